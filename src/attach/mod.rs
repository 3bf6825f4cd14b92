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

mod claim;
pub(crate) mod control;
pub mod daemon;
mod device;
mod family;
pub(crate) mod file;
mod fork;
pub(crate) mod fuse;
mod isolation;
mod keeper;
mod loop_device;
mod nbd;
mod plan;
mod process;
pub(crate) mod record;
mod serving;
mod shared;
mod usage;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;

pub use device::Device;
pub(crate) use fork::{AtThatMoment, fork};
pub use keeper::Keeper;
use plan::{Opened, Plan};
use process::{Daemon, Process};
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
    /// Bytes for what is written to the device of an image; without it half of the machine's memory.
    pub memory: Option<u64>,
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
    /// Whether it will be [`Attached::keep_while_used`]: then a loop device is made so from the beginning, which is faster, and cannot
    /// be [`Attached::keep`].
    pub while_used: bool,
    /// What the private root is called that it is for, if it is for one.
    pub root: Option<String>,
    /// Is told, in a line for people, if there is another device of the same session on this machine, and both can be written to.
    pub warn: fn(&str),
}

/// A device that is ready, and does not stay: it is detached when this is dropped, unless it is [kept](Attached::keep).
#[derive(Debug)]
pub struct Attached {
    record: Record,
    device: Device,
    // The option is empty once it is kept.
    undo: Option<Made>,
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

    /// What it is written down under.
    pub(crate) fn id(&self) -> &str {
        self.undo.as_ref().map_or("", |made| made.entry.id())
    }

    /// From now on the device, a loop device, shows `length` bytes from `offset` on only, and waits until it does.
    ///
    /// # Errors
    /// `Unsupported` if it is no loop device; what the kernel says.
    pub(crate) fn narrow(&self, offset: u64, length: u64) -> Result<()> {
        if nbd::is_one(&self.device) {
            let why = "Only a loop device can be a part of an image";
            return Err(Error::new(ErrorKind::Unsupported, why).advise("use --backend fuse"));
        }
        let failed = |error| Error::io("Cannot narrow down", error).on_path(self.device.path());
        let mut options = File::options();
        let file = options.read(true).write(!self.record.read_only);
        let file = file.open(self.device.path()).map_err(failed)?;
        loop_device::narrow(&file, offset, length).map_err(failed)?;
        self.device.wait_until_ready(length)
    }

    /// From now on the device outlives this process. Gives its daemon, a child of this process, for whoever wants to know
    /// of its end.
    ///
    /// # Errors
    /// Its daemon died in the meantime. What is left of the device is taken away then; and if it was made to go with its last
    /// user (`Invalid`).
    pub fn keep(mut self) -> Result<Child> {
        if self.undo.as_ref().is_some_and(|made| made.open.is_some()) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "The device goes with its last user: it cannot be kept",
            ));
        }
        let gone = || Error::new(ErrorKind::NotFound, "The device has been taken away");
        self.undo.take().ok_or_else(gone)?.keep()
    }

    /// From now on the device lives as long as somebody has it open or mounted: the file that is returned, or what was
    /// mounted while that was open. Then the kernel lets go of it, and its daemon ends. Whoever has the [`Keeper`] looks after
    /// it in the meantime: without, it fails.
    ///
    /// # Errors
    /// Its daemon died in the meantime, or the kernel refuses; the device is taken away then.
    pub fn keep_while_used(mut self) -> Result<(File, Keeper)> {
        let failed = |error| Error::io("Cannot hand over", error).on_path(self.device.path());
        let file = match self.undo.as_mut().and_then(|made| made.open.take()) {
            // It is one of these already.
            Some(file) => file,
            None => {
                let writes = !self.record.read_only;
                let file =
                    File::options().read(true).write(writes).open(self.device.path()).map_err(failed)?;
                let id = self.undo.as_ref().map_or("", |made| made.entry.id());
                if nbd::is_one(&self.device) {
                    nbd::release_with_last_user(&self.device, id, &file).map_err(failed)?;
                } else {
                    loop_device::release_with_last_user(&file).map_err(failed)?;
                }
                file
            }
        };
        let gone = || Error::new(ErrorKind::NotFound, "The device has been taken away");
        let Made { device, entry, directory, daemon, .. } = self.undo.take().ok_or_else(gone)?;
        match daemon.look_after() {
            Ok(keeper) => Ok((file, keeper)),
            Err((error, daemon)) => {
                Made { device, open: Some(file), entry, directory, daemon }.undo();
                Err(Error::io("The daemon of the new device has died", error))
            }
        }
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
    let wanted = options.device.as_deref().map(Device::of_path).transpose()?;
    let backend = choose(options.backend, wanted.as_ref())?;
    let Opened { source, export, told, image, sockets } = plan::open(options)?;
    let entry = directory.create(&random_name()?)?;
    let plan = Plan { options, directory: &directory, entry: &entry, wanted, source, export, told, image };
    let is_shared = plan.is_shared();
    let made = match backend {
        Backend::Nbd => nbd::make(&plan, sockets),
        Backend::Auto | Backend::Fuse => fuse::make(&plan, sockets),
    };
    let attached = finish(made, &directory, entry)?;
    if is_shared && let Some(warning) = shared::warning(&directory, attached.id(), attached.record()) {
        (options.warn)(&warning);
    }
    Ok(attached)
}

