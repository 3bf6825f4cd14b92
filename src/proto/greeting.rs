//! The first words of the handshake: the server's greeting, the flags of both sides, and the one reply of the handshake
//! that is no option reply.

use super::constants::*;
use super::fields::{field, put, wire_flags};
use super::request::BadMagic;

wire_flags! {
    /// What the server says of itself in the greeting ("Handshake flags").
    HandshakeFlags: u16 {
        FIXED_NEWSTYLE = FLAG_FIXED_NEWSTYLE,
        NO_ZEROES = FLAG_NO_ZEROES,
    }
}

wire_flags! {
    /// What the client answers to the greeting ("Client flags").
    ClientFlags: u32 {
        FIXED_NEWSTYLE = FLAG_C_FIXED_NEWSTYLE,
        NO_ZEROES = FLAG_C_NO_ZEROES,
    }
}

wire_flags! {
    /// What an export can do ("Transmission flags").
    TransmissionFlags: u16 {
        HAS_FLAGS = FLAG_HAS_FLAGS,
        READ_ONLY = FLAG_READ_ONLY,
        SEND_FLUSH = FLAG_SEND_FLUSH,
        SEND_FUA = FLAG_SEND_FUA,
        ROTATIONAL = FLAG_ROTATIONAL,
        SEND_TRIM = FLAG_SEND_TRIM,
        SEND_WRITE_ZEROES = FLAG_SEND_WRITE_ZEROES,
        SEND_DF = FLAG_SEND_DF,
        CAN_MULTI_CONN = FLAG_CAN_MULTI_CONN,
        SEND_RESIZE = FLAG_SEND_RESIZE,
        SEND_CACHE = FLAG_SEND_CACHE,
        SEND_FAST_ZERO = FLAG_SEND_FAST_ZERO,
        BLOCK_STATUS_PAYLOAD = FLAG_BLOCK_STATUS_PAYLOAD,
    }
}

/// The newstyle greeting, the first bytes of every connection, server to client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the server says of itself.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Bytes on the wire.
    pub const SIZE: usize = 18;

    /// Reads a greeting.
    ///
    /// # Errors
    /// Either magic is not the one of newstyle: this is an oldstyle server, or none.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u64(NBD_MAGIC, field(bytes, 0))?;
        BadMagic::check_u64(OPTION_MAGIC, field(bytes, 8))?;
        Ok(Self { flags: HandshakeFlags(u16::from_be_bytes(field(bytes, 16))) })
    }

    /// Its bytes on the wire.
    #[must_use]
    pub const fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &NBD_MAGIC.to_be_bytes());
        put(&mut bytes, 8, &OPTION_MAGIC.to_be_bytes());
        put(&mut bytes, 16, &self.flags.0.to_be_bytes());
        bytes
    }
}

/// The reply to `OPT_EXPORT_NAME`: no magic and no type; [`EXPORT_NAME_PADDING`] zeroes follow unless both sides said that
/// they need none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Size of the export in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl ExportNameReply {
    /// Bytes on the wire, without the zeroes behind.
    pub const SIZE: usize = 10;

    /// Reads the reply; any bytes are one.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        Self {
            size: u64::from_be_bytes(field(bytes, 0)),
            flags: TransmissionFlags(u16::from_be_bytes(field(bytes, 8))),
        }
    }

    /// Appends the reply, and the zeroes behind it when `padded`.
    pub fn append_to(&self, out: &mut Vec<u8>, padded: bool) {
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        if padded {
            out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_two_magics_and_the_flags() {
        let greeting = Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE.union(HandshakeFlags::NO_ZEROES) };
        assert_eq!(&greeting.encode(), b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(Greeting::parse(b"NBDMAGICIHAVEOPT\x00\x03"), Ok(greeting));
        // An oldstyle server's second magic.
        assert!(Greeting::parse(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00").is_err());
        assert!(Greeting::parse(b"SSH-2.0-OpenSSH_10").is_err());
    }

    #[test]
    fn the_reply_to_export_name_is_padded_unless_told_not_to() {
        let reply = ExportNameReply { size: 0x1_0000, flags: TransmissionFlags(0x0d) };
        let mut out = Vec::new();
        reply.append_to(&mut out, false);
        assert_eq!(out, b"\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0d");
        assert_eq!(ExportNameReply::parse(&field(&out, 0)), reply);
        out.clear();
        reply.append_to(&mut out, true);
        assert_eq!(out.len(), 134);
        assert!(out[10..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn flags_are_shown_by_name_and_unknown_bits_are_kept() {
        let flags = TransmissionFlags(0x8003);
        assert_eq!(format!("{flags:?}"), "{HAS_FLAGS, READ_ONLY, 0x8000}");
        assert!(flags.contains(TransmissionFlags::HAS_FLAGS));
        assert!(!flags.contains(TransmissionFlags::SEND_FUA));
        assert_eq!(flags.without(TransmissionFlags::READ_ONLY).bits(), 0x8001);
        assert!(ClientFlags::NONE.is_empty());
    }
}
