//! How much a session may be asked to do in a second: caps on its requests, and on the bytes that they move.
//!
//! A cap is a bucket that fills at the cap's rate and holds what comes in [`BURST`]. A request that finds anything in it goes
//! at once and takes what it costs, if need be more than is there: one that is larger than the bucket goes, too, and those
//! behind it wait for longer. A bucket is kept as one moment, from which on it is full enough for the next request:
//!
//! ```text
//!   now - BURST        now
//!   ────|───────────────|──────────────────────> time
//!       next: full      next: may go      next: must wait until then
//! ```
//!
//! All connections of a session, on whichever worker, take from the same buckets, each for the request at its head only: a
//! connection with many requests and one with few have their turns one by one. Who must wait has its moment reserved, and
//! gives it back when it leaves.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a session that was idle may do at once: as much as comes in so much time.
pub const BURST: Duration = Duration::from_millis(100);

/// How much a session may be asked to do in a second, by all of its connections together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// Requests of any kind; as many as come without it.
    pub iops: Option<NonZeroU64>,
    /// Bytes that are read and written; as many as come without it.
    pub bandwidth: Option<NonZeroU64>,
}

/// A session's caps, and how far they are used.
#[derive(Debug)]
pub struct Pace {
    /// Whether there is any cap: so that sessions without one pay for no lock.
    is_capped: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    caps: Caps,
    /// How often the caps were changed: what was reserved before is void.
    changes: u64,
    /// From when on there is something in the bucket for requests, and in that for bytes.
    next: [Instant; 2],
}

/// A request's moment, as long as it waits for it.
#[derive(Debug)]
pub struct Reserved {
    at: Instant,
    changes: u64,
    costs: [Duration; 2],
}

impl Pace {
    pub(super) fn new(caps: Caps) -> Self {
        let next = [Instant::now(); 2];
        let is_capped = AtomicBool::new(caps != Caps::default());
        Self { is_capped, state: Mutex::new(State { caps, changes: 0, next }) }
    }

    /// Whether requests may have to wait.
    #[must_use]
    pub fn is_capped(&self) -> bool {
        self.is_capped.load(Ordering::Relaxed)
    }

    /// The caps.
    #[must_use]
    pub fn caps(&self) -> Caps {
        self.state().caps
    }

    /// Changes the caps. What went before does not count any more, and who waits may ask again: see
    /// [`super::Registry::set_caps`].
    pub(super) fn set(&self, caps: Caps) {
        let mut state = self.state();
        state.caps = caps;
        state.changes += 1;
        state.next = [Instant::now(); 2];
        self.is_capped.store(caps != Caps::default(), Ordering::Relaxed);
    }

    /// Asks whether a request that moves so many bytes may go at `now`; if not, until when to wait. What is reserved for it
    /// meanwhile is put into `reserved`, and is to be brought along when asking again.
    pub fn ask(&self, bytes: u64, reserved: &mut Option<Reserved>, now: Instant) -> Option<Instant> {
        let mut state = self.state();
        let mine = reserved.take().filter(|mine| mine.changes == state.changes);
        let mine = mine.unwrap_or_else(|| state.reserve(bytes, now));
        let wait = (mine.at > now).then_some(mine.at);
        if wait.is_some() {
            *reserved = Some(mine);
        }
        wait
    }

