//! The FUSE backend: a detached FUSE file system with one file, and a loop device on it.

pub(super) mod disk;
mod mount;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde_json::json;

use super::control::{self, Told};
use super::device::{Device, SECTOR};
use super::record::{Directory, Entry, Record};
use super::{Attached, Opened, Options, loop_device, random_name};
use crate::error::{Error, ErrorKind, Result};
use crate::proto::TransmissionFlags;
use mount::Detached;

/// A daemon ends when its device is gone. It wipes what it held, which takes time.
const DAEMON_PATIENCE: Duration = Duration::from_secs(30);

/// What has been made and is not kept yet.
#[derive(Debug)]
pub(super) struct Made {
    device: Device,
    entry: Entry,
    directory: OwnedFd,
    daemon: Daemon,
}

impl Made {
    /// Tells the daemon that it stays.
    pub(super) fn keep(self) -> Result<()> {
        match control::send(self.daemon.control.as_fd(), &json!({ "kept": true }), &[]) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.undo();
                Err(Error::io("The daemon of the new device has died", error))
            }
        }
    }

    /// Takes it away again.
    pub(super) fn undo(self) {
        let Self { device, entry, directory, daemon } = self;
        if let Err(error) = loop_device::clear(&device, entry.id()) {
            // The next who attaches or detaches finds it, and frees it when nobody uses it any more.
            tracing::warn!(%error, "A device that is not wanted any more stays for now");
            return;
        }
        super::record::remove(directory.as_fd(), entry.id());
        drop(entry);
        daemon.end();
    }
}

/// A daemon that has been started. It ends when it sees the end of `control`, unless it was told that it is kept.
#[derive(Debug)]
struct Daemon {
    child: Child,
    control: OwnedFd,
}

impl Daemon {
    /// Starts this program once more, as a daemon.
    ///
    /// Its arguments are for people who list processes, and the id for [`Process::of_daemon`].
    fn start(options: &Options, id: &str, source: &str, export: &str) -> Result<Self> {
        let failed = |error| Error::io("Cannot start the daemon", error);
        let (control, theirs) = control::pair().map_err(failed)?;
        let log = match &options.log {
            None => Stdio::null(),
            Some(path) => {
                let cannot = |error| Error::io("Cannot open log", error).on_path(path);
                Stdio::from(File::options().create(true).append(true).open(path).map_err(cannot)?)
            }
        };
        let child = Command::new(&options.program)
            .arg0("memdev")
            .args([super::daemon::SUBCOMMAND, id, export, source])
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        Ok(Self { child, control })
    }

    /// What the daemon answers to its order.
    fn answer(&self) -> Result<Told> {
        let failed = |error| Error::io("Cannot hear the daemon", error);
        let died = || {
            Error::new(ErrorKind::Io, "The daemon died before the device was there").advise("see its --log")
        };
        let (value, _) = control::receive(self.control.as_fd()).map_err(failed)?.ok_or_else(died)?;
        match control::error_from_json(&value) {
            Some(error) => Err(error),
            None => Told::from_json(&value).ok_or_else(died),
        }
    }

