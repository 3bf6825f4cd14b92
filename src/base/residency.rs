//! Which pages of an image were seen in memory: a hint that keeps workers from waiting for a disk.
//!
//! One bit a page, set once the page was found in the page cache. The kernel may drop pages later; a helper thread looks
//! from time to time ([`Residency::recheck`]) and clears the bits of those that went.

use crate::sys::Mapping;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Words of bits in one part, which is made when a bit in it is first set: a huge sparse image costs next to nothing.
const WORDS: usize = 512;
/// Pages that a part stands for: 128 MiB of pages of 4 KiB.
const PART: u64 = 64 * WORDS as u64;
/// Parts that one call of `recheck` looks at.
const RECHECK: usize = 2;

type Part = Box<[AtomicU64; WORDS]>;

#[derive(Debug)]
pub(super) struct Residency {
    size: u64,
    /// A page is two to the power of this many bytes.
    page_shift: u32,
    parts: Box<[OnceLock<Part>]>,
    /// Parts all of whose words are full: of an image that is all in memory, this is all that reads look at.
    full: Box<[AtomicBool]>,
    next: AtomicUsize,
}

/// Some bits of one word.
#[derive(Debug, PartialEq, Eq)]
struct Bits {
    part: usize,
    word: usize,
    mask: u64,
}

/// The bits of a range of pages, word by word.
fn bits(pages: Range<u64>) -> impl Iterator<Item = Bits> {
    let words = if pages.is_empty() { 0..0 } else { pages.start / 64..pages.end.div_ceil(64) };
    words.map(move |word| {
        let low = pages.start.saturating_sub(word * 64);
        let high = (pages.end - word * 64).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        Bits { part: index(word / WORDS as u64), word: index(word % WORDS as u64), mask }
    })
}

/// The bits of up to 64 pages of which the kernel has told.
fn word_of(pages: &[u8]) -> u64 {
    pages.iter().rev().fold(0, |bits, page| bits << 1 | u64::from(page & 1))
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("the image is mapped, so its pages can be counted")
}

impl Residency {
    pub(super) fn new(size: u64) -> Self {
        let page_shift = rustix::param::page_size().trailing_zeros();
        let count = index(size.div_ceil(1 << page_shift).div_ceil(PART));
        Self {
            size,
            page_shift,
            parts: (0..count).map(|_| OnceLock::new()).collect(),
            full: (0..count).map(|_| AtomicBool::new(false)).collect(),
            next: AtomicUsize::new(0),
        }
    }

    fn pages(&self, range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        range.start >> self.page_shift..((range.end - 1) >> self.page_shift) + 1
    }

    /// Bytes of `pages` pages.
    fn bytes(&self, pages: u64) -> u64 {
        pages << self.page_shift
    }

    /// Whether all of `range` was seen in memory.
    pub(super) fn is_seen(&self, range: &Range<u64>) -> bool {
        let pages = self.pages(range);
        let parts = index(pages.start / PART)..index(pages.end.div_ceil(PART));
        self.full[parts].iter().all(|full| full.load(Ordering::Relaxed))
            || bits(pages).all(|Bits { part, word, mask }| {
                self.parts[part].get().is_some_and(|part| part[word].load(Ordering::Relaxed) & mask == mask)
            })
    }

    /// Notes that all of `range` was just read.
    pub(super) fn set_seen(&self, range: &Range<u64>) {
        bits(self.pages(range)).for_each(|bits| self.set(&bits));
    }

    fn set(&self, bits: &Bits) {
        let part = self.parts[bits.part].get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        let before = part[bits.word].fetch_or(bits.mask, Ordering::Relaxed);
        // The last part of an image is full only if all of it is pages of the image: else its words are looked at.
        if before != u64::MAX && before | bits.mask == u64::MAX {
            let is_full = part.iter().all(|word| word.load(Ordering::Relaxed) == u64::MAX);
            self.full[bits.part].store(is_full, Ordering::Relaxed);
        }
    }

    /// Looks which pages in and around `range` are in memory, and notes them: where one is, its neighbours often are, too,
    /// and need not be looked for one by one. Those around it are the rest of the words that its own bits are in: no page
    /// is looked for again for a neighbour's sake, and a vain look costs next to nothing.
    pub(super) fn look_around(&self, range: &Range<u64>, mapping: &Mapping) {
        let pages = self.pages(range);
        let start = pages.start / 64 * 64;
        let end = pages.end.next_multiple_of(64).min(self.pages(&(0..self.size)).end);
        let mut resident = vec![0; index(end.saturating_sub(start))];
        if mapping.residency(index(self.bytes(start)), &mut resident).is_err() {
            return;
        }
        for (word, pages) in (start / 64..).zip(resident.chunks(64)) {
            let mask = word_of(pages);
            if mask != 0 {
                self.set(&Bits { part: index(word / WORDS as u64), word: index(word % WORDS as u64), mask });
            }
        }
    }

