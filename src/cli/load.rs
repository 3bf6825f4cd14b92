//! `memdev load NAME FILE`: a session that begins as a saved image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use memdev::control::model::{NewSession, SessionDetail};
use memdev::load::{self, Backing, Format, Saved};
use memdev::{Error, ErrorKind, Result};

use super::control::{ControlArgs, json};
use super::held::HeldSession;
use super::interruption::Interruption;
use super::progress::Bar;
use super::{Failure, size};

/// Make a session that begins as a saved image, and print the URI to connect to
#[derive(Args, Debug)]
#[command(
    long_about = "Make a session that begins as a saved image, and print the URI to connect to.\n\n\
        FILE is what 'memdev save' has made, or QEMU: a qcow2 with the image that is served as its backing file, or one \
        without any, or a raw image; of the size that sessions on the image have. Of one without a backing file only what \
        differs from the image takes memory. The session is there, under its id, when everything is in it; a load that fails \
        or is interrupted, even by SIGKILL, leaves none.",
    after_help = "Examples:\n  \
        memdev load root x.qcow2              what 'save --base root.img' has saved\n  \
        memdev load root x.img --id build-17  a raw image\n\n\
        Like one that 'memdev new' makes, the session belongs to whoever connects to it first, and stays until it was used \
        and left again for the server's --linger time, or ended."
)]
pub(crate) struct Load {
    /// The image's export name, as in 'memdev serve NAME=IMAGE'
    #[arg(value_name = "NAME")]
    image: String,

    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// What kind of file [default: as it looks]
    #[arg(long, value_enum)]
    format: Option<Kind>,

    /// Take the image that is served for the file's backing file, whatever that is called: for one that was moved
    #[arg(long)]
    trust_base: bool,

    /// The session's id, 1 to 64 letters, digits, dots, underscores or hyphens [default: 128 random bits]
    #[arg(long, value_name = "ID", value_parser = super::new::id)]
    id: Option<String>,

    /// Memory for what it holds [default: as for every session]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Keep what it holds encrypted in memory, as 'memdev new --seal' does
    #[arg(long)]
    seal: bool,

    /// Print all about the session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// As 'memdev save' and QEMU make it
    Qcow2,
    /// Byte by byte
    Raw,
}

pub(crate) fn run(args: Load) -> Result<(), Failure> {
    let format = args.format.map(|kind| match kind {
        Kind::Qcow2 => Format::Qcow2,
        Kind::Raw => Format::Raw,
    });
    super::new::check_image(&args.image)?;
    let saved = Saved::open(&args.file, format)?;
    let interruption = Interruption::watch()?;
    let made = make(saved, &args, &mut || interruption.check());
    interruption.pass_on();
    let made = made?;
    let text = if args.json { json(&made)? } else { super::new::uri(&made) };
    Ok(super::print(&text)?)
}

fn make(
    mut saved: Saved,
    args: &Load,
    check: &mut dyn FnMut() -> Result<()>,
) -> Result<SessionDetail, Failure> {
    let mut client = args.control.connect()?;
    if let Some(id) = &args.id
        && let Ok(there) = client.session(&format!("{}@{id}", args.image))
    {
        let error = Error::new(ErrorKind::InUse, "There is such a session already:").on(there.session.name);
        return Err(error.advise("choose another id").into());
    }
    let wanted = NewSession {
        image: Some(args.image.clone()),
        id: None,
        memory: args.memory,
        held: true,
        sealed: args.seal,
    };
    let held = HeldSession::new(client, |client| client.create(&wanted))?;
    check_base(&saved, args, &held)?;
    let mut bar = Bar::new();
    let loaded = load::load(&mut saved, &held.uri()?, &mut |done, all| {
        bar.show(done, all);
        check()
    });
    bar.clear();
    loaded.map_err(|error| match error.kind() {
        ErrorKind::OutOfSpace => {
            let why = "No memory for what is in";
            Error::new(ErrorKind::OutOfSpace, why).on_path(&args.file).advise("give more: --memory SIZE")
        }
        _ => error,
    })?;
    Ok(held.keep(args.id.clone())?)
}

/// Whether a session on this base can begin as what is saved.
fn check_base(saved: &Saved, args: &Load, held: &HeldSession) -> Result<()> {
    let session = &held.session().session;
    // What the file says may hold anything, and is read at a terminal.
    let invalid = |message: String| Error::new(ErrorKind::Invalid, message.replace(char::is_control, "?"));
    if !saved.fits(session.size) {
        let message = format!("A session on {} has {} bytes, and", session.image, session.size);
        let error = invalid(message).on(format!("{} has {}", args.file.display(), saved.size()));
        return Err(error.advise("load it on the image that it was made from"));
    }
    let Some(Backing { name, format }) = saved.backing().filter(|_| !args.trust_base) else { return Ok(()) };
    if let Some(format) = format.as_ref().filter(|format| *format != "raw") {
        let message = format!("The backing file of {} is {format}, and", args.file.display());
        let error = invalid(message).on(format!("{} is served as a raw image", session.base.path));
        return Err(error.advise("say --trust-base if it has the same content"));
    }
    // Looked at, as to which file it is, and not opened.
    let path = backing_path(&args.file, name);
    held.check_base(&path, &format!("The image {}", session.image)).map_err(|error| {
        let message = format!("The backing file of {} is not what is served: {error}", args.file.display());
        invalid(message).advise("say --trust-base if it has the same content")
    })
}

/// Where a backing file lies, as QEMU looks for it.
fn backing_path(file: &Path, name: &OsStr) -> PathBuf {
    let name = name.as_bytes();
    let name = OsStr::from_bytes(name.strip_prefix(b"file:").unwrap_or(name));
    file.parent().unwrap_or(Path::new("")).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_begins_where_the_file_lies() {
        let of = |file: &str, name: &str| backing_path(Path::new(file), OsStr::new(name));
        assert_eq!(of("x.qcow2", "root.img"), Path::new("root.img"));
        assert_eq!(of("/a/x.qcow2", "../root.img"), Path::new("/a/../root.img"));
        assert_eq!(of("/a/x.qcow2", "/b/root.img"), Path::new("/b/root.img"));
        assert_eq!(of("/a/x.qcow2", "file:root.img"), Path::new("/a/root.img"));
    }
}