    /// Waits for its end, which comes by itself once it is on its own.
    fn end(self) {
        let Self { mut child, control } = self;
        drop(control);
        let start = Instant::now();
        while matches!(child.try_wait(), Ok(None)) {
            if start.elapsed() > DAEMON_PATIENCE {
                // It is ours, has not been waited for, and so cannot be anybody else.
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Attaches by FUSE; see [`super::attach`].
pub(super) fn attach(options: &Options, directory: &Directory) -> Result<Attached> {
    let wanted = options.device.as_deref().map(Device::of_path).transpose()?;
    if let Some(device) = wanted.as_ref().filter(|device| device.attribute("loop/backing_file").is_some()) {
        return Err(loop_device::in_use("Cannot attach to", device, &["it has a file already".to_owned()]));
    }
    let Opened { source, export, sockets, told, image } = super::open(options)?;
    let entry = directory.create(&random_name()?)?;
    let made = make(options, directory, &entry, wanted.as_ref(), &export, &source, (sockets, told, image));
    let (device, daemon, record) = match made {
        Ok(made) => made,
        Err(error) => {
            directory.remove(entry.id());
            return Err(error);
        }
    };
    let failed = |error| Error::io("Cannot keep track of the device", error);
    let cloned = directory.as_fd().try_clone_to_owned().map_err(failed);
    let attached = Attached {
        undo: Some(Made { device: device.clone(), entry, directory: cloned?, daemon }),
        device,
        record,
    };
    // From here on whatever goes wrong is undone.
    attached.device.wait_until_ready(attached.record.size)?;
    Ok(attached)
}

type Ends = (Vec<OwnedFd>, Option<Told>, Option<File>);

fn make(
    options: &Options,
    directory: &Directory,
    entry: &Entry,
    wanted: Option<&Device>,
    export: &str,
    source: &str,
    (sockets, told, image): Ends,
) -> Result<(Device, Daemon, Record)> {
    let failed = |error| Error::io("Cannot instruct the daemon", error);
    let name = file_name(entry.id(), export);
    let (requests, mount) = Detached::new()?.split();
    let daemon = Daemon::start(options, entry.id(), source, export)?;
    let order = json!({
        "id": entry.id(),
        "state": std::path::absolute(&options.state).map_err(failed)?,
        "file": name,
        "export": export,
        "image": image.is_some(),
        "connections": options.connections,
        "read_only": options.read_only,
        "told": told.map(Told::to_json),
        "die_with_parent": options.die_with_parent,
    });
    let mut descriptors = vec![entry.as_fd(), directory.as_fd(), requests.as_fd()];
    descriptors.extend(image.iter().map(File::as_fd));
    descriptors.extend(sockets.iter().map(OwnedFd::as_fd));
    control::send(daemon.control.as_fd(), &order, &descriptors).map_err(failed)?;
    // Nobody but the daemon has these from now on: when it dies, the file and the session are to know.
    drop((requests, sockets));
    let made = finish(options, entry, wanted, export, source, &daemon, &mount, &name);
    match made {
        Ok((device, record)) => Ok((device, daemon, record)),
        Err(error) => {
            drop(mount);
            daemon.end();
            Err(error)
        }
    }
}

#[allow(
    clippy::too_many_arguments,
    reason = "the parts of one step, apart only so that its failure can be undone"
)]
fn finish(
    options: &Options,
    entry: &Entry,
    wanted: Option<&Device>,
    export: &str,
    source: &str,
    daemon: &Daemon,
    mount: &OwnedFd,
    name: &str,
) -> Result<(Device, Record)> {
    let told = daemon.answer()?;
    if told.size < SECTOR {
        return Err(Error::new(ErrorKind::Invalid, format!("Export '{export}' has less than one sector")));
    }
    let read_only = options.read_only || told.flags.contains(TransmissionFlags::READ_ONLY);
    let file = Detached::open(mount, name, read_only)
        .map_err(|error| Error::io("Cannot open the file that the daemon serves", error))?;
    let record = |device: &Device| Record {
        device: device.name().to_owned(),
        backend: "fuse".to_owned(),
        source: source.to_owned(),
        export: export.to_owned(),
        size: told.size / SECTOR * SECTOR,
        read_only,
        connections: options.connections,
        pid: daemon.child.id(),
    };
    // Sectors of 512 bytes are what file systems and partition tables in images are made for; a server that cannot
    // take so small a request says so.
    let page = u32::try_from(rustix::param::page_size()).unwrap_or(4096);
    let block_size = told.minimum.next_power_of_two().clamp(512, page);
    let wanted_loop = loop_device::Wanted { id: entry.id(), file: file.as_fd(), block_size, read_only };
    let device = loop_device::make(&wanted_loop, wanted, |device| entry.write(&record(device)))?;
    let record = record(&device);
    Ok((device, record))
}

/// What the file is called, and so what `losetup` shows.
fn file_name(id: &str, export: &str) -> String {
    let mut name = format!("{}:", loop_device::mark(id));
    // 255 bytes at most, and no character that a path or a line of text cannot hold.
    for c in export.chars().map(|c| if c == '/' || c.is_control() { '_' } else { c }) {
        if name.len() + c.len_utf8() > 255 {
            break;
        }
        name.push(c);
    }
    name
}

/// Takes the device of `entry` away, and waits until its daemon has ended; see [`super::detach`].
pub(super) fn detach(directory: &Directory, entry: &Entry) -> Result<()> {
    let process = Process::of_daemon(entry);
    free(entry)?;
    // The daemon removes its record when it ends in good order; one that had died could not.
    let start = Instant::now();
    while !entry.is_abandoned() {
        if start.elapsed() > DAEMON_PATIENCE {
            let pid = entry.record().map_or(0, |record| record.pid);
            return Err(Error::new(
                ErrorKind::Io,
                format!("The device is gone, but its daemon {pid} does not end"),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    directory.remove(entry.id());
    // A dying process lets go of its files a moment before it has gone.
    process.map_or(Ok(()), |process| process.wait(DAEMON_PATIENCE))
}

/// A process that can be waited for although it is not this one's child.
struct Process(OwnedFd);

impl Process {
    /// The daemon of `entry`, if it lives and can be seen from here. Its number alone would prove nothing: it may be of
    /// another namespace, or somebody else's by now.
    fn of_daemon(entry: &Entry) -> Option<Self> {
        let number = entry.record()?.pid;
        let pid = Pid::from_raw(i32::try_from(number).ok()?)?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let arguments = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
        let is_it = arguments.split(|&byte| byte == 0).any(|argument| argument == entry.id().as_bytes());
        is_it.then_some(Self(process))
    }

    fn wait(&self, patience: Duration) -> Result<()> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot wait for the daemon's end", error);
        let timeout = Timespec::try_from(patience).map_err(|_| failed(rustix::io::Errno::INVAL))?;
        rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)).map_err(failed)?;
        Ok(())
    }
}

/// Frees the device that `entry` names, if it is there.
///
/// # Errors
/// `InUse` if somebody uses it.
pub(super) fn free(entry: &Entry) -> Result<()> {
    let device = entry.record().and_then(|record| Device::named(&record.device));
    device.map_or(Ok(()), |device| loop_device::clear(&device, entry.id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_so_that_they_are_found_and_shown() {
        let id = random_name().unwrap();
        let name = file_name(&id, "a/b\n@c");
        assert_eq!(name, format!("memdev:{id}:a_b_@c"));
        let long = file_name(&id, &"ä".repeat(300));
        assert!(long.len() <= 255 && long.ends_with('ä'));
    }
}
