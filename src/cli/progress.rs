//! A bar that shows how far something is.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How far it has got, where somebody looks.
pub(super) struct Bar {
    shown: Option<Instant>,
    wanted: bool,
}

impl Bar {
    const WIDTH: u64 = 40;
    const EVERY: Duration = Duration::from_millis(100);

    pub(super) fn new() -> Self {
        Self { shown: None, wanted: io::stderr().is_terminal() }
    }

    /// So many of so many bytes.
    pub(super) fn show(&mut self, done: u64, all: u64) {
        self.draw(done, all, |done| format!("{} MiB", done >> 20));
    }

    /// So many of so many things.
    pub(super) fn show_count(&mut self, done: u64, all: u64) {
        self.draw(done, all, |done| done.to_string());
    }

    fn draw(&mut self, done: u64, all: u64, said: impl Fn(u64) -> String) {
        if !self.wanted || self.shown.is_some_and(|shown| shown.elapsed() < Self::EVERY) {
            return;
        }
        self.shown = Some(Instant::now());
        let (full, percent) = (done * Self::WIDTH / all.max(1), done * 100 / all.max(1));
        let bar: String = (0..Self::WIDTH).map(|at| if at < full { '#' } else { '.' }).collect();
        // Who closes stderr does not want to see it.
        let _ = write!(io::stderr(), "\r[{bar}] {percent:3} %  {}", said(done));
    }

    pub(super) fn clear(&self) {
        if self.shown.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
