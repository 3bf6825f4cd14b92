//! What was asked for over a connection, and how long it took: counted where it is done, added up when somebody asks.
//!
//! ```text
//!   worker ── adds ──> Traffic (a connection's own)  ──┐
//!                      Traffic                       ──┴── added up ──> Totals: of a session, of the server
//!                      connections that have closed ─────────────────────^
//! ```
//!
//! Every connection has counters of its own, which only its worker writes: each is a load and a store, and no processor
//! waits for another's. Whoever adds them up sees every counter as it was at some moment lately; two of them need not be
//! of the same moment.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Read requests.
    Reads,
    /// Write requests.
    Writes,
    /// Write-zeroes requests.
    Zeroes,
    /// Trim requests.
    Trims,
    /// Flush requests.
    Flushes,
    /// Other requests: block status and cache.
    Others,
    /// Requests of any kind that were answered by an error.
    Errors,
    /// Bytes that read requests asked for.
    BytesRead,
    /// Bytes of payload that write requests brought.
    BytesWritten,
    /// Bytes that were read from the base image,
    BytesFromBase,
    /// from what the session had written,
    BytesFromOverlay,
    /// and from neither: they were known to be zero.
    BytesFromHoles,
}

impl Count {
    const NUMBER: usize = Self::BytesFromHoles as usize + 1;
}

/// Kinds of requests whose times are kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// All others.
    Other,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Other];
}

/// Buckets of times, each for twice those of the one before: up to 1 µs, 2 µs, ... 2^22 µs (4.2 s), and beyond.
const BUCKETS: usize = 24;

/// The bucket for a time.
fn bucket(nanos: u64) -> usize {
    let micros = nanos.div_ceil(1000).max(1);
    // The power of two that is not smaller: 1 is 0, 2 is 1, 3 and 4 are 2.
    let power = u64::BITS - (micros - 1).leading_zeros();
    (power as usize).min(BUCKETS - 1)
}

/// The longest time that the bucket is for; the last has none.
fn bound(bucket: usize) -> Option<Duration> {
    (bucket + 1 < BUCKETS).then(|| Duration::from_micros(1 << bucket))
}

/// What went over one connection, counted by the worker that it is on.
#[derive(Debug, Default)]
pub struct Traffic {
    counts: [AtomicU64; Count::NUMBER],
    times: [Times; Kind::ALL.len()],
}

#[derive(Debug, Default)]
struct Times {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

/// Adds to a counter that nobody else writes.
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

impl Traffic {
    /// Counts. Only for the thread that has the connection: of two at the same time, one would be lost.
    pub fn add(&self, what: Count, count: u64) {
        add(&self.counts[what as usize], count);
    }

    /// Notes that so many requests took so long each. Only for the thread that has the connection.
    pub fn took(&self, kind: Kind, requests: u64, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let times = &self.times[kind as usize];
        add(&times.buckets[bucket(nanos)], requests);
        add(&times.nanos, nanos.saturating_mul(requests));
    }
}

/// Sums of what went over some connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    counts: [u64; Count::NUMBER],
    times: [Histogram; Kind::ALL.len()],
}

/// How many requests took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    nanos: u64,
}

impl Totals {
    /// How many, or how much.
    #[must_use]
    pub fn get(&self, what: Count) -> u64 {
        self.counts[what as usize]
    }

    /// How long requests of a kind took.
    #[must_use]
    pub fn times(&self, kind: Kind) -> &Histogram {
        &self.times[kind as usize]
    }

    /// These sums, or those of `earlier` where they are higher: for sums that may only grow.
    #[must_use]
    pub fn at_least(mut self, earlier: &Self) -> Self {
        let raise = |now: &mut u64, then: &u64| *now = (*now).max(*then);
        self.counts.iter_mut().zip(&earlier.counts).for_each(|(now, then)| raise(now, then));
        for (now, then) in self.times.iter_mut().zip(&earlier.times) {
            now.buckets.iter_mut().zip(&then.buckets).for_each(|(now, then)| raise(now, then));
            raise(&mut now.nanos, &then.nanos);
        }
        self
    }
}

