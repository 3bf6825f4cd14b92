//! What the device should hold: an array of bytes, some of which may be one of several.
//!
//! A write that failed may have happened in part, and of requests that are in flight together and overlap either may be
//! the last: then a byte may be what either left. What is read settles it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::world::BLOCK;

/// One block that was touched.
#[derive(Debug)]
struct Known {
    now: Vec<u8>,
    /// What else each byte may be.
    or: Vec<Vec<u8>>,
}

/// What the device should hold.
#[derive(Debug)]
pub(crate) struct Model<'a> {
    base: &'a [u8],
    touched: BTreeMap<u64, Known>,
    /// Whether requests are done in the order in which they are told here.
    exact: bool,
}

fn place(at: u64) -> usize {
    usize::try_from(at).expect("a small disk")
}

impl<'a> Model<'a> {
    pub(crate) fn new(base: &'a [u8], exact: bool) -> Self {
        Self { base, touched: BTreeMap::new(), exact }
    }

    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    fn size(&self) -> u64 {
        self.base.len() as u64
    }

    /// Changes the bytes of `range` by `fill`, which gets a part of it and where in it the part begins. If not
    /// `certain`, each byte may also have stayed as it was.
    pub(crate) fn change(&mut self, range: Range<u64>, certain: bool, fill: impl Fn(usize, &mut [u8])) {
        for (block, part) in parts(&range) {
            let base = self.base;
            let known = self.touched.entry(block).or_insert_with(|| {
                let end = ((block + 1) * BLOCK).min(base.len() as u64);
                Known { now: base[place(block * BLOCK)..place(end)].to_vec(), or: Vec::new() }
            });
            let mut new = known.now.clone();
            fill(place((block * BLOCK).saturating_sub(range.start)), &mut new[part.clone()]);
            if certain && self.exact {
                for other in &mut known.or {
                    other[part.clone()].copy_from_slice(&new[part.clone()]);
                }
                known.now = new;
            } else if new != known.now && !known.or.contains(&new) {
                known.or.push(new);
            }
        }
    }

    /// The range reads as zeroes.
    pub(crate) fn zero(&mut self, range: Range<u64>, certain: bool) {
        self.change(range, certain, |_, part| part.fill(0));
    }

    /// The whole blocks in the range read as zeroes; the last block is whole however short it is.
    pub(crate) fn trim(&mut self, range: Range<u64>, certain: bool) {
        let start = range.start.next_multiple_of(BLOCK);
        let end = if range.end == self.size() { range.end } else { range.end / BLOCK * BLOCK };
        if start < end {
            self.zero(start..end, certain);
        }
    }

    /// Panics unless `data` is what may be read at `offset`; settles what was uncertain there.
    pub(crate) fn check(&mut self, offset: u64, data: &[u8]) {
        let range = offset..offset + data.len() as u64;
        for (block, part) in parts(&range) {
            let first = block * BLOCK + part.start as u64;
            let got = &data[place(first - offset)..][..part.len()];
            let Some(known) = self.touched.get_mut(&block) else {
                check_equal(got, &self.base[place(first)..][..part.len()], first);
                continue;
            };
            if known.or.is_empty() {
                check_equal(got, &known.now[part], first);
                continue;
            }
            for (at, byte) in part.clone().zip(got) {
                let may_be = known.now[at] == *byte || known.or.iter().any(|other| other[at] == *byte);
                assert!(may_be, "byte {} is {byte:#04x}, which nobody put there", block * BLOCK + at as u64);
            }
            if self.exact {
                known.now[part.clone()].copy_from_slice(got);
                known.or.iter_mut().for_each(|other| other[part.clone()].copy_from_slice(got));
            }
        }
    }

    /// Panics unless every byte of the range may be zero.
    pub(crate) fn check_zero(&self, range: Range<u64>) {
        const ZEROES: [u8; 4096] = [0; 4096];
        self.check_each(range, "zero", |base| &ZEROES[..base.len()]);
    }

    /// Panics unless every byte of the range may be the base's.
    pub(crate) fn check_unwritten(&self, range: Range<u64>) {
        self.check_each(range, "not written to", |base| base);
    }

    /// Panics unless every block of the range was touched.
    pub(crate) fn check_written(&self, range: Range<u64>) {
        for (block, _) in parts(&range) {
            assert!(self.touched.contains_key(&block), "block {block} is called written to");
        }
    }

    fn check_each(&self, range: Range<u64>, what: &str, expected: impl for<'b> Fn(&'b [u8]) -> &'b [u8]) {
        for (block, part) in parts(&range) {
            let base = &self.base[place(block * BLOCK) + part.start..][..part.len()];
            let expected = expected(base);
            let at = match self.touched.get(&block) {
                None if base == expected => continue,
                None => 0,
                Some(known) if known.now[part.clone()] == *expected => continue,
                Some(known) => {
                    let may_be = |at: &usize| {
                        let expected = expected[at - part.start];
                        known.now[*at] == expected || known.or.iter().any(|other| other[*at] == expected)
                    };
                    let Some(at) = part.clone().find(|at| !may_be(at)) else { continue };
                    at - part.start
                }
            };
            panic!("byte {} or one behind it is called {what} and is not", block * BLOCK + at as u64);
        }
    }

    /// The blocks that were touched.
    pub(crate) fn touched(&self) -> impl DoubleEndedIterator<Item = u64> + '_ {
        self.touched.keys().copied()
    }
}

/// The parts of the blocks that make up a range: a block, and the bytes within it.
fn parts(range: &Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
    let range = range.clone();
    let blocks = if range.is_empty() { 0..0 } else { range.start / BLOCK..range.end.div_ceil(BLOCK) };
    blocks.map(move |block| {
        let within = |at: u64| place(at.clamp(block * BLOCK, (block + 1) * BLOCK) - block * BLOCK);
        (block, within(range.start)..within(range.end))
    })
}

fn check_equal(got: &[u8], expected: &[u8], first: u64) {
    if got == expected {
        return;
    }
    let at = got.iter().zip(expected).position(|(a, b)| a != b).expect("of one length, and different");
    panic!("byte {} is {:#04x} and should be {:#04x}", first + at as u64, got[at], expected[at]);
}
