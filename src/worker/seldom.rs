//! Lines of the log that a client can provoke: not more often than people can read them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long to be silent after a line.
const SILENCE: Duration = Duration::from_secs(10);

/// When the last line was, and how many were left out since.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    /// Whether to say it now; then, how many times it was not said since the last time.
    pub(super) fn say(&self) -> Option<u64> {
        self.say_at(Instant::now())
    }

    fn say_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (time, omitted) = &mut *last;
        if time.is_some_and(|time| now.saturating_duration_since(time) < SILENCE) {
            *omitted += 1;
            return None;
        }
        *time = Some(now);
        Some(std::mem::take(omitted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_often_it_was_silent() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.say_at(start), Some(0));
        assert_eq!(seldom.say_at(start + SILENCE / 2), None);
        assert_eq!(seldom.say_at(start + SILENCE / 2), None);
        assert_eq!(seldom.say_at(start + SILENCE), Some(2));
        assert_eq!(seldom.say_at(start + SILENCE * 3), Some(0));
    }
}
