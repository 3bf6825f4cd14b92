//! The nbd backend: the kernel's own client, which gets connections that have been opened already (`linux/nbd-netlink.h`).
//!
//! The device carries the attachment's id as its *backend identifier*, which the kernel shows in sysfs for as long as the
//! device is connected. The kernel chooses the device, so its number is not known before it is made; a record without a
//! device is looked for by the id.
//!
//! The kernel tells nobody when a server has died. So there is a daemon here, too, which has the same sockets and watches
//! for their end, and so releases the record's lock when the device is worth nothing any more.

mod netlink;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::TransmissionFlags;

use super::Begun;
use super::claim::{self, claim, in_use};
use super::control::Told;
use super::device::{Device, mark};
use super::plan::{Plan, block_size};
use super::process::Daemon;
use super::record::Record;
use super::usage;
use netlink::{Family, Message};

const FAMILY: &str = "nbd";

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_CLIENT_FLAGS: u16 = 6;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// The device is disconnected when the last who has it open closes it.
const CFLAG_DISCONNECT_ON_CLOSE: u64 = 1 << 1;

/// A request that is not answered by then is given up, and its connection with it: without a time the kernel waits for a
/// server that hangs for ever. Long enough for one that is busy, or reads from a slow disk.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How long requests wait for new connections when all have died. Nobody brings new ones: the session behind them may be
/// another by then.
const DEAD_CONNECTION_TIMEOUT: Duration = Duration::ZERO;

/// Whether the device is one of the nbd driver's.
pub(super) fn is_one(device: &Device) -> bool {
    number(device).is_some()
}

fn number(device: &Device) -> Option<u32> {
    device.name().strip_prefix("nbd")?.parse().ok()
}

/// Whether the kernel has the driver, after having been asked to load it.
pub(super) fn is_available() -> bool {
    let there = || matches!(Family::open(FAMILY), Ok(Some(_)));
    there() || (load() && there())
}

/// Asks for the driver to be loaded, if there is one to load: a kernel without it is asked by everybody who attaches, and
/// to start a program for nothing takes longer than anything else about that. Whether it comes is seen by asking for it.
fn load() -> bool {
    let kernel = rustix::system::uname();
    let list = format!("/lib/modules/{}/modules.dep", kernel.release().to_string_lossy());
    if !fs::read_to_string(list).is_ok_and(|modules| modules.contains("/nbd.ko")) {
        return false;
    }
    let mut modprobe = Command::new("modprobe");
    modprobe.args(["--quiet", "nbd"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    modprobe.status().is_ok_and(|status| status.success())
}

fn family() -> Result<Family> {
    let failed = |error| Error::io("Cannot talk to the kernel's nbd driver", error);
    let missing = || {
        Error::new(ErrorKind::Unsupported, "This kernel has no nbd driver, or not in this network namespace")
            .advise("load it with 'modprobe nbd', or use --backend fuse")
    };
    if !is_available() {
        return Err(missing());
    }
    Family::open(FAMILY).map_err(failed)?.ok_or_else(missing)
}

/// What the kernel is to connect.
struct Connect<'a> {
    /// The device; without one the kernel chooses.
    number: Option<u32>,
    id: &'a str,
    size: u64,
    block_size: u32,
    flags: TransmissionFlags,
}

impl Connect<'_> {
    /// Adds it to a message, with the descriptors of the sockets.
    fn describe(&self, mut message: Message, sockets: impl Iterator<Item = u32>) -> Message {
        if let Some(number) = self.number {
            message = message.u32(ATTR_INDEX, number);
        }
        message
            .u64(ATTR_SIZE_BYTES, self.size)
            .u64(ATTR_BLOCK_SIZE_BYTES, self.block_size.into())
            .u64(ATTR_TIMEOUT, REQUEST_TIMEOUT.as_secs())
            .u64(ATTR_DEAD_CONN_TIMEOUT, DEAD_CONNECTION_TIMEOUT.as_secs())
            .u64(ATTR_SERVER_FLAGS, self.flags.bits().into())
            // It stays when it is closed; see `release_with_last_user` for the other way.
            .u64(ATTR_CLIENT_FLAGS, 0)
            .text(ATTR_BACKEND_IDENTIFIER, &mark(self.id))
            .nested(ATTR_SOCKETS, |list| {
                sockets.fold(list, |list, socket| list.nested(SOCK_ITEM, |item| item.u32(SOCK_FD, socket)))
            })
    }
}

