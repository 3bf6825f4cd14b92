//! Sessions as those see them who look after the server: a list of all, what each does and holds, and a hand on them.
//!
//! A named session is called by its export name, `IMAGE@ID`. A session of one connection has no name to enter it by; here
//! it is called `IMAGE@:SERIAL`, which no client can ask for.

use super::housekeeper::Chore;
use super::registry::{ASK_FOR_IMAGES, taken, unknown};
use super::{Count, Registry, Session, SessionId, Totals};
use crate::base::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::net::Party;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A session that was found, and what it is called.
#[derive(Clone, Debug)]
pub struct Found {
    /// `IMAGE@ID` or `IMAGE@:SERIAL`.
    pub name: String,
    /// The name of its image.
    pub image: String,
    /// Its id, if it can be entered by one.
    pub id: Option<String>,
    /// Whether a new session on its image would be on the same file.
    pub is_current: bool,
    /// Itself.
    pub session: Arc<Session>,
}

/// What a session does in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Read requests.
    pub reads: f64,
    /// Write requests.
    pub writes: f64,
    /// Bytes read.
    pub bytes_read: f64,
    /// Bytes written.
    pub bytes_written: f64,
}

/// What was counted at some moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    counts: [u64; 4],
}

/// The last two samples: rates are from the earlier one on, so that they are never those of too short a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Samples([Sample; 2]);

impl Samples {
    pub(super) fn since(born: Instant) -> Self {
        Self([Sample { at: born, counts: [0; 4] }; 2])
    }
}

impl Sample {
    fn of(totals: &Totals, at: Instant) -> Self {
        let counted = [Count::Reads, Count::Writes, Count::BytesRead, Count::BytesWritten];
        Self { at, counts: counted.map(|what| totals.get(what)) }
    }

    fn rates_since(&self, earlier: &Self) -> Rates {
        let time = self.at.saturating_duration_since(earlier.at).max(Duration::from_millis(1)).as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "a rate, for people")]
        let rate = |index: usize| self.counts[index].saturating_sub(earlier.counts[index]) as f64 / time;
        Rates { reads: rate(0), writes: rate(1), bytes_read: rate(2), bytes_written: rate(3) }
    }
}

impl Session {
    /// Its number among all sessions that this process has had: those that were made later have higher ones.
    #[must_use]
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// How long it has been there.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// Whom it belongs to, as `user 1000`; `None` as long as it is anybody's.
    #[must_use]
    pub fn owner(&self) -> Option<String> {
        self.owner.get().map(ToString::to_string)
    }

    /// How many connections are in it.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.attached().lines.len()
    }

    /// Who is in it, as the log calls them; one for each connection.
    #[must_use]
    pub fn peers(&self) -> Vec<String> {
        self.attached().lines.iter().map(|line| line.peer().to_string()).collect()
    }

    /// What went over all of its connections so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let attached = self.attached();
        let mut totals = attached.past.as_deref().cloned().unwrap_or_default();
        attached.lines.iter().filter_map(|line| line.counted()).for_each(|traffic| totals += traffic);
        totals
    }

    /// What it does in a second, given what it did so far: on average since the last but one [`Session::sample`], or since
    /// it was made.
    #[must_use]
    pub fn rates(&self, totals: &Totals) -> Rates {
        let Samples([earlier, _]) = *self.samples();
        Sample::of(totals, Instant::now()).rates_since(&earlier)
    }

    /// Takes note of what it did so far, for [`Session::rates`]; to be called in equal intervals.
    pub fn sample(&self) {
        let now = Sample::of(&self.totals(), Instant::now());
        let mut samples = self.samples();
        samples.0 = [samples.0[1], now];
    }

    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hangs up on everybody who is in it.
    fn hang_up(&self) {
        // Without the lock: a line may be in the middle of its turn, and its worker may want to leave the session.
        let lines = self.attached().lines.clone();
        lines.iter().for_each(|line| line.hang_up());
    }
}

