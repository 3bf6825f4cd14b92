//! The journal of a file system that was not unmounted: what it holds of blocks that are not where they belong yet, as the
//! kernel would find out when it mounts (jbd2, `Documentation/filesystems/ext4/journal.rst`). Nothing is written: a block
//! is looked up in the journal when it is read.
//!
//! ```text
//!   superblock | descriptor: which blocks follow | blocks ... | revoke: what not to replay | commit | descriptor ...
//! ```
//!
//! Transactions follow each other in a ring. One counts when its commit block is there, and so are those of all before it.

use super::fields::{be16, be32};
use crate::error::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, HashMap};

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

const FEATURE_REVOKE: u32 = 0x1;
const FEATURE_64BIT: u32 = 0x2;
const FEATURE_ASYNC_COMMIT: u32 = 0x4;
const FEATURE_CHECKSUM_V2: u32 = 0x8;
const FEATURE_CHECKSUM_V3: u32 = 0x10;
const FEATURE_FAST_COMMIT: u32 = 0x20;
const KNOWN: u32 = FEATURE_REVOKE
    | FEATURE_64BIT
    | FEATURE_ASYNC_COMMIT
    | FEATURE_CHECKSUM_V2
    | FEATURE_CHECKSUM_V3
    | FEATURE_FAST_COMMIT;

/// The block began with the journal's own magic, which was taken out.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;

/// The first block of a fast commit begins with this tag, little-endian.
const FAST_COMMIT_HEAD: [u8; 2] = [9, 0];

/// Bytes before what a block of the journal holds.
const HEADER: usize = 12;

/// Where blocks are that the journal has newer than their places do.
pub(super) type Replayed = BTreeMap<u64, Copy>;

/// A block in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    /// Its number on the disk.
    pub(super) block: u64,
    /// Whether its first four bytes are to be the journal's magic.
    pub(super) escaped: bool,
}

impl Copy {
    /// Makes a block that was read from the journal what it is.
    pub(super) fn restore(self, block: &mut [u8]) {
        if self.escaped {
            block[..4].copy_from_slice(&MAGIC.to_be_bytes());
        }
    }
}

/// The journal's superblock.
struct Super {
    length: u32,
    first: u32,
    sequence: u32,
    start: u32,
    features: u32,
    uuid: [u8; 16],
}

impl Super {
    fn parse(block: &[u8]) -> Result<Self> {
        let kind = be32(block, 4);
        let wrong = |what: &str| Error::new(ErrorKind::Invalid, format!("The journal {what} of"));
        if be32(block, 0) != MAGIC || !matches!(kind, SUPERBLOCK_V1 | SUPERBLOCK_V2) {
            return Err(wrong("has no superblock"));
        }
        let features = if kind == SUPERBLOCK_V2 { be32(block, 40) } else { 0 };
        if features & !KNOWN != 0 {
            let error = Error::new(ErrorKind::Unsupported, "The journal has features that are not known of");
            return Err(error.advise("use --mount, as root"));
        }
        let fast = match (features & FEATURE_FAST_COMMIT, be32(block, 84)) {
            (0, _) => 0,
            (_, 0) => 256,
            (_, blocks) => blocks,
        };
        let whole = be32(block, 16);
        let (length, first) = (whole.saturating_sub(fast), be32(block, 20));
        let start = be32(block, 28);
        let size_of_blocks = usize::try_from(be32(block, 12)).unwrap_or(0);
        if size_of_blocks != block.len() || first == 0 || first >= length || start >= length {
            return Err(wrong("makes no sense"));
        }
        let uuid = std::array::from_fn(|at| block[48 + at]);
        Ok(Self { length, first, sequence: be32(block, 24), start, features, uuid })
    }

    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    fn has_checksums(&self) -> bool {
        self.has(FEATURE_CHECKSUM_V2 | FEATURE_CHECKSUM_V3)
    }

    /// Bytes of a tag without the UUID that may follow it.
    fn tag_size(&self) -> usize {
        match (self.has(FEATURE_CHECKSUM_V3), self.has(FEATURE_CHECKSUM_V2), self.has(FEATURE_64BIT)) {
            (true, ..) => 16,
            (_, true, true) => 14,
            (_, true, false) => 10,
            (_, _, true) => 12,
            _ => 8,
        }
    }

