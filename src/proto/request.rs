//! The request message: what a client asks for in the transmission phase.

use super::constants::*;
use super::fields::{field, put, wire_enum, wire_flags};

/// A message does not begin with its magic: the stream is out of step, or the peer speaks something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Bad magic {found:#x}")]
pub struct BadMagic {
    /// What was there instead.
    pub found: u64,
}

impl BadMagic {
    #[inline]
    pub(super) fn check_u32(expected: u32, bytes: [u8; 4]) -> Result<(), Self> {
        let found = u32::from_be_bytes(bytes);
        if found == expected { Ok(()) } else { Err(Self { found: u64::from(found) }) }
    }

    #[inline]
    pub(super) fn check_u64(expected: u64, bytes: [u8; 8]) -> Result<(), Self> {
        let found = u64::from_be_bytes(bytes);
        if found == expected { Ok(()) } else { Err(Self { found }) }
    }
}

/// What a client calls a request by; opaque, comes back in the reply. Older texts say *handle*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cookie(pub u64);

wire_enum! {
    /// What a request wants done ("Request types").
    Command: u16 {
        Read = CMD_READ,
        Write = CMD_WRITE,
        Disc = CMD_DISC,
        Flush = CMD_FLUSH,
        Trim = CMD_TRIM,
        Cache = CMD_CACHE,
        WriteZeroes = CMD_WRITE_ZEROES,
        BlockStatus = CMD_BLOCK_STATUS,
    }
}

wire_flags! {
    /// How a request wants it done ("Command flags").
    CommandFlags: u16 {
        FUA = CMD_FLAG_FUA,
        NO_HOLE = CMD_FLAG_NO_HOLE,
        DF = CMD_FLAG_DF,
        REQ_ONE = CMD_FLAG_REQ_ONE,
        FAST_ZERO = CMD_FLAG_FAST_ZERO,
        PAYLOAD_LEN = CMD_FLAG_PAYLOAD_LEN,
    }
}

/// The header of a request; the `length` bytes of a `Write` follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// By which name the reply will be known.
    pub cookie: Cookie,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range in bytes.
    pub length: u32,
}

impl Request {
    /// Bytes on the wire, without the payload of a write.
    pub const SIZE: usize = 28;

    /// Reads the header of a request.
    ///
    /// # Errors
    /// The magic is wrong; nothing behind it can be trusted to be a request.
    #[inline]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u32(REQUEST_MAGIC, field(bytes, 0))?;
        Ok(Self {
            flags: CommandFlags(u16::from_be_bytes(field(bytes, 4))),
            command: Command::from(u16::from_be_bytes(field(bytes, 6))),
            cookie: Cookie(u64::from_be_bytes(field(bytes, 8))),
            offset: u64::from_be_bytes(field(bytes, 16)),
            length: u32::from_be_bytes(field(bytes, 24)),
        })
    }

    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &REQUEST_MAGIC.to_be_bytes());
        put(&mut bytes, 4, &self.flags.0.to_be_bytes());
        put(&mut bytes, 6, &u16::from(self.command).to_be_bytes());
        put(&mut bytes, 8, &self.cookie.0.to_be_bytes());
        put(&mut bytes, 16, &self.offset.to_be_bytes());
        put(&mut bytes, 24, &self.length.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes written by hand from the layout in "Request message".
    const WIRE: &[(&[u8; 28], Request)] = &[
        (
            b"\x25\x60\x95\x13\x00\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\
              \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00",
            Request {
                flags: CommandFlags::NONE,
                command: Command::Read,
                cookie: Cookie(0x0102_0304_0506_0708),
                offset: 4096,
                length: 512,
            },
        ),
        (
            b"\x25\x60\x95\x13\x00\x12\x00\x06\x00\x00\x00\x00\x00\x00\x00\x00\
              \xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            Request {
                flags: CommandFlags(CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO),
                command: Command::WriteZeroes,
                cookie: Cookie(0),
                offset: u64::MAX,
                length: u32::MAX,
            },
        ),
        (
            b"\x25\x60\x95\x13\x80\x00\x12\x34\xff\xff\xff\xff\xff\xff\xff\xff\
              \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
            Request {
                flags: CommandFlags(0x8000),
                command: Command::Other(0x1234),
                cookie: Cookie(u64::MAX),
                offset: 0,
                length: 0,
            },
        ),
    ];

    #[test]
    fn requests_are_as_the_specification_lays_them_out() {
        for (bytes, request) in WIRE {
            assert_eq!(Request::parse(bytes), Ok(*request));
            assert_eq!(request.encode(), **bytes);
        }
    }

    #[test]
    fn every_command_and_every_unknown_one_survives() {
        for value in 0..=u16::MAX {
            assert_eq!(u16::from(Command::from(value)), value);
        }
        assert_eq!(Command::from(7), Command::BlockStatus);
        assert_eq!(Command::from(8), Command::Other(CMD_RESIZE));
    }

    #[test]
    fn a_wrong_magic_is_refused_and_named() {
        // The magic of Linux before 2.1.117, and of the extended header, are no requests here.
        for magic in [0x1256_0953, EXTENDED_REQUEST_MAGIC, 0, SIMPLE_REPLY_MAGIC] {
            let mut bytes = *WIRE[0].0;
            put(&mut bytes, 0, &magic.to_be_bytes());
            let error = Request::parse(&bytes).unwrap_err();
            assert_eq!(error.found, u64::from(magic));
            assert_eq!(error.to_string(), format!("Bad magic {magic:#x}"));
        }
    }
}
