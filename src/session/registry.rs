//! All images and sessions of a server, by name.

use super::handover::Handover;
use super::housekeeper::{Chore, Chores};
use super::{Caps, Line, Owner, Request, Session, SessionId, Totals};
use crate::base::{Image, Source};
use crate::cow::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Full, Most, Party, Place, Stream, Tally};
use crate::overlay::{Budget, Overlay, Pool};
use crate::seal::Keys;
use crossbeam::channel::unbounded;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
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
    /// How much one session may be asked to do in a second.
    pub caps: Caps,
    /// Whether the blocks of every session are ciphertext in memory.
    pub seal: bool,
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

/// Where a named session is: its image's place among the sources, and its id.
pub(super) type Key = (usize, SessionId);

pub(super) type Named = HashMap<Key, (Arc<Session>, Place)>;

/// All images and sessions of a server.
#[derive(Debug)]
pub struct Registry {
    sources: Vec<Source>,
    pool: Arc<Pool>,
    total: Arc<Budget>,
    pub(super) limits: Limits,
    sessions: Arc<Tally>,
    named: Mutex<Named>,
    /// Sessions of one connection each, by their serial numbers, with their images' places among the sources.
    private: Mutex<HashMap<u64, (usize, Arc<Session>)>>,
    /// What went over connections that are closed.
    past: Mutex<Totals>,
    pub(super) chores: Chores,
    pub(super) stopping: AtomicBool,
    /// Has those asked again who wait because of their sessions' caps.
    caps_changed: OnceLock<Callback>,
    pub(super) handover: Handover,
}