impl Registry {
    /// All sessions, the oldest first.
    #[must_use]
    pub fn sessions(&self) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        found.extend(
            self.named()
                .iter()
                .map(|((index, id), (session, _))| self.called(*index, Some(id), Arc::clone(session))),
        );
        found.extend(
            self.private().values().map(|(index, session)| self.called(*index, None, Arc::clone(session))),
        );
        found.sort_unstable_by_key(|found| found.session.serial);
        found
    }

    fn called(&self, index: usize, id: Option<&SessionId>, session: Arc<Session>) -> Found {
        let source = self.sources().get(index);
        let image = source.map_or("", Source::name).to_owned();
        let is_current = source.is_some_and(|source| Arc::ptr_eq(&source.latest(), session.device().image()));
        let name = match id {
            Some(id) => format!("{image}@{id}"),
            None => format!("{image}@:{}", session.serial),
        };
        Found { name, image, id: id.map(ToString::to_string), is_current, session }
    }

    /// The session that is called `name`.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Invalid` when nothing can be called so.
    pub fn session(&self, name: &str) -> Result<Found> {
        if let Some((image, serial)) = name.split_once("@:") {
            let serial: u64 = serial.parse().map_err(|_| unknown(name))?;
            let (index, session) = self.private().get(&serial).cloned().ok_or_else(|| unknown(name))?;
            let found = self.called(index, None, session);
            return if image == found.image { Ok(found) } else { Err(unknown(name)) };
        }
        let key = self.key(name)?;
        Ok(self.called(key.0, Some(&key.1), self.at(&key, name)?.0))
    }

    /// Makes the named session `name` for somebody who is going to enter it, and whose it is then. It stays until it was
    /// entered and left again, or ended; `party` is who is counted as its maker. With `memory`, that many bytes of data are
    /// its limit instead of the usual ones; what is written to it is `sealed` also where not all sessions are.
    ///
    /// # Errors
    /// `NotFound` when there is no such image, `Invalid` when the name is none of a session, `InUse` when it is there
    /// already, `Denied` when there are as many sessions as there may be, `OutOfSpace` when there is no memory for it.
    pub fn create(&self, name: &str, party: Party, memory: Option<u64>, sealed: bool) -> Result<Found> {
        let (index, id) = self.key(name)?;
        let image = self.current(&self.sources()[index]);
        let make = |budget| Ok(Session::unclaimed(self.blank(image, budget, sealed)?, self.limits.caps));
        let session = self.add(((index, id.clone()), name), party, memory, make)?;
        Ok(self.called(index, Some(&id), session))
    }

    /// Ends the session that is called `name`: hangs up on everybody who is in it. Its memory is free when all of its
    /// connections have been closed, which their workers do at once. Whoever asks for its name after that gets a new one.
    ///
    /// # Errors
    /// As [`Registry::session`].
    pub fn end(&self, name: &str) -> Result<()> {
        self.end_found(&self.session(name)?)
    }

    /// Ends the session that was found, as [`Registry::end`] does, whatever it is called by now; another one that is called so
    /// stays.
    ///
    /// # Errors
    /// As [`Registry::session`].
    pub fn end_found(&self, found: &Found) -> Result<()> {
        if found.id.is_some() {
            let key = self.key(&found.name)?;
            let mut named = self.named();
            // It may be called otherwise by now, and somebody else's may have its name.
            let is_it = |session: &Arc<Session>| Arc::ptr_eq(session, &found.session);
            let key = match named.get(&key) {
                Some((session, _)) if is_it(session) => Some(key),
                _ => named.iter().find(|(_, (session, _))| is_it(session)).map(|(key, _)| key.clone()),
            };
            let ended = key.and_then(|key| named.remove(&key));
            drop(named);
            drop(ended);
        }
        found.session.hang_up();
        Ok(())
    }

    /// Offers the image at `path` as `name` from now on, see [`Source::replace`]. Sessions that are there stay on what they
    /// are on.
    ///
    /// # Errors
    /// `NotFound` when there is no image of this name; and as [`Source::replace`].
    pub fn replace_image(&self, name: &str, path: &Path, file: Option<File>) -> Result<()> {
        let source = self.image(name)?;
        source.replace(path, file)?;
        self.give(Chore::Look);
        Ok(())
    }

    /// The image `name`.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name.
    pub fn image(&self, name: &str) -> Result<&Source> {
        let none = || Error::new(ErrorKind::NotFound, "No such image:").on(name);
        let found = self.sources().iter().find(|source| source.name() == name);
        found.ok_or_else(|| none().advise(ASK_FOR_IMAGES))
    }

    /// Calls the session `name` by another id from now on. Who is in it stays, and its URIs are others.
    ///
    /// # Errors
    /// As [`Registry::session`]; `Invalid` when nobody can be called so, or it is one connection's own, `InUse` when there is
    /// another session of this id.
    pub fn rename(&self, name: &str, id: &str) -> Result<Found> {
        let old = self.key(name)?;
        let new = self.key(&format!("{}@{id}", self.sources()[old.0].name()))?;
        let mut named = self.named();
        self.check_not_giving_way(name)?;
        if old != new {
            if !named.contains_key(&old) {
                return Err(unknown(name));
            }
            if named.contains_key(&new) {
                return Err(taken(id));
            }
            if let Some(session) = named.remove(&old) {
                named.insert(new.clone(), session);
            }
        }
        let session = named.get(&new).map(|(session, _)| Arc::clone(session));
        drop(named);
        Ok(self.called(new.0, Some(&new.1), session.ok_or_else(|| unknown(name))?))
    }

    /// What went over all connections that there ever were.
    #[must_use]
    pub fn totals(&self) -> Totals {
        // In this order: what is closed in between is missing from this sum, and never counted twice.
        let mut totals = self.past().clone();
        for Found { session, .. } in self.sessions() {
            let attached = session.attached();
            attached.lines.iter().filter_map(|line| line.counted()).for_each(|traffic| totals += traffic);
        }
        totals
    }
}
