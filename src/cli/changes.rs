//! `memdev changes SESSION|URI|FILE`: what a session has made, changed and removed, as files.

mod archive;
mod report;
mod source;

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use memdev::attach::DIRECTORY;
use memdev::changes::{Changes, Node, Pair, compare, diff};
use memdev::{Error, ErrorKind, root};

use super::Failure;
use super::control::ControlArgs;
use super::interruption::Interruption;
use report::Report;
use source::Sources;

/// Show which files a session has made, changed and removed
#[derive(Args, Debug)]
#[command(
    long_about = "Show which files a session has made, changed and removed, against the image that it is on. A live session, \
        called as 'memdev ps' calls it, goes on meanwhile: it is looked at as it is at one moment, by way of a fork that is \
        ended afterwards. A session called by its URI is read over NBD and must be at rest. A FILE is \
        what 'memdev save' has made of one, qcow2 or raw.\n\n\
        Nothing is mounted, and no rights are needed but those to read: ext2, ext3 and ext4 are understood, and only what \
        was written to is looked at. Of a private root, called as 'memdev enter' calls it, that 'memdev run --session' has \
        started, the kernel writes back first what it has in its cache. What another kernel has in its cache is not in the session yet: freeze a mounted file system \
        first (fsfreeze), or see what a power failure would leave.\n\n\
        Lines begin with A (new), M (changed, and in what) or D (deleted). A renamed file is one that is deleted and one \
        that is new. That something was read, or that only a time was set, is not told.",
    after_help = "Examples:\n  \
        memdev changes root@build-17              what a live session has done so far\n  \
        memdev changes nbd://localhost/root@x     of a session at rest, from anywhere\n  \
        memdev changes x.qcow2 --base root.img    of a session that was saved\n  \
        memdev changes root@x --diff /etc | less  what has changed within the files\n  \
        memdev changes root@x --tar layer.tar     the files as a layer of an OCI image\n  \
        memdev changes root@x --json |\n      \
            jq -r '.[] | select(.change == \"added\") | .path'\n\n\
        With --exit-code the status is that of diff: 0 nothing has changed, 1 something has, 2 it failed."
)]
pub(crate) struct ChangesArgs {
    /// The session, as 'memdev ps' calls it, the private root that is on it, its NBD URI, or the file that it was saved as
    #[arg(value_name = "SESSION|URI|FILE")]
    what: String,

    /// The image that the session is on, if it is not served as that any more, or if FILE was saved without it
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,

    /// Look at this partition, by its number, of a whole disk
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partition: Option<u32>,

    /// Have the kernel look: attach both, mount them read-only where nobody sees that, and walk through. For file systems other
    /// than ext4; needs root
    #[arg(long)]
    mount: bool,

    /// Tell also of what differs in its modification time alone
    #[arg(long)]
    times: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Print how the text file at this path, or every one below it, differs, as patch takes it
    #[arg(long, value_name = "PATH", conflicts_with = "json")]
    diff: Option<OsString>,

    /// Write what has changed as a layer of an OCI image, a tar archive, to this file; - is standard output
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "diff"])]
    tar: Option<PathBuf>,

    /// Let the exit status tell whether anything has changed
    #[arg(long)]
    exit_code: bool,

    #[command(flatten)]
    control: ControlArgs,

    /// Where attachments and private roots are written down
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

impl ChangesArgs {
    /// Where what is usually in `path` is written down.
    fn directory(&self, path: &str, name: &str) -> PathBuf {
        self.state.as_ref().map_or_else(|| root::directory(path), |state| state.join(name))
    }
}

pub(crate) fn run(args: &ChangesArgs) -> Result<ExitCode, Failure> {
    match look(args) {
        Ok(changed) => Ok(ExitCode::from(u8::from(args.exit_code && changed))),
        Err(Failure::Failed(error)) if args.exit_code => Err(Failure::NotRun(error, 2)),
        Err(failure) => Err(failure),
    }
}

/// Whether anything has changed.
fn look(args: &ChangesArgs) -> Result<bool, Failure> {
    // Whoever interrupts it must not leave anything behind that was made to look at.
    let interruption = Interruption::watch()?;
    let looked = Sources::find(args).and_then(|sources| {
        interruption.check()?;
        Ok(if args.mount {
            let mut pair = sources.mounted(args.partition, &args.directory(DIRECTORY, "attach"))?;
            tell_of(args, &mut pair, &interruption)?
        } else {
            tell_of(args, &mut sources.ext4(args.partition)?, &interruption)?
        })
    });
    interruption.pass_on();
    looked
}

fn tell_of<P: Pair>(args: &ChangesArgs, pair: &mut P, interruption: &Interruption) -> Result<bool, Error> {
    interruption.check()?;
    let changes = compare(pair)?;
    interruption.check()?;
    tell(args, pair, &changes)
}

fn tell<P: Pair>(args: &ChangesArgs, pair: &mut P, changes: &Changes<Node<P>>) -> Result<bool, Error> {
    let list: Vec<_> = changes.list.iter().filter(|change| args.times || !change.is_noise()).collect();
    let report = Report { times: args.times };
    let mut lost = 0;
    if let Some(file) = &args.tar {
        lost = archive::write(pair, changes, file)?;
    } else if let Some(path) = &args.diff {
        differences(pair, changes, path)?;
    } else if args.json {
        report.json(pair, &list)?;
    } else {
        report.lines(pair, &list)?;
    }
    if changes.too_deep > 0 {
        let message = format!(
            "{} names were left out whose paths have more than {} bytes",
            changes.too_deep,
            memdev::changes::LONGEST_PATH
        );
        return Err(Error::new(ErrorKind::Unsupported, message).advise("no program can name them by a path"));
    }
    if lost > 0 {
        let message = format!("The layer is not all that has changed: {lost} things are missing");
        return Err(Error::new(ErrorKind::Unsupported, message).advise("they are named above"));
    }
    Ok(!list.is_empty())
}

fn differences<P: Pair>(pair: &mut P, changes: &Changes<Node<P>>, path: &OsStr) -> Result<(), Error> {
    // As a shell completes it, or as it was told.
    let mut path = path.as_bytes();
    while let Some(rest) = path.strip_prefix(b"/") {
        path = rest;
    }
    while let Some(rest) = path.strip_suffix(b"/") {
        path = rest;
    }
    let stdout = io::stdout().lock();
    let is_terminal = stdout.is_terminal();
    let mut out = Shown { out: BufWriter::new(stdout), is_terminal, broke: false };
    let written = diff::write(pair, changes, path, &mut out);
    let flushed = out.flush();
    match (written, flushed) {
        // A reader that has seen enough is no failure.
        (_, Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        (Err(_), _) if out.broke => Ok(()),
        (written, flushed) => {
            written.and(flushed.map_err(|error| Error::io("Cannot write to standard output", error)))
        }
    }
}

/// Standard output. What is in files must not do anything to a terminal.
struct Shown<W> {
    out: W,
    is_terminal: bool,
    broke: bool,
}

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let odd = |byte: u8| byte.is_ascii_control() && !matches!(byte, b'\n' | b'\t');
        let written = if self.is_terminal {
            let plain: Vec<_> = bytes.iter().map(|&byte| if odd(byte) { b'?' } else { byte }).collect();
            self.out.write_all(&plain)
        } else {
            self.out.write_all(bytes)
        };
        self.broke |= written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        written.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