/// What has been made, ready and to be undone; or what was begun, undone.
fn finish(made: Result<Begun>, directory: &Directory, entry: Entry) -> Result<Attached> {
    let cloned = directory.as_fd().try_clone_to_owned();
    let cloned = cloned.map_err(|error| Error::io("Cannot keep track of the device", error));
    let (Begun { device, open, daemon, record }, cloned) = match made.and_then(|made| Ok((made, cloned?))) {
        Ok(all) => all,
        Err(error) => {
            // It may have failed with the device made: then the record stays for as long as that does.
            if free(&entry, false).is_ok() {
                directory.remove(entry.id());
            }
            return Err(error);
        }
    };
    let undo = Some(Made { device: device.clone(), open, entry, directory: cloned, daemon });
    let attached = Attached { record, device, undo };
    // From here on whatever goes wrong is undone.
    attached.device.wait_until_ready(attached.record.size)?;
    Ok(attached)
}

/// The backend for what was asked for. The device that was asked for decides, if one was.
fn choose(wanted: Backend, device: Option<&Device>) -> Result<Backend> {
    let kind = device.map(|device| {
        let kind = if nbd::is_one(device) {
            Backend::Nbd
        } else if loop_device::is_one(device) {
            Backend::Fuse
        } else {
            let why = format!("{} is neither an nbd nor a loop device", device.path().display());
            return Err(Error::new(ErrorKind::Invalid, why).advise("leave out --device, or give a free one"));
        };
        Ok((device, kind))
    });
    match (wanted, kind.transpose()?) {
        (Backend::Auto, Some((_, kind))) => Ok(kind),
        (Backend::Auto, None) if nbd::is_available() => Ok(Backend::Nbd),
        (Backend::Auto, None) => Ok(Backend::Fuse),
        (wanted, Some((device, kind))) if wanted != kind => {
            let why = format!("{} is no device for --backend {}", device.path().display(), wanted.name());
            Err(Error::new(ErrorKind::Invalid, why).advise("leave out one of the two"))
        }
        (wanted, _) => Ok(wanted),
    }
}

/// A device that a backend has made.
struct Begun {
    device: Device,
    /// What keeps it, if it goes when nobody has it open.
    open: Option<File>,
    daemon: Daemon,
    record: Record,
}

/// What has been made and is not kept yet.
#[derive(Debug)]
struct Made {
    device: Device,
    open: Option<File>,
    entry: Entry,
    directory: OwnedFd,
    daemon: Daemon,
}

impl Made {
    /// Tells the daemon that it stays.
    fn keep(self) -> Result<Child> {
        match self.daemon.keep() {
            Ok(()) => self.daemon.into_child(),
            Err(error) => {
                self.undo();
                Err(Error::io("The daemon of the new device has died", error))
            }
        }
    }

    /// Takes it away again.
    fn undo(self) {
        let Self { device, open, entry, directory, daemon } = self;
        // It may be gone with that.
        drop(open);
        if let Err(error) = clear(&device, entry.id(), true) {
            // The next who attaches or detaches finds it, and frees it when nobody uses it any more.
            tracing::warn!(%error, "A device that is not wanted any more stays for now");
            return;
        }
        record::remove(directory.as_fd(), entry.id());
        drop(entry);
        daemon.end();
    }
}

/// Detaches `device`, and returns when the kernel has let go of it and its daemon has ended.
///
/// # Errors
/// `NotFound` if memdev has not attached it, `InUse` if somebody uses it (the error says who); then nothing has changed.
pub fn detach(state: &Path, device: &Path) -> Result<()> {
    let directory = Directory::open(state)?;
    let result = detach_in(&directory, device);
    // What else the dead left behind is not in the way of anybody, but this is the moment to free it.
    result.and(clean_up(&directory))
}