/// Makes the device; see [`super::attach`].
///
/// # Errors
/// As there. What was begun is undone.
pub(super) fn make(plan: &Plan<'_>, sockets: Vec<OwnedFd>) -> Result<Begun> {
    let mut family = family()?;
    if let Some(device) = plan.wanted.as_ref().filter(|device| device.attribute("pid").is_some()) {
        return Err(in_use("Cannot attach to", device, &["it is connected already".to_owned()]));
    }
    let daemon = Daemon::start(plan)?;
    let connected = daemon.instruct(plan, None, None, &sockets).and_then(|()| daemon.answer()).and_then(
        |(told, made)| {
            let sockets = if made.is_empty() { sockets } else { made };
            connect(plan, &mut family, &daemon, told, &sockets)
        },
    );
    match connected {
        Ok((device, record)) => Ok(Begun { device, open: None, daemon, record }),
        Err(error) => {
            daemon.end();
            Err(error)
        }
    }
}

fn connect(
    plan: &Plan<'_>,
    family: &mut Family,
    daemon: &Daemon,
    told: Told,
    sockets: &[OwnedFd],
) -> Result<(Device, Record)> {
    let mut record = plan.record("nbd", told, daemon.number())?;
    if let Some(device) = &plan.wanted {
        device.name().clone_into(&mut record.device);
    }
    plan.entry.write(&record)?;
    let read_only = if record.read_only { TransmissionFlags::READ_ONLY } else { TransmissionFlags::NONE };
    let connect = Connect {
        number: plan.wanted.as_ref().and_then(number),
        id: plan.entry.id(),
        size: record.size,
        block_size: block_size(told),
        flags: told.flags.union(read_only),
    };
    let descriptors = sockets.iter().filter_map(|socket| u32::try_from(socket.as_raw_fd()).ok());
    let message = connect.describe(family.message(CMD_CONNECT), descriptors);
    let number = family.ask_u32(message, ATTR_INDEX).map_err(|error| match &plan.wanted {
        Some(device) if error.raw_os_error() == Some(libc::EBUSY) => {
            in_use("Cannot attach to", device, &usage::users(device))
        }
        _ => Error::io("The kernel's nbd driver refuses the connection", error).advise("see dmesg"),
    })?;
    let device = number.and_then(|number| Device::named(&format!("nbd{number}")));
    let device =
        device.ok_or_else(|| Error::new(ErrorKind::Io, "The kernel does not say which device it is"))?;
    if !carries(&device, plan.entry.id()) {
        // Nobody could tell it from others' devices later on. It has just been made by this process, so it is known now.
        if let Some(number) = self::number(&device) {
            let message = family.message(CMD_DISCONNECT).u32(ATTR_INDEX, number);
            family.ask_u32(message, ATTR_INDEX).map_err(|error| Error::io("Cannot disconnect", error))?;
        }
        let why = "This kernel's nbd driver does not keep the names of devices";
        return Err(
            Error::new(ErrorKind::Unsupported, why).advise("use Linux 5.14 or newer, or --backend fuse")
        );
    }
    device.name().clone_into(&mut record.device);
    plan.entry.write(&record)?;
    Ok((device, record))
}

/// Whether the device carries this id.
pub(super) fn carries(device: &Device, id: &str) -> bool {
    device.attribute("backend").is_some_and(|backend| backend == mark(id))
}

/// The device that carries this id, whatever its record says.
pub(super) fn find(id: &str) -> Option<Device> {
    let devices = fs::read_dir("/sys/block").ok()?.flatten();
    let names = devices.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| Device::named(&name)).find(|device| is_one(device) && carries(device, id))
}