    /// Takes back what was reserved for a request that is not going to be done.
    pub fn give_back(&self, reserved: &Reserved) {
        let mut state = self.state();
        if state.changes == reserved.changes {
            for (next, cost) in state.next.iter_mut().zip(reserved.costs) {
                *next = next.checked_sub(cost).unwrap_or(*next);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Times and numbers: whole at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reserve(&mut self, bytes: u64, now: Instant) -> Reserved {
        let costs = [cost(1, self.caps.iops), cost(bytes, self.caps.bandwidth)];
        let full = now.checked_sub(BURST).unwrap_or(now);
        let mut at = now;
        for (next, cost) in self.next.iter_mut().zip(costs) {
            if cost.is_zero() {
                continue;
            }
            let begin = (*next).max(full);
            at = at.max(begin);
            *next = begin.checked_add(cost).unwrap_or(begin);
        }
        Reserved { at, changes: self.changes, costs }
    }
}

/// How long it takes for so much to come in.
fn cost(much: u64, a_second: Option<NonZeroU64>) -> Duration {
    let nanos = a_second.map_or(0, |rate| u128::from(much) * 1_000_000_000 / u128::from(rate.get()));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(iops: u64, bandwidth: u64) -> (Pace, Instant) {
        let pace = Pace::new(Caps { iops: NonZeroU64::new(iops), bandwidth: NonZeroU64::new(bandwidth) });
        // Long enough after its beginning for its buckets to be full.
        (pace, Instant::now() + BURST * 2)
    }

    /// When requests go that are asked for by one connection, all of them at `now`, counted from then.
    fn times(pace: &Pace, now: Instant, sizes: &[u64]) -> Vec<u128> {
        let mut clock = now;
        let mut gone = Vec::new();
        for &bytes in sizes {
            let mut reserved = None;
            while let Some(until) = pace.ask(bytes, &mut reserved, clock) {
                assert!(until > clock);
                clock = until;
            }
            gone.push((clock - now).as_millis());
        }
        gone
    }

    #[test]
    fn requests_go_at_once_as_long_as_the_bucket_has_any_and_then_at_the_rate() {
        let (pace, now) = pace(20, 0);
        // A bucket of two, and one that finds it not quite empty.
        assert_eq!(times(&pace, now, &[4096; 6]), [0, 0, 0, 50, 100, 150]);
        // It fills up again, and never more than that.
        assert_eq!(times(&pace, now + Duration::from_secs(60), &[0; 4]), [0, 0, 0, 50]);
    }

    #[test]
    fn one_that_is_larger_than_the_bucket_goes_and_those_behind_it_wait() {
        let (pace, now) = pace(0, 1000);
        assert_eq!(times(&pace, now, &[2000, 0, 100, 100]), [0, 0, 1900, 2000]);
    }

    #[test]
    fn the_stricter_cap_decides() {
        let (pace, now) = pace(20, 1000);
        assert_eq!(times(&pace, now, &[10, 10, 10, 1000, 10, 10]), [0, 0, 0, 50, 930, 940]);
    }

    #[test]
    fn connections_have_their_turns_one_by_one_and_what_is_given_back_is_there_for_others() {
        let (pace, now) = pace(10, 0);
        assert_eq!(times(&pace, now, &[0; 2]), [0, 0]);
        let (mut one, mut two, mut three) = (None, None, None);
        let wait = |reserved: &mut Option<Reserved>, now| {
            pace.ask(0, reserved, now).map(|until| (until - now).as_millis())
        };
        assert_eq!((wait(&mut one, now), wait(&mut two, now)), (Some(100), Some(200)));
        // Asking again takes nothing more.
        assert_eq!((wait(&mut one, now), wait(&mut two, now)), (Some(100), Some(200)));
        pace.give_back(&two.take().unwrap());
        assert_eq!(wait(&mut three, now), Some(200));
        assert_eq!(wait(&mut one, now + Duration::from_millis(100)), None);
    }

    #[test]
    fn changed_caps_free_who_waits() {
        let (pace, now) = pace(0, 1);
        assert_eq!(times(&pace, now, &[1 << 20]), [0]);
        let mut reserved = None;
        assert!(
            pace.ask(1, &mut reserved, now).is_some_and(|until| until > now + Duration::from_secs(1 << 19))
        );
        pace.set(Caps::default());
        assert!(!pace.is_capped());
        assert_eq!(pace.ask(1, &mut reserved, Instant::now()), None);
        assert!(reserved.is_none());
    }
}
