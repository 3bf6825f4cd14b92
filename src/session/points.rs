//! Points in a session's life: checkpoints, the way back to them, and forks.
//!
//! All of these happen between turns: no request of any connection of the session is being acted on meanwhile, so a request
//! is before the operation or behind it. Each costs the size of the map's top, not of the data: see
//! [`crate::overlay`].
//!
//! A session is called by its export name, `IMAGE@ID`, or `@ID` for one on the first image.

use super::{Registry, Session};
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::SystemTime;

/// What is known of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// What it was called by whoever took it.
    pub name: String,
    /// When.
    pub taken: SystemTime,
    /// Bytes of blocks that the session had written by then, whether it still has them or not.
    pub data: u64,
}

impl Registry {
    /// Keeps the present state of `session` under `name`: 1 to 64 letters, digits, dots, underscores or hyphens.
    ///
    /// # Errors
    /// `NotFound` when there is no such session, `Invalid` when `name` cannot be one, `InUse` when there is such a
    /// checkpoint, `OutOfSpace` when the session has as many as it may have, or there is no memory for its map.
    pub fn checkpoint(&self, session: &str, name: &str) -> Result<Checkpoint> {
        let _ = name;
        self.not_yet(session)
    }

    /// The checkpoints of `session`, the oldest first.
    ///
    /// # Errors
    /// `NotFound` when there is no such session.
    pub fn checkpoints(&self, session: &str) -> Result<Vec<Checkpoint>> {
        self.not_yet(session)
    }

    /// Gives up a checkpoint. What it alone holds is freed in the background.
    ///
    /// # Errors
    /// `NotFound` when there is no such session or no such checkpoint.
    pub fn drop_checkpoint(&self, session: &str, name: &str) -> Result<()> {
        let _ = name;
        self.not_yet(session)
    }

    /// Makes `session` what it was at its checkpoint `name`, for all of its connections at once. The checkpoint stays, and
    /// so do those that were taken later. A write that was in the middle of its payload then fails with `EIO`, since a
    /// part of it would be missing. What the kernel of an attached device has cached is the caller's business.
    ///
    /// # Errors
    /// `NotFound` when there is no such session or no such checkpoint.
    pub fn rollback(&self, session: &str, name: &str) -> Result<()> {
        let _ = name;
        self.not_yet(session)
    }

    /// Makes `session` what its image is, as [`Registry::rollback`] does. Checkpoints stay.
    ///
    /// # Errors
    /// `NotFound` when there is no such session.
    pub fn reset(&self, session: &str) -> Result<()> {
        self.not_yet(session)
    }

    /// Makes a new session, `new`, of the present state of `session`: on the same image, with the same owner and the same
    /// limit, without its checkpoints. Nobody is in it yet, so it ends after the linger time if nobody comes.
    ///
    /// # Errors
    /// `NotFound` when there is no such session, `Invalid` when `new` is not the name of a session on the same image,
    /// `InUse` when there is such a session, `Denied` when there are as many as there may be, `OutOfSpace` when there is
    /// no memory for it.
    pub fn fork(&self, session: &str, new: &str) -> Result<Arc<Session>> {
        let _ = new;
        self.not_yet(session)
    }

    fn not_yet<T>(&self, session: &str) -> Result<T> {
        let _ = self.sources();
        Err(Error::new(ErrorKind::Unsupported, "Not there yet:").on(session))
    }
}
