//! The two file systems as trees, and what they have in common.

use super::attributes::{self, Attribute, Value};
use super::directory;
use super::inode::{BLOCK_AREA, Inode};
use super::layout::Layout;
use super::mapping::{self, Mapping, Run};
use super::volume::Volume;
use crate::changes::compare::Pair;
use crate::changes::disk::{AT_ONCE, Disks, Side, touches};
use crate::changes::tree::{Kind, Name, Stat, Tree, Xattrs};
use crate::error::Result;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// The inode of the root directory.
const ROOT: u32 = 2;
/// The longest target of a symbolic link.
const LONGEST_TARGET: u64 = 4096;
/// The longest value of an extended attribute that the kernel gives to anybody.
const LONGEST_VALUE: u32 = 65536;

/// One of the two file systems.
pub struct Ext4 {
    volume: Volume,
    /// The inode whose blocks were last looked up: a file is read in parts.
    last: Option<(u32, Rc<Mapping>)>,
}

impl Ext4 {
    fn new(volume: Volume) -> Self {
        Self { volume, last: None }
    }

    /// Where the data of an inode is that has it in blocks.
    fn mapping(&mut self, inode: &Inode) -> Result<Rc<Mapping>> {
        if let Some((number, mapping)) = &self.last
            && *number == inode.number
        {
            return Ok(Rc::clone(mapping));
        }
        let mapping = Rc::new(mapping::of(&mut self.volume, inode)?);
        self.last = Some((inode.number, Rc::clone(&mapping)));
        Ok(mapping)
    }

    fn damaged(&self, inode: &Inode, what: &str) -> crate::Error {
        self.volume.damaged_inode(inode.number, what)
    }

    fn attributes(&mut self, inode: &Inode) -> Result<Vec<Attribute>> {
        let mut found = attributes::in_inode(inode.attributes()).map_err(|what| self.damaged(inode, what))?;
        let block = inode.attribute_block();
        if block != 0 {
            if !self.volume.has_block(block) {
                return Err(self.damaged(inode, "has attributes that lie elsewhere"));
            }
            let block = self.volume.block(block)?;
            found.append(&mut attributes::in_block(&block).map_err(|what| self.damaged(inode, what))?);
        }
        Ok(found)
    }

