//! The superblock: of which sizes everything is, and where the inodes are.

use super::fields::{le16, le32};
use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;

/// Where the superblock begins, and its bytes.
pub(super) const SUPERBLOCK: Range<u64> = 1024..2048;

/// Features without which a driver must not read the file system, and what they are called.
mod incompatible {
    pub(super) const FILE_TYPE: u32 = 0x2;
    pub(super) const RECOVER: u32 = 0x4;
    pub(super) const META_BG: u32 = 0x10;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const BITS_64: u32 = 0x80;
    pub(super) const MMP: u32 = 0x100;
    pub(super) const FLEX_BG: u32 = 0x200;
    pub(super) const EA_INODE: u32 = 0x400;
    pub(super) const CHECKSUM_SEED: u32 = 0x2000;
    pub(super) const LARGE_DIR: u32 = 0x4000;
    pub(super) const INLINE_DATA: u32 = 0x8000;
    /// That names may be in it without regard to case changes nothing for who lists them.
    pub(super) const CASE_FOLD: u32 = 0x2_0000;
    /// Only directories and files that are encrypted cannot be read.
    pub(super) const ENCRYPT: u32 = 0x1_0000;

    pub(super) const KNOWN: u32 = FILE_TYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BITS_64
        | MMP
        | FLEX_BG
        | EA_INODE
        | CHECKSUM_SEED
        | LARGE_DIR
        | INLINE_DATA
        | CASE_FOLD
        | ENCRYPT;
}

const COMPATIBLE_JOURNAL: u32 = 0x4;
const COMPATIBLE_SPARSE_SUPER2: u32 = 0x200;
const READ_ONLY_SPARSE_SUPER: u32 = 0x1;

/// What of the superblock is needed to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of a block: a power of two from 1024 to 65536.
    pub(super) block_size: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    pub(super) inode_size: u32,
    inodes_per_group: u32,
    blocks_per_group: u32,
    first_data_block: u32,
    descriptor_size: u32,
    /// The first group of descriptors that is kept in its own groups.
    first_meta_group: Option<u32>,
    sparse_super: bool,
    backup_groups: Option<[u32; 2]>,
    /// The inode of a journal that has to be looked at.
    pub(super) journal: Option<u32>,
    /// Whether values of extended attributes may have inodes of their own.
    pub(super) attribute_inodes: bool,
}

impl Layout {
    /// Reads a superblock of 1024 bytes, on a disk of `size`.
    ///
    /// # Errors
    /// A line without whose file system it is: it is none, it has features that are not known here, or makes no sense.
    pub(super) fn parse(bytes: &[u8; 1024], size: u64) -> Result<Self> {
        if le16(bytes, 56) != 0xef53 {
            return Err(Error::new(ErrorKind::Unsupported, "No ext4 is on the disk of"));
        }
        let wrong = |what: &str| {
            let message = format!("The superblock makes no sense ({what}) of");
            Error::new(ErrorKind::Invalid, message)
        };
        let (compatible, features, read_only) = (le32(bytes, 92), le32(bytes, 96), le32(bytes, 100));
        let unknown = features & !incompatible::KNOWN;
        if unknown != 0 {
            let message = format!("Features that are not known here ({unknown:#x}) has the ext4 of");
            return Err(Error::new(ErrorKind::Unsupported, message).advise("use --mount, as root"));
        }
        let block_shift = le32(bytes, 24);
        if block_shift > 6 {
            return Err(wrong("block size"));
        }
        let block_size = 1024_u64 << block_shift;
        let has = |feature: u32| features & feature != 0;
        let high = |at: usize| if has(incompatible::BITS_64) { u64::from(le32(bytes, at)) << 32 } else { 0 };
        let dynamic = le32(bytes, 76) >= 1;
        let inode_size = if dynamic { u32::from(le16(bytes, 88)) } else { 128 };
        if inode_size < 128 || !inode_size.is_power_of_two() || u64::from(inode_size) > block_size {
            return Err(wrong("inode size"));
        }
        let descriptor_size = if has(incompatible::BITS_64) { u32::from(le16(bytes, 254)) } else { 32 };
        let descriptor_size = if descriptor_size == 0 { 32 } else { descriptor_size };
        if !(32..=1024).contains(&descriptor_size) || !descriptor_size.is_power_of_two() {
            return Err(wrong("descriptor size"));
        }
        let layout = Self {
            block_size,
            blocks: u64::from(le32(bytes, 4)) | high(336),
            inodes: le32(bytes, 0),
            inode_size,
            inodes_per_group: le32(bytes, 40),
            blocks_per_group: le32(bytes, 32),
            first_data_block: le32(bytes, 20),
            descriptor_size,
            first_meta_group: has(incompatible::META_BG).then(|| le32(bytes, 260)),
            sparse_super: read_only & READ_ONLY_SPARSE_SUPER != 0,
            backup_groups: (compatible & COMPATIBLE_SPARSE_SUPER2 != 0)
                .then(|| [le32(bytes, 0x24c), le32(bytes, 0x250)]),
            journal: (compatible & COMPATIBLE_JOURNAL != 0 && has(incompatible::RECOVER))
                .then(|| le32(bytes, 224)),
            attribute_inodes: has(incompatible::EA_INODE),
        };
        if layout.inodes_per_group == 0 || layout.blocks_per_group == 0 {
            return Err(wrong("size of groups"));
        }
        // So does the kernel refuse it.
        if layout.blocks.checked_mul(block_size).is_none_or(|end| end > size) {
            return Err(wrong("it is larger than its disk"));
        }
        if layout.journal == Some(0) {
            let message = "The journal to be replayed is on another device for";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(layout)
    }

    /// Whether blocks and inodes of both are found in the same places.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let of = |layout: &Self| Self { journal: None, ..layout.clone() };
        of(self) == of(other)
    }

