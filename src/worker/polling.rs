//! Whether to look for a while before going to sleep.
//!
//! Going to sleep and being woken costs more than answering a small request, so a worker whose client asks again at
//! once does better to keep looking. Where nothing comes, it looks less and less often, so an idle server is idle.

use std::time::{Duration, Instant};

/// How long to look.
const WINDOW: Duration = Duration::from_micros(50);
/// After so many vain looks in a row, one sleep in two to the power of this many is preceded by a look.
const MOST_BACKOFF: u32 = 8;

#[derive(Debug, Default)]
pub(super) struct Polling {
    /// Vain looks in a row, up to the most that count.
    vain: u32,
    /// Sleeps that are not preceded by a look.
    skip: u32,
    until: Option<Instant>,
}

impl Polling {
    /// Whether to look once more, instead of going to sleep.
    pub(super) fn look(&mut self) -> bool {
        match self.until {
            None if self.skip > 0 => {
                self.skip -= 1;
                false
            }
            None => {
                self.until = Some(Instant::now() + WINDOW);
                true
            }
            Some(until) if Instant::now() < until => true,
            Some(_) => {
                self.until = None;
                self.vain = (self.vain + 1).min(MOST_BACKOFF);
                self.skip = (1 << self.vain) - 1;
                false
            }
        }
    }

    /// Something had come.
    pub(super) fn found(&mut self) {
        if self.until.take().is_some() {
            self.vain = 0;
            self.skip = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_less_and_less_where_nothing_comes_and_at_once_where_something_does() {
        let mut polling = Polling::default();
        let mut sleeps_before_look = || {
            let mut sleeps = 0;
            while !polling.look() {
                sleeps += 1;
            }
            while polling.look() {}
            sleeps
        };
        let vain: Vec<u32> = (0..10).map(|_| sleeps_before_look()).collect();
        assert_eq!(vain, [0, 1, 3, 7, 15, 31, 63, 127, 255, 255]);
        while !polling.look() {}
        polling.found();
        assert!(polling.look());
    }
}
