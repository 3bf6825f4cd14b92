//! File systems of sessions: whatever is on both disks, to compare them ends, what is told are paths that there can be, and
//! that it is known where was written changes nothing of what is found.
//!
//! An input is the size of the disks in MiB, one byte, and then blocks: a number of two bytes, of which the highest bit says
//! that it is the session's alone, and 1,024 bytes. So a small file system makes a small input, although most of it is zero.

use memdev::changes::{Change, Disks, Ext4Pair, Pair, Tree, Written, compare, diff, layer};
use std::io;

/// Bytes of a block of an input.
pub const BLOCK: usize = 1024;
/// The largest disks, in MiB.
const LARGEST: u8 = 8;
/// Bytes of an archive that are looked at.
const ENOUGH: usize = 1 << 20;

/// One input.
pub fn body(data: &[u8]) {
    let Some((&size, blocks)) = data.split_first() else { return };
    let size = usize::from(size.clamp(1, LARGEST)) << 20;
    let (mut before, mut now) = (vec![0; size], vec![0; size]);
    for block in blocks.chunks_exact(2 + BLOCK) {
        let number = u16::from_be_bytes([block[0], block[1]]);
        let at = usize::from(number & 0x7fff) * BLOCK;
        let Some(place) = now.get_mut(at..at + BLOCK) else { continue };
        place.copy_from_slice(&block[2..]);
        if number >> 15 == 0 {
            before[at..at + BLOCK].copy_from_slice(&block[2..]);
        }
    }
    let differ = |at: &usize| before[at * BLOCK..(at + 1) * BLOCK] != now[at * BLOCK..(at + 1) * BLOCK];
    let written = (0..size / BLOCK).filter(differ).map(|at| (at * BLOCK) as u64..((at + 1) * BLOCK) as u64);
    let written = Written::In(written.collect());
    let known = changes(&before, &now, written);
    let read = changes(&before, &now, Written::Unknown);
    if let (Some(known), Some(read)) = (known, read) {
        assert_eq!(known, read, "it is known where was written");
    }
}

/// What has changed, if that can be found out.
fn changes(before: &[u8], now: &[u8], written: Written) -> Option<Vec<Change<u32>>> {
    let size = now.len() as u64;
    let disks = Disks::new(Box::new(before.to_vec()), Box::new(now.to_vec()), written);
    let mut pair = Ext4Pair::open(disks, 0..size, 0..size).ok()?;
    let changes = compare(&mut pair).ok()?;
    for change in &changes.list {
        let mut names = change.path.split(|&byte| byte == b'/');
        let fine = |name: &[u8]| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0);
        assert!(change.path.is_empty() || names.all(fine), "{:?}", change.path);
        if let Some(node) = &change.now {
            let tree = pair.now();
            let ranges = tree.data(node).unwrap_or_default();
            assert!(ranges.iter().all(|range| range.start < range.end), "{ranges:?}");
            assert!(ranges.windows(2).all(|two| two[0].end < two[1].start), "{ranges:?}");
            let _ = (tree.xattrs(node).is_ok(), tree.target(node).is_ok());
        }
    }
    let _ = layer::write(&mut pair, &changes, Bounded(ENOUGH)).is_ok();
    let _ = diff::write(&mut pair, &changes, b"", &mut Bounded(ENOUGH)).is_ok();
    Some(changes.list)
}

/// Takes so much, and no more.
struct Bounded(usize);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