    /// Where the descriptor of an inode's group begins, in bytes, and the inode's place within that group's table.
    pub(super) fn descriptor_of(&self, inode: u32) -> Option<(u64, u64)> {
        let index = inode.checked_sub(1).filter(|_| inode <= self.inodes)?;
        let (group, within) = (index / self.inodes_per_group, index % self.inodes_per_group);
        let per_block = u32::try_from(self.block_size).ok()? / self.descriptor_size;
        let block = self.descriptor_block(group / per_block, per_block)?;
        let within_block = u64::from(group % per_block) * u64::from(self.descriptor_size);
        let at = block.checked_mul(self.block_size)?.checked_add(within_block)?;
        Some((at, u64::from(within) * u64::from(self.inode_size)))
    }

    /// Where the `number`th block of descriptors is.
    fn descriptor_block(&self, number: u32, per_block: u32) -> Option<u64> {
        let first = self.first_meta_group.filter(|&first| number >= first);
        if first.is_none() {
            return Some(SUPERBLOCK.start / self.block_size + 1 + u64::from(number));
        }
        let group = number.checked_mul(per_block)?;
        let start = u64::from(self.first_data_block)
            .checked_add(u64::from(group).checked_mul(u64::from(self.blocks_per_group))?)?;
        // With clusters of small blocks, the first group begins before the superblock.
        let odd = self.block_size == SUPERBLOCK.start && group == 0 && self.first_data_block == 0;
        Some(start + u64::from(self.has_superblock(group)) + u64::from(odd))
    }

    fn has_superblock(&self, group: u32) -> bool {
        if let Some(backups) = self.backup_groups {
            return group == 0 || backups.contains(&group);
        }
        let is_power_of = |base: u32| {
            let mut power = 1_u64;
            while power < u64::from(group) {
                power *= u64::from(base);
            }
            power == u64::from(group)
        };
        group <= 1 || !self.sparse_super || is_power_of(3) || is_power_of(5) || is_power_of(7)
    }

    /// Where an inode table begins, in blocks, by the descriptor of its group.
    pub(super) fn inode_table(&self, descriptor: &[u8]) -> u64 {
        let high = if self.descriptor_size >= 64 { u64::from(le32(descriptor, 40)) << 32 } else { 0 };
        u64::from(le32(descriptor, 8)) | high
    }

    /// Bytes of a descriptor.
    pub(super) fn descriptor_size(&self) -> usize {
        usize::try_from(self.descriptor_size).unwrap_or(64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Patches<'a> = &'a [(usize, &'a [u8])];

    fn superblock(patches: Patches<'_>) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        let usual: Patches<'_> = &[
            (0, &[0x00, 0x10, 0, 0]),
            (4, &[0x00, 0x40, 0, 0]),
            (24, &[2]),
            (32, &[0x00, 0x80, 0, 0]),
            (40, &[0x00, 0x08, 0, 0]),
            (56, &[0x53, 0xef]),
            (76, &[1]),
            (88, &[0x00, 0x01]),
            (96, &[0x42]),
            (100, &[1]),
        ];
        for (at, patch) in usual.iter().chain(patches) {
            bytes[*at..at + patch.len()].copy_from_slice(patch);
        }
        bytes
    }

    fn parse(bytes: &[u8; 1024]) -> Result<Layout> {
        Layout::parse(bytes, 16384 * 4096)
    }

    #[test]
    fn inodes_are_found_by_their_groups() {
        let layout = parse(&superblock(&[])).unwrap();
        assert_eq!((layout.block_size, layout.blocks, layout.inode_size), (4096, 16384, 256));
        assert_eq!(layout.descriptor_of(1), Some((4096, 0)));
        assert_eq!(layout.descriptor_of(2049 + 3), Some((4096 + 32, 3 * 256)));
        assert_eq!((layout.descriptor_of(0), layout.descriptor_of(4097)), (None, None));
        // Blocks of descriptors in groups of their own, each of which holds those of 128 groups.
        let meta = parse(&superblock(&[(96, &[0x52]), (0, &[0, 0, 0, 1])])).unwrap();
        assert_eq!(meta.descriptor_of(1), Some((4096, 0)), "behind a superblock");
        assert_eq!(meta.descriptor_of(128 * 2048 + 1), Some((128 * 32768 * 4096, 0)), "where there is none");
    }

    #[test]
    fn superblocks_are_where_they_are_kept() {
        let layout = parse(&superblock(&[])).unwrap();
        let groups: Vec<_> = (0..130).filter(|&group| layout.has_superblock(group)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
        let all = parse(&superblock(&[(100, &[0])])).unwrap();
        assert!((0..130).all(|group| all.has_superblock(group)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let cases: [(Patches<'_>, &str); 8] = [
            (&[(56, &[0, 0])], "No ext4"),
            (&[(24, &[7])], "block size"),
            (&[(88, &[64, 0])], "inode size"),
            (&[(96, &[0xc2]), (254, &[48, 0])], "descriptor size"),
            (&[(40, &[0, 0, 0, 0])], "size of groups"),
            (&[(96, &[0xc2]), (336, &[0xff; 4])], "larger than its disk"),
            (&[(96, &[0x43])], "not known here (0x1)"),
            (&[(92, &[4]), (96, &[0x46])], "on another device"),
        ];
        for (patches, expected) in cases {
            let error = parse(&superblock(patches)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
