//! `memdev save SESSION|URI FILE`: what a session holds, as an image.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use memdev::base::Image;
use memdev::control::model::Fork;
use memdev::net::Uri;
use memdev::save::{self, Format, Remote, Source};
use memdev::{Error, ErrorKind, Result};

use super::Failure;
use super::control::ControlArgs;
use super::held::HeldSession;
use super::interruption::Interruption;
use super::progress::Bar;

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
        memdev save root@x x.qcow2 --base root.img    what a live session has written\n  \
        memdev save root@x x.img --format raw         all of it, sparse\n  \
        memdev save nbd://localhost/root@x x.qcow2    of a session at rest"
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
    let interruption = Interruption::watch()?;
    // The one who saves need not be the session's owner: who may control the server may read everything of it.
    let fork = Fork { id: None, unclaimed: true, held: true };
    let saved = HeldSession::new(client, |client| client.fork(&args.session, &fork)).and_then(|moment| {
        if let Some(base) = &args.base {
            moment.check_base(base, &args.session)?;
        }
        from(&moment.uri()?, &args, &mut || interruption.check())
    });
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

/// What an NBD client can see of it: whether it could be the base.
fn check_base(base: &Path, source: &impl Source) -> Result<()> {
    let size = Image::open(base)?.size();
    if size == source.size() {
        return Ok(());
    }
    let message = format!("The session has {} bytes, and its base cannot have {size}:", source.size());
    Err(Error::new(ErrorKind::Invalid, message).on(base.display()).advise("give the image that is served"))
}
