//! Counting what is asked for and how long it takes: see [`crate::session::Traffic`].
//!
//! The time of a request is that from when its beginning was seen to have arrived to when the kernel was given its answer.
//! It costs one look at the clock a batch, since all requests that came together and were answered together took as long.

use super::reply::Asked;
use super::validate::Action;
use super::{Output, Transmission};
use crate::session::{Count, Kind, Traffic};
use std::time::{Duration, Instant};

/// Requests that were answered since the counters were last told.
#[derive(Debug, Default)]
pub(super) struct Answered {
    /// When the input that is acted on now had arrived; nothing is noted without.
    now: Option<Instant>,
    /// Requests in that input, by their kinds.
    at_once: [u32; Kind::ALL.len()],
    /// Requests that had come before.
    later: Vec<(Kind, Instant)>,
    errors: u32,
}

impl Answered {
    pub(super) fn now(&self) -> Option<Instant> {
        self.now
    }

    pub(super) fn note(&mut self, asked: Asked) {
        let Some(began) = asked.began else { return };
        if self.now == Some(began) {
            self.at_once[asked.kind as usize] += 1;
        } else {
            self.later.push((asked.kind, began));
        }
    }

    pub(super) fn note_error(&mut self) {
        self.errors = self.errors.saturating_add(1);
    }

    fn is_empty(&self) -> bool {
        self.at_once == [0; 3] && self.later.is_empty() && self.errors == 0
    }
}

impl Output {
    /// Says when the input that is going to be acted on had arrived, so that the times of requests are noted.
    pub fn begin(&mut self, now: Instant) {
        self.answered.now = Some(now);
    }
}

impl Transmission {
    /// Adds to the connection's counters what was answered since the last time. To be called when `output` was given to
    /// the kernel; returns the time then, if it was of interest.
    pub fn account(&self, output: &mut Output) -> Option<Instant> {
        let answered = &mut output.answered;
        if answered.is_empty() {
            return None;
        }
        let traffic = self.attachment.line().traffic();
        let done = Instant::now();
        if let Some(began) = answered.now {
            let time = done.saturating_duration_since(began);
            for (kind, count) in Kind::ALL.into_iter().zip(&mut answered.at_once) {
                if *count > 0 {
                    traffic.took(kind, u64::from(std::mem::take(count)), time);
                }
            }
        }
        for (kind, began) in answered.later.drain(..) {
            let time: Duration = done.saturating_duration_since(began);
            traffic.took(kind, 1, time);
        }
        match std::mem::take(&mut answered.errors) {
            0 => {}
            errors => traffic.add(Count::Errors, u64::from(errors)),
        }
        Some(done)
    }
}

/// Counts a request that is going to be done.
pub(super) fn count(traffic: &Traffic, action: &Action) {
    match action {
        Action::Read { range, .. } => {
            traffic.add(Count::Reads, 1);
            traffic.add(Count::BytesRead, range.end - range.start);
        }
        Action::Write { range } => {
            traffic.add(Count::Writes, 1);
            traffic.add(Count::BytesWritten, range.end - range.start);
        }
        Action::WriteZeroes { .. } => traffic.add(Count::Zeroes, 1),
        Action::Trim { .. } => traffic.add(Count::Trims, 1),
        Action::Flush => traffic.add(Count::Flushes, 1),
        Action::Cache { .. } | Action::BlockStatus(_) | Action::ChosenStatus { .. } => {
            traffic.add(Count::Others, 1);
        }
        Action::Disconnect => {}
    }
}
