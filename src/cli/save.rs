//! `memdev save URI FILE`: what a session holds, as an image.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use memdev::base::Image;
use memdev::net::Uri;
use memdev::save::{self, Format, Remote, Source};
use memdev::{Error, ErrorKind, Result};

/// Save what a session holds as an image file
#[derive(Args, Debug)]
#[command(
    long_about = "Save what a session holds as an image file, by reading it over NBD. The session must be at rest \
        meanwhile: nobody else may write to it. The file appears when it is complete and on the disk, in place of one that \
        had its name; a save that is interrupted leaves nothing.",
    after_help = "Examples:\n  \
        memdev save 'nbd+unix:///root@x?socket=/run/memdev.sock' x.qcow2 --base root.img    what was written\n  \
        memdev save nbd://localhost/root@x x.qcow2                                          all of it\n  \
        memdev save nbd://localhost/root@x x.img --format raw                               all of it, sparse"
)]
pub(crate) struct Save {
    /// The NBD URI of the session
    #[arg(value_name = "URI")]
    uri: Uri,

    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Save what was written only, over this image, the one that is served, as backing file
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,

    /// What kind of file
    #[arg(long, value_enum, default_value_t = Kind::Qcow2)]
    format: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// For QEMU, and everything that reads its images
    Qcow2,
    /// Byte by byte; what is zero is a hole
    Raw,
}

pub(crate) fn run(args: Save) -> Result<()> {
    let mut source = Remote::open(&args.uri)?;
    let format = match (args.format, args.base) {
        (Kind::Raw, None) => Format::Raw,
        (Kind::Qcow2, None) => Format::Qcow2,
        (Kind::Qcow2, Some(base)) => {
            check_base(&base, &source)?;
            Format::Qcow2Over(base)
        }
        (Kind::Raw, Some(_)) => {
            let error = Error::new(ErrorKind::Invalid, "A raw image has no base");
            return Err(error.advise("leave out --base, or save as qcow2"));
        }
    };
    let mut bar = Bar::new();
    let saved = save::save(&mut source, &args.file, &format, &mut |done, all| bar.show(done, all));
    bar.clear();
    saved
}

/// What a client can see of it: whether it could be the base.
fn check_base(base: &Path, source: &impl Source) -> Result<()> {
    let size = Image::open(base)?.size();
    if size == source.size() {
        return Ok(());
    }
    let message = format!("The session has {} bytes, and its base cannot have {size}:", source.size());
    Err(Error::new(ErrorKind::Invalid, message).on(base.display()).advise("give the image that is served"))
}

/// How far it has got, where somebody looks.
struct Bar {
    shown: Option<Instant>,
    wanted: bool,
}

impl Bar {
    const WIDTH: u64 = 40;
    const EVERY: Duration = Duration::from_millis(100);

    fn new() -> Self {
        Self { shown: None, wanted: io::stderr().is_terminal() }
    }

    fn show(&mut self, done: u64, all: u64) {
        if !self.wanted || self.shown.is_some_and(|shown| shown.elapsed() < Self::EVERY) {
            return;
        }
        self.shown = Some(Instant::now());
        let (full, percent) = (done * Self::WIDTH / all.max(1), done * 100 / all.max(1));
        let bar: String = (0..Self::WIDTH).map(|at| if at < full { '#' } else { '.' }).collect();
        // Who closes stderr does not want to see it.
        let _ = write!(io::stderr(), "\r[{bar}] {percent:3} %  {} MiB", done >> 20);
    }

    fn clear(&self) {
        if self.shown.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
