//! What the command and its daemon say to each other, once: an order with descriptors, an answer, and that it is kept.
//!
//! ```text
//!   command                         daemon
//!     ── order, descriptors ──────────>       what to serve
//!     <───────────────────── told ────       size and abilities, or why not
//!        (the command makes the device)
//!     ── kept ────────────────────────>       from now on the daemon lives as long as the device
//! ```
//!
//! If either end sees the other's end before `kept`, it undoes its part.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::MAX_CONNECTIONS;
use crate::client::Export;
use crate::error::{Error, ErrorKind};
use crate::net::rights;
use crate::proto::TransmissionFlags;

/// The longest message: names and paths, with room.
const MESSAGE_MAX: usize = 64 << 10;

/// The most descriptors in a message: the record, its directory, /dev/fuse, an image, and the connections.
const DESCRIPTORS_MAX: usize = 8 + MAX_CONNECTIONS as usize;
const _: () = assert!(DESCRIPTORS_MAX <= rights::MOST);

/// Two ends of a connection that keeps messages apart.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message with descriptors.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &Value,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    rights::send(socket, message.to_string().as_bytes(), descriptors, SendFlags::empty()).map(drop)
}

/// Receives one message with its descriptors; `None` when the other end has gone.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Value, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let (length, descriptors) = loop {
        match rights::receive(socket, &mut bytes, RecvFlags::empty()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It had something unread when it died.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            result => break result?,
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let value = serde_json::from_slice(&bytes[..length]).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some((value, descriptors)))
}

/// What a server told of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Bytes.
    pub(super) size: u64,
    /// What it can do.
    pub(super) flags: TransmissionFlags,
    /// The smallest request that it takes, in bytes.
    pub(super) minimum: u32,
    /// The longest payload that it takes, in bytes.
    pub(super) maximum: u32,
}

impl Told {
    pub(super) fn of_export(export: &Export) -> Self {
        let sizes = export.block_sizes.unwrap_or_default();
        Self { size: export.size, flags: export.flags, minimum: sizes.minimum, maximum: sizes.maximum }
    }

    pub(super) fn to_json(self) -> Value {
        json!({ "size": self.size, "flags": self.flags.bits(), "minimum": self.minimum, "maximum": self.maximum })
    }

    pub(super) fn from_json(value: &Value) -> Option<Self> {
        let small = |key: &str| value[key].as_u64().and_then(|number| u32::try_from(number).ok());
        let flags = small("flags").and_then(|bits| u16::try_from(bits).ok())?;
        Some(Self {
            size: value["size"].as_u64()?,
            flags: TransmissionFlags(flags),
            minimum: small("minimum")?,
            maximum: small("maximum")?,
        })
    }
}

/// A failure on its way from the daemon to the command. Its words are kept whole; of its kind, what decides anything.
pub(crate) fn error_to_json(error: &Error) -> Value {
    json!({ "error": error.to_string() })
}

/// The failure in an answer, if it is one.
pub(crate) fn error_from_json(value: &Value) -> Option<Error> {
    Some(Error::new(ErrorKind::Io, value["error"].as_str()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (one, other) = pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        send(one.as_fd(), &json!({"a": 1}), &[writer.as_fd()]).unwrap();
        send(one.as_fd(), &json!({"b": "x".repeat(5000)}), &[]).unwrap();
        drop(writer);
        let (first, mut descriptors) = receive(other.as_fd()).unwrap().unwrap();
        assert_eq!((first, descriptors.len()), (json!({"a": 1}), 1));
        let mut writer = File::from(descriptors.remove(0));
        std::io::Write::write_all(&mut writer, b"here").unwrap();
        drop(writer);
        let mut text = String::new();
        File::from(OwnedFd::from(reader)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "here");
        let (second, descriptors) = receive(other.as_fd()).unwrap().unwrap();
        assert_eq!((second["b"].as_str().unwrap().len(), descriptors.len()), (5000, 0));
        drop(one);
        assert!(receive(other.as_fd()).unwrap().is_none());
    }

    #[test]
    fn what_was_told_survives_the_way() {
        let flags = TransmissionFlags::SEND_FLUSH.union(TransmissionFlags::READ_ONLY);
        let told = Told { size: u64::MAX, flags, minimum: 512, maximum: 32 << 20 };
        assert_eq!(Told::from_json(&told.to_json()), Some(told));
        assert_eq!(Told::from_json(&json!({"size": 1})), None);
        let error = Error::new(ErrorKind::NotFound, "It is gone").advise("look for it");
        assert_eq!(error_from_json(&error_to_json(&error)).unwrap().to_string(), "It is gone; look for it");
        assert!(error_from_json(&told.to_json()).is_none());
    }
}
