//! All images and sessions of a server, by name.

use super::{Attached, Line, Owner, Request, Session, SessionId, Totals};
use crate::base::{Image, Source};
use crate::cow::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Full, Most, Party, Place, Stream, Tally};
use crate::overlay::{Budget, Overlay, Pool};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What sessions may hold, and how long a named one stays when nobody is in it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of data of one session.
    pub session_memory: u64,
    /// From the end of the last connection to the end of a named session.
    pub linger: Duration,
    /// How many sessions there may be, and how many that one party has made.
    pub sessions: Most,
}

/// What a client may know of an export before it opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The canonical name: the image's, with the session's id if there is one.
    pub name: String,
    /// For people.
    pub text: String,
    /// Bytes.
    pub size: u64,
    /// Whether several connections to it share one session.
    pub shared: bool,
}

/// Connections to one session. Everybody who attaches looks at all of the others, on its worker's time, and no client is
/// known that uses more than a few dozen.
const MOST_LINES: usize = 256;

/// After a look at all sessions the housekeeper rests for so many times as long as it took,
const REST: u32 = 20;
/// but never longer than this.
const LONGEST_REST: Duration = Duration::from_millis(100);

pub(super) type Named = HashMap<(usize, SessionId), (Arc<Session>, Place)>;

/// Work for the housekeeper.
#[derive(Debug)]
enum Chore {
    /// A session nobody is in any more, to be taken apart at leisure.
    End(Arc<Session>),
    /// A session that has left something behind: its overlay is to be tidied.
    Tidy(Arc<Session>),
    /// A named session was left, or the server stops: look at the time again.
    Look,
}

/// All images and sessions of a server.
#[derive(Debug)]
pub struct Registry {
    sources: Vec<Source>,
    pool: Arc<Pool>,
    total: Arc<Budget>,
    limits: Limits,
    sessions: Arc<Tally>,
    named: Mutex<Named>,
    /// Sessions of one connection each, by their serial numbers, with their images' places among the sources.
    private: Mutex<HashMap<u64, (usize, Arc<Session>)>>,
    /// What went over connections that are closed.
    past: Mutex<Totals>,
    chores: (Sender<Chore>, Receiver<Chore>),
    stopping: AtomicBool,
}

