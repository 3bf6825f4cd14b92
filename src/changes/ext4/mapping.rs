//! Where the blocks of an inode are: by a tree of extents, or by ext2's lists of blocks.

use super::fields::{le16, le32};
use super::inode::Inode;
use super::volume::Volume;
use crate::error::Result;
use std::ops::Range;

/// Neighbouring blocks of a file that are neighbours on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first, counted from the file's beginning.
    pub(super) logical: u64,
    /// The first on the disk.
    pub(super) physical: u64,
    pub(super) length: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.logical + self.length
    }

    /// On the disk.
    pub(super) fn blocks(&self) -> Range<u64> {
        self.physical..self.physical + self.length
    }
}

/// Where the blocks of an inode are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Those with data, in order. What is in none of them is zero.
    pub(super) runs: Vec<Run>,
    /// Those that say where others are.
    pub(super) nodes: Vec<u64>,
}

const EXTENT_MAGIC: u16 = 0xf30a;
/// Bytes of an entry of a node of extents, and of what is before them.
const ENTRY: usize = 12;
/// The deepest tree that there is.
const DEEPEST: u16 = 5;
/// An extent that is longer than this is of so many blocks less, and they read as zeroes.
const UNWRITTEN: u64 = 32768;
/// Blocks that a file without extents lists itself.
const DIRECT: u64 = 12;

/// Where the blocks of `inode` are, which has its data in blocks.
///
/// # Errors
/// They cannot be read, or make no sense.
pub(super) fn of(volume: &mut Volume, inode: &Inode) -> Result<Mapping> {
    let mut mapping = Mapping::default();
    if inode.has_extents() {
        let root = inode.block_area().to_vec();
        extents(volume, inode, &root, None, &mut mapping)?;
    } else {
        lists(volume, inode, &mut mapping)?;
    }
    volume.charge(mapping.runs.len() as u64)?;
    Ok(mapping)
}

impl Mapping {
    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.end() == run.logical && last.physical + last.length == run.physical => {
                last.length += run.length;
            }
            _ => self.runs.push(run),
        }
    }
}

/// One node of a tree of extents. `depth`: that it must have; the root's is free.
fn extents(
    volume: &mut Volume,
    inode: &Inode,
    node: &[u8],
    depth: Option<u16>,
    mapping: &mut Mapping,
) -> Result<()> {
    let wrong = |volume: &Volume, what: &str| Err(volume.damaged_inode(inode.number, what));
    let (entries, found) = (usize::from(le16(node, 2)), le16(node, 6));
    let fits = (entries + 1) * ENTRY <= node.len();
    if le16(node, 0) != EXTENT_MAGIC || !fits || found > DEEPEST || depth.is_some_and(|depth| depth != found)
    {
        return wrong(volume, "has a node of extents that makes no sense");
    }
    // What each subtree begins with, to hold that against what it says.
    let mut next = mapping.runs.last().map_or(0, Run::end);
    for entry in node[ENTRY..].chunks_exact(ENTRY).take(entries) {
        let logical = u64::from(le32(entry, 0));
        if logical < next {
            return wrong(volume, "has extents that are out of order");
        }
        if found > 0 {
            let block = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
            let below = volume.block(block)?;
            mapping.nodes.push(block);
            extents(volume, inode, &below, Some(found - 1), mapping)?;
            next = mapping.runs.last().map_or(0, Run::end).max(logical + 1);
            continue;
        }
        let length = u64::from(le16(entry, 4));
        let physical = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
        let (length, is_data) = if length > UNWRITTEN { (length - UNWRITTEN, false) } else { (length, true) };
        if length == 0 || !volume.has_blocks(&(physical..physical.saturating_add(length))) {
            return wrong(volume, "has an extent that lies elsewhere");
        }
        next = logical + length;
        if is_data {
            mapping.push(Run { logical, physical, length });
        }
    }
    Ok(())
}

/// Twelve blocks, then a list of blocks, a list of lists, and a list of lists of lists.
fn lists(volume: &mut Volume, inode: &Inode, mapping: &mut Mapping) -> Result<()> {
    let per_block = volume.block_size() / 4;
    let area = inode.block_area();
    for at in 0..DIRECT {
        let block = le32(area, usize::try_from(at).unwrap_or(0) * 4);
        add(volume, inode, at, block, mapping)?;
    }
    let (mut first, mut covered) = (DIRECT, per_block);
    for level in 0..3 {
        let block = le32(area, (12 + level) * 4);
        list(volume, inode, block, level, first, covered, mapping)?;
        (first, covered) = (first + covered, covered * per_block);
    }
    Ok(())
}

/// A list, the first of whose blocks is the file's `first` one, and which covers `covered` of them.
fn list(
    volume: &mut Volume,
    inode: &Inode,
    block: u32,
    level: usize,
    first: u64,
    covered: u64,
    mapping: &mut Mapping,
) -> Result<()> {
    // Beyond its end a file has none, whatever is listed.
    if block == 0 || first >= inode.size.div_ceil(volume.block_size()) {
        return Ok(());
    }
    let content = volume.block(u64::from(block))?;
    mapping.nodes.push(u64::from(block));
    let each = covered / (content.len() as u64 / 4);
    for (at, entry) in (0_u64..).zip(content.chunks_exact(4)) {
        let below = le32(entry, 0);
        match level {
            0 => add(volume, inode, first + at, below, mapping)?,
            _ => list(volume, inode, below, level - 1, first + at * each, each, mapping)?,
        }
    }
    Ok(())
}

fn add(volume: &Volume, inode: &Inode, logical: u64, block: u32, mapping: &mut Mapping) -> Result<()> {
    let physical = u64::from(block);
    if block == 0 {
        return Ok(());
    }
    if !volume.has_block(physical) {
        return Err(volume.damaged_inode(inode.number, "has a block that lies elsewhere"));
    }
    mapping.push(Run { logical, physical, length: 1 });
    Ok(())
}
