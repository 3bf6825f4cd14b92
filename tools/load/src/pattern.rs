//! Which request comes next: sequential or random, reads, writes, trims or a mixture, with or without repetition.

use std::fmt;
use std::str::FromStr;

use memdev::proto::Command;

/// The kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    RandRead,
    RandWrite,
    Read,
    Write,
    /// Trims from the start on, one after the other.
    Trim,
    /// Random reads and writes in this proportion.
    Mixed {
        reads: u32,
        writes: u32,
    },
    /// Connect, handshake, one read, disconnect, again and again.
    Open,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "randread" => Self::RandRead,
            "randwrite" => Self::RandWrite,
            "read" => Self::Read,
            "write" => Self::Write,
            "trim" => Self::Trim,
            "open" => Self::Open,
            _ => {
                let mixed = text.strip_prefix("mixed:").and_then(|shares| shares.split_once(':'));
                let share = |text: &str| text.parse::<u32>().ok().filter(|&n| n <= 1000);
                match mixed.and_then(|(r, w)| share(r).zip(share(w))) {
                    Some((reads, writes)) if reads + writes > 0 => Self::Mixed { reads, writes },
                    _ => {
                        return Err(format!(
                            "'{text}' is no pattern; one of randread, randwrite, read, write, trim, mixed:R:W, open"
                        ));
                    }
                }
            }
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RandRead => f.write_str("randread"),
            Self::RandWrite => f.write_str("randwrite"),
            Self::Read => f.write_str("read"),
            Self::Write => f.write_str("write"),
            Self::Trim => f.write_str("trim"),
            Self::Mixed { reads, writes } => write!(f, "mixed:{reads}:{writes}"),
            Self::Open => f.write_str("open"),
        }
    }
}

/// A small fast generator (SplitMix64): the draw must cost less than anything that is measured.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly drawn from `0..bound`.
    fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("the product's upper half")
    }

    /// Fills `bytes` with noise: data that no server can take for zeroes.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_be_bytes()[..part.len()]);
        }
    }
}

/// Visits each of `0..count` once in a scrambled order, without remembering where it has been: a bijection on the
/// next power of two, walked until it falls inside.
fn scramble(index: u64, count: u64, key: u64) -> u64 {
    let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
    let mask = if bits == 0 { 0 } else { u64::MAX >> (u64::BITS - bits) };
    let shift = (bits / 2).max(1);
    let mut x = index;
    loop {
        x = (x ^ key) & mask;
        for factor in [0x9e37_79b9_7f4a_7c15_u64, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
            x = x.wrapping_mul(factor) & mask;
            x ^= x >> shift;
        }
        if x < count {
            return x;
        }
    }
}

/// One connection's endless (or, without repetition, finite) row of requests.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pattern: Pattern,
    block: u32,
    /// How many places there are.
    places: u64,
    /// Bytes from one place to the next.
    stride: u64,
    /// Where this connection starts among those who share the places, and how many they are.
    lane: u64,
    lanes: u64,
    distinct: bool,
    issued: u64,
    random: Random,
    key: u64,
}

/// What a [`Source`] is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) pattern: Pattern,
    /// Bytes a request.
    pub(crate) block: u32,
    /// Bytes of the export, from its start, that are used.
    pub(crate) span: u64,
    /// Offsets are multiples of this many bytes.
    pub(crate) align: u64,
    /// Every place at most once.
    pub(crate) distinct: bool,
    pub(crate) seed: u64,
}

impl Source {
    /// The source of connection `lane` of `lanes` that divide the places between them.
    pub(crate) fn new(plan: &Plan, lane: u64, lanes: u64) -> Self {
        let stride = plan.align.max(1);
        let places = plan.span.saturating_sub(u64::from(plan.block)) / stride + u64::from(plan.span > 0);
        let mut random = Random::new(plan.seed.wrapping_add(lane.wrapping_mul(0x5851_f42d_4c95_7f2d)));
        let key = Random::new(plan.seed).next();
        // Sequential streams that share a session would otherwise all start at the same place.
        let _ = random.next();
        Self {
            pattern: plan.pattern,
            block: plan.block,
            places,
            stride,
            lane,
            lanes: lanes.max(1),
            distinct: plan.distinct,
            issued: 0,
            random,
            key,
        }
    }

    /// The next request's command, offset and length; None when every place has been visited.
    pub(crate) fn next(&mut self) -> Option<(Command, u64, u32)> {
        let turn = self.issued * self.lanes + self.lane;
        let sequential = matches!(self.pattern, Pattern::Read | Pattern::Write | Pattern::Trim);
        if self.distinct && turn >= self.places {
            return None;
        }
        self.issued += 1;
        let place = match (sequential, self.distinct) {
            (true, _) => turn % self.places,
            (false, true) => scramble(turn, self.places, self.key),
            (false, false) => self.random.below(self.places),
        };
        let command = match self.pattern {
            Pattern::RandRead | Pattern::Read | Pattern::Open => Command::Read,
            Pattern::RandWrite | Pattern::Write => Command::Write,
            Pattern::Trim => Command::Trim,
            Pattern::Mixed { reads, writes } => {
                if self.random.below(u64::from(reads + writes)) < u64::from(reads) {
                    Command::Read
                } else {
                    Command::Write
                }
            }
        };
        Some((command, place * self.stride, self.block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scramble_visits_everything_once() {
        for count in [1, 2, 3, 7, 64, 1000, 4097] {
            let mut seen: Vec<u64> = (0..count).map(|i| scramble(i, count, 0x1234_5678_9abc)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..count), "{count}");
        }
    }

    #[test]
    fn connections_that_share_a_session_divide_its_places() {
        let plan = Plan {
            pattern: Pattern::RandWrite,
            block: 512,
            span: 100 * 4096,
            align: 4096,
            distinct: true,
            seed: 7,
        };
        let mut seen = Vec::new();
        for lane in 0..3 {
            let mut source = Source::new(&plan, lane, 3);
            while let Some((command, offset, length)) = source.next() {
                assert_eq!((command, length), (Command::Write, 512));
                seen.push(offset / 4096);
            }
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..100));
    }

    #[test]
    fn patterns_read_back_as_they_print() {
        for text in ["randread", "randwrite", "read", "write", "trim", "mixed:2:1", "open"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        assert!("mixed:0:0".parse::<Pattern>().is_err());
        assert!("reed".parse::<Pattern>().is_err());
    }
}
