//! A block device of this machine's kernel for a session: attached, listed, detached, and freed when somebody died.
//!
//! ```text
//!  fuse:  /dev/loopN ── one file, by FUSE, in no mount table ── daemon ── NBD ──> session        (any kernel)
//!  nbd:   /dev/nbdN  ── the kernel's own client ─────────────────────── NBD ──> session        (where it has one)
//!                                          the session: in a running server, or in the daemon for an image
//! ```
//!
//! # What is kept
//!
//! A device is worth nothing without who serves it, and whoever serves it can die at any moment, so can the command that
//! attaches. So every attachment has a file (`record`) that says which device is being made *before* it is made, and is
//! locked for as long as its daemon lives: a lock that can be had means that nobody serves the device any more, whatever
//! process numbers say. The device carries the attachment's id, 128 random bits. A device is touched only if its file
//! names it *and* it carries that id, so nothing of anybody else's ever is; what a dead party left behind is freed by the
//! next attach or detach.
//!
//! # Who does what
//!
//! The command does what needs paths and devices (`fuse`); the daemon gets descriptors (`control`) and serves them in
//! a mount namespace of its own that holds nothing ([`daemon`]). Until the command says that the device is kept, the
//! daemon ends with it.

mod control;
pub mod daemon;
mod device;
mod fuse;
mod isolation;
mod loop_device;
mod record;
mod usage;

use std::path::{Path, PathBuf};

use crate::base::Image;
use crate::client;
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::proto::TransmissionFlags;

pub use device::Device;
pub use record::{DIRECTORY, Record};
use record::{Directory, Entry};

/// The most connections that one device may have: more than that have no use.
pub const MAX_CONNECTIONS: u32 = 16;

/// The program of this process: not by its path, which may have been replaced since it began.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// What a device shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A session of its own on an image, served by the daemon itself and gone with the device.
    Image {
        /// What the export is called.
        name: String,
        /// The image file.
        path: PathBuf,
    },
    /// An export, or a named session, of a running server.
    Export(Uri),
}

/// How the kernel gets to the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's own NBD client where there is one, else FUSE.
    Auto,
    /// The kernel's own NBD client.
    Nbd,
    /// A file by FUSE, and a loop device on it.
    Fuse,
}

impl Backend {
    /// Its name on the command line and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Nbd => "nbd",
            Self::Fuse => "fuse",
        }
    }
}

/// What to attach, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the device shows.
    pub source: Source,
    /// The device to use; without it one that is free.
    pub device: Option<PathBuf>,
    /// Connections to the server, 1 to [`MAX_CONNECTIONS`].
    pub connections: u32,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// How the kernel gets to the data.
    pub backend: Backend,
    /// Where attachments are written down: [`DIRECTORY`] unless there is a reason.
    pub state: PathBuf,
    /// A file that the daemon's log is appended to; without it the daemon does not log.
    pub log: Option<PathBuf>,
    /// The program that becomes the daemon by [`daemon::SUBCOMMAND`]: memdev, which usually is [`THIS_PROGRAM`].
    pub program: PathBuf,
    /// Whether the daemon is killed when the thread that attaches ends: for a launcher whose devices must not outlive it.
    pub die_with_parent: bool,
}

/// A device that is ready, and does not stay: it is detached when this is dropped, unless it is [kept](Attached::keep).
#[derive(Debug)]
pub struct Attached {
    record: Record,
    device: Device,
    // The option is empty once it is kept.
    undo: Option<fuse::Made>,
}

impl Attached {
    /// What was attached, and as what.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// From now on the device outlives this process.
    ///
    /// # Errors
    /// Its daemon died in the meantime. What is left of the device is taken away then.
    pub fn keep(mut self) -> Result<()> {
        let made = self.undo.take();
        made.map_or(Ok(()), |made| made.keep())
    }

    /// From now on the device lives as long as somebody has it open or mounted: the file that is returned, or what was
    /// mounted while that was open. Then the kernel lets go of it, and its daemon ends.
    ///
    /// # Errors
    /// Its daemon died in the meantime, or the kernel refuses; the device is taken away then.
    pub fn keep_while_used(self) -> Result<std::fs::File> {
        let failed = |error| Error::io("Cannot hand over", error).on_path(self.device.path());
        let writes = !self.record.read_only;
        let file =
            std::fs::File::options().read(true).write(writes).open(self.device.path()).map_err(failed)?;
        loop_device::release_with_last_user(&file).map_err(failed)?;
        self.keep()?;
        Ok(file)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(made) = self.undo.take() {
            made.undo();
        }
    }
}

