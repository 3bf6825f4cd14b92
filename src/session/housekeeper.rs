//! Who ends the sessions that nobody is in any more, and takes apart what they leave behind, so that no worker has to.

use super::{Attached, Registry, Session};
use crate::base::Source;
use crate::overlay::{IDLE, TICK};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// After a look at all sessions the housekeeper rests for so many times as long as it took,
const REST: u32 = 20;
/// but never longer than this.
const LONGEST_REST: Duration = Duration::from_millis(100);

/// How often it looks whether somebody is still on an image that was replaced.
const LOOK_AT_IMAGES: Duration = Duration::from_secs(1);

/// Work for the housekeeper.
#[derive(Debug)]
pub(super) enum Chore {
    /// A session nobody is in any more, to be taken apart at leisure.
    End(Arc<Session>),
    /// A session that has left something behind: its overlay is to be tidied.
    Tidy(Arc<Session>),
    /// A named session was left, or the server stops: look at the time again.
    Look,
}

/// What is to be done, from all who find something and for the one who does it.
pub(super) type Chores = (Sender<Chore>, Receiver<Chore>);

impl Registry {
    /// Has what a session has left behind taken apart in the background.
    pub(super) fn tidy_later(&self, session: Arc<Session>) {
        self.give(Chore::Tidy(session));
    }

    pub(super) fn give(&self, chore: Chore) {
        // The receiver lives as long as the sender.
        let _ = self.chores.0.send(chore);
    }

    /// The housekeeper's life, until [`Registry::stop`]: ends sessions nobody is in, and takes them apart.
    pub fn keep_house(&self) {
        while !self.stopping.load(Ordering::Relaxed) {
            let began = Instant::now();
            let mut wait = self.end_idle(began).unwrap_or(Duration::from_secs(3600));
            if self.sources().iter().map(Source::drop_unused).sum::<usize>() > 0 {
                wait = wait.min(LOOK_AT_IMAGES);
            }
            // Where sessions are many, a look at all of them takes long, and whoever attaches waits for it: so it is not
            // done again and again while clients come and go.
            self.rest((began.elapsed() * REST).min(LONGEST_REST));
            let mut chore = self.chores.1.recv_timeout(wait);
            // All that have come, before all sessions are looked at again.
            loop {
                match chore {
                    Ok(Chore::End(session)) => drop(session),
                    Ok(Chore::Tidy(session)) => session.device.overlay().tidy(),
                    Ok(Chore::Look) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                chore = self.chores.1.recv_timeout(Duration::ZERO);
            }
        }
    }

    /// Waits so long, or until somebody wakes the thread and the server stops.
    fn rest(&self, time: Duration) {
        let start = Instant::now();
        while let Some(left) = time.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            std::thread::park_timeout(left);
        }
    }

    /// Ends the named sessions that nobody is in for longer than the linger time, or at all where nobody can come back; returns the
    /// time to the next end.
    pub(super) fn end_idle(&self, now: Instant) -> Option<Duration> {
        let is_unreachable = self.is_unreachable();
        let mut ended = Vec::new();
        let mut next: Option<Duration> = None;
        let mut named = self.named();
        named.retain(|_, (session, _)| {
            let attached = session.attached();
            let Attached { lines, left, awaited, .. } = &*attached;
            if !lines.is_empty() || (*awaited && !is_unreachable) {
                return true;
            }
            let remaining = (*left + self.limits.linger).saturating_duration_since(now);
            if remaining.is_zero() || is_unreachable {
                ended.push(Arc::clone(session));
                return false;
            }
            next = Some(next.map_or(remaining, |next| next.min(remaining)));
            true
        });
        drop(named);
        next
    }

    /// Moves blocks of sealed sessions that were not used lately into the file that there is for them, until memory is not short any
    /// more, or none can go. Waits for the disk, and for others who do the same.
    ///
    /// # Errors
    /// When the file takes no more: a second or so nothing is tried then.
    pub fn make_room(&self) -> io::Result<()> {
        let Some(overflow) = self.pool().overflow() else { return Ok(()) };
        let mut hand = overflow.hand.lock().unwrap_or_else(PoisonError::into_inner);
        if overflow.is_stuck() {
            return Ok(());
        }
        let wanted = || self.total().wants_room() && !self.stopping.load(Ordering::Relaxed);
        // Something may have become colder since.
        hand.level = hand.level.saturating_sub(1);
        // A round may have begun in the middle: one more is needed to know that there is nothing as cold as that.
        let mut in_vain = 0;
        while wanted() {
            #[allow(clippy::cast_possible_truncation, reason = "they come round")]
            let tick = (overflow.since.elapsed().as_millis() / TICK.as_millis()) as u16;
            self.pool().arena().set_tick(tick);
            // From where the search was, to the end; then from the beginning.
            for found in self.sessions() {
                let session = &found.session;
                if session.serial < hand.session || !session.device.is_sealed() {
                    continue;
                }
                if session.serial > hand.session {
                    (hand.session, hand.block) = (session.serial, 0);
                }
                while hand.session == session.serial {
                    if !wanted() {
                        return Ok(());
                    }
                    let moved = session.device.overlay().move_out(hand.block, IDLE[hand.level]);
                    let moved = moved.inspect_err(|_| overflow.get_stuck())?;
                    in_vain = if moved.bytes > 0 { 0 } else { in_vain };
                    (hand.session, hand.block) =
                        moved.next.map_or((session.serial + 1, 0), |block| (session.serial, block));
                }
            }
            (hand.session, hand.block) = (0, 0);
            in_vain += 1;
            if in_vain > 1 && hand.level + 1 < IDLE.len() {
                (hand.level, in_vain) = (hand.level + 1, 0);
            } else if in_vain > 1 {
                overflow.get_stuck();
                break;
            }
        }
        Ok(())
    }

    /// Refuses new sessions, and ends [`Registry::keep_house`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.give(Chore::Look);
    }

    /// Ends all sessions that nobody is in, whatever their linger time.
    pub fn end_all(&self) {
        self.named().clear();
        self.chores.1.try_iter().for_each(drop);
        // What was just taken may have been the very chore by which a housekeeper that still sleeps was to hear of the
        // stop, and without it he would sleep for an hour.
        if self.stopping.load(Ordering::Relaxed) {
            self.give(Chore::Look);
        }
    }
}