/// Disconnects the device, if it carries this id, and returns when the kernel has let go of its connections. A device that
/// does not carry it is somebody else's, or free, and is left alone. If it is `served`, what its cache holds is written first.
///
/// # Errors
/// `InUse` if somebody uses it: nothing has changed then.
pub(super) fn clear(device: &Device, id: &str, served: bool) -> Result<()> {
    if !carries(device, id) {
        return Ok(());
    }
    let number = number(device).ok_or_else(|| Error::new(ErrorKind::Invalid, "No nbd device"))?;
    let mut family = family()?;
    // While it is open nobody can connect it to something else.
    let Some(file) = claim(device, |_| Ok(carries(device, id)))? else { return Ok(()) };
    if served {
        claim::sync(&file, device);
    }
    let message = family.message(CMD_DISCONNECT).u32(ATTR_INDEX, number);
    family
        .ask_u32(message, ATTR_INDEX)
        .map_err(|error| Error::io("Cannot disconnect", error).on_path(device.path()))?;
    drop(file);
    claim::wait_until_gone(device, || !carries(device, id) && device.attribute("pid").is_none())
}

/// From now on the device is disconnected when the last who has it open closes it: `_file`, or somebody after it.
///
/// # Errors
/// What the kernel says.
pub(super) fn release_with_last_user(device: &Device, id: &str, _file: &File) -> io::Result<()> {
    let number = number(device).ok_or(io::ErrorKind::InvalidInput)?;
    let mut family = Family::open(FAMILY)?.ok_or(io::ErrorKind::Unsupported)?;
    let message = family
        .message(CMD_RECONFIGURE)
        .u32(ATTR_INDEX, number)
        .u64(ATTR_CLIENT_FLAGS, CFLAG_DISCONNECT_ON_CLOSE)
        .text(ATTR_BACKEND_IDENTIFIER, &mark(id));
    family.ask_u32(message, ATTR_INDEX).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_the_driver_are_known_by_name() {
        let is = |name: &str| is_one(&Device::named(name).unwrap());
        assert!(is("nbd0") && is("nbd15"));
        assert!(!is("nbd") && !is("nbd0p1") && !is("loop0") && !is("sda"));
    }

    /// Attributes in this machine's byte order, as `linux/nbd-netlink.h` has them, written by hand.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the kernel speaks in the machine's own byte order")]
    fn a_connection_is_described_byte_by_byte() {
        let connect = Connect {
            number: Some(3),
            id: "0123456789abcdef0123456789abcdef",
            size: 1 << 30,
            block_size: 512,
            flags: TransmissionFlags::SEND_FLUSH.union(TransmissionFlags::READ_ONLY),
        };
        let bytes =
            netlink::tests::bytes(connect.describe(Message::new(33, CMD_CONNECT), [5, 6].into_iter()));
        let mut expected = Vec::new();
        let half = |expected: &mut Vec<u8>, value: u16| expected.extend(value.to_ne_bytes());
        let word = |expected: &mut Vec<u8>, value: u32| expected.extend(value.to_ne_bytes());
        let long = |expected: &mut Vec<u8>, kind: u16, value: u64| {
            expected.extend(12_u16.to_ne_bytes());
            expected.extend(kind.to_ne_bytes());
            expected.extend(value.to_ne_bytes());
        };
        word(&mut expected, 16 + 4 + 8 + 6 * 12 + 44 + 28);
        half(&mut expected, 33);
        half(&mut expected, 5);
        word(&mut expected, 7);
        word(&mut expected, 0);
        expected.extend([1, 1, 0, 0]);
        half(&mut expected, 8);
        half(&mut expected, 1);
        word(&mut expected, 3);
        long(&mut expected, 2, 1 << 30);
        long(&mut expected, 3, 512);
        long(&mut expected, 4, 60);
        long(&mut expected, 8, 0);
        long(&mut expected, 5, 0b110);
        long(&mut expected, 6, 0);
        half(&mut expected, 44);
        half(&mut expected, 10);
        expected.extend(b"memdev:0123456789abcdef0123456789abcdef\0");
        half(&mut expected, 28);
        half(&mut expected, 7 | 0x8000);
        for socket in [5, 6] {
            half(&mut expected, 12);
            half(&mut expected, 1 | 0x8000);
            half(&mut expected, 8);
            half(&mut expected, 1);
            word(&mut expected, socket);
        }
        assert_eq!(bytes, expected);
        let any = Connect { number: None, ..connect };
        let shorter = netlink::tests::bytes(any.describe(Message::new(33, CMD_CONNECT), [5, 6].into_iter()));
        assert_eq!(shorter[20..], expected[28..], "without a number the kernel chooses");
    }
}
