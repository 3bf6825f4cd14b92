//! One inode: what it says, from the bytes that it has on the disk.

use super::fields::{le16, le32};
use crate::changes::tree::{Kind, Stat, Time};

/// Bytes of an inode that all have.
pub(super) const LEAST: usize = 128;
/// Bytes of what it says of its blocks.
pub(super) const BLOCK_AREA: usize = 60;

const FLAG_HUGE_FILE: u32 = 0x4_0000;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;
const FLAG_ENCRYPTED: u32 = 0x800;

/// An inode.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) number: u32,
    /// All of its bytes.
    pub(super) bytes: Box<[u8]>,
    pub(super) kind: Kind,
    /// Bytes of what it holds.
    pub(super) size: u64,
    flags: u32,
}

impl Inode {
    /// The inode in `bytes`, [`LEAST`] at least; what is wrong with it, if something is.
    pub(super) fn parse(number: u32, bytes: Box<[u8]>) -> Result<Self, &'static str> {
        let mode = u32::from(le16(&bytes, 0));
        if le16(&bytes, 26) == 0 {
            return Err("is free, and yet has a name");
        }
        let kind = Kind::of_mode(mode).ok_or("is of no kind that there is")?;
        let size = u64::from(le32(&bytes, 4)) | u64::from(le32(&bytes, 108)) << 32;
        if size > i64::MAX.cast_unsigned() {
            return Err("is larger than anything can be");
        }
        let flags = le32(&bytes, 32);
        Ok(Self { number, bytes, kind, size, flags })
    }

    pub(super) fn stat(&self) -> Stat {
        let bytes = &self.bytes;
        let device = self.kind.is_device().then(|| device(&bytes[40..48]));
        Stat {
            kind: self.kind,
            mode: u32::from(le16(bytes, 0)) & 0o7777,
            user: u32::from(le16(bytes, 2)) | u32::from(le16(bytes, 120)) << 16,
            group: u32::from(le16(bytes, 24)) | u32::from(le16(bytes, 122)) << 16,
            size: if matches!(self.kind, Kind::File | Kind::Symlink) { self.size } else { 0 },
            mtime: self.time(16, 136),
            device,
            links: u32::from(le16(bytes, 26)),
            number: u64::from(self.number),
            born: self.has_extra(148).then(|| self.time(144, 148)),
        }
    }

    /// What it says of where its blocks are.
    pub(super) fn block_area(&self) -> &[u8] {
        &self.bytes[40..40 + BLOCK_AREA]
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & FLAG_EXTENTS != 0
    }

    /// Whether what it holds is where others say where their blocks are.
    pub(super) fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE_DATA != 0
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & FLAG_ENCRYPTED != 0
    }

    /// Whether it is a symbolic link whose target needs no block.
    pub(super) fn is_fast_link(&self, block_size: u64) -> bool {
        let attributes = if self.attribute_block() == 0 { 0 } else { block_size };
        let blocks = u64::from(le32(&self.bytes, 28)) | u64::from(le16(&self.bytes, 116)) << 32;
        let unit = if self.flags & FLAG_HUGE_FILE != 0 { block_size } else { 512 };
        let small = self.size < BLOCK_AREA as u64;
        self.kind == Kind::Symlink && small && (!self.has_extents() || blocks * unit <= attributes)
    }

    /// The block of its extended attributes; 0 if it has none.
    pub(super) fn attribute_block(&self) -> u64 {
        u64::from(le32(&self.bytes, 104)) | u64::from(le16(&self.bytes, 118)) << 32
    }

    /// Its own bytes that may be extended attributes.
    pub(super) fn attributes(&self) -> &[u8] {
        if self.bytes.len() <= LEAST + 4 {
            return &[];
        }
        self.bytes.get(LEAST + usize::from(le16(&self.bytes, LEAST))..).unwrap_or_default()
    }

    /// Whether its field of four bytes at `at` is there.
    fn has_extra(&self, at: usize) -> bool {
        let end =
            LEAST + if self.bytes.len() > LEAST + 2 { usize::from(le16(&self.bytes, LEAST)) } else { 0 };
        at + 4 <= end.min(self.bytes.len())
    }

    fn time(&self, at: usize, extra_at: usize) -> Time {
        let seconds = i64::from(le32(&self.bytes, at).cast_signed());
        let extra = if self.has_extra(extra_at) { le32(&self.bytes, extra_at) } else { 0 };
        // The kernel takes nonsense there as it is; nobody can write it to an archive.
        let nanoseconds = (extra >> 2).min(999_999_999);
        Time { seconds: seconds + (i64::from(extra & 3) << 32), nanoseconds }
    }
}

/// Major and minor number, as they were written down before 2003 or after.
fn device(area: &[u8]) -> (u32, u32) {
    let (old, new) = (le32(area, 0), le32(area, 4));
    if old != 0 {
        return (old >> 8 & 0xff, old & 0xff);
    }
    (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(patches: &[(usize, &[u8])]) -> Result<Inode, &'static str> {
        let mut bytes = vec![0; 256];
        for (at, patch) in [(0, &[0xa4, 0x81][..]), (26, &[1]), (128, &[32])].iter().chain(patches) {
            bytes[*at..at + patch.len()].copy_from_slice(patch);
        }
        Inode::parse(12, bytes.into())
    }

    #[test]
    fn fields_are_put_together() {
        let stat = inode(&[
            (2, &[1, 2]),
            (24, &[3, 4]),
            (120, &[5, 0, 6, 0]),
            (4, &[0, 0, 0, 0x80]),
            (108, &[1]),
            (16, &[0xff; 4]),
            (136, &[1 | 8, 0, 0, 0]),
            (144, &[2, 0, 0, 0, 4, 0, 0, 0]),
        ])
        .unwrap()
        .stat();
        assert_eq!((stat.kind, stat.mode), (Kind::File, 0o644));
        assert_eq!((stat.user, stat.group), (0x0005_0201, 0x0006_0403));
        assert_eq!(stat.size, 0x1_8000_0000);
        assert_eq!(stat.mtime, Time { seconds: (1 << 32) - 1, nanoseconds: 2 });
        assert_eq!(stat.born, Some(Time { seconds: 2, nanoseconds: 1 }));
    }

    #[test]
    fn devices_have_numbers_old_and_new() {
        let of = |patch: &[u8]| inode(&[(0, &[0xb6, 0x61]), (40, patch)]).unwrap().stat().device;
        assert_eq!(of(&[3, 1, 0, 0, 0, 0, 0, 0]), Some((1, 3)));
        assert_eq!(of(&[0, 0, 0, 0, 0x45, 0x23, 0x61, 0x00]), Some((0x123, 0x645)));
        assert_eq!(inode(&[]).unwrap().stat().device, None);
    }

    #[test]
    fn what_cannot_be_is_said() {
        assert!(inode(&[(26, &[0])]).is_err());
        assert!(inode(&[(0, &[0, 0])]).is_err());
        assert!(inode(&[(108, &[0xff; 4])]).is_err());
        // Extra fields that would lie behind its end.
        assert_eq!(inode(&[(128, &[0xff; 2])]).unwrap().attributes(), b"");
        let old = Inode::parse(1, {
            let mut bytes = vec![0; 128];
            bytes[..2].copy_from_slice(&[0xa4, 0x81]);
            bytes[26] = 1;
            bytes.into()
        });
        let old = old.unwrap();
        assert_eq!((old.stat().born, old.attributes()), (None, &[][..]));
    }
}
