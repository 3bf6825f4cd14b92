//! `memdev save SESSION|URI FILE`: what a session holds, as an image.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use memdev::base::Image;
use memdev::control::Client;
use memdev::control::model::{Fork, SessionDetail};
use memdev::net::{Address, Uri};
use memdev::save::{self, Format, Remote, Source};
use memdev::sys::process::is_ignored;
use memdev::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

use super::Failure;
use super::control::ControlArgs;

/// Save what a session holds as an image file
#[derive(Args, Debug)]
#[command(
    long_about = "Save what a session holds as an image file. A live session, called as 'memdev ps' calls it, goes on \
        meanwhile: what it holds at one moment is saved, by way of a fork that is ended afterwards. A session called by its \
        URI is read over NBD and must be at rest: nobody else may write to it. The file appears when it is complete and on \
        the disk, in place of one that had its name; a save that is interrupted leaves nothing.\n\n\
        What a kernel has in its cache is not in the session yet: freeze a mounted file system first (fsfreeze), or save \
        what a power failure would leave.",
    after_help = "Examples:\n  \
        memdev save root@x x.qcow2 --base root.img         what a live session has written so far\n  \
        memdev save root@x x.img --format raw              all of it, sparse\n  \
        memdev save nbd://localhost/root@x x.qcow2         of a session at rest, from anywhere"
)]
pub(crate) struct Save {
    /// The session, as 'memdev ps' calls it, or its NBD URI
    #[arg(value_name = "SESSION|URI")]
    session: String,

    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Save what was written only, over this image, the one that is served, as backing file
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,

    /// What kind of file
    #[arg(long, value_enum, default_value_t = Kind::Qcow2)]
    format: Kind,

    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// For QEMU, and everything that reads its images
    Qcow2,
    /// Byte by byte; what is zero is a hole
    Raw,
}

pub(crate) fn run(args: Save) -> Result<(), Failure> {
    if args.session.contains("://") {
        let uri = args.session.parse().map_err(|error| Failure::Usage(format!("{error}")))?;
        return Ok(from(&uri, &args, &mut || Ok(()))?);
    }
    let client = args.control.connect()?;
    // Whoever interrupts it must not leave the fork behind.
    let interruption = Interruption::watch()?;
    let saved = Moment::of(client, &args.session)
        .and_then(|moment| from(&moment.uri()?, &args, &mut || interruption.check()));
    interruption.pass_on();
    Ok(saved?)
}

fn from(uri: &Uri, args: &Save, check: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let mut source = Remote::open(uri)?;
    let format = match (args.format, &args.base) {
        (Kind::Raw, None) => Format::Raw,
        (Kind::Qcow2, None) => Format::Qcow2,
        (Kind::Qcow2, Some(base)) => {
            check_base(base, &source)?;
            Format::Qcow2Over(base.clone())
        }
        (Kind::Raw, Some(_)) => {
            let error = Error::new(ErrorKind::Invalid, "A raw image has no base");
            return Err(error.advise("leave out --base, or save as qcow2"));
        }
    };
    let mut bar = Bar::new();
    let saved = save::save(&mut source, &args.file, &format, &mut |done, all| {
        bar.show(done, all);
        check()
    });
    bar.clear();
    saved
}

/// One moment of a live session: a fork, until this is dropped.
struct Moment {
    client: Client,
    fork: SessionDetail,
}

impl Moment {
    fn of(mut client: Client, session: &str) -> Result<Self> {
        // The one who saves need not be the session's owner: who may control the server may read everything of it.
        let fork = client.fork(session, &Fork { id: None, unclaimed: true })?;
        Ok(Self { client, fork })
    }

    /// The way to it, on this machine if there is one.
    fn uri(&self) -> Result<Uri> {
        let uris = self.fork.session.uris.iter().map(|uri| uri.parse::<Uri>());
        let mut uris = uris.collect::<Result<Vec<_>>>()?;
        uris.sort_by_key(|uri| !matches!(uri.address, Address::Unix(_)));
        uris.into_iter().next().ok_or_else(|| {
            let error = Error::new(ErrorKind::Unsupported, "The server listens nowhere: no way to");
            error.on(&self.fork.session.name).advise("start it with --unix or --tcp")
        })
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // It fails where the server has gone, and the fork with it.
        let _ = self.client.end(&self.fork.session.name);
    }
}

/// A signal that ends the command, in good order: the second one at once.
struct Interruption(Arc<AtomicUsize>);

impl Interruption {
    fn watch() -> Result<Self> {
        let failed = |error| Error::io("Cannot watch for signals", error);
        let (which, came) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if is_ignored(signal) {
                continue;
            }
            flag::register_conditional_default(signal, Arc::clone(&came)).map_err(failed)?;
            flag::register(signal, Arc::clone(&came)).map_err(failed)?;
            let number = usize::try_from(signal).unwrap_or(0);
            flag::register_usize(signal, Arc::clone(&which), number).map_err(failed)?;
        }
        Ok(Self(which))
    }

    fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Shutdown, "Interrupted")),
        }
    }

    /// Ends the process by the signal that came, if one did, so that its parent sees the truth.
    fn pass_on(&self) {
        if let Ok(signal @ 1..) = i32::try_from(self.0.load(Ordering::Relaxed)) {
            // It does not come back; if it did, the error would be said.
            let _ = low_level::emulate_default_handler(signal);
        }
    }
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