fn detach_in(directory: &Directory, path: &Path) -> Result<()> {
    let unknown = |why: String| {
        Error::new(ErrorKind::NotFound, "Cannot detach")
            .on(format!("{}: {why}", path.display()))
            .advise("list what there is with 'memdev attach --list'")
    };
    // The node decides, not what it is called: a file that happens to be called loop3 is no device.
    let device = Device::of_path(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => unknown("there is no such device".to_owned()),
        _ => error,
    })?;
    let is_it = |entry: &&Entry| {
        entry.record().is_some_and(|record| record.device == device.name() && carries(&record, entry))
    };
    match directory.entries()?.iter().find(is_it) {
        Some(entry) => take_away(directory, entry),
        None => Err(unknown("memdev has not attached it".to_owned())),
    }
}

/// Takes the device of `entry` away, and waits until its daemon has ended.
fn take_away(directory: &Directory, entry: &Entry) -> Result<()> {
    let process = Process::of_daemon(entry);
    let served = !entry.is_abandoned();
    free(entry, served)?;
    // The daemon removes its record when it ends in good order; one that had died could not.
    let start = Instant::now();
    while !entry.is_abandoned() {
        if start.elapsed() > process::PATIENCE {
            let pid = entry.record().map_or(0, |record| record.pid);
            let why = format!("The device is gone, but its daemon {pid} does not end");
            return Err(Error::new(ErrorKind::Io, why));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    directory.remove(entry.id());
    // A dying process lets go of its files a moment before it has gone.
    process.map_or(Ok(()), |process| process.wait(process::PATIENCE))
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
    let Some(device) = Device::named(&record.device) else { return false };
    if nbd::is_one(&device) {
        nbd::carries(&device, entry.id())
    } else {
        loop_device::carries(&device, entry.id())
    }
}

/// Frees the device, if it carries the id. If it is `served`, what its cache holds is written first.
fn clear(device: &Device, id: &str, served: bool) -> Result<()> {
    if nbd::is_one(device) { nbd::clear(device, id, served) } else { loop_device::clear(device, id, served) }
}

/// Frees the device that `entry` names, if it is there.
///
/// # Errors
/// `InUse` if somebody uses it.
fn free(entry: &Entry, served: bool) -> Result<()> {
    let Some(record) = entry.record() else { return Ok(()) };
    // The kernel chooses nbd devices: whoever made it may have died before it was written down which.
    let device = Device::named(&record.device).or_else(|| nbd::find(entry.id()));
    device.map_or(Ok(()), |device| clear(&device, entry.id(), served))
}

/// Frees what dead parties left behind in `state`, as far as nobody uses it.
///
/// # Errors
/// The directory cannot be read.
pub(crate) fn clean_up_state(state: &Path) -> Result<()> {
    clean_up(&Directory::open(state)?)
}

/// Frees what dead parties left behind, as far as nobody uses it.
fn clean_up(directory: &Directory) -> Result<()> {
    for entry in directory.entries()? {
        // The lock is kept while it is freed, so that only one does it.
        if !entry.is_abandoned() {
            continue;
        }
        match free(&entry, false) {
            Ok(()) => directory.remove(entry.id()),
            Err(error) => tracing::debug!(%error, id = entry.id(), "A device without a server stays for now"),
        }
    }
    Ok(())
}

/// A session that the daemon serves has a name that nobody can guess.
pub(crate) fn random_name() -> Result<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_that_is_asked_for_decides_the_backend() {
        let choose = |wanted, name| choose(wanted, Some(&Device::named(name).unwrap()));
        assert_eq!(choose(Backend::Auto, "loop7").unwrap(), Backend::Fuse);
        assert_eq!(choose(Backend::Auto, "nbd7").unwrap(), Backend::Nbd);
        assert_eq!(choose(Backend::Fuse, "loop7").unwrap(), Backend::Fuse);
        assert!(
            choose(Backend::Nbd, "loop7").unwrap_err().to_string().contains("no device for --backend nbd")
        );
        for backend in [Backend::Auto, Backend::Fuse, Backend::Nbd] {
            for name in ["sda", "vda", "loop", "loopy", "zram0"] {
                let error = choose(backend, name).unwrap_err().to_string();
                assert!(error.contains("neither an nbd nor a loop device"), "{name}: {error}");
            }
        }
    }
}
