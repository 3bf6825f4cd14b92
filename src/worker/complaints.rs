//! What the log says of clients that are refused: a line for each, but not as many as they like. Who may connect may fail
//! as often as it wants to, and must not be able to fill a disk with that.

use crate::net::Peer;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in each [`WHILE`]; what is beyond is counted.
const MOST: u32 = 20;
const WHILE: Duration = Duration::from_secs(1);

/// The complaints of all connections.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Lately>);

#[derive(Debug, Default)]
struct Lately {
    since: Option<Instant>,
    said: u32,
    left_out: u64,
}

impl Complaints {
    /// Complains of `peer`, at a level that is shown by default.
    pub(super) fn of(&self, peer: &Peer, why: fmt::Arguments<'_>) {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner).may_say(Instant::now());
        let Some(left_out) = said else { return };
        if left_out > 0 {
            tracing::warn!(left_out, "More clients were refused than there are lines about them");
        }
        tracing::warn!(%peer, "{why}");
    }
}

impl Lately {
    /// Whether a line may be written now; how many were left out since the last one.
    fn may_say(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.duration_since(since) >= WHILE) {
            (self.since, self.said) = (Some(now), 0);
        }
        if self.said == MOST {
            self.left_out += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_end_to_complaints_for_a_while() {
        let mut lately = Lately::default();
        let start = Instant::now();
        assert!((0..MOST).all(|_| lately.may_say(start) == Some(0)));
        assert!((0..7).all(|_| lately.may_say(start + WHILE / 2).is_none()));
        assert_eq!(lately.may_say(start + WHILE), Some(7));
        assert_eq!(lately.may_say(start + WHILE), Some(0));
    }
}
