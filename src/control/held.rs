//! Sessions that end with the connection they were asked for on: for who makes one on the way to something else, and may be
//! killed on that way.

use crate::error::{Error, ErrorKind, Result};
use crate::session::{Found, Registry};
use std::sync::Arc;

/// The sessions that one control connection holds. They end when this is dropped.
pub(super) struct Held {
    registry: Arc<Registry>,
    sessions: Vec<Found>,
    /// Whether there may be one more connection that holds something.
    has_room: bool,
}

impl Held {
    pub(super) fn new(registry: &Arc<Registry>) -> Self {
        Self { registry: Arc::clone(registry), sessions: Vec::new(), has_room: true }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Says whether there may be one more connection that holds something.
    pub(super) fn set_room(&mut self, has_room: bool) {
        self.has_room = has_room;
    }

    /// Whether a session may be held, if that is `wanted`.
    pub(super) fn check(&self, wanted: bool) -> Result<()> {
        if wanted && self.is_empty() && !self.has_room {
            let why = "Too many control clients hold sessions that are not done yet";
            return Err(Error::new(ErrorKind::Denied, why).advise("try again when one of them has finished"));
        }
        Ok(())
    }

    pub(super) fn hold(&mut self, found: Found) {
        self.sessions.push(found);
    }

    /// It is called otherwise by now.
    pub(super) fn renamed(&mut self, found: &Found) {
        if let Some(held) = self.sessions.iter_mut().find(|held| Arc::ptr_eq(&held.session, &found.session)) {
            held.clone_from(found);
        }
    }

    pub(super) fn let_go(&mut self, found: &Found) {
        self.sessions.retain(|held| !Arc::ptr_eq(&held.session, &found.session));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for found in &self.sessions {
            // It fails where the server is about to end, and all sessions with it.
            let _ = self.registry.end_found(found);
        }
    }
}