    fn value(&mut self, inode: &Inode, value: Value) -> Result<Vec<u8>> {
        match value {
            Value::Bytes(bytes) => Ok(bytes),
            Value::Inode(number, size) => {
                if size > LONGEST_VALUE || !self.volume.layout().attribute_inodes {
                    return Err(self.damaged(inode, "has an attribute that cannot be"));
                }
                let holder = self.volume.inode(number)?;
                if holder.kind != Kind::File || u64::from(size) > holder.size || holder.is_inline() {
                    return Err(self.damaged(inode, "has an attribute in what is no file"));
                }
                let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
                self.read_mapped(&holder, 0, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// What an inode holds that has no blocks; beyond that there is nothing.
    fn inline(&mut self, inode: &Inode) -> Result<Vec<u8>> {
        let mut bytes = inode.block_area().to_vec();
        if inode.size > BLOCK_AREA as u64 {
            let rest = self.attributes(inode)?.into_iter().find(|attribute| attribute.name.is_none());
            if let Some(rest) = rest {
                bytes.append(&mut self.value(inode, rest.value)?);
            }
        }
        Ok(bytes)
    }

    /// Fills `buffer` from `offset` on with what is in blocks.
    fn read_mapped(&mut self, inode: &Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mapping = self.mapping(inode)?;
        self.read_runs(&mapping.runs, offset, buffer)
    }

    fn read_runs(&mut self, runs: &[Run], offset: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.fill(0);
        let size = self.volume.block_size();
        let wanted = offset..offset.saturating_add(buffer.len() as u64);
        let first = runs.partition_point(|run| (run.logical + run.length) * size <= wanted.start);
        for run in &runs[first..] {
            let bytes = run.logical * size..(run.logical + run.length) * size;
            let part = bytes.start.max(wanted.start)..bytes.end.min(wanted.end);
            if part.is_empty() {
                break;
            }
            // Whole blocks, of which the first may begin before what is wanted.
            let block = part.start / size;
            let skipped = usize::try_from(part.start % size).unwrap_or(0);
            let length = usize::try_from(part.end - part.start).unwrap_or(0);
            let at = usize::try_from(part.start - offset).unwrap_or(0);
            let physical = run.physical + (block - run.logical);
            if skipped == 0 {
                self.volume.read_blocks(physical, &mut buffer[at..at + length])?;
            } else {
                let mut whole = vec![0; skipped + length];
                self.volume.read_blocks(physical, &mut whole)?;
                buffer[at..at + length].copy_from_slice(&whole[skipped..]);
            }
        }
        Ok(())
    }

    /// The bytes of a file's runs, none beyond its end.
    fn ranges(&self, runs: &[Run], size: u64) -> Vec<Range<u64>> {
        let block = self.volume.block_size();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for run in runs {
            let range = run.logical * block..((run.logical + run.length) * block).min(size);
            match ranges.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

impl Tree for Ext4 {
    type Node = u32;

    fn root(&mut self) -> Result<u32> {
        Ok(ROOT)
    }

    fn entries(&mut self, &directory: &u32) -> Result<Vec<(Name, u32)>> {
        let inode = self.volume.inode(directory)?;
        if inode.is_encrypted() {
            let error = "A directory is encrypted in the file system of";
            return Err(crate::Error::new(crate::ErrorKind::Unsupported, error).on(self.volume.owner()));
        }
        let mut entries = Vec::new();
        if inode.is_inline() {
            let bytes = self.inline(&inode)?;
            let size = usize::try_from(inode.size).unwrap_or(usize::MAX).clamp(BLOCK_AREA, bytes.len());
            // The first four bytes are the parent; what does not fit has entries of its own.
            for part in [&bytes[4..BLOCK_AREA], &bytes[BLOCK_AREA..size]] {
                directory::parse(part, &mut entries).map_err(|what| self.damaged(&inode, what))?;
            }
        } else {
            let end = inode.size.div_ceil(self.volume.block_size());
            for run in &self.mapping(&inode)?.runs {
                for at in (0..run.length).take_while(|at| run.logical + at < end) {
                    let block = self.volume.block(run.physical + at)?;
                    directory::parse(&block, &mut entries).map_err(|what| self.damaged(&inode, what))?;
                }
            }
        }
        entries.sort_unstable();
        if entries.windows(2).any(|two| two[0].0 == two[1].0) {
            return Err(self.damaged(&inode, "has a name twice"));
        }
        Ok(entries)
    }

    fn stat(&mut self, &node: &u32) -> Result<Stat> {
        Ok(self.volume.inode(node)?.stat())
    }

    fn xattrs(&mut self, &node: &u32) -> Result<Xattrs> {
        let inode = self.volume.inode(node)?;
        let mut found = Xattrs::new();
        for Attribute { name, value } in self.attributes(&inode)? {
            if let Some(name) = name {
                let value = self.value(&inode, value)?;
                found.entry(name).or_insert(value);
            }
        }
        Ok(found)
    }

    fn target(&mut self, &link: &u32) -> Result<Vec<u8>> {
        let inode = self.volume.inode(link)?;
        if inode.kind != Kind::Symlink
            || inode.size == 0
            || inode.size > LONGEST_TARGET
            || inode.is_encrypted()
        {
            return Err(self.damaged(&inode, "has no target that can be one"));
        }
        let size = usize::try_from(inode.size).unwrap_or(0);
        let mut target = if inode.is_inline() {
            self.inline(&inode)?
        } else if inode.is_fast_link(self.volume.block_size()) {
            inode.block_area().to_vec()
        } else {
            let mut bytes = vec![0; size];
            self.read_mapped(&inode, 0, &mut bytes)?;
            bytes
        };
        target.truncate(size);
        // So does the kernel show it.
        if let Some(end) = target.iter().position(|&byte| byte == 0) {
            target.truncate(end);
        }
        Ok(target)
    }

    fn data(&mut self, &file: &u32) -> Result<Vec<Range<u64>>> {
        let inode = self.volume.inode(file)?;
        if inode.is_inline() {
            let end = (self.inline(&inode)?.len() as u64).min(inode.size);
            return Ok(std::iter::once(0..end).filter(|range| !range.is_empty()).collect());
        }
        let mapping = self.mapping(&inode)?;
        Ok(self.ranges(&mapping.runs, inode.size))
    }

    fn read(&mut self, &file: &u32, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let inode = self.volume.inode(file)?;
        if inode.is_encrypted() {
            let error = "A file is encrypted in the file system of";
            return Err(crate::Error::new(crate::ErrorKind::Unsupported, error).on(self.volume.owner()));
        }
        if inode.is_inline() {
            let bytes = self.inline(&inode)?;
            buffer.fill(0);
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let part = bytes.get(start..).unwrap_or_default();
            let length = part.len().min(buffer.len());
            buffer[..length].copy_from_slice(&part[..length]);
            return Ok(());
        }
        self.read_mapped(&inode, offset, buffer)
    }
}

/// An ext4 file system before and after a session has written to it.
pub struct Ext4Pair {
    disks: Rc<RefCell<Disks>>,
    before: Ext4,
    now: Ext4,
    /// The blocks that either journal has newer, which no disk knows to have been written; in order and apart.
    replayed: Vec<Range<u64>>,
    /// Whether the same number means the same block, and the same inode, in both.
    alike: bool,
}

impl Ext4Pair {
    /// The file systems in these places of the disks.
    ///
    /// # Errors
    /// There is none, or it makes no sense, or has what is not known here.
    pub fn open(disks: Disks, before: Range<u64>, now: Range<u64>) -> Result<Self> {
        let disks = Rc::new(RefCell::new(disks));
        let same_place = before.start == now.start;
        let before = Ext4::new(Volume::open(&disks, Side::Before, before)?);
        let now = Ext4::new(Volume::open(&disks, Side::Now, now)?);
        let alike = same_place && Layout::is_like(before.volume.layout(), now.volume.layout());
        let both = before.volume.replayed().keys().chain(now.volume.replayed().keys());
        let mut blocks: Vec<u64> = both.copied().collect();
        blocks.sort_unstable();
        let mut replayed: Vec<Range<u64>> = Vec::new();
        for block in blocks {
            match replayed.last_mut() {
                Some(last) if block < last.end => {}
                // A journal may name any number; those behind the end are read by nobody.
                Some(last) if block == last.end => last.end = last.end.saturating_add(1),
                _ => replayed.push(block..block.saturating_add(1)),
            }
        }
        Ok(Self { disks, before, now, replayed, alike })
    }

    /// Whether blocks of these numbers may hold something else than they did.
    fn differ(&self, blocks: &Range<u64>) -> Result<bool> {
        if !self.alike || touches(&self.replayed, blocks) {
            return Ok(true);
        }
        self.disks.borrow_mut().differ(self.now.volume.bytes(blocks))
    }

    /// Whether all bytes of the inode are as they were.
    fn same_inode(&self, number: u32) -> Result<bool> {
        let (before, now) = (self.before.volume.place_of(number)?, self.now.volume.place_of(number)?);
        if before == now && !self.differ(&(now.0..now.0 + 1))? {
            return Ok(true);
        }
        Ok(self.before.volume.inode_bytes(number)? == self.now.volume.inode_bytes(number)?)
    }

    /// Whether the parts of two files that lie in these runs are the same, of `size` bytes.
    fn same_runs(&mut self, before: &[Run], now: &[Run], size: u64) -> Result<bool> {
        let block = self.now.volume.block_size();
        let mut at = 0;
        let (mut old, mut new) = (Vec::new(), Vec::new());
        while at * block < size {
            // Where either of the two begins or ends, and what is there until then.
            let (one, one_end) = piece(before, at);
            let (other, other_end) = piece(now, at);
            let end = one_end.min(other_end).min(size.div_ceil(block));
            let same_place = one == other;
            let untouched = same_place
                && match other {
                    Some(physical) => !self.differ(&(physical..physical + (end - at)))?,
                    None => true,
                };
            let mut from = if untouched { end } else { at };
            while from < end {
                let to = end.min(from + (AT_ONCE / block).max(1));
                let bytes = (to * block).min(size) - from * block;
                let bytes = usize::try_from(bytes).unwrap_or(0);
                old.resize(bytes, 0);
                new.resize(bytes, 0);
                self.before.read_runs(before, from * block, &mut old)?;
                self.now.read_runs(now, from * block, &mut new)?;
                if old != new {
                    return Ok(false);
                }
                from = to;
            }
            at = end;
        }
        Ok(true)
    }
}

/// Where block `at` of a file is, and up to where the answer is of one kind.
fn piece(runs: &[Run], at: u64) -> (Option<u64>, u64) {
    let next = runs.partition_point(|run| run.logical + run.length <= at);
    match runs.get(next) {
        None => (None, u64::MAX),
        Some(run) if run.logical > at => (None, run.logical),
        Some(run) => (Some(run.physical + (at - run.logical)), run.logical + run.length),
    }
}

impl Pair for Ext4Pair {
    type Tree = Ext4;

    fn before(&mut self) -> &mut Ext4 {
        &mut self.before
    }

    fn now(&mut self) -> &mut Ext4 {
        &mut self.now
    }

    fn untouched(&mut self, &before: &u32, &now: &u32) -> Result<bool> {
        // An attribute in an inode of its own is not looked for.
        let hidden = self.now.volume.layout().attribute_inodes;
        if before != now || !self.alike || hidden || !self.same_inode(now)? {
            return Ok(false);
        }
        let inode = self.now.volume.inode(now)?;
        let attributes = inode.attribute_block();
        if attributes != 0 && self.differ(&(attributes..attributes.saturating_add(1)))? {
            return Ok(false);
        }
        let has_blocks = matches!(inode.kind, Kind::File | Kind::Directory | Kind::Symlink);
        if !has_blocks || inode.is_inline() || inode.is_fast_link(self.now.volume.block_size()) {
            return Ok(true);
        }
        let mapping = self.now.mapping(&inode)?;
        for &node in &mapping.nodes {
            if self.differ(&(node..node + 1))? {
                return Ok(false);
            }
        }
        for run in &mapping.runs {
            if self.differ(&run.blocks())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn same_content(&mut self, before: &u32, now: &u32) -> Result<bool> {
        let (old, new) = (self.before.volume.inode(*before)?, self.now.volume.inode(*now)?);
        if old.size != new.size {
            return Ok(false);
        }
        let same_size = self.before.volume.block_size() == self.now.volume.block_size();
        if old.is_inline() || new.is_inline() || !same_size {
            return crate::changes::compare::same_bytes(self, before, now, new.size);
        }
        let size = new.size;
        let (old, new) = (self.before.mapping(&old)?, self.now.mapping(&new)?);
        self.same_runs(&old.runs, &new.runs, size)
    }
}
