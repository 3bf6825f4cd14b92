//! Lines of the log that clients can provoke as often as they like: no more of them than people read, so that nobody can
//! fill a disk with them. What is left out is counted, and the next line of its kind says how many those were.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One kind of line.
#[derive(Debug)]
pub(super) struct Seldom {
    most: u32,
    during: Duration,
    lately: Mutex<Lately>,
}

#[derive(Debug, Default)]
struct Lately {
    /// When the time began in which there may be so many.
    since: Option<Instant>,
    said: u32,
    omitted: u64,
}

impl Seldom {
    /// At most `most` lines in every `during`, which begins with a line.
    fn new(most: u32, during: Duration) -> Self {
        Self { most, during, lately: Mutex::default() }
    }

    /// Calls `write` if there may be a line now, with the number of those that were left out since the last one.
    pub(super) fn say(&self, write: impl FnOnce(Option<NonZeroU64>)) {
        self.say_at(Instant::now(), write);
    }

    fn say_at(&self, now: Instant, write: impl FnOnce(Option<NonZeroU64>)) {
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        if lately.since.is_none_or(|since| now.saturating_duration_since(since) >= self.during) {
            (lately.since, lately.said) = (Some(now), 0);
        }
        if lately.said == self.most {
            lately.omitted += 1;
            return;
        }
        lately.said += 1;
        let omitted = NonZeroU64::new(std::mem::take(&mut lately.omitted));
        // Writing may take a while, and workers come by here.
        drop(lately);
        write(omitted);
    }
}

/// Every kind of line that a server has to be sparing with.
#[derive(Debug)]
pub(super) struct Lines {
    /// A client failed to get in. Who runs the server looks for one of them among many, and the reasons differ.
    pub(super) not_let_in: Seldom,
    /// A connection was one too many.
    pub(super) one_too_many: Seldom,
    /// There are no descriptors for connections.
    pub(super) no_descriptors: Seldom,
    /// A client was hung up on for what it had not read.
    pub(super) unread: Seldom,
    /// An image cannot be read: a client can have that happen with every request of 28 bytes.
    pub(super) unreadable: Seldom,
}

impl Default for Lines {
    fn default() -> Self {
        let now_and_then = || Seldom::new(1, Duration::from_secs(10));
        Self {
            not_let_in: Seldom::new(20, Duration::from_secs(1)),
            one_too_many: now_and_then(),
            no_descriptors: now_and_then(),
            unread: now_and_then(),
            unreadable: now_and_then(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHILE: Duration = Duration::from_secs(10);

    /// What is said at these times, counted from the first: for each line, how many were left out before it.
    fn said(most: u32, times: &[Duration]) -> Vec<(Duration, u64)> {
        let (seldom, start) = (Seldom::new(most, WHILE), Instant::now());
        let mut lines = Vec::new();
        for &time in times {
            let line = |omitted: Option<NonZeroU64>| lines.push((time, omitted.map_or(0, NonZeroU64::get)));
            seldom.say_at(start + time, line);
        }
        lines
    }

    #[test]
    fn there_are_so_many_lines_in_a_while_and_no_more() {
        let times = [Duration::ZERO, WHILE / 2, WHILE / 2, WHILE - Duration::from_nanos(1)];
        assert_eq!(said(3, &times), [(Duration::ZERO, 0), (WHILE / 2, 0), (WHILE / 2, 0)]);
        assert_eq!(said(1, &times), [(Duration::ZERO, 0)]);
    }

    #[test]
    fn a_line_says_how_many_were_left_out_before_it_and_says_it_once() {
        let times = [Duration::ZERO, WHILE / 2, WHILE / 2, WHILE, WHILE * 2, WHILE * 5];
        let lines = [(Duration::ZERO, 0), (WHILE, 2), (WHILE * 2, 0), (WHILE * 5, 0)];
        assert_eq!(said(1, &times), lines);
    }

    #[test]
    fn the_time_begins_with_a_line_and_not_with_one_that_was_left_out() {
        let times = [Duration::ZERO, WHILE - Duration::from_nanos(1), WHILE];
        assert_eq!(said(1, &times), [(Duration::ZERO, 0), (WHILE, 1)]);
    }

    #[test]
    fn kinds_do_not_silence_each_other() {
        let lines = Lines::default();
        let mut count = 0;
        for _ in 0..1000 {
            for kind in [&lines.one_too_many, &lines.no_descriptors, &lines.unread, &lines.unreadable] {
                kind.say(|_| count += 1);
            }
        }
        assert!(count >= 4, "one of each at least");
        let mut seen = 0;
        (0..20).for_each(|_| lines.not_let_in.say(|_| seen += 1));
        assert_eq!(seen, 20, "a few of these are let through at once");
    }
}