    /// Looks at the next part of the image, and forgets pages that are in memory no longer.
    /// Where the kernel does not tell (`is_told`), all of the part is forgotten: that costs an order a page, and no wait.
    pub(super) fn recheck(&self, mapping: &Mapping, is_told: bool) {
        let first = self.next.fetch_add(RECHECK, Ordering::Relaxed);
        if first >= self.parts.len() {
            self.next.store(0, Ordering::Relaxed);
            return;
        }
        for (number, part) in self.parts.iter().enumerate().skip(first).take(RECHECK) {
            let Some(part) = part.get() else { continue };
            let start = number as u64 * PART;
            let count = (self.pages(&(0..self.size)).end - start).min(PART);
            let mut resident = vec![0; index(count)];
            let asked = mapping.residency(index(self.bytes(start)), &mut resident);
            for (word, pages) in part.iter().zip(resident.chunks(64)) {
                let kept = if is_told && asked.is_ok() { word_of(pages) } else { 0 };
                if kept != u64::MAX {
                    self.full[number].store(false, Ordering::Relaxed);
                }
                word.fetch_and(kept, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masks(pages: Range<u64>) -> Vec<(usize, usize, u64)> {
        bits(pages).map(|bits| (bits.part, bits.word, bits.mask)).collect()
    }

    #[test]
    fn words_and_masks_cover_exactly_the_pages() {
        assert_eq!(masks(3..130), [(0, 0, u64::MAX << 3), (0, 1, u64::MAX), (0, 2, 0b11)]);
        assert_eq!(masks(PART - 1..PART + 1), [(0, WORDS - 1, 1 << 63), (1, 0, 1)]);
        assert_eq!(masks(5..5), []);
    }

    #[test]
    fn a_full_part_is_known_as_a_whole_until_a_page_of_it_goes() {
        const SIZE: u64 = PART * 4096 + 1;
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let mapping = Mapping::new(&file, SIZE).unwrap();
        let residency = Residency::new(SIZE);
        residency.set_seen(&(0..SIZE));
        let full = || residency.full.iter().map(|full| full.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(full(), [true, false]);
        assert!(residency.is_seen(&(0..SIZE)));
        // Nothing of the file was ever read, so nothing of it is in memory.
        residency.recheck(&mapping, true);
        assert_eq!(full(), [false, false]);
        assert!(!residency.is_seen(&(4096..4097)));
    }

    #[test]
    fn a_look_finds_what_is_there_of_the_words_that_it_is_about() {
        const PAGE: u64 = 4096;
        let pages = |first: u64, count: u64| first * PAGE..(first + count) * PAGE;
        let file = tempfile::tempfile().unwrap();
        // The last word has ten pages, the last of them a byte.
        let size = (3 * 64 + 9) * PAGE + 1;
        file.set_len(size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 70 * 4096], 60 * PAGE).unwrap();
        let mapping = Mapping::new(&file, size).unwrap();
        let residency = Residency::new(size);
        residency.look_around(&(70 * PAGE..70 * PAGE + 1), &mapping);
        assert!(residency.is_seen(&pages(64, 64)));
        assert!(!residency.is_seen(&pages(63, 1)) && !residency.is_seen(&pages(128, 1)));
        residency.look_around(&(0..size), &mapping);
        assert!(residency.is_seen(&pages(60, 70)));
        assert!(!residency.is_seen(&pages(59, 1)) && !residency.is_seen(&pages(130, 1)));
        residency.look_around(&(size - 1..size), &mapping);
        assert!(!residency.is_seen(&(size - 1..size)));
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", size - 1).unwrap();
        residency.look_around(&(size - 1..size), &mapping);
        assert!(residency.is_seen(&(size - 1..size)));
        residency.look_around(&(5..5), &mapping);
    }

    #[test]
    fn what_was_seen_is_known_page_by_page() {
        let residency = Residency::new(1 << 40);
        let page = residency.bytes(1);
        assert!(residency.is_seen(&(7..7)) && !residency.is_seen(&(7..8)));
        residency.set_seen(&(page + 5..3 * page));
        assert!(residency.is_seen(&(page..3 * page)));
        assert!(!residency.is_seen(&(page..3 * page + 1)) && !residency.is_seen(&(page - 1..page)));
        assert_eq!(residency.parts.iter().filter(|part| part.get().is_some()).count(), 1);
    }
}
