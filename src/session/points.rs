//! Points in a session's life: checkpoints, the way back to them, and forks.
//!
//! All of these happen between turns: no request of any connection of the session is being acted on meanwhile, so what a
//! turn does is before the operation or behind it. Each costs the size of the map's top, not of the data: see
//! [`crate::overlay`]. What takes several turns is a request that is long, or that waits for its payload or for the
//! disk. Of a write that is not acknowledged yet a checkpoint or a fork may have a part, as a disk may when the power fails.
//! On the way back, a read that has begun goes on with what it has begun with, zeroing begins anew, and a write of which a
//! part is lost fails.
//!
//! A session is called by its export name, `IMAGE@ID`, or `@ID` for one on the first image.

use super::{Registry, Session, SessionId};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::Snapshot;
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

/// What is known of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// What it was called by whoever took it.
    pub name: String,
    /// When.
    pub taken: SystemTime,
    /// Bytes of the blocks that it holds; the session, and other checkpoints, may hold them, too.
    pub data: u64,
}

/// Whom a fork belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heir {
    /// Whom the session belongs to that it is made of.
    Owner,
    /// Whoever enters it first.
    FirstComer,
}

impl Registry {
    /// Keeps the present state of `session` under `name`: 1 to 64 letters, digits, dots, underscores or hyphens.
    ///
    /// # Errors
    /// `NotFound` when there is no such session, `Invalid` when `name` cannot be one, `InUse` when there is such a
    /// checkpoint, `OutOfSpace` when there is no memory for its map.
    pub fn checkpoint(&self, session: &str, name: &str) -> Result<Checkpoint> {
        self.find(session)?.checkpoint(name)
    }

    /// The checkpoints of `session`, the oldest first.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub fn checkpoints(&self, session: &str) -> Result<Vec<Checkpoint>> {
        Ok(self.find(session)?.checkpoints())
    }

    /// Gives up a checkpoint. What it alone holds is freed in the background.
    ///
    /// # Errors
    /// As [`Registry::find`]; `NotFound` when there is no such checkpoint.
    pub fn drop_checkpoint(&self, session: &str, name: &str) -> Result<()> {
        let session = self.find(session)?;
        let point = session.points().remove(name).ok_or_else(|| no_such(name))?;
        session.device.overlay().forget(point.snapshot);
        self.tidy_later(session);
        Ok(())
    }

    /// Makes `session` what it was at its checkpoint `name`, for all of its connections at once. The checkpoint stays, and
    /// so do those that were taken later. A write that was in the middle of its payload fails with `EIO` if a part of it is
    /// lost by that. What the kernel of an attached device has cached is the caller's business.
    ///
    /// # Errors
    /// As [`Registry::find`]; `NotFound` when there is no such checkpoint.
    pub fn rollback(&self, session: &str, name: &str) -> Result<()> {
        let session = self.find(session)?;
        session.rollback(name)?;
        self.tidy_later(session);
        Ok(())
    }

    /// Makes `session` what its image is, as [`Registry::rollback`] does. Checkpoints stay.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub fn reset(&self, session: &str) -> Result<()> {
        let session = self.find(session)?;
        session.reset();
        self.tidy_later(session);
        Ok(())
    }

    /// Makes a new session, `new`, of the present state of `session`: on the same image, with the same limits, for `heir`,
    /// without its checkpoints. It pays for what is written to it from then on; what it has in common with `session`
    /// is paid for by who wrote it. It stays until somebody has been in it and left it for the linger time, or it is ended.
    ///
    /// # Errors
    /// `NotFound` when there is no such session, `Invalid` when `new` is not the name of a session on the same image,
    /// `InUse` when there is such a session, `Denied` when there are as many as there may be, `OutOfSpace` when there is
    /// no memory for it.
    pub fn fork(&self, session: &str, new: &str, heir: Heir) -> Result<Arc<Session>> {
        let (from, to) = (self.key(session)?, self.key(new)?);
        if from.0 != to.0 {
            let error = Error::new(ErrorKind::Invalid, "A fork is on the same image, and cannot be called");
            return Err(error.on(new));
        }
        let (parent, party) = self.at(&from, session)?;
        let limit = parent.device.overlay().budget().limit();
        let owner = match heir {
            Heir::Owner => parent.owner.clone(),
            Heir::FirstComer => OnceLock::new(),
        };
        self.add((to, new), party, Some(limit), |budget| {
            let device = parent.between_turns(|| parent.device.fork(budget));
            Ok(Session::owned_by(device, owner, parent.pace.caps()))
        })
    }

    /// The named session `name`.
    ///
    /// # Errors
    /// `NotFound` when there is none, or no such image; `Invalid` when nobody's session can be called so.
    pub fn find(&self, name: &str) -> Result<Arc<Session>> {
        self.at(&self.key(name)?, name).map(|(session, _)| session)
    }
}

