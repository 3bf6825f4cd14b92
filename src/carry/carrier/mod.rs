//! The carrier: fills, watches, delivers, and sees to the rest at the end.
//!
//! ```text
//!  overview ── look ──> State: queue, what is known ──> work (several threads) ──> store
//!     └─ when nobody is inside any more: end ──> report, and the rest to the spool
//! ```

mod awaited;
mod end;
mod look;
mod overview;
mod work;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use self::awaited::while_awaited;
use self::overview::Main;
use super::Options;
use super::delivery::{Delivery, Notes};
use super::fill::Fill;
use super::known::KnownPaths;
use super::queue::Queue;
use super::rules::Rules;
use super::status::Status;
use super::stores::{self, Session, Store};
use super::tree::Tree;
use super::watch::Watch;
use crate::attach::control;
use crate::error::{Error, Result};

/// How often those who look are told how far it is.
const TELL: Duration = Duration::from_millis(200);

/// One carried directory of one session.
pub(crate) struct Job<'a> {
    pub(crate) options: &'a Options,
    /// Where it is carried to.
    pub(crate) destination: &'a str,
    /// The root directory of the private root's file system, in a mount of its own, which has nothing mounted in it.
    pub(crate) root: OwnedFd,
    /// The carried directory, from there.
    pub(crate) place: PathBuf,
    pub(crate) session_id: &'a str,
    pub(crate) session_name: &'a str,
    /// User and group inside of the one whose everything is, where [`Options::of_user`] says so.
    pub(crate) person: Option<(u32, u32)>,
    /// Readable when nobody is inside any more.
    pub(crate) inside: BorrowedFd<'a>,
    /// See [`KnownPaths::journal`].
    pub(crate) journal: OwnedFd,
}

/// Carries, until nobody is inside any more and everything is delivered or in the spool. `channel` hears `filled` once, how
/// far it is at the end, and the report. A word over it ends the attempts to deliver. That nobody listens is fine.
///
/// # Errors
/// The destination cannot be used, or the directory not be filled; then nothing has been delivered.
pub(crate) fn serve(job: Job<'_>, channel: BorrowedFd<'_>) -> Result<()> {
    let failed = |error| Error::io("Cannot begin to carry", error);
    let options = job.options;
    let rules = Rules::new(&options.rules, &options.exclude, &options.include)?;
    let session = Session { id: job.session_id.to_owned(), name: job.session_name.to_owned() };
    let tree = Tree::new(job.root, job.place);
    let mut known = KnownPaths::of(job.journal.into()).map_err(failed)?;
    let notes = Notes::default();
    // Whoever takes over from one that was killed finds the mark of one that had filled.
    let first = known.get(Path::new("")).is_none();
    let open = || stores::open(job.destination, &session.id[..session.id.len().min(12)], first, job.person);
    let store = if first {
        let fill = || {
            let store = open()?;
            fill(&tree, &*store, &rules, &notes, &mut known, channel)?;
            for lack in store.lacks() {
                notes.add(format!("{} holds no {lack}", job.destination));
            }
            Ok::<_, Error>(store)
        };
        while_awaited(channel, job.inside, fill).map_err(failed)??
    } else {
        let store = open()?;
        let _ = store.sweep(Path::new(""));
        store
    };
    let watch = Watch::new(&tree);
    let shared = Shared {
        tree: &tree,
        store: &*store,
        rules: &rules,
        notes: &notes,
        session: &session,
        deletes: options.deletes,
        state: Mutex::new(State::new(known, !first)),
        wake: Condvar::new(),
    };
    if first {
        shared.take_stock();
    }
    let mut status = Status::new(&options.state, job.session_name, tree.place(), job.destination);
    let _ = control::send(channel, &json!({ "filled": true, "notes": notes.all() }), &[]);
    std::thread::scope(|scope| {
        scope.spawn(|| shared.work(scope));
        let mut main = Main { shared: &shared, watch, inside: job.inside, channel: Some(channel) };
        main.attend(&mut status);
        let mut report = main.finish(scope, options, &mut status, job.destination);
        report.notes = notes.all();
        let _ = control::send(channel, &json!({ "report": report.to_json() }), &[]);
        drop(status);
        // A delivery may hang for as long as a server does.
        crate::sys::process::exit_now(0)
    })
}

/// Fills the directory, and tells how far that is.
fn fill(
    tree: &Tree,
    store: &dyn Store,
    rules: &Rules,
    notes: &Notes,
    known: &mut KnownPaths,
    channel: BorrowedFd<'_>,
) -> Result<()> {
    let mut told = Instant::now();
    let mut progress = |files: u64| {
        if told.elapsed() > TELL {
            told = Instant::now();
            let _ = control::send(channel, &json!({ "filling": files }), &[]);
        }
    };
    let mut fill = Fill { tree, store, rules, notes, progress: &mut progress };
    fill.run(known).map(drop)
}

struct State {
    queue: Queue,
    known: KnownPaths,
    /// Nothing more is delivered.
    over: bool,
    /// The queue takes everything.
    unlimited: bool,
    /// Everything is to be looked at again.
    rescan: bool,
    /// Nobody is inside any more.
    at_rest: bool,
    /// How often the destination has failed in a row, and when it did last.
    failures: u32,
    failed: Option<Instant>,
    /// It is not asked before.
    pause: Option<Instant>,
    last_error: Option<String>,
    /// Since when nothing has succeeded, in seconds since 1970; `None` if nothing has failed since the last success.
    failing_since: Option<i64>,
    last_success: Instant,
    /// Files and bytes.
    delivered: (u64, u64),
    /// How many threads deliver, and how many of them have nothing to do.
    workers: usize,
    idle: usize,
}

impl State {
    fn new(known: KnownPaths, rescan: bool) -> Self {
        Self {
            queue: Queue::default(),
            known,
            over: false,
            unlimited: false,
            rescan,
            at_rest: false,
            failures: 0,
            failed: None,
            pause: None,
            last_error: None,
            failing_since: None,
            last_success: Instant::now(),
            delivered: (0, 0),
            workers: 1,
            idle: 0,
        }
    }
}

struct Shared<'a> {
    tree: &'a Tree,
    store: &'a dyn Store,
    rules: &'a Rules,
    notes: &'a Notes,
    session: &'a Session,
    deletes: bool,
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn delivery(&self) -> Delivery<'_> {
        Delivery { store: self.store, session: self.session, notes: self.notes }
    }
}
