//! The truth that a session is compared with: a plain array of bytes.

use std::ops::Range;

use super::{Client, Image, Random, Request, size};

/// The unit in which TRIM must take effect; at its edges it may.
const BLOCK: u64 = 4096;

/// What a session must hold.
#[derive(Clone, Debug)]
pub struct Model {
    bytes: Vec<u8>,
    /// Of every block, what the session did to it.
    touched: Vec<Touch>,
}

/// What a session did to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    /// Nothing: it must not be called dirty.
    Never,
    /// It was zeroed or trimmed, which may have changed nothing.
    Zeroed,
    /// It was written to: it must be called dirty.
    Written,
}

impl Model {
    /// A fresh session's content.
    pub fn of(image: &Image) -> Self {
        let bytes = image.all();
        Self { touched: vec![Touch::Never; bytes.len().div_ceil(size(BLOCK))], bytes }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// What a read must give.
    pub fn read(&self, offset: u64, length: u64) -> &[u8] {
        &self.bytes[size(offset)..size(offset + length)]
    }

    /// A write took place.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.bytes[size(offset)..size(offset) + data.len()].copy_from_slice(data);
        self.blocks(offset, data.len() as u64).fill(Touch::Written);
    }

    /// The range was zeroed.
    pub fn zero(&mut self, offset: u64, length: u64) {
        self.bytes[size(offset)..size(offset + length)].fill(0);
        for touch in self.blocks(offset, length) {
            if *touch == Touch::Never {
                *touch = Touch::Zeroed;
            }
        }
    }

    /// What was done to the blocks of a range.
    fn blocks(&mut self, offset: u64, length: u64) -> &mut [Touch] {
        let end = if length == 0 { offset } else { (offset + length).next_multiple_of(BLOCK) };
        &mut self.touched[size(offset / BLOCK)..size(end / BLOCK).max(size(offset / BLOCK))]
    }

    /// The range was trimmed: whole blocks are zero now; in the returned ranges each byte is either kept or zero.
    pub fn trim(&mut self, offset: u64, length: u64) -> Vec<Range<u64>> {
        let end = offset + length;
        let first = offset.next_multiple_of(BLOCK);
        // The image's last block is whole however short it is.
        let last = if end == self.size() { end } else { end / BLOCK * BLOCK };
        if first >= last {
            return if length == 0 { Vec::new() } else { std::iter::once(offset..end).collect() };
        }
        self.zero(first, last - first);
        [offset..first, last..end].into_iter().filter(|range| !range.is_empty()).collect()
    }

    /// Takes over what a trimmed block's edge reads as; panics unless each byte is either kept or zero.
    #[track_caller]
    pub fn adopt(&mut self, offset: u64, got: &[u8]) {
        for (index, (&old, &new)) in self.read(offset, got.len() as u64).iter().zip(got).enumerate() {
            assert!(
                new == old || new == 0,
                "byte {} at the edge of a trim was {old:#04x} and reads {new:#04x}",
                offset + index as u64
            );
        }
        self.bytes[size(offset)..size(offset) + got.len()].copy_from_slice(got);
    }
}

/// Panics with the first difference; a dump of megabytes helps nobody.
#[track_caller]
pub fn assert_bytes(got: &[u8], expected: &[u8], offset: u64) {
    assert_eq!(got.len(), expected.len(), "lengths at {offset}");
    if got == expected {
        return;
    }
    let wrong = || got.iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at);
    let first = wrong().next().expect("they differ");
    let last = wrong().next_back().expect("they differ");
    let upto = got.len().min(first + 16);
    panic!(
        "{} bytes differ, the first at {} and the last at {}: got {:02x?}, expected {:02x?}",
        wrong().count(),
        offset + first as u64,
        offset + last as u64,
        &got[first..upto],
        &expected[first..upto],
    );
}

/// A client whose every operation is checked against a model.
pub struct Checked {
    /// The connection.
    pub client: Client,
    /// What the session must hold.
    pub model: Model,
}

impl Checked {
    /// A client of a fresh session on `image`.
    pub fn new(client: Client, image: &Image) -> Self {
        Self { client, model: Model::of(image) }
    }

