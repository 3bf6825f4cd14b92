//! The thread that has the overview: looks where the kernel tells of changes, and tells how far it is.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::{Shared, TELL};
use crate::carry::queue::PATHS_MAX;
use crate::carry::status::Status;
use crate::carry::watch::{Look, Watch};

/// The thread that has the overview.
pub(super) struct Main<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) watch: Watch,
    pub(super) inside: BorrowedFd<'a>,
    pub(super) channel: Option<BorrowedFd<'a>>,
}

impl<'a> Main<'a> {
    /// Until nobody is inside any more.
    pub(super) fn attend(&mut self, status: &mut Status) {
        let mut last = Instant::now();
        loop {
            let rescan = self.shared.lock().rescan;
            let now = Instant::now();
            // A queue that was full has to have some room first.
            let room = || self.shared.lock().queue.len() < PATHS_MAX / 2;
            if rescan && now - last > Duration::from_millis(500) && room() {
                self.shared.look(Look::AtAll);
                last = Instant::now();
            } else if self.watch.due(last).is_some_and(|due| due <= now) {
                self.shared.look(self.watch.take());
                last = Instant::now();
            }
            self.tell(status, "running");
            let next = self.watch.due(last).into_iter().chain(rescan.then(|| now + TELL)).min();
            let wait =
                next.map_or(Duration::from_secs(1), |next| next.saturating_duration_since(Instant::now()));
            let timeout = Timespec::try_from(wait.min(Duration::from_secs(1))).unwrap_or_default();
            let heard = self.watch.fd();
            let mut fds = vec![PollFd::from_borrowed_fd(self.inside, PollFlags::IN)];
            fds.extend(heard.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            if poll(&mut fds, Some(&timeout)).is_err() {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return;
            }
            if ready.get(1) == Some(&true) {
                self.watch.hear(self.shared.tree);
            }
        }
    }

    pub(super) fn tell(&self, status: &mut Status, phase: &str) {
        let state = self.shared.lock();
        let now = Instant::now();
        let value = json!({
            "phase": phase,
            "waiting": state.queue.len(),
            "waiting_bytes": state.queue.bytes(),
            "delivered": state.delivered.0,
            "delivered_bytes": state.delivered.1,
            "failures": state.failures,
            "retry_in": state.pause.map(|pause| pause.saturating_duration_since(now).as_secs()),
            "last_error": state.last_error.clone().filter(|_| state.queue.len() > 0),
            "failing_since": state.failing_since.filter(|_| state.queue.len() > 0),
            "events_lost": self.watch.losses,
            "notes": self.shared.notes.all(),
        });
        drop(state);
        status.set(value);
    }
}
