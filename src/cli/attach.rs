//! `memdev attach`: a block device of this machine for an image or an export.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use memdev::Error;
use memdev::attach::{self, Backend, DIRECTORY, Listed, MAX_CONNECTIONS, Options, Source, THIS_PROGRAM};
use memdev::net::Uri;
use serde_json::{Value, json};

use super::Failure;
use super::command::notice;
use super::image::ImageArg;
use super::size::{self, human};

/// Make a block device of an image's private copy, or of an export
#[derive(Args, Debug)]
#[command(
    long_about = "Make a block device of this machine, as /dev/loop3, of a private copy of an image, or of an export of a \
        running server; print its path, and return when it can be used. It stays until 'memdev detach'. Needs root.\n\n\
        A copy of an image is one for this device alone: what is written to it is kept in memory by the device's daemon, \
        and is gone when it is detached. A session NAME@ID of a running server can be detached and attached again.",
    after_help = "Examples:\n  \
        disk=$(memdev attach root.img)             a private copy of an image ...\n  \
        mount \"$disk\" /mnt                         ... as a file system\n  \
        umount /mnt && memdev detach \"$disk\"       and gone\n  \
        memdev attach nbd://localhost/root@alice   a named session of a running server\n  \
        memdev attach --list                       what is attached, and who uses it"
)]
pub(crate) struct Attach {
    /// The image file, or the NBD URI of an export or of a session of it (NAME@ID)
    #[arg(value_name = "IMAGE|EXPORT-URI", required_unless_present = "list")]
    what: Option<OsString>,

    /// The device to use [default: one that is free]
    #[arg(long, value_name = "DEVICE", conflicts_with = "list")]
    device: Option<PathBuf>,

    /// Connections to the server, or threads of an image's daemon; of a server more than one only of a named session
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "list",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CONNECTIONS)))]
    connections: u32,

    /// Memory for what is written to the device of an image [default: half of the machine's]
    ///
    /// A write beyond it fails; discarding gives memory back. Of an export its server has the say.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "list")]
    memory: Option<u64>,

    /// Refuse writes to the device
    #[arg(long, conflicts_with = "list")]
    read_only: bool,

    /// What the kernel uses: its own NBD client, or FUSE and a loop device
    #[arg(long, value_enum, default_value_t = BackendArg::Auto, conflicts_with = "list")]
    backend: BackendArg,

    /// Append the log of the device's daemon to this file [default: no log]
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    log: Option<PathBuf>,

    /// Show what is attached, and who uses it
    #[arg(long, conflicts_with = "what")]
    list: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Where attachments are written down
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, hide = true)]
    state: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// nbd where the kernel has it, else fuse
    Auto,
    /// The kernel's own NBD client, as /dev/nbd0
    Nbd,
    /// One file by FUSE, and a loop device on it, as /dev/loop0
    Fuse,
}

impl From<BackendArg> for Backend {
    fn from(backend: BackendArg) -> Self {
        match backend {
            BackendArg::Auto => Self::Auto,
            BackendArg::Nbd => Self::Nbd,
            BackendArg::Fuse => Self::Fuse,
        }
    }
}

pub(crate) fn run(args: Attach) -> Result<(), Failure> {
    let Some(what) = args.what else { return Ok(show_list(&args.state, args.json)?) };
    let source = match what.to_str().filter(|text| Uri::looks_like(text)) {
        Some(uri) => Source::Export(uri.parse::<Uri>()?),
        None => {
            let image = ImageArg::parse(what).map_err(Failure::Usage)?;
            Source::Image { name: image.name, path: image.path }
        }
    };
    let options = Options {
        source,
        device: args.device,
        connections: args.connections,
        memory: args.memory,
        read_only: args.read_only,
        backend: args.backend.into(),
        state: args.state,
        log: args.log,
        program: THIS_PROGRAM.into(),
        die_with_parent: false,
        while_used: false,
        root: None,
        warn: notice,
    };
    let attached = attach::attach(&options)?;
    let text = if args.json {
        format!("{:#}\n", attached.record().to_json())
    } else {
        format!("{}\n", attached.device().path().display())
    };
    // Said before it is kept: a device whose name nobody got to know is nobody's to detach. So nobody's having listened
    // is a failure, too.
    let mut stdout = io::stdout().lock();
    let said = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    said.map_err(|error| Error::io("Cannot write the device's name to standard output", error))?;
    attached.keep()?;
    Ok(())
}

fn show_list(state: &std::path::Path, json: bool) -> Result<(), Error> {
    let all = attach::list(state)?;
    if json {
        let all: Vec<Value> = all.iter().map(to_json).collect();
        return super::print(&format!("{:#}\n", Value::from(all)));
    }
    let mut text = String::new();
    for listed in &all {
        let record = &listed.record;
        let shown = |text: &str| text.replace(char::is_control, "\u{fffd}");
        let _ = write!(text, "/dev/{}: {}", record.device, shown(&record.export));
        let _ = write!(text, " ({}), {}, by {}", shown(&record.source), human(record.size), record.backend);
        if record.read_only {
            text.push_str(", read-only");
        }
        if let Some(root) = &record.root {
            let _ = write!(text, ", for the private root {}", shown(root));
        }
        if !listed.alive {
            text.push_str(", its server is gone");
        }
        for user in &listed.users {
            let _ = write!(text, "; {}", shown(user));
        }
        text.push('\n');
    }
    super::print(&text)
}

fn to_json(listed: &Listed) -> Value {
    let mut value = listed.record.to_json();
    value["alive"] = json!(listed.alive);
    value["users"] = json!(listed.users);
    value
}
