//! `memdev run`: a command in a private root.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use memdev::attach::Source;
use memdev::base::Image;
use memdev::net::Uri;
use memdev::root::{self, Bind, Network};
use memdev::{Error, ErrorKind};

use super::attach::BackendArg;
use super::carry::CarryArgs;
use super::command::{CommandArgs, finish, notice};
use super::image::ImageArg;
use super::limits::LimitArgs;
use super::{Failure, size};

/// Run a command whose root directory is a private copy of an image
#[derive(Args, Debug)]
#[command(
    long_about = "Run a command, by default a shell, whose root directory is a private copy of an image. Its processes, \
        mounts, terminals and temporary files are its own; it is root there, and nobody outside. What it changes is kept in \
        memory, and gone when it ends, with every process that it has left.\n\n\
        Who is not root gets the same of an ext4 image, by fuse2fs and in subordinate ids (Debian's packages fuse2fs and uidmap; \
        /dev/fuse must be open to everybody, as udev makes it); what such a session cannot do is said when it starts.\n\n\
        The files of a directory survive with --carry.\n\n\
        The exit status is the command's: 128+N if signal N ended it, 127 if there is no such program, 126 if it cannot be \
        executed, 1 if it does not come to that; 74 where it would be 0 but what is carried has not all been delivered.",
    after_help = "Examples:\n  \
        memdev run debian.img                            a shell\n  \
        memdev run debian.img -- apt-get remove -y perl  the image never knows\n  \
        memdev run --user joe --workdir /src --bind \"$PWD:/src\" debian.img -- make\n  \
        memdev run --session 'nbd+unix:///debian@joe?socket=/run/nbd.sock'\n                                                   \
        a server's session, to go on\n  \
        memdev run --dry-run debian.img                  what would be done, in steps"
)]
pub(crate) struct Run {
    /// The image file (raw: ext4 or XFS), or the NBD URI of a session (NAME@ID) of a running server
    #[arg(value_name = "IMAGE|EXPORT-URI", required_unless_present = "session")]
    image: Option<OsString>,

    /// The session NAME@ID of a running server, by its NBD URI: what is changed is there afterwards
    #[arg(long, value_name = "URI", conflicts_with = "image")]
    session: Option<String>,

    /// The partition of the image, by its number, if it is of a whole disk (GPT or MBR)
    #[arg(short, long, value_name = "N")]
    partition: Option<u32>,

    #[command(flatten)]
    command: CommandArgs,

    /// The host name [default: the session's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// Let the command see a directory or file of the host as well; :ro only to be read
    #[arg(long, value_name = "SRC:DST[:ro]", value_parser = clap::builder::OsStringValueParser::new())]
    bind: Vec<OsString>,

    #[command(flatten)]
    carry: CarryArgs,

    /// The network: the host's, or none
    #[arg(long, value_enum, default_value_t = NetworkArg::Host)]
    net: NetworkArg,

    /// Memory for what is written to the copy [default: half of the machine's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    #[command(flatten)]
    limits: LimitArgs,

    /// Be the host's root, with those of its capabilities that can neither reach the host nor make devices
    #[arg(long)]
    privileged: bool,

    /// What the session is called, as for 'memdev enter' [default: the image's name and some digits]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Do not tell what an ordinary user cannot do there
    #[arg(short, long)]
    quiet: bool,

    /// Print what would be done, step by step, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// What the kernel uses for the device, as for 'memdev attach'
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,

    /// Append the log of the device's daemon to this file [default: no log]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum NetworkArg {
    /// None but a loopback interface of its own
    None,
    /// The host's
    Host,
}

pub(crate) fn run(args: Run) -> Result<ExitCode, Failure> {
    let dry_run = args.dry_run;
    let run = configure(args)?;
    if dry_run {
        super::print(&run.plan().to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let source = run.source.clone();
    // What is on a disk is refused by these kinds of error.
    let may_be_content = |error: &Error| matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Invalid);
    let explained = |error: Error| not_raw(&source).filter(|_| may_be_content(&error)).unwrap_or(error);
    finish(&run.run().map_err(explained)?)
}

/// That the image is no raw disk, if that is what it is.
fn not_raw(source: &Source) -> Option<Error> {
    let Source::Image { path, .. } = source else { return None };
    let found = Image::open(path).ok()?.contents().ok()?;
    // A file system may have anything before it.
    if found.iter().any(|content| matches!(content.kind, "ext2" | "ext3" | "ext4" | "xfs" | "gpt" | "dos")) {
        return None;
    }
    let (what, advice) = found.iter().find_map(|content| Some((content.what, content.advice?)))?;
    let why = format!("Cannot make a root of {}, which is no raw disk ({what})", path.display());
    Some(Error::new(ErrorKind::Unsupported, why).advise(advice))
}

fn configure(args: Run) -> Result<root::Run, Failure> {
    let source = source(args.session, args.image.unwrap_or_default())?;
    let mut run = root::Run::new(source);
    run.partition = args.partition;
    run.env = args.command.env();
    (run.attachments, run.sessions) = args.command.directories();
    run.carrying = args.carry.options(args.command.state.as_deref())?;
    run.command = args.command.command;
    run.login = args.command.login;
    run.workdir = args.command.workdir;
    run.user = args.command.user;
    run.hostname = args.hostname;
    run.binds =
        args.bind.iter().map(|text| Bind::parse(text)).collect::<Result<_, _>>().map_err(Failure::Usage)?;
    run.network = match args.net {
        NetworkArg::Host => Network::Host,
        NetworkArg::None => Network::None,
    };
    run.memory = args.memory;
    run.limits = args.limits.into();
    run.privileged = args.privileged;
    if !args.quiet {
        run.notice = notice;
    }
    run.warn = notice;
    run.name = args.name;
    run.backend = args.backend.into();
    run.log = args.log;
    Ok(run)
}

/// What is to be the root.
fn source(session: Option<String>, image: OsString) -> Result<Source, Failure> {
    if let Some(uri) = session {
        if !Uri::looks_like(&uri) {
            let why = format!("'{uri}' is no URI; write nbd+unix:///NAME@ID?socket=PATH");
            return Err(Failure::Usage(why));
        }
        return Ok(Source::Export(uri.parse::<Uri>()?));
    }
    if let Some(uri) = image.to_str().filter(|text| Uri::looks_like(text)) {
        return Ok(Source::Export(uri.parse::<Uri>()?));
    }
    let image = ImageArg::parse(image).map_err(Failure::Usage)?;
    Ok(Source::Image { name: image.name, path: image.path })
}
