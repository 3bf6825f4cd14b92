//! One of the two file systems: its blocks, with those that its journal has newer, and its inodes.

use super::inode::{self, Inode};
use super::journal::{self, Replayed};
use super::layout::{Layout, SUPERBLOCK};
use super::mapping;
use crate::changes::disk::{Disks, Side};
use crate::error::{Error, ErrorKind, Result};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// How many times over a file system may have its blocks looked at. One in which each is used once never comes near that;
/// one that was made to be read for ever does.
const PATIENCE: u64 = 32;
/// For those that are small.
const PATIENCE_AT_LEAST: u64 = 1 << 16;

/// A file system on one of two disks.
pub(super) struct Volume {
    disks: Rc<RefCell<Disks>>,
    side: Side,
    /// Where it is on the disk.
    place: Range<u64>,
    layout: Layout,
    replayed: Replayed,
    /// Looks at blocks that are left.
    patience: u64,
}

impl Volume {
    /// Opens the file system at `place` on the disk of `side`.
    ///
    /// # Errors
    /// There is none, or it makes no sense, or has what is not known here.
    pub(super) fn open(disks: &Rc<RefCell<Disks>>, side: Side, place: Range<u64>) -> Result<Self> {
        let whose = |error: Error| error.on(side.owner());
        let mut bytes = [0; 1024];
        if place.end - place.start < SUPERBLOCK.end {
            return Err(whose(Error::new(ErrorKind::Unsupported, "No ext4 is on the disk of")));
        }
        disks.borrow_mut().read(side, place.start + SUPERBLOCK.start, &mut bytes)?;
        let layout = Layout::parse(&bytes, place.end - place.start).map_err(whose)?;
        let patience = layout.blocks * PATIENCE + PATIENCE_AT_LEAST;
        let (disks, replayed) = (Rc::clone(disks), Replayed::new());
        let mut volume = Self { disks, side, place, layout, replayed, patience };
        if let Some(inode) = volume.layout.journal {
            volume.replay(inode)?;
            // The superblock may be among what was replayed.
            let size = volume.layout.block_size;
            let block = volume.block(SUPERBLOCK.start / size)?;
            let at = usize::try_from(SUPERBLOCK.start % size).unwrap_or(0);
            let bytes =
                <&[u8; 1024]>::try_from(&block[at..at + 1024]).map_err(|_| volume.damaged("superblock"))?;
            let layout = Layout::parse(bytes, volume.place.end - volume.place.start).map_err(whose)?;
            if layout.block_size != size {
                return Err(volume.damaged("the journal has another block size"));
            }
            volume.layout = layout;
        }
        Ok(volume)
    }

    fn replay(&mut self, number: u32) -> Result<()> {
        let inode = self.inode(number)?;
        if inode.is_inline() {
            return Err(self.damaged("its journal is in an inode"));
        }
        let runs = mapping::of(self, &inode)?.runs;
        let size = usize::try_from(self.layout.block_size).unwrap_or(0);
        self.replayed = journal::replay(size, &mut |at, block| {
            let at = u64::from(at);
            let run = runs.get(runs.partition_point(|run| run.logical + run.length <= at));
            let run = run.filter(|run| run.logical <= at);
            let run = run.ok_or_else(|| self.damaged("its journal has a hole"))?;
            let place = run.physical + (at - run.logical);
            if !block.is_empty() {
                self.read_in_place(place, 0, block)?;
            }
            Ok(place)
        })?;
        Ok(())
    }

    /// Bytes of a block.
    pub(super) fn block_size(&self) -> u64 {
        self.layout.block_size
    }

    /// Whose it is, for people.
    pub(super) fn owner(&self) -> &'static str {
        self.side.owner()
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The blocks that the journal has newer.
    pub(super) fn replayed(&self) -> &Replayed {
        &self.replayed
    }

