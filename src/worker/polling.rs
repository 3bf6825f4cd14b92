//! Whether to look for a while before going to sleep.
//!
//! Going to sleep and being woken costs more than answering a small request, so a worker whose client asks again at
//! once does better to keep looking. Where nothing comes, it looks less and less often, so an idle server is idle. Where
//! others want the processor, it soon stops looking: a thread that sleeps is run at once when something comes for it,
//! one that was looking waits for its turn.

use std::time::{Duration, Instant};

/// How long to look.
const WINDOW: Duration = Duration::from_micros(50);
/// Between two looks somebody else must have had the processor, if so much time has passed.
const STALL: Duration = Duration::from_micros(25);
/// So many vain looks one such stall counts for.
const STALL_WEIGHT: u32 = 3;
/// After so many vain looks in a row, one sleep in two to the power of this many is preceded by a look.
const MOST_BACKOFF: u32 = 8;

#[derive(Debug, Default)]
pub(super) struct Polling {
    /// Vain looks in a row, up to the most that count.
    vain: u32,
    /// Sleeps that are not preceded by a look.
    skip: u32,
    looking: Option<Looking>,
}

#[derive(Debug)]
struct Looking {
    until: Instant,
    last: Instant,
}

impl Polling {
    /// Whether to look once more, instead of going to sleep.
    pub(super) fn look(&mut self) -> bool {
        self.look_at(Instant::now())
    }

    fn look_at(&mut self, now: Instant) -> bool {
        match &mut self.looking {
            None if self.skip > 0 => {
                self.skip -= 1;
                false
            }
            None => {
                self.looking = Some(Looking { until: now + WINDOW, last: now });
                true
            }
            Some(looking) if now - looking.last > STALL => {
                self.back_off(self.vain + STALL_WEIGHT);
                false
            }
            Some(looking) if now < looking.until => {
                looking.last = now;
                true
            }
            Some(_) => {
                self.back_off(self.vain + 1);
                false
            }
        }
    }

    fn back_off(&mut self, vain: u32) {
        self.vain = vain.min(MOST_BACKOFF);
        self.skip = (1 << self.vain) - 1;
        self.looking = None;
    }

    /// Something had come.
    pub(super) fn found(&mut self) {
        if self.looking.is_some() {
            self.found_at(Instant::now());
        }
    }

    fn found_at(&mut self, now: Instant) {
        match self.looking.take() {
            Some(looking) if now - looking.last > STALL => self.back_off(self.vain + STALL_WEIGHT),
            Some(_) => (self.vain, self.skip) = (0, 0),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_micros(1);

    /// Looks in vain until it goes to sleep; returns the sleeps before that.
    fn sleeps_before_look(polling: &mut Polling, now: &mut Instant) -> u32 {
        let mut sleeps = 0;
        while !polling.look_at(*now) {
            sleeps += 1;
        }
        while polling.look_at(*now) {
            *now += STEP;
        }
        sleeps
    }

    #[test]
    fn it_looks_less_and_less_where_nothing_comes_and_at_once_where_something_does() {
        let (mut polling, mut now) = (Polling::default(), Instant::now());
        let vain: Vec<u32> = (0..10).map(|_| sleeps_before_look(&mut polling, &mut now)).collect();
        assert_eq!(vain, [0, 1, 3, 7, 15, 31, 63, 127, 255, 255]);
        while !polling.look_at(now) {}
        polling.found_at(now);
        assert!(polling.look_at(now));
    }

    #[test]
    fn it_does_not_look_where_others_want_the_processor() {
        let (mut polling, now) = (Polling::default(), Instant::now());
        assert!(polling.look_at(now));
        polling.found_at(now + 2 * STALL);
        assert_eq!((0..300).take_while(|_| !polling.look_at(now)).count(), 7);
        // Again, and it looks far less often.
        assert!(!polling.look_at(now + 2 * STALL));
        assert_eq!((0..300).take_while(|_| !polling.look_at(now)).count(), 63);
    }
}