    /// Whether the last four bytes of a block are its checksum.
    fn tail_is_right(&self, block: &[u8]) -> bool {
        !self.has_checksums() || self.sum(block, block.len() - 4) == be32(block, block.len() - 4)
    }

    /// The checksum of a block whose own is at `at`, and was zero.
    fn sum(&self, block: &[u8], at: usize) -> u32 {
        [&self.uuid[..], &block[..at], &[0; 4], &block[at + 4..]]
            .iter()
            .fold(!0, |sum, part| crc32c(sum, part))
    }

    /// The blocks that a descriptor announces: where each belongs, and whether it is escaped.
    fn tags(&self, block: &[u8]) -> Vec<(u64, bool)> {
        let end = block.len() - if self.has_checksums() { 4 } else { 0 };
        let (size, mut at, mut tags) = (self.tag_size(), HEADER, Vec::new());
        while at + size <= end {
            let (flags, high) = if self.has(FEATURE_CHECKSUM_V3) {
                (be32(block, at + 4), be32(block, at + 8))
            } else {
                let wide = self.has(FEATURE_64BIT);
                (u32::from(be16(block, at + 6)), if wide { be32(block, at + 8) } else { 0 })
            };
            let high = if self.has(FEATURE_64BIT) { u64::from(high) << 32 } else { 0 };
            tags.push((u64::from(be32(block, at)) | high, flags & ESCAPED != 0));
            at += size + if flags & SAME_UUID == 0 { 16 } else { 0 };
            if flags & LAST != 0 {
                break;
            }
        }
        tags
    }

    /// The blocks that are not to be replayed.
    fn revoked(&self, block: &[u8]) -> Vec<u64> {
        let end = usize::try_from(be32(block, HEADER)).unwrap_or(usize::MAX);
        let end = end.min(block.len() - if self.has_checksums() { 4 } else { 0 });
        let wide = self.has(FEATURE_64BIT);
        let size = if wide { 8 } else { 4 };
        let records = block[..end].get(HEADER + 4..).unwrap_or_default();
        let number = |record: &[u8]| {
            if wide {
                u64::from(be32(record, 0)) << 32 | u64::from(be32(record, 4))
            } else {
                u64::from(be32(record, 0))
            }
        };
        records.chunks_exact(size).map(number).collect()
    }
}

/// What is to be replayed. `read` fills a block of `block_size` bytes with the journal's block of a number, and gives its
/// number on the disk; with an empty one it only does that.
///
/// # Errors
/// A line without whose journal it is: it makes no sense, or what it needs is not known here; what `read` says.
pub(super) fn replay(
    block_size: usize,
    read: &mut dyn FnMut(u32, &mut [u8]) -> Result<u64>,
) -> Result<Replayed> {
    let mut block = vec![0; block_size];
    read(0, &mut block)?;
    let journal = Super::parse(&block)?;
    if journal.has(FEATURE_FAST_COMMIT) {
        // The kernel leaves out one block between the two.
        read(journal.length + 1, &mut block)?;
        if block.starts_with(&FAST_COMMIT_HEAD) && journal.start != 0 {
            let error = Error::new(ErrorKind::Unsupported, "The journal may hold fast commits of");
            return Err(error.advise("use --mount, as root"));
        }
    }
    let mut log = Log { journal, replayed: Vec::new(), revoked: HashMap::new() };
    if log.journal.start != 0 {
        log.collect(&mut block, read)?;
    }
    Ok(log.finish())
}

/// What was found in the transactions that count.
struct Log {
    journal: Super,
    /// In order: the transaction, where the block belongs, and where it is.
    replayed: Vec<(u32, u64, Copy)>,
    /// The last transaction that revoked a block.
    revoked: HashMap<u64, u32>,
}