    /// Where blocks are on the disk, in bytes.
    pub(super) fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        let at = |block: u64| self.place.start + block * self.layout.block_size;
        at(blocks.start)..at(blocks.end)
    }

    /// Whether these are blocks that a file can have.
    pub(super) fn has_blocks(&self, blocks: &Range<u64>) -> bool {
        blocks.start > 0 && blocks.start <= blocks.end && blocks.end <= self.layout.blocks
    }

    /// Whether it has this block, and this is not the first.
    pub(super) fn has_block(&self, block: u64) -> bool {
        (1..self.layout.blocks).contains(&block)
    }

    /// A block that says something of the file system itself.
    ///
    /// # Errors
    /// It cannot be read, or there is none.
    pub(super) fn block(&mut self, number: u64) -> Result<Vec<u8>> {
        let mut block = vec![0; usize::try_from(self.layout.block_size).unwrap_or(0)];
        self.read_blocks(number, &mut block)?;
        Ok(block)
    }

    /// Fills `buffer` with blocks from `first` on.
    ///
    /// # Errors
    /// They cannot be read, or are not there.
    pub(super) fn read_blocks(&mut self, first: u64, buffer: &mut [u8]) -> Result<()> {
        let size = self.layout.block_size;
        let blocks = first..first.saturating_add((buffer.len() as u64).div_ceil(size));
        if blocks.end > self.layout.blocks {
            return Err(self.damaged("a block would lie behind its end"));
        }
        self.charge(blocks.end - blocks.start)?;
        self.read_in_place(first, 0, buffer)?;
        // The journal has few, mostly none of these.
        for (&block, copy) in self.replayed.range(blocks) {
            let at = usize::try_from((block - first) * size).unwrap_or(0);
            let end = buffer.len().min(at + usize::try_from(size).unwrap_or(0));
            self.read_in_place(copy.block, 0, &mut buffer[at..end])?;
            copy.restore(&mut buffer[at..end]);
        }
        Ok(())
    }

    /// Fills `buffer` with what is at `within` of a block. It is part of a table that is looked at again and again, and so
    /// counts for nothing.
    fn read_part(&self, block: u64, within: u64, buffer: &mut [u8]) -> Result<()> {
        match self.replayed.get(&block) {
            None => self.read_in_place(block, within, buffer),
            Some(copy) => {
                let mut whole = vec![0; usize::try_from(self.layout.block_size).unwrap_or(0)];
                self.read_in_place(copy.block, 0, &mut whole)?;
                copy.restore(&mut whole);
                let at = usize::try_from(within).unwrap_or(usize::MAX);
                let part = at.checked_add(buffer.len()).and_then(|end| whole.get(at..end));
                buffer
                    .copy_from_slice(part.ok_or_else(|| self.damaged("a table has an entry across blocks"))?);
                Ok(())
            }
        }
    }

    /// Without regard to the journal.
    fn read_in_place(&self, block: u64, within: u64, buffer: &mut [u8]) -> Result<()> {
        // The file system is not larger than its place.
        if block >= self.layout.blocks {
            return Err(self.damaged("a block would lie behind its end"));
        }
        let at = self.place.start + block * self.layout.block_size + within;
        self.disks.borrow_mut().read(self.side, at, buffer)
    }

    /// Where the bytes of an inode are: a block, and the place in it.
    ///
    /// # Errors
    /// There is no such inode, or its group makes no sense.
    pub(super) fn place_of(&self, number: u32) -> Result<(u64, u64)> {
        let size = self.layout.block_size;
        let place = self.layout.descriptor_of(number);
        let (at, within) = place.ok_or_else(|| self.damaged_inode(number, "is not there"))?;
        let mut descriptor = [0; 64];
        let descriptor = &mut descriptor[..self.layout.descriptor_size().min(64)];
        self.read_part(at / size, at % size, descriptor)?;
        let table = self.layout.inode_table(descriptor);
        let block = table.checked_add(within / size).filter(|&block| self.has_block(block));
        Ok((block.ok_or_else(|| self.damaged_inode(number, "is nowhere"))?, within % size))
    }

    /// The bytes of an inode.
    ///
    /// # Errors
    /// There is no such inode, or it cannot be read.
    pub(super) fn inode_bytes(&self, number: u32) -> Result<Box<[u8]>> {
        let (block, within) = self.place_of(number)?;
        let size = usize::try_from(self.layout.inode_size).unwrap_or(inode::LEAST);
        let mut bytes = vec![0; size].into_boxed_slice();
        self.read_part(block, within, &mut bytes)?;
        Ok(bytes)
    }

    /// An inode that is used.
    ///
    /// # Errors
    /// It is free, or makes no sense, or cannot be read.
    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        let bytes = self.inode_bytes(number)?;
        Inode::parse(number, bytes).map_err(|what| self.damaged_inode(number, what))
    }

    /// Counts what was looked at.
    ///
    /// # Errors
    /// It was more than a file system can take that is in order.
    pub(super) fn charge(&mut self, blocks: u64) -> Result<()> {
        match self.patience.checked_sub(blocks) {
            Some(left) => {
                self.patience = left;
                Ok(())
            }
            None => Err(self.damaged("its files have the same blocks over and over")),
        }
    }

    /// What is said of a file system that makes no sense.
    pub(super) fn damaged(&self, what: &str) -> Error {
        let message = format!("The file system of {} is damaged: {what}", self.side.owner());
        Error::new(ErrorKind::Invalid, message).advise("check a copy of it with e2fsck")
    }

    /// The same, of an inode.
    pub(super) fn damaged_inode(&self, number: u32, what: &str) -> Error {
        self.damaged(&format!("inode {number} {what}"))
    }
}