    /// Reads and compares.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) {
        let got = self.client.read(offset, length);
        assert_bytes(&got, self.model.read(offset, length), offset);
    }

    /// Reads and compares everything.
    #[track_caller]
    pub fn read_all(&mut self) {
        let got = self.client.read_all();
        assert_bytes(&got, self.model.read(0, self.model.size()), 0);
    }

    /// Writes.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.client.write(offset, data);
        self.model.write(offset, data);
    }

    /// Writes zeroes.
    #[track_caller]
    pub fn zeroes(&mut self, offset: u64, length: u64, flags: u16) {
        self.client.call(&Request::zeroes(offset, length).with(flags)).ok();
        self.model.zero(offset, length);
    }

    /// Trims, and adopts what the edges read as.
    #[track_caller]
    pub fn trim(&mut self, offset: u64, length: u64) {
        self.client.trim(offset, length);
        for edge in self.model.trim(offset, length) {
            let got = self.client.read(edge.start, edge.end - edge.start);
            self.model.adopt(edge.start, &got);
        }
    }

    /// Asks for block status and checks that what is called zero is zero.
    #[track_caller]
    pub fn status(&mut self, offset: u64, length: u64) {
        let mut at = offset;
        for (extent, state) in self.client.status(offset, length) {
            if state & super::nbd::STATE_ZERO != 0 {
                let zero = self.model.read(at, extent).iter().all(|&byte| byte == 0);
                assert!(zero, "{extent} bytes at {at} are reported as zero and are not");
            }
            at += extent;
        }
        assert_eq!(at, offset + length, "block status covers what was asked for");
        if self.client.contexts.iter().any(|context| context.1 == "memdev:dirty") {
            self.dirty(offset, length);
        }
    }

    /// Asks which blocks the session wrote: those and no others.
    #[track_caller]
    fn dirty(&mut self, offset: u64, length: u64) {
        let mut at = offset;
        let context = self.client.context("memdev:dirty");
        for (extent, state) in self.client.status_of(context, offset, length) {
            if state & super::nbd::DIRTY_ZERO != 0 {
                assert!(self.model.read(at, extent).iter().all(|&byte| byte == 0), "dirty and zero at {at}");
            }
            let wrong = if state & super::nbd::DIRTY == 0 { Touch::Written } else { Touch::Never };
            let first = at / BLOCK;
            for (block, touch) in (first..).zip(self.model.blocks(at, extent).iter()) {
                assert_ne!(*touch, wrong, "block {block} has the dirty state {state}");
            }
            at += extent;
        }
        assert_eq!(at, offset + length, "block status covers what was asked for");
    }

    /// One random operation of at most `most` bytes; block status only with `structured` replies.
    #[track_caller]
    pub fn random_step(&mut self, random: &mut Random, most: u64, structured: bool) {
        let (offset, length) = random_range(random, self.model.size(), most);
        match random.below(100) {
            0..40 => self.read(offset, length),
            40..75 => {
                let data = random.bytes(length);
                self.write(offset, &data);
            }
            75..80 => self.write(offset, &vec![0; size(length)]),
            80..88 => self.trim(offset, length),
            88..95 => {
                let flags = [0, super::nbd::NO_HOLE, super::nbd::FUA][size(random.below(3))];
                self.zeroes(offset, length, flags);
            }
            95..97 => self.client.flush(),
            _ if structured => self.status(offset, length),
            _ => self.read(offset, length),
        }
    }
}

/// A range inside `0..total`: mostly small and odd, sometimes whole blocks, at most `most` bytes.
pub fn random_range(random: &mut Random, total: u64, most: u64) -> (u64, u64) {
    let most = most.min(total);
    let length = match random.below(4) {
        0 => random.between(1, most.min(600)),
        1 => random.between(1, most.min(3 * BLOCK)),
        2 => (random.between(1, 4) * BLOCK).min(most),
        _ => random.between(1, most),
    };
    let offset = random.below(total - length + 1);
    let offset = if random.below(3) == 0 { offset / BLOCK * BLOCK } else { offset };
    (offset, length)
}
