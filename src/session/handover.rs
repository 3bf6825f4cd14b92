//! Sessions of a server that takes another's place, or whose place is taken: see [`crate::takeover`].
//!
//! A name belongs to one server at any time. Those that the server before still has are known here, and none of them is made;
//! a server that gives way makes none at all from then on.

use super::Registry;
use super::housekeeper::Chore;
use crate::base::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::Side;
use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is elsewhere.
#[derive(Debug, Default)]
pub(super) struct Handover {
    /// Sessions of the server before, as `IMAGE@ID`.
    before: Mutex<HashSet<String>>,
    /// Changed under the lock on the named sessions.
    gives_way: AtomicBool,
    /// The server that has taken this one's place is gone, and with it every way to come in here.
    is_unreachable: AtomicBool,
}

impl Registry {
    fn before(&self) -> MutexGuard<'_, HashSet<String>> {
        // Every change is one insertion or removal.
        self.handover.before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that these sessions are with the server before.
    pub fn set_before(&self, sessions: impl IntoIterator<Item = String>) {
        self.before().extend(sessions);
    }

    /// Notes that these are not any more.
    pub fn forget_before(&self, sessions: &[String]) {
        let mut before = self.before();
        for session in sessions {
            before.remove(session);
        }
    }

    /// Notes that there is no server before any more.
    pub fn forget_all_before(&self) {
        std::mem::take(&mut *self.before());
    }

    /// Makes no sessions from now on: somebody takes this server's place.
    pub fn give_way(&self) {
        let _named = self.named();
        self.handover.gives_way.store(true, Ordering::Release);
    }

    /// Whether somebody has taken this server's place. Where it matters that it stays so, under the lock on the named sessions.
    #[must_use]
    pub fn gives_way(&self) -> bool {
        self.handover.gives_way.load(Ordering::Acquire)
    }

    /// Ends the sessions that nobody is in, whatever their linger time, and from now on every other one with its last connection:
    /// nobody can come in any more.
    pub fn become_unreachable(&self) {
        if !self.handover.is_unreachable.swap(true, Ordering::Relaxed) {
            self.give(Chore::Look);
        }
    }

    pub(super) fn is_unreachable(&self) -> bool {
        self.handover.is_unreachable.load(Ordering::Relaxed)
    }

    /// All sessions that clients may come back to, those of the server before included, as `IMAGE@ID`.
    #[must_use]
    pub fn names(&self) -> HashSet<String> {
        let mut names = self.before().clone();
        let named = self.named();
        let name = |index: usize| self.sources().get(index).map_or("", Source::name);
        names.extend(named.keys().map(|(index, id)| format!("{}@{id}", name(*index))));
        names
    }

    /// Whether the server before has any.
    #[must_use]
    pub fn has_before(&self) -> bool {
        !self.before().is_empty()
    }

    /// Those of the server before, in order.
    #[must_use]
    pub fn names_before(&self) -> Vec<String> {
        let mut names: Vec<_> = self.before().iter().cloned().collect();
        names.sort_unstable();
        names
    }

    /// The name of the image that a client gets which names none.
    #[must_use]
    pub fn first(&self) -> &str {
        self.sources().first().map_or("", Source::name)
    }

    /// What `export_name` is here, said by somebody who came to another server, to which `first` is the first image: that server
    /// may have its images in another order, and `@ID` has to be one session for both.
    #[must_use]
    pub fn resolve<'n>(&self, export_name: &'n str, first: Option<&str>) -> Cow<'n, str> {
        if let Some(first) = first.filter(|_| export_name.starts_with('@')) {
            let whole = format!("{first}{export_name}");
            if self.is_before(&whole) || self.sources().iter().any(|source| source.name() == first) {
                return Cow::Owned(whole);
            }
        }
        Cow::Borrowed(export_name)
    }

    /// Whether the session that `export_name` asks for is with the server before.
    #[must_use]
    pub fn is_before(&self, export_name: &str) -> bool {
        let before = self.before();
        if before.is_empty() {
            return false;
        }
        let name = export_name.strip_suffix('?').unwrap_or(export_name);
        match name.strip_prefix('@') {
            Some(id) => before.contains(&format!("{}@{id}", self.first())),
            None => before.contains(name),
        }
    }

    /// Whose it is that a client wants and that is not here; `None` if that has just changed, and it can be asked for again.
    #[must_use]
    pub fn whose(&self, export_name: &str) -> Option<Side> {
        if self.is_before(export_name) {
            return Some(Side::Before);
        }
        self.gives_way().then_some(Side::After)
    }

    pub(super) fn check_not_before(&self, export_name: &str) -> Result<()> {
        if !self.is_before(export_name) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Elsewhere, "It is still with the server that was here before:")
            .on(export_name))
    }

    pub(super) fn check_not_giving_way(&self, export_name: &str) -> Result<()> {
        if !self.gives_way() {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Elsewhere, "This server is being replaced, and makes nothing new:");
        Err(error.on(export_name).advise(
            "a session that is still with it cannot be forked, renamed, or saved while it is used; 'memdev save' takes its URI \
             when nobody writes to it",
        ))
    }
}