impl Log {
    fn collect(
        &mut self,
        block: &mut [u8],
        read: &mut dyn FnMut(u32, &mut [u8]) -> Result<u64>,
    ) -> Result<()> {
        let (mut at, mut sequence) = (self.journal.start, self.journal.sequence);
        let (mut blocks, mut revoked) = (Vec::new(), Vec::new());
        // A log that goes round and round is none.
        let mut left = self.journal.length - self.journal.first;
        let mut next = |at: &mut u32| {
            let here = *at;
            *at = if here + 1 >= self.journal.length { self.journal.first } else { here + 1 };
            left = left.checked_sub(1)?;
            Some(here)
        };
        while let Some(here) = next(&mut at) {
            read(here, block)?;
            if be32(block, 0) != MAGIC || be32(block, 8) != sequence {
                break;
            }
            match be32(block, 4) {
                DESCRIPTOR if self.journal.tail_is_right(block) => {
                    for (home, escaped) in self.journal.tags(block) {
                        let Some(place) = next(&mut at) else { return Ok(()) };
                        blocks.push((home, place, escaped));
                    }
                }
                REVOKE if self.journal.tail_is_right(block) => {
                    revoked.append(&mut self.journal.revoked(block))
                }
                COMMIT if self.is_committed(block) => {
                    for (home, place, escaped) in blocks.drain(..) {
                        let copy = Copy { block: read(place, &mut [])?, escaped };
                        self.replayed.push((sequence, home, copy));
                    }
                    self.revoked.extend(revoked.drain(..).map(|home| (home, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Whether a commit block is one that was written as a whole.
    fn is_committed(&self, block: &[u8]) -> bool {
        const CHECKSUM: usize = 16;
        !self.journal.has_checksums() || self.journal.sum(block, CHECKSUM) == be32(block, CHECKSUM)
    }

    fn finish(self) -> Replayed {
        let mut replayed = Replayed::new();
        for (sequence, home, copy) in self.replayed {
            // Numbers of transactions come round again; of two, the later is less than half of all behind the earlier.
            let later = |by: &u32| by.wrapping_sub(sequence) < u32::MAX / 2;
            if !self.revoked.get(&home).is_some_and(later) {
                replayed.insert(home, copy);
            }
        }
        replayed
    }
}

/// The checksum of Castagnoli, as both ext4 and its journal have it: from `sum` on, and not inverted at the end.
fn crc32c(sum: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            // The index is less than 256.
            #[allow(clippy::cast_possible_truncation)]
            let mut value = at as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[at] = value;
            at += 1;
        }
        table
    };
    bytes.iter().fold(sum, |sum, &byte| {
        let [.., low] = sum.to_be_bytes();
        TABLE[usize::from(low ^ byte)] ^ sum >> 8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1024;

    /// A journal whose blocks lie at 1000 and behind on the disk.
    struct Ring(Vec<Vec<u8>>);

    impl Ring {
        fn new(length: u32, start: u32, sequence: u32, features: u32) -> Self {
            let mut ring = Self(vec![vec![0; SIZE]; usize::try_from(length).unwrap()]);
            for (at, value) in
                [MAGIC, SUPERBLOCK_V2, 0, 1024, length, 1, sequence, start, 0, 0, features].iter().enumerate()
            {
                ring.0[0][at * 4..at * 4 + 4].copy_from_slice(&value.to_be_bytes());
            }
            ring
        }

        fn put(&mut self, at: usize, words: &[u32]) -> &mut Self {
            self.0[at].fill(0);
            for (word, value) in words.iter().enumerate() {
                self.0[at][word * 4..word * 4 + 4].copy_from_slice(&value.to_be_bytes());
            }
            self
        }

        /// One block that belongs at `home`, at the two places from `at` on.
        fn descriptor(&mut self, at: usize, sequence: u32, home: u32) -> &mut Self {
            self.put(at, &[MAGIC, DESCRIPTOR, sequence, home, SAME_UUID | LAST])
        }

        fn commit(&mut self, at: usize, sequence: u32) -> &mut Self {
            self.put(at, &[MAGIC, COMMIT, sequence])
        }

        fn replay(&self) -> Result<Vec<(u64, u64)>> {
            let replayed = replay(SIZE, &mut |number, block| {
                let at = usize::try_from(number).unwrap();
                let found = self.0.get(at).ok_or_else(|| Error::new(ErrorKind::Invalid, "beyond"))?;
                block.copy_from_slice(&found[..block.len()]);
                Ok(1000 + u64::from(number))
            })?;
            Ok(replayed.into_iter().map(|(home, copy)| (home, copy.block)).collect())
        }
    }

    #[test]
    fn transactions_count_when_they_are_committed_and_the_last_one_wins() {
        let mut ring = Ring::new(32, 1, 7, 0);
        ring.descriptor(1, 7, 50).commit(3, 7).descriptor(4, 8, 50).commit(6, 8);
        ring.descriptor(7, 9, 60);
        assert_eq!(ring.replay().unwrap(), [(50, 1005)], "the last one was never committed");
        ring.commit(9, 10);
        assert_eq!(ring.replay().unwrap(), [(50, 1005)], "this is of another round");
        ring.commit(9, 9);
        assert_eq!(ring.replay().unwrap(), [(50, 1005), (60, 1008)]);
    }

    #[test]
    fn what_was_revoked_later_is_not_replayed() {
        let mut ring = Ring::new(32, 1, 7, FEATURE_REVOKE);
        ring.descriptor(1, 7, 50).commit(3, 7).descriptor(4, 8, 51).commit(6, 8);
        ring.put(7, &[MAGIC, REVOKE, 9, 24, 50, 70]).commit(8, 9);
        assert_eq!(ring.replay().unwrap(), [(51, 1005)]);
        ring.descriptor(9, 10, 50).commit(11, 10);
        assert_eq!(ring.replay().unwrap(), [(50, 1010), (51, 1005)], "written again after it was revoked");
    }

    #[test]
    fn a_ring_goes_on_at_its_beginning_and_has_an_end() {
        let mut ring = Ring::new(16, 14, u32::MAX, 0);
        ring.descriptor(14, u32::MAX, 50).commit(1, u32::MAX).descriptor(2, 0, 51).commit(4, 0);
        assert_eq!(ring.replay().unwrap(), [(50, 1015), (51, 1003)]);
        // Nothing but commits, of all numbers that could come.
        let mut round = Ring::new(16, 1, 0, 0);
        for at in 1..16 {
            round.commit(at, u32::try_from(at).unwrap() - 1);
        }
        assert_eq!(round.replay().unwrap(), []);
        // A descriptor that announces more than there is.
        let mut long = Ring::new(16, 1, 0, 0);
        let words: Vec<u32> = [MAGIC, DESCRIPTOR, 0].into_iter().chain([5, SAME_UUID].repeat(120)).collect();
        long.put(1, &words);
        assert_eq!(long.replay().unwrap(), []);
    }

    #[test]
    fn tags_have_the_sizes_that_the_features_say() {
        for (features, size) in [
            (0, 8),
            (FEATURE_64BIT, 12),
            (FEATURE_CHECKSUM_V2, 10),
            (FEATURE_CHECKSUM_V2 | FEATURE_64BIT, 14),
            (FEATURE_CHECKSUM_V3, 16),
            (FEATURE_CHECKSUM_V3 | FEATURE_64BIT, 16),
        ] {
            let journal = Super::parse(&Ring::new(16, 0, 0, features).0[0]).unwrap();
            assert_eq!(journal.tag_size(), size, "{features:#x}");
        }
    }

    #[test]
    fn a_commit_counts_if_its_checksum_is_right() {
        let mut ring = Ring::new(16, 1, 7, FEATURE_CHECKSUM_V3);
        let journal = Super::parse(&ring.0[0]).unwrap();
        ring.put(1, &[MAGIC, DESCRIPTOR, 7, 50, SAME_UUID | LAST | ESCAPED]).commit(3, 7);
        assert_eq!(ring.replay().unwrap(), []);
        for (at, place) in [(1, SIZE - 4), (3, 16)] {
            let sum = journal.sum(&ring.0[at], place);
            ring.0[at][place..place + 4].copy_from_slice(&sum.to_be_bytes());
        }
        assert_eq!(ring.replay().unwrap(), [(50, 1002)]);
        let mut block = [0; 8];
        Copy { block: 0, escaped: true }.restore(&mut block);
        assert_eq!(block, [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_no_journal_is_an_error() {
        let refused = |ring: Ring| ring.replay().unwrap_err().to_string();
        assert!(refused(Ring(vec![vec![0; SIZE]])).contains("no superblock"));
        assert!(refused(Ring::new(16, 16, 0, 0)).contains("makes no sense"));
        assert!(refused(Ring::new(1, 0, 0, 0)).contains("makes no sense"));
        assert!(refused(Ring::new(16, 1, 0, 0x40)).contains("features"));
        let mut fast = Ring::new(300, 1, 0, FEATURE_FAST_COMMIT);
        assert_eq!(fast.replay().unwrap(), []);
        fast.0[45][..2].copy_from_slice(&FAST_COMMIT_HEAD);
        assert!(refused(fast).contains("fast commits"));
        assert_eq!(Ring::new(16, 0, 0, 0).replay().unwrap(), []);
    }

    #[test]
    fn the_checksum_is_that_of_castagnoli() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }
}