/// What to do when something happens.
struct Callback(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Callback")
    }
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
            caps_changed: OnceLock::new(),
            handover: Handover::default(),
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

    /// Says what is to be done when a session's caps were changed: who waits because of them is to ask again. Only the first
    /// that says so is heard.
    pub fn when_caps_change(&self, act: impl Fn() + Send + Sync + 'static) {
        // Said once, by the server that it is of.
        let _ = self.caps_changed.set(Callback(Box::new(act)));
    }

    /// Changes how much `session` may be asked to do in a second. Requests that wait go on as the new caps have it.
    pub fn set_caps(&self, session: &Session, caps: Caps) {
        session.pace().set(caps);
        if let Some(Callback(act)) = self.caps_changed.get() {
            act();
        }
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
            None if self.gives_way() => self.check_not_giving_way(export_name)?,
            None if must_exist => return Err(no_such_session(export_name)),
            None => {}
        }
        let image =
            session.map_or_else(|| self.current(source), |session| Arc::clone(session.device.image()));
        Ok(describe(source, id.as_ref(), &image))
    }

    /// The image for a session that begins now.
    pub(super) fn current(&self, source: &Source) -> Arc<Image> {
        let image = source.current();
        if source.was_replaced() {
            self.give(Chore::Look);
        }
        image
    }

    /// Which image's and which session's `name` is, `IMAGE@ID`.
    ///
    /// # Errors
    /// `NotFound` when there is no such image, `Invalid` when nobody's session can be called so.
    pub(super) fn key(&self, name: &str) -> Result<Key> {
        let Wanted { index, id, must_exist, .. } =
            self.look_up(name).map_err(|error| match error.kind() {
                // An id without its image is what is most easily taken for a name.
                ErrorKind::NotFound if !name.contains('@') => {
                    let error = Error::new(ErrorKind::NotFound, "No such session:").on(name);
                    error.advise("write IMAGE@ID; 'memdev ps' lists the sessions")
                }
                ErrorKind::NotFound => error.advise(ASK_FOR_IMAGES),
                _ => error,
            })?;
        let none = || Error::new(ErrorKind::Invalid, "Not the name of a session:").on(name).advise(ASK);
        Ok((index, id.filter(|_| !must_exist).ok_or_else(none)?))
    }

    /// The session in the map of the named ones at `key`, which `name` stands for, and who is counted as its maker.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub(super) fn at(&self, key: &Key, name: &str) -> Result<(Arc<Session>, Party)> {
        let named = self.named();
        let (session, place) = named.get(key).ok_or_else(|| unknown(name))?;
        Ok((Arc::clone(session), place.party()))
    }

    /// A new named session for somebody who is going to enter it, made by `make` with a budget: `memory` bytes of data, or
    /// the usual ones. It stays until it was entered and left again, or ended; `party` is counted as its maker.
    ///
    /// # Errors
    /// `InUse` when there is one at `key`, which `name` stands for; `Denied` when there are as many sessions as there may
    /// be; `OutOfSpace` when there is no memory for it.
    pub(super) fn add(
        &self,
        (key, name): (Key, &str),
        party: Party,
        memory: Option<u64>,
        make: impl FnOnce(Budget) -> Result<Session>,
    ) -> Result<Arc<Session>> {
        if self.named().contains_key(&key) {
            return Err(taken(name));
        }
        self.check_not_giving_way(name)?;
        let (budget, place) = self.room(party, memory)?;
        // Not under the lock on the map: it may have to wait for a turn.
        let session = Arc::new(make(budget)?);
        session.attached().awaited = true;
        let mut named = self.named();
        self.check_not_giving_way(name)?;
        match named.entry(key) {
            Entry::Occupied(_) => return Err(taken(name)),
            Entry::Vacant(vacant) => vacant.insert((Arc::clone(&session), place)),
        };
        Ok(session)
    }

    pub(super) fn look_up(&self, export_name: &str) -> Result<Wanted<'_>> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "Server is shutting down"));
        }
        self.check_not_before(export_name)?;
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
        let image = self.current(source);
        let line = Arc::new(Line::new(Arc::clone(stream)));
        let (session, place) = match &id {
            None => {
                self.check_not_giving_way(export_name)?;
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
        key: Key,
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
                self.check_not_giving_way(export_name)?;
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
        let (budget, place) = self.room(Party::of(stream.peer()), None)?;
        let device = self.blank(image, budget, false)?;
        Ok((Arc::new(Session::new(device, Owner::of(stream.peer()), self.limits.caps)), place))
    }

    /// A budget and a place for one more session of `party`, which may hold `memory` bytes of data, or the usual ones.
    fn room(&self, party: Party, memory: Option<u64>) -> Result<(Budget, Place)> {
        let place = self.sessions.enter(party).map_err(too_many)?;
        let budget =
            Budget::within(&self.total, memory.unwrap_or(self.limits.session_memory)).map_err(no_memory)?;
        Ok((budget, place))
    }

    /// A device that is `image` still. What is written to it is sealed if that is wanted, or done with every session.
    ///
    /// # Errors
    /// `OutOfSpace` when there is no room for its key.
    pub(super) fn blank(&self, image: Arc<Image>, budget: Budget, sealed: bool) -> Result<Device> {
        let blocks = self.pool.block_size().blocks_for(image.size());
        let pool = Arc::clone(&self.pool);
        let overlay = if sealed || self.limits.seal {
            let key = self.pool.keys().ok().and_then(Keys::make).ok_or_else(|| {
                Error::new(ErrorKind::OutOfSpace, "No room for the key of one more sealed session")
                    .advise("try again when others have ended, or raise ulimit -l before the server starts")
            })?;
            Overlay::sealed(blocks, pool, budget, key)
        } else {
            Overlay::new(blocks, pool, budget)
        };
        Ok(Device::new(image, overlay))
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

    /// How many named sessions there are.
    #[cfg(test)]
    pub(super) fn named_sessions(&self) -> usize {
        self.named().len()
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

/// For a client, who knows nothing of the server's other sessions.
fn no_such_session(export_name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "No such session").on(export_name)
}

/// For those who look after the server.
pub(super) fn unknown(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "No such session:").on(name).advise(ASK)
}

pub(super) fn taken(name: &str) -> Error {
    Error::new(ErrorKind::InUse, "There is such a session already:").on(name).advise("choose another id")
}

const ASK: &str = "'memdev ps' lists the sessions";

pub(super) const ASK_FOR_IMAGES: &str = "'memdev image list' lists the images";

fn no_memory(kind: ErrorKind) -> Error {
    Error::new(kind, "Nearly all of the server's memory is used, so there are no new sessions")
        .advise("try again when others have ended, or have given some back")
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