impl AddAssign<&Traffic> for Totals {
    fn add_assign(&mut self, traffic: &Traffic) {
        let take = |sum: &mut u64, counter: &AtomicU64| {
            *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
        };
        self.counts.iter_mut().zip(&traffic.counts).for_each(|(sum, counter)| take(sum, counter));
        for (sum, times) in self.times.iter_mut().zip(&traffic.times) {
            sum.buckets.iter_mut().zip(&times.buckets).for_each(|(sum, counter)| take(sum, counter));
            take(&mut sum.nanos, &times.nanos);
        }
    }
}

impl AddAssign<&Self> for Totals {
    fn add_assign(&mut self, other: &Self) {
        let take = |sum: &mut u64, count: &u64| *sum = sum.wrapping_add(*count);
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| take(sum, count));
        for (sum, times) in self.times.iter_mut().zip(&other.times) {
            sum.buckets.iter_mut().zip(&times.buckets).for_each(|(sum, count)| take(sum, count));
            take(&mut sum.nanos, &times.nanos);
        }
    }
}

impl Histogram {
    /// How many requests.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// How long all of them took.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.nanos)
    }

    /// The mean; `None` where there were none.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.nanos.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// The time that so large a part of all requests (between 0 and 1) did not take longer than: the upper end of the
    /// bucket in which it lies, so at most twice the truth. For what took longer than all bounds, the highest of these.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank may be off by one in 2^53"
        )]
        let rank = ((count as f64 * part).ceil() as u64).clamp(1, count);
        let highest = Duration::from_micros(1 << (BUCKETS - 2));
        self.up_to().find(|(_, below)| *below >= rank).map(|(bound, _)| bound.unwrap_or(highest))
    }

    /// For every bound, the shortest first, how many requests did not take longer; the last has no bound.
    pub fn up_to(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        self.buckets.iter().enumerate().scan(0, |below, (index, count)| {
            *below += count;
            Some((bound(index), *below))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_that_ends_with_the_next_power_of_two() {
        for (nanos, micros) in [(0, 1), (1000, 1), (1001, 2), (2000, 2), (2001, 4), (4_000_000, 4096)] {
            assert_eq!(bound(bucket(nanos)), Some(Duration::from_micros(micros)), "{nanos}");
        }
        assert_eq!(bound(bucket(4_194_304_000)), Some(Duration::from_micros(1 << 22)));
        assert_eq!(bound(bucket(4_194_304_001)), None);
        assert_eq!(bound(bucket(u64::MAX)), None);
    }

    #[test]
    fn totals_are_sums_and_quantiles_ends_of_buckets() {
        let (one, two) = (Traffic::default(), Traffic::default());
        one.add(Count::Reads, 3);
        two.add(Count::Reads, 4);
        two.add(Count::BytesRead, 1 << 40);
        one.took(Kind::Read, 98, Duration::from_micros(3));
        two.took(Kind::Read, 1, Duration::from_micros(100));
        two.took(Kind::Read, 1, Duration::from_secs(60));
        let mut totals = Totals::default();
        assert_eq!(totals.times(Kind::Read).quantile(0.5), None);
        totals += &one;
        let mut rest = Totals::default();
        rest += &two;
        totals += &rest;
        assert_eq!((totals.get(Count::Reads), totals.get(Count::BytesRead)), (7, 1 << 40));
        let times = totals.times(Kind::Read);
        let micros = |part| times.quantile(part).unwrap().as_micros();
        assert_eq!((micros(0.0), micros(0.5), micros(0.98), micros(0.99)), (4, 4, 4, 128));
        assert_eq!(micros(1.0), 1 << 22);
        assert_eq!((times.count(), times.sum()), (100, Duration::from_micros(98 * 3 + 100 + 60_000_000)));
        assert_eq!(times.up_to().last(), Some((None, 100)));
        assert_eq!(totals.times(Kind::Write).count(), 0);
        assert_eq!(rest.clone().at_least(&totals), totals);
    }
}