impl Registry {
    /// A registry that offers `sources`, the first also under the empty name, with memory from `pool` within `total`.
    #[must_use]
    pub fn new(sources: Vec<Source>, pool: Arc<Pool>, total: Arc<Budget>, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            sources,
            pool,
            total,
            limits,
            sessions: Tally::new(limits.sessions),
            named: Mutex::default(),
            private: Mutex::default(),
            past: Mutex::default(),
            chores: unbounded(),
            stopping: AtomicBool::new(false),
        })
    }

    /// The images offered.
    #[must_use]
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Where block memory comes from.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// What all sessions may hold, and hold.
    #[must_use]
    pub fn total(&self) -> &Arc<Budget> {
        &self.total
    }

    /// How many sessions there are, and may be.
    #[must_use]
    pub fn tally(&self) -> &Arc<Tally> {
        &self.sessions
    }

    pub(super) fn private(&self) -> MutexGuard<'_, HashMap<u64, (usize, Arc<Session>)>> {
        // As the map of the named ones.
        self.private.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn past(&self) -> MutexGuard<'_, Totals> {
        // Sums; at worst one of them lacks something.
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn named(&self) -> MutexGuard<'_, Named> {
        // Insertions and removals leave the map whole.
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self, name: &str) -> Result<(usize, &Source)> {
        let unknown = || Error::new(ErrorKind::NotFound, "No such export").on(name);
        if name.is_empty() {
            return self.sources.first().map(|source| (0, source)).ok_or_else(unknown);
        }
        self.sources.iter().enumerate().find(|(_, source)| source.name() == name).ok_or_else(unknown)
    }

    /// The names and descriptions of all images, in order; none of a server that stops.
    pub fn list(&self) -> impl Iterator<Item = (String, String)> {
        let stopping = self.stopping.load(Ordering::Relaxed);
        self.sources.iter().filter(move |_| !stopping).map(|source| named(source, None))
    }

    /// What `export_name` would give a client; makes nothing.
    ///
    /// # Errors
    /// `NotFound` when there is no such image, or no such session where it is asked for only if it is there; `Invalid`
    /// when the session's id is none; `Denied` when the session is another user's.
    pub fn describe(&self, export_name: &str, stream: &Stream) -> Result<Description> {
        let Wanted { index, source, id, must_exist } = self.look_up(export_name)?;
        let session = id
            .as_ref()
            .and_then(|id| self.named().get(&(index, id.clone())).map(|(session, _)| Arc::clone(session)));
        match &session {
            Some(session) => admit(session, export_name, stream)?,
            None if must_exist => return Err(no_such_session(export_name)),
            None => {}
        }
        let image = session.map_or_else(|| source.current(), |session| Arc::clone(session.device.image()));
        Ok(describe(source, id.as_ref(), &image))
    }

    /// The named session `name`, `IMAGE@ID`.
    ///
    /// # Errors
    /// `NotFound` when there is none, or no such image; `Invalid` when the session's id is none.
    pub fn find(&self, name: &str) -> Result<Arc<Session>> {
        self.find_with_key(name).map(|(session, ..)| session)
    }

    /// The same, with which image's it is and who has its place.
    pub(super) fn find_with_key(&self, name: &str) -> Result<(Arc<Session>, usize, Party)> {
        let Wanted { index, id, .. } = self.look_up(name)?;
        let named = self.named();
        let found = id.and_then(|id| named.get(&(index, id)));
        let found = found.map(|(session, place)| (Arc::clone(session), index, place.party()));
        found.ok_or_else(|| no_such_session(name))
    }

    /// A new named session, made by `make` with a budget of at most `limit` bytes of data.
    pub(super) fn add(
        &self,
        (index, name): (usize, &str),
        party: Party,
        limit: u64,
        make: impl FnOnce(Budget) -> Session,
    ) -> Result<Arc<Session>> {
        let Wanted { index: of, id, .. } = self.look_up(name)?;
        let invalid = |what| Error::new(ErrorKind::Invalid, what).on(name);
        let id = id.ok_or_else(|| invalid("Not the name of a session:").advise("call it IMAGE@ID"))?;
        if of != index {
            return Err(invalid("A fork is on the same image, and cannot be called"));
        }
        let key = (index, id);
        let taken = || Error::new(ErrorKind::InUse, "There is a session").on(name).advise("use another name");
        if self.named().contains_key(&key) {
            return Err(taken());
        }
        let place = self.sessions.enter(party).map_err(too_many)?;
        let session = Arc::new(make(self.budget(limit)?));
        session.attached().awaited = true;
        match self.named().entry(key) {
            Entry::Occupied(_) => return Err(taken()),
            Entry::Vacant(vacant) => vacant.insert((Arc::clone(&session), place)),
        };
        Ok(session)
    }

    fn budget(&self, limit: u64) -> Result<Budget> {
        Budget::within(&self.total, limit).map_err(|kind| Error::new(kind, "The server's memory is used up"))
    }

    /// Has what a session has left behind taken apart in the background.
    pub(super) fn tidy_later(&self, session: Arc<Session>) {
        self.give(Chore::Tidy(session));
    }

    pub(super) fn look_up(&self, export_name: &str) -> Result<Wanted<'_>> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "Server is shutting down"));
        }
        let (image, id, must_exist) = match Request::parse(export_name) {
            Request::Fresh(image) => (image, None, false),
            Request::Named(image, id) => (image, Some(id), false),
            Request::Existing(image, id) => (image, Some(id), true),
            Request::BadId(id) => {
                let error = Error::new(ErrorKind::Invalid, "Not a session id:").on(format_args!("{id:?}"));
                return Err(error.advise("use 1 to 64 letters, digits, dots, underscores or hyphens"));
            }
        };
        let (index, source) = self.source(image)?;
        Ok(Wanted { index, source, id, must_exist })
    }

    /// Lets the client at the other end of `stream` into the session that `export_name` asks for.
    ///
    /// # Errors
    /// As [`Registry::describe`]; and when it would be a new session, `Denied` if there are as many as there may be, and
    /// `OutOfSpace` if there is no memory for it.
    pub fn attach(
        self: &Arc<Self>,
        export_name: &str,
        stream: &Arc<Stream>,
    ) -> Result<(Description, Attachment)> {
        let Wanted { index, source, id, must_exist } = self.look_up(export_name)?;
        // Looked for before any lock: it may have to open a new image.
        let image = source.current();
        let line = Arc::new(Line::new(Arc::clone(stream)));
        let (session, place) = match &id {
            None => {
                let (session, place) = self.make_session(image, stream)?;
                session.attached().lines.push(Arc::clone(&line));
                self.private().insert(session.serial, (index, Arc::clone(&session)));
                (session, Some(place))
            }
            Some(id) => {
                let make = (!must_exist).then_some(image);
                (self.enter((index, id.clone()), make, export_name, stream, &line)?, None)
            }
        };
        let description = describe(source, id.as_ref(), session.device.image());
        Ok((description, Attachment { session, line, registry: Arc::clone(self), own: place }))
    }

    /// Enters a named session by `line`; makes it on `image`, if that is given and it is not there. Who gives none only
    /// looks, and changes nothing about whose it is or how long it stays.
    fn enter(
        &self,
        key: (usize, SessionId),
        image: Option<Arc<Image>>,
        export_name: &str,
        stream: &Stream,
        line: &Arc<Line>,
    ) -> Result<Arc<Session>> {
        let looks_only = image.is_none();
        let mut named = self.named();
        let session = match named.get(&key) {
            Some((session, _)) => {
                admit(session, export_name, stream)?;
                if !looks_only {
                    session.owner.get_or_init(|| Owner::of(stream.peer()));
                }
                Arc::clone(session)
            }
            None => {
                let image = image.ok_or_else(|| no_such_session(export_name))?;
                let (session, place) = self.make_session(image, stream)?;
                named.insert(key, (Arc::clone(&session), place));
                session
            }
        };
        let others = {
            // Under the lock on the map, so that the session cannot end at the same time.
            let mut attached = session.attached();
            if attached.lines.len() >= MOST_LINES {
                let error = Error::new(ErrorKind::OutOfSpace, "Too many connections to session");
                return Err(error.on(export_name).advise("close some of them first"));
            }
            let others = attached.lines.clone();
            attached.awaited &= looks_only;
            attached.lines.push(Arc::clone(line));
            others
        };
        drop(named);
        // Without any lock: it may have to wait for a turn.
        Line::somebody_attaches(&others);
        Ok(session)
    }

    fn make_session(&self, image: Arc<Image>, stream: &Stream) -> Result<(Arc<Session>, Place)> {
        let (device, place) = self.make_device(image, Party::of(stream.peer()), None)?;
        Ok((Arc::new(Session::new(device, Owner::of(stream.peer()))), place))
    }

    /// An empty device over `image`, with a limit of its own if `memory` says so, and a place for a session of `party`.
    pub(super) fn make_device(
        &self,
        image: Arc<Image>,
        party: Party,
        memory: Option<u64>,
    ) -> Result<(Device, Place)> {
        let place = self.sessions.enter(party).map_err(too_many)?;
        let budget = self.budget(memory.unwrap_or(self.limits.session_memory))?;
        let blocks = self.pool.block_size().blocks_for(image.size());
        let overlay = Overlay::new(blocks, Arc::clone(&self.pool), budget);
        Ok((Device::new(image, overlay), place))
    }

    fn leave(&self, session: &Arc<Session>, line: &Arc<Line>, named: bool) {
        if let Some(traffic) = line.counted() {
            *self.past() += traffic;
        }
        if named {
            let mut attached = session.attached();
            attached.lines.retain(|other| !Arc::ptr_eq(other, line));
            if let Some(traffic) = line.counted() {
                **attached.past.get_or_insert_default() += traffic;
            }
            if attached.lines.is_empty() {
                attached.left = Instant::now();
                self.give(Chore::Look);
            }
            return;
        }
        // Under no lock longer than it takes: it may be the last that holds the session.
        let own = self.private().remove(&session.serial);
        drop(own);
        if session.device.overlay().budget().data() > 0 {
            self.give(Chore::End(Arc::clone(session)));
        }
    }

    fn give(&self, chore: Chore) {
        // The receiver lives as long as the sender.
        let _ = self.chores.0.send(chore);
    }

    /// The housekeeper's life, until [`Registry::stop`]: ends sessions nobody is in, and takes them apart.
    pub fn keep_house(&self) {
        while !self.stopping.load(Ordering::Relaxed) {
            let began = Instant::now();
            let wait = self.end_idle(began).unwrap_or(Duration::from_secs(3600));
            // Where sessions are many, a look at all of them takes long, and whoever attaches waits for it: so it is not
            // done again and again while clients come and go.
            std::thread::sleep((began.elapsed() * REST).min(LONGEST_REST));
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

    /// Ends the named sessions that nobody is in for longer than the linger time; returns the time to the next end.
    pub(super) fn end_idle(&self, now: Instant) -> Option<Duration> {
        let mut ended = Vec::new();
        let mut next: Option<Duration> = None;
        let mut named = self.named();
        named.retain(|_, (session, _)| {
            let attached = session.attached();
            let Attached { lines, left, awaited, .. } = &*attached;
            if !lines.is_empty() || *awaited {
                return true;
            }
            let remaining = (*left + self.limits.linger).saturating_duration_since(now);
            if remaining.is_zero() {
                ended.push(Arc::clone(session));
                return false;
            }
            next = Some(next.map_or(remaining, |next| next.min(remaining)));
            true
        });
        drop(named);
        next
    }

    /// How many named sessions there are.
    #[cfg(test)]
    pub(super) fn named_sessions(&self) -> usize {
        self.named().len()
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

/// What an export name turned out to ask for.
pub(super) struct Wanted<'a> {
    /// The image's place in the list.
    pub(super) index: usize,
    source: &'a Source,
    pub(super) id: Option<SessionId>,
    /// The session is not made if it is not there.
    pub(super) must_exist: bool,
}

fn no_such_session(export_name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "No such session").on(export_name)
}

fn too_many(full: Full) -> Error {
    let advice = match full {
        Full::All(_) => "try again when others have ended",
        Full::Party { .. } => "end one of them first; a named one ends some time after it was left",
    };
    Error::new(ErrorKind::Denied, format!("Too many sessions: {full}")).advise(advice)
}

fn admit(session: &Session, export_name: &str, stream: &Stream) -> Result<()> {
    // Entering one that is nobody's makes it the first comer's: see `Registry::enter`.
    if session.owner.get().is_none_or(|owner| owner.admits(stream.peer())) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Denied, "This session belongs to another user:").on(export_name))
}

/// Name and description.
fn named(source: &Source, id: Option<&SessionId>) -> (String, String) {
    let name = source.name();
    match id {
        None => (name.to_owned(), format!("A writable copy of {name}, private to this connection")),
        Some(id) => (format!("{name}@{id}"), format!("A writable copy of {name}, private to session {id}")),
    }
}

fn describe(source: &Source, id: Option<&SessionId>, image: &Image) -> Description {
    let (name, text) = named(source, id);
    Description { name, text, size: image.size(), shared: id.is_some() }
}

/// A connection's place in its session; dropping it leaves.
#[derive(Debug)]
pub struct Attachment {
    session: Arc<Session>,
    line: Arc<Line>,
    registry: Arc<Registry>,
    /// The place of a session that is this connection's own; a named one has its place by its name.
    own: Option<Place>,
}

impl Attachment {
    /// The session.
    #[must_use]
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The connection, as the session sees it.
    #[must_use]
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.registry.leave(&self.session, &self.line, self.own.is_none());
    }
}
