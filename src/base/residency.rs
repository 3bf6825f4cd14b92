//! Which parts of an image were seen in memory: a hint that keeps workers from waiting for a disk.
//!
//! One bit a granule, set once the granule was read into the page cache. The kernel may drop pages later; a helper
//! thread looks from time to time ([`Residency::recheck`]) and clears the bits of those that went.

use crate::sys::Mapping;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes that one bit stands for: the kernel's own fault-around size, so one fault maps a granule.
const GRANULE: u64 = 64 << 10;
/// Bytes that one call of `recheck` looks at.
const RECHECK: u64 = 256 << 20;

#[derive(Debug)]
pub(super) struct Residency {
    size: u64,
    // 2 MiB for a 1 TiB image, once for all its sessions.
    seen: Vec<AtomicU64>,
    next: AtomicUsize,
}

fn granules(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / GRANULE..range.end.div_ceil(GRANULE) }
}

/// The words that a range of granules touches, each with the mask of its bits.
fn words(granules: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let (first, end) = (granules.start, granules.end);
    let words = if first < end { first / 64..end.div_ceil(64) } else { 0..0 };
    words.map(move |word| {
        let low = first.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        (usize::try_from(word).expect("the image is mapped, so its granules can be counted"), mask)
    })
}

impl Residency {
    pub(super) fn new(size: u64) -> Self {
        let count = usize::try_from(size.div_ceil(GRANULE).div_ceil(64)).expect("the image is mapped");
        let seen = (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { size, seen, next: AtomicUsize::new(0) }
    }

    pub(super) fn is_seen(&self, range: Range<u64>) -> bool {
        words(granules(&range)).all(|(word, mask)| self.seen[word].load(Ordering::Relaxed) & mask == mask)
    }

    pub(super) fn set_seen(&self, range: Range<u64>) {
        for (word, mask) in words(granules(&range)) {
            self.seen[word].fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// The granules of `range` that were not seen, as byte ranges that end with the image, neighbours in one.
    pub(super) fn unseen(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for granule in granules(&range) {
            let bytes = granule * GRANULE..((granule + 1) * GRANULE).min(self.size);
            match found.last_mut() {
                _ if self.is_seen(bytes.clone()) => {}
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => found.push(bytes),
            }
        }
        found
    }

    pub(super) fn recheck(&self, mapping: &Mapping) {
        let page = rustix::param::page_size() as u64;
        let granules_in_all = self.size.div_ceil(GRANULE);
        let words_each = usize::try_from(RECHECK / GRANULE / 64).unwrap_or(1).max(1);
        let first = self.next.fetch_add(words_each, Ordering::Relaxed);
        if first >= self.seen.len() {
            self.next.store(0, Ordering::Relaxed);
            return;
        }
        let mut pages = [0_u8; 64];
        for (word, seen) in self.seen.iter().enumerate().skip(first).take(words_each) {
            let mut bits = seen.load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let granule = word as u64 * 64 + u64::from(bit);
                debug_assert!(granule < granules_in_all);
                let start = granule * GRANULE;
                let end = (start + GRANULE).min(self.size);
                let count = usize::try_from((end - start).div_ceil(page)).unwrap_or(0).min(pages.len());
                let Ok(offset) = usize::try_from(start) else { return };
                let gone = mapping.residency(offset, &mut pages[..count]).is_err()
                    || pages[..count].iter().any(|page| page & 1 == 0);
                if gone {
                    seen.fetch_and(!(1 << bit), Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_masks_cover_exactly_the_granules() {
        let all: Vec<_> = words(3..130).collect();
        assert_eq!(all, [(0, u64::MAX << 3), (1, u64::MAX), (2, 0b11)]);
        assert_eq!(words(64..65).collect::<Vec<_>>(), [(1, 1)]);
        assert_eq!(words(5..5).count(), 0);
    }

    #[test]
    fn unseen_granules_are_merged_and_end_with_the_image() {
        let residency = Residency::new(GRANULE * 4 + 100);
        residency.set_seen(GRANULE..GRANULE + 1);
        assert_eq!(residency.unseen(0..GRANULE * 4 + 100), [0..GRANULE, GRANULE * 2..GRANULE * 4 + 100]);
        assert!(residency.is_seen(GRANULE + 5..GRANULE * 2));
        assert!(!residency.is_seen(GRANULE + 5..GRANULE * 2 + 1));
        assert!(residency.is_seen(7..7));
    }
}
