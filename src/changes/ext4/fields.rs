//! Numbers as the formats have them: ext4's are little-endian, its journal's big-endian. All of these must be there.

/// Little-endian.
fn little(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from(bytes[at]) | u16::from(bytes[at + 1]) << 8
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::try_from(little(bytes, at, 4)).unwrap_or(u32::MAX)
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
