//! The overlay's unit.

/// The overlay's unit, in bytes: a power of two from 4 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(u32);

impl BlockSize {
    /// 4 KiB: the page size of most hosts and the block size of most file systems.
    pub const DEFAULT: Self = Self(4096);
    /// The smallest.
    pub const MIN: u32 = 4096;
    /// The largest.
    pub const MAX: u32 = 1 << 20;

    /// A block size of `bytes`, if it is a power of two within the limits.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// In bytes, as a length in memory.
    #[must_use]
    pub fn in_memory(self) -> usize {
        self.0 as usize
    }

    /// The block that byte `offset` is in.
    #[must_use]
    pub fn index_of(self, offset: u64) -> u64 {
        offset >> self.0.trailing_zeros()
    }

    /// Where in its block byte `offset` is.
    #[must_use]
    pub fn offset_within(self, offset: u64) -> usize {
        #[allow(clippy::cast_possible_truncation, reason = "below 1 MiB by construction")]
        let within = (offset & (self.bytes() - 1)) as usize;
        within
    }

    /// Blocks needed for `bytes` bytes.
    #[must_use]
    pub fn blocks_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}