/// Attaches: when this returns, the device has its size and can be read. Frees first what dead daemons left behind.
///
/// # Errors
/// `Denied` without the rights of root, `InUse` if the device that was asked for is taken, `Unsupported` if the kernel
/// lacks what the backend needs, and whatever goes wrong with the image, the server or the system.
pub fn attach(options: &Options) -> Result<Attached> {
    if !(1..=MAX_CONNECTIONS).contains(&options.connections) {
        let why = format!("{} connections where 1 to {MAX_CONNECTIONS} are possible", options.connections);
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    let directory = Directory::open(&options.state)?;
    clean_up(&directory)?;
    match options.backend {
        Backend::Nbd => Err(Error::new(ErrorKind::Unsupported, "The nbd backend is not there yet")
            .advise("use --backend fuse")),
        Backend::Auto | Backend::Fuse => fuse::attach(options, &directory),
    }
}

/// Detaches `device`, and returns when the kernel has let go of it and its daemon has ended.
///
/// # Errors
/// `NotFound` if memdev has not attached it, `InUse` if somebody uses it (the error says who); then nothing has changed.
pub fn detach(state: &Path, device: &Path) -> Result<()> {
    let directory = Directory::open(state)?;
    // Of a device that has gone altogether only the name is left.
    let name = Device::of_path(device).map(|device| device.name().to_owned()).ok();
    let name = name.as_deref().or_else(|| device.file_name().and_then(|name| name.to_str()));
    let entries = directory.entries()?;
    let found = entries.iter().find(|entry| {
        entry.record().is_some_and(|record| Some(record.device.as_str()) == name)
            && entry.record().is_some_and(|record| carries(&record, entry))
    });
    let Some(entry) = found else {
        // What else the dead left behind is not in the way of anybody, but this is the moment to free it.
        clean_up(&directory)?;
        return Err(Error::new(ErrorKind::NotFound, "Cannot detach")
            .on(format!("{}: memdev has not attached it", device.display()))
            .advise("list what there is with 'memdev attach --list'"));
    };
    let result = fuse::detach(&directory, entry);
    clean_up(&directory)?;
    result
}

/// One attachment.
#[derive(Debug)]
pub struct Listed {
    /// What is attached, and as what.
    pub record: Record,
    /// Whether it is served. If not, it is freed by the next attach or detach that finds it unused.
    pub alive: bool,
    /// Who uses the device, in words.
    pub users: Vec<String>,
}

/// What is attached at this moment, by device.
///
/// # Errors
/// The directory cannot be read.
pub fn list(state: &Path) -> Result<Vec<Listed>> {
    let directory = Directory::open(state)?;
    let mut all = Vec::new();
    for entry in directory.entries()? {
        let Some(record) = entry.record() else { continue };
        if !carries(&record, &entry) {
            continue;
        }
        let Some(device) = Device::named(&record.device) else { continue };
        let alive = !entry.is_abandoned();
        all.push(Listed { users: usage::users(&device), record, alive });
    }
    all.sort_by_key(|listed| {
        // loop2 comes before loop10.
        let name = &listed.record.device;
        let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
        (name[..name.len() - digits.len()].to_owned(), digits.parse::<u32>().unwrap_or(u32::MAX))
    });
    Ok(all)
}

/// Whether the device that the record names is this attachment's: it carries its id.
fn carries(record: &Record, entry: &Entry) -> bool {
    Device::named(&record.device).is_some_and(|device| loop_device::carries(&device, entry.id()))
}

/// Frees what dead parties left behind, as far as nobody uses it.
fn clean_up(directory: &Directory) -> Result<()> {
    for entry in directory.entries()? {
        // The lock is kept while it is freed, so that only one does it.
        if !entry.is_abandoned() {
            continue;
        }
        match fuse::free(&entry) {
            Ok(()) => directory.remove(entry.id()),
            Err(error) => tracing::debug!(%error, id = entry.id(), "A device without a server stays for now"),
        }
    }
    Ok(())
}

/// A session that the daemon serves has a name that nobody can guess.
fn random_name() -> Result<String> {
    use std::fmt::Write as _;
    use std::io::Read as _;
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| Error::io("Cannot read random bits from /dev/urandom", error))?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// What a source is called, and what it is where its server tells.
struct Opened {
    source: String,
    export: String,
    /// The connections to a running server; none for an image, which the daemon serves.
    sockets: Vec<std::os::fd::OwnedFd>,
    told: Option<control::Told>,
    image: Option<std::fs::File>,
}

/// Opens what is to be attached: the image, or as many connections to the export as are asked for.
fn open(options: &Options) -> Result<Opened> {
    match &options.source {
        Source::Image { name, path } => {
            let path = std::path::absolute(path)
                .map_err(|error| Error::io("Cannot resolve the path of image", error).on_path(path))?;
            // Everything that can be wrong with an image is found out, and said, here.
            Image::open(&path)?;
            let image = std::fs::File::open(&path)
                .map_err(|error| Error::io("Cannot open image", error).on_path(&path))?;
            let export = format!("{name}@{}", random_name()?);
            let source = path.display().to_string();
            Ok(Opened { source, export, sockets: Vec::new(), told: None, image: Some(image) })
        }
        Source::Export(uri) => {
            let mut sockets = Vec::new();
            let mut first = None;
            for _ in 0..options.connections {
                let (socket, export) = client::open_simple(&uri.address, &uri.export)?;
                let shared = export.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
                if options.connections > 1 && !shared {
                    // Each would be a copy of its own, behind one device.
                    let why = format!("Export '{}' cannot have several connections", uri.export);
                    return Err(Error::new(ErrorKind::Invalid, why)
                        .advise("name a session, as NAME@ID, or leave out --connections"));
                }
                sockets.push(socket);
                first.get_or_insert(export);
            }
            let told = first.as_ref().map(control::Told::of_export);
            let name = first.map_or_else(String::new, |export| export.name);
            // What was asked for names the session; what the server answers may be the image alone.
            let export = if uri.export.is_empty() { name } else { uri.export.clone() };
            Ok(Opened { source: uri.to_string(), export, sockets, told, image: None })
        }
    }
}
