//! `memdev run`: a command in a private root.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use memdev::attach::{self, Source};
use memdev::net::Uri;
use memdev::root::{self, Bind, Network};

use super::Failure;
use super::attach::BackendArg;
use super::image::ImageArg;
use super::size;

/// Run a command whose root directory is a private copy of an image
#[derive(Args, Debug)]
#[command(
    long_about = "Run a command, by default a shell, whose root directory is a private copy of an image. Its processes, \
        mounts, terminals and temporary files are its own; it is root there, and nobody outside. What it changes is kept in \
        memory, and gone when it ends, with every process that it has left. Needs root.\n\n\
        The exit status is the command's: 128+N if signal N ended it, 127 if there is no such program, 126 if it cannot be \
        executed.",
    after_help = "Examples:\n  \
        memdev run debian.img                            a shell\n  \
        memdev run debian.img -- apt-get remove -y perl  try something out; the image never knows\n  \
        memdev run --user joe --workdir /src --bind \"$PWD:/src\" debian.img -- make\n  \
        memdev run --session 'nbd+unix:///debian@joe?socket=/run/nbd.sock'\n                                                         \
        a session of a server, to go on with\n  \
        memdev run --dry-run debian.img                  what would be done, step by step"
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

    /// The command and its arguments [default: the user's shell]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,

    /// Set an environment variable; without a value, take it over from here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<OsString>,

    /// The directory that the command begins in [default: /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,

    /// The user, and perhaps the group, of the image: names or numbers [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// The host name [default: the session's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// Let the command see a directory or file of the host as well; :ro only to be read
    #[arg(long, value_name = "SRC:DST[:ro]", value_parser = clap::builder::OsStringValueParser::new())]
    bind: Vec<OsString>,

    /// The network: the host's, or none
    #[arg(long, value_enum, default_value_t = NetworkArg::Host)]
    net: NetworkArg,

    /// Memory for what is written to the copy [default: half of the machine's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Be the host's root, with those of its capabilities that can neither reach the host nor make devices
    #[arg(long)]
    privileged: bool,

    /// What the session is called, as for 'memdev enter' [default: the image's name and some digits]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Start the shell as one that was just logged in to
    #[arg(long)]
    login: bool,

    /// Print what would be done, step by step, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// What the kernel uses for the device, as for 'memdev attach'
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,

    /// Append the log of the device's daemon to this file [default: no log]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Where sessions and attachments are written down [default: /run]
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
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
    finish(&run.run()?)
}

/// The command's exit status as this process's; that it could not be executed is said.
pub(crate) fn finish(ended: &root::Ended) -> Result<ExitCode, Failure> {
    if let Some(trouble) = ended.trouble() {
        let _ = writeln!(std::io::stderr(), "memdev: {}", trouble.replace(char::is_control, " "));
    }
    Ok(ExitCode::from(ended.status()))
}

fn configure(args: Run) -> Result<root::Run, Failure> {
    let source = source(args.session, args.image.unwrap_or_default())?;
    let mut run = root::Run::new(source);
    run.partition = args.partition;
    run.command = args.command;
    run.login = args.login;
    run.env = args.env.iter().filter_map(|text| variable(text)).collect();
    run.workdir = args.workdir;
    run.user = args.user;
    run.hostname = args.hostname;
    run.binds = args.bind.iter().map(|text| bind(text)).collect::<Result<_, _>>().map_err(Failure::Usage)?;
    run.network = match args.net {
        NetworkArg::Host => Network::Host,
        NetworkArg::None => Network::None,
    };
    run.memory = args.memory;
    run.privileged = args.privileged;
    run.name = args.name;
    run.backend = args.backend.into();
    run.log = args.log;
    (run.attachments, run.sessions) = directories(args.state.as_deref());
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

/// Where attachments and sessions are written down.
pub(crate) fn directories(state: Option<&Path>) -> (PathBuf, PathBuf) {
    match state {
        Some(state) => (state.join("attach"), state.join("root")),
        None => (attach::DIRECTORY.into(), root::DIRECTORY.into()),
    }
}

/// `KEY=VALUE`, or `KEY`, whose value is this process's, if it has one.
pub(crate) fn variable(text: &OsStr) -> Option<(OsString, OsString)> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
            Some((owned(&bytes[..at]), owned(&bytes[at + 1..])))
        }
        None => std::env::var_os(text).map(|value| (text.to_owned(), value)),
    }
}

fn bind(text: &OsStr) -> Result<Bind, String> {
    let wrong = || format!("'{}' does not parse; write SRC:DST or SRC:DST:ro", text.display());
    let fields: Vec<_> = text.as_bytes().split(|&byte| byte == b':').collect();
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let (source, target, read_only) = match fields[..] {
        [source, target] => (source, target, false),
        [source, target, b"ro"] => (source, target, true),
        [source, target, b"rw"] => (source, target, false),
        _ => return Err(wrong()),
    };
    if source.is_empty() || !target.starts_with(b"/") {
        return Err(wrong() + ", DST from the private root's /");
    }
    let source = std::path::absolute(path(source)).map_err(|_| wrong())?;
    Ok(Bind { source, target: path(target), read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_those_of_container_tools() {
        let parse = |text: &str| bind(OsStr::new(text));
        let expected = |read_only| Ok(Bind { source: "/a".into(), target: "/b/c".into(), read_only });
        assert_eq!(parse("/a:/b/c"), expected(false));
        assert_eq!(parse("/a:/b/c:rw"), expected(false));
        assert_eq!(parse("/a:/b/c:ro"), expected(true));
        assert!(parse("x:/b").is_ok_and(|bind| bind.source.is_absolute()));
        for bad in ["", "/a", "/a:", ":/b", "/a:b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables_are_given_or_taken_over() {
        let get = |text: &str| variable(OsStr::new(text));
        assert_eq!(get("A=b=c"), Some(("A".into(), "b=c".into())));
        assert_eq!(get("A="), Some(("A".into(), "".into())));
        assert_eq!(get("PATH"), std::env::var_os("PATH").map(|path| ("PATH".into(), path)));
        assert_eq!(get("NO_SUCH_VARIABLE"), None);
    }
}