/// A session's checkpoints, by name.
pub(super) type Points = BTreeMap<String, Point>;

/// A checkpoint.
#[derive(Debug)]
pub(super) struct Point {
    taken: SystemTime,
    /// How many had been taken of the session before.
    number: u64,
    snapshot: Snapshot,
}

fn no_such(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "No such checkpoint:").on(name)
}

impl Session {
    fn points(&self) -> MutexGuard<'_, Points> {
        // Every change is one insertion or removal.
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        if SessionId::new(name).is_none() {
            let error =
                Error::new(ErrorKind::Invalid, "Not a checkpoint's name:").on(format_args!("{name:?}"));
            return Err(error.advise("use 1 to 64 letters, digits, dots, underscores or hyphens"));
        }
        let mut points = self.points();
        if points.contains_key(name) {
            let error = Error::new(ErrorKind::InUse, "There is a checkpoint").on(name);
            return Err(error.advise("drop it first, or use another name"));
        }
        let snapshot = self.between_turns(|| self.device.overlay().snapshot()).map_err(|kind| {
            Error::new(kind, "No memory for a checkpoint")
                .on(name)
                .advise("drop another one, or raise --memory")
        })?;
        let number = points.values().map(|point| point.number + 1).max().unwrap_or(0);
        let point = Point { taken: SystemTime::now(), number, snapshot };
        let told = point.tell(name);
        points.insert(name.to_owned(), point);
        Ok(told)
    }

    fn checkpoints(&self) -> Vec<Checkpoint> {
        let points = self.points();
        let mut all: Vec<_> = points.iter().collect();
        all.sort_by_key(|(_, point)| point.number);
        all.into_iter().map(|(name, point)| point.tell(name)).collect()
    }

    fn rollback(&self, name: &str) -> Result<()> {
        let points = self.points();
        let point = points.get(name).ok_or_else(|| no_such(name))?;
        self.between_turns(|| self.device.overlay().return_to(Some(&point.snapshot)));
        Ok(())
    }

    fn reset(&self) {
        self.between_turns(|| self.device.overlay().return_to(None));
    }

    /// Does something while no request of any connection of the session is being acted on. Waits for the turns at hand, and
    /// workers that want to begin one wait for it: so it must be short.
    fn between_turns<R>(&self, act: impl FnOnce() -> R) -> R {
        loop {
            let lines = self.attached().lines.clone();
            // Always in the order in which they came, so that two who do this do not wait for each other.
            let _held: Vec<_> = lines.iter().map(|line| line.hold()).collect();
            // Whoever has a turn never waits for this lock.
            let attached = self.attached();
            let is_held = |line| lines.iter().any(|held| Arc::ptr_eq(held, line));
            // Else somebody has come in the meantime, and may have a turn.
            if attached.lines.iter().all(is_held) {
                return act();
            }
        }
    }
}

impl Point {
    fn tell(&self, name: &str) -> Checkpoint {
        Checkpoint { name: name.to_owned(), taken: self.taken, data: self.snapshot.data() }
    }
}
