//! What a worker does because of the time.

use super::accepting::ACCEPT_PAUSE;
use super::connection::Connection;
use super::event_loop::Worker;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Clients that are hung up on at a time because their handshake took too long, before others have a turn.
const HANG_UPS: usize = 8;

impl Worker {
    /// Asks again for connections that wait because of their sessions' caps: those whose time has come, or all.
    pub(super) fn go_on_with_paced(&mut self, until: Option<Instant>) {
        let later = until.map_or_else(BTreeSet::new, |until| self.paced.split_off(&(until, u64::MAX)));
        // Each once: who comes to wait again is looked at later.
        for (_, token) in std::mem::replace(&mut self.paced, later) {
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.timer = None;
                self.drive(token);
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let handshake = self.handshakes.front().map(|(deadline, _)| *deadline);
        let doubt = self.doubts.front().map(|(time, _)| *time);
        let paced = self.paced.first().map(|(time, _)| *time);
        let soonest =
            [handshake, doubt, paced, self.rounds.next(), self.accepts_again].into_iter().flatten().min()?;
        Some(soonest.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    }

    pub(super) fn check_deadlines(&mut self) {
        if self.handshakes.is_empty()
            && self.doubts.is_empty()
            && self.paced.is_empty()
            && self.rounds.next().is_none()
            && self.accepts_again.is_none()
        {
            return;
        }
        let now = Instant::now();
        self.go_round(now);
        self.go_on_with_paced(Some(now));
        while let Some(&(time, token)) = self.doubts.front()
            && time <= now
        {
            self.doubts.pop_front();
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.is_doubted = false;
                self.drive(token);
            }
        }
        let mut hung_up = 0;
        while let Some(&(deadline, token)) = self.handshakes.front() {
            let in_handshake = self.connections.get(&token).is_some_and(Connection::is_before_transmission);
            if in_handshake && (deadline > now || hung_up == HANG_UPS) {
                break;
            }
            self.handshakes.pop_front();
            if in_handshake {
                hung_up += 1;
                tracing::debug!("handshake took too long");
                self.close(token);
            }
        }
        if self.accepts_again.is_some_and(|again| again <= now) {
            self.accepts_again = None;
            if let Err(error) = self.listen() {
                tracing::error!(%error, "cannot listen again yet");
                self.stop_listening();
                self.accepts_again = Some(now + ACCEPT_PAUSE);
            }
        }
    }
}
