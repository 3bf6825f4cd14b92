//! Deliveries: what is in the queue, by as many threads as have something to do.

use std::io;
use std::path::Path;
use std::sync::PoisonError;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::{Shared, State};
use crate::carry::delivery::{Notes, hash_of_link, shorten};
use crate::carry::entry::{Kind, Time, Version, escape};
use crate::carry::known::{Known, hash_of_attributes};
use crate::carry::queue::{LONGEST_DELAY, delay};
use crate::carry::stores::Properties;
use crate::error::plain;

/// How soon a file is looked at again that somebody writes, at the latest.
const AFTER_BUSY: Duration = Duration::from_secs(1);

/// So long who delivers waits for something to deliver, beside another who does.
const LINGER: Duration = Duration::from_secs(30);

/// Why something was not delivered.
enum Trouble {
    /// It changes just now.
    Busy,
    /// It cannot be read.
    Here(io::Error),
    /// It cannot be left there.
    There(io::Error),
}

impl Trouble {
    fn of_delivery(error: io::Error) -> Self {
        // The system's own EBUSY has a number.
        match error.kind() {
            io::ErrorKind::ResourceBusy if error.raw_os_error().is_none() => Self::Busy,
            _ => Self::There(error),
        }
    }
}

impl Shared<'_> {
    /// Delivers what is in the queue, one after the other. As long as there may be more, somebody else waits for what comes
    /// meanwhile: nobody knows how long a delivery takes.
    pub(super) fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut state = self.lock();
        let mut last = Instant::now();
        loop {
            if state.over {
                return;
            }
            let now = Instant::now();
            let paused = state.pause.filter(|pause| *pause > now);
            let next = if paused.is_some() { None } else { state.queue.pop(now) };
            let Some(path) = next else {
                let until = paused.or_else(|| state.queue.next_time());
                let wait = until.map_or(LINGER, |until| until.saturating_duration_since(now));
                state.idle += 1;
                let waited = self.wake.wait_timeout(state, wait.clamp(Duration::from_millis(5), LINGER));
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                if last.elapsed() >= LINGER && state.idle > 0 {
                    state.workers -= 1;
                    return;
                }
                continue;
            };
            if state.idle == 0 && state.workers < self.store.at_once() {
                // If there can be no more threads, those that there are do it.
                let helper = thread::Builder::new().spawn_scoped(scope, || self.work(scope));
                state.workers += usize::from(helper.is_ok());
            }
            let known = state.known.get(&path).cloned();
            let at_rest = state.at_rest;
            drop(state);
            let result = self.deliver(&path, known.as_ref(), at_rest);
            last = Instant::now();
            state = self.lock();
            state.after(&path, result, now, at_rest, self.notes);
            self.wake.notify_all();
        }
    }

    /// Delivers the newest version of what is at `path`. What is known of it then, `None` if it is to be forgotten.
    fn deliver(&self, path: &Path, known: Option<&Known>, at_rest: bool) -> Result<Option<Known>, Trouble> {
        let delivery = self.delivery();
        let seen = self.tree.version(path).map_err(Trouble::Here)?.map(Version::before_reading);
        let Some(seen) = seen else {
            let Some(known) = known.filter(|known| known.is_there()) else { return Ok(None) };
            if !self.deletes {
                return Ok(Some(known.clone()));
            }
            delivery.remove(path, known).map_err(Trouble::There)?;
            return Ok(None);
        };
        self.parents(path)?;
        let properties = |version: &Version| -> Result<Properties, Trouble> {
            Ok(Properties {
                meta: version.meta.clone(),
                modified: version.modified,
                attributes: match version.kind {
                    Kind::Link => Vec::new(),
                    _ => self.tree.attributes(path).map_err(Trouble::Here)?,
                },
                session: self.session.clone(),
            })
        };
        let mut attributes = 0;
        let (seen, stamp, hash) = match seen.kind {
            Kind::Directory => {
                let properties = properties(&seen)?;
                attributes = hash_of_attributes(&properties.attributes);
                let stamp = delivery.directory(path, &properties, known).map_err(Trouble::There)?;
                (seen, stamp, None)
            }
            Kind::Link => {
                let target = self.tree.target(path).map_err(Trouble::Here)?;
                let stamp =
                    delivery.link(path, &target, &properties(&seen)?, known).map_err(Trouble::There)?;
                (seen, stamp, Some(hash_of_link(&target)))
            }
            Kind::File => {
                self.clear(path)?;
                let mut source = match self.tree.read(path, at_rest) {
                    Ok(source) => source,
                    Err(error)
                        if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound) =>
                    {
                        return Err(Trouble::Busy);
                    }
                    Err(error) => return Err(Trouble::Here(error)),
                };
                let version = source.version.clone();
                let (stamp, hash) = delivery
                    .file(path, &mut source, &properties(&version)?, known)
                    .map_err(Trouble::of_delivery)?;
                (version, stamp, hash)
            }
            Kind::Other => return Ok(known.cloned()),
        };
        Ok(Some(Known { seen, there: Some(stamp), hash, attributes }))
    }

    /// Makes the directories that `path` is in.
    fn parents(&self, path: &Path) -> Result<(), Trouble> {
        let mut above: Vec<_> =
            path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
        above.reverse();
        for directory in above {
            let known = self.lock().known.get(directory).cloned();
            if known.as_ref().is_some_and(|known| known.is_there() && known.is_directory()) {
                continue;
            }
            let version = self.tree.version(directory).map_err(Trouble::Here)?.map(Version::before_reading);
            let Some(seen) = version.filter(|version| version.kind == Kind::Directory) else {
                // It is being replaced: what was in it is looked for again.
                return Err(Trouble::Busy);
            };
            let attributes = self.tree.attributes(directory).map_err(Trouble::Here)?;
            let hash = hash_of_attributes(&attributes);
            let (meta, modified) = (seen.meta.clone(), seen.modified);
            let properties = Properties { meta, modified, attributes, session: self.session.clone() };
            let stamp =
                self.delivery().directory(directory, &properties, known.as_ref()).map_err(Trouble::There)?;
            let known = Known { there: Some(stamp), ..Known::of(seen, hash) };
            self.lock().known.set(directory, known);
        }
        Ok(())
    }

    /// Where a directory was left that is a file by now, it is emptied of what this session had left in it. What else is in
    /// it is kept, with it, beside.
    fn clear(&self, path: &Path) -> Result<(), Trouble> {
        let below: Vec<_> = {
            let state = self.lock();
            let below = state.known.below(path).into_iter().filter(|inner| inner != path);
            below.filter_map(|inner| state.known.get(&inner).cloned().map(|known| (inner, known))).collect()
        };
        if !self.deletes {
            return Ok(());
        }
        for (inner, known) in below.into_iter().rev().filter(|(_, known)| known.is_there()) {
            match self.delivery().remove(&inner, &known) {
                Err(error) if error.kind() != io::ErrorKind::NotADirectory => {
                    return Err(Trouble::There(error));
                }
                _ => self.lock().known.forget(&inner),
            }
        }
        Ok(())
    }
}

impl State {
    /// A delivery that began at `begun` is over.
    fn after(
        &mut self,
        path: &Path,
        result: Result<Option<Known>, Trouble>,
        begun: Instant,
        at_rest: bool,
        notes: &Notes,
    ) {
        let now = Instant::now();
        match &result {
            Ok(_) => self.failing_since = None,
            Err(Trouble::Busy) => {}
            Err(_) => drop(self.failing_since.get_or_insert_with(|| Time::now().seconds)),
        }
        match result {
            Ok(known) => {
                match known {
                    Some(known) => {
                        self.delivered.0 += 1;
                        self.delivered.1 += if known.seen.kind == Kind::File { known.seen.size } else { 0 };
                        self.known.set(path, known);
                    }
                    None => self.known.forget(path),
                }
                self.queue.done(path);
                self.failures = 0;
                self.pause = None;
                self.last_success = now;
            }
            Err(Trouble::Busy) => self.queue.failed(path, now, AFTER_BUSY),
            Err(Trouble::Here(error)) => {
                self.last_error = Some(shorten(format!("cannot read {}: {}", escape(path), plain(&error))));
                // There is no device any more, which nobody can help.
                if at_rest {
                    notes.add(format!("{} cannot be read: {}", escape(path), plain(&error)));
                }
                self.queue.failed(path, now, LONGEST_DELAY);
            }
            Err(Trouble::There(error)) => {
                tracing::debug!(path = %escape(path), %error, "Cannot deliver");
                self.last_error = Some(shorten(format!("{}: {}", escape(path), plain(&error))));
                self.queue.failed(path, now, LONGEST_DELAY);
                // Of those that were under way when it failed, each would tell of the same.
                let is_news = self.failed.is_none_or(|failed| begun >= failed);
                if is_news && !is_about_this_file(&error) {
                    self.failures += 1;
                    self.failed = Some(now);
                    self.pause = Some(now + delay(self.failures));
                }
            }
        }
    }
}

/// Whether others may be delivered although this one cannot.
fn is_about_this_file(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::PermissionDenied
            | Kind::InvalidInput
            | Kind::InvalidFilename
            | Kind::IsADirectory
            | Kind::NotADirectory
            | Kind::DirectoryNotEmpty
            | Kind::AlreadyExists
            | Kind::NotFound
            | Kind::FileTooLarge
    )
}

#[cfg(test)]
mod tests {
    use std::ffi::{OsStr, OsString};
    use std::fs::{self, File};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, Condvar, Mutex, mpsc};

    use super::*;
    use crate::carry::entry::Stamp;
    use crate::carry::known::KnownPaths;
    use crate::carry::queue::Rank;
    use crate::carry::rules::Rules;
    use crate::carry::stores::{Aside, Content, Found, Session, Store};
    use crate::carry::tree::Tree;

    /// Files are delivered to it by this.
    struct To<F>(F);

    impl<F: Fn(&Path) -> io::Result<()> + Send + Sync> Store for To<F> {
        fn lacks(&self) -> Vec<&'static str> {
            Vec::new()
        }

        fn at_once(&self) -> usize {
            4
        }

        fn find(&self, _: &Path) -> io::Result<Option<Found>> {
            unreachable!()
        }

        fn list(&self, _: &Path) -> io::Result<Vec<(OsString, Found)>> {
            unreachable!()
        }

        fn get(&self, _: &Path) -> io::Result<Box<dyn Content + '_>> {
            unreachable!()
        }

        fn target(&self, _: &Path) -> io::Result<OsString> {
            unreachable!()
        }

        fn put(&self, path: &Path, _: &mut dyn Content, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            (self.0)(path).map(|()| Stamp { size: 0, modified: Time::default(), tag: None })
        }

        fn link(&self, _: &Path, _: &OsStr, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            unreachable!()
        }

        fn make_directory(&self, _: &Path, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            unreachable!()
        }

        fn remove(&self, _: &Path, _: Kind) -> io::Result<()> {
            unreachable!()
        }
    }

    /// Has files delivered that are pushed by `test`, by `to`.
    fn deliver(to: impl Fn(&Path) -> io::Result<()> + Send + Sync, test: impl FnOnce(&Shared<'_>)) {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let tree = Tree::new(File::open(dir.path()).unwrap().into(), PathBuf::new());
        for name in ["a", "b", "c", "d"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let known = KnownPaths::of(KnownPaths::journal().unwrap()).unwrap();
        let shared = Shared {
            tree: &tree,
            store: &To(to),
            rules: &Rules::new(&[], &[], &[]).unwrap(),
            notes: &Notes::default(),
            session: &Session::default(),
            deletes: false,
            state: Mutex::new(State::new(known, false)),
            wake: Condvar::new(),
        };
        /// Whatever becomes of the test, who works ends.
        struct Over<'a>(&'a Shared<'a>);

        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.lock().over = true;
                self.0.wake.notify_all();
            }
        }

        thread::scope(|scope| {
            let _over = Over(&shared);
            scope.spawn(|| shared.work(scope));
            test(&shared);
        });
    }

    fn push(shared: &Shared<'_>, name: &str) {
        assert!(shared.lock().queue.push(Path::new(name), Rank::File, 1, false));
        shared.wake.notify_all();
    }

    /// A long one, of which there was nobody who would have waited for more, held up all that came later.
    #[test]
    fn what_comes_later_does_not_wait_for_what_takes_long() {
        let (begin, begun) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let released = Mutex::new(released);
        let to = |path: &Path| {
            begin.send(path.to_owned()).unwrap();
            if path == Path::new("a") {
                released.lock().unwrap().recv().unwrap();
            }
            Ok(())
        };
        deliver(to, |shared| {
            push(shared, "a");
            assert_eq!(begun.recv().unwrap(), Path::new("a"));
            push(shared, "b");
            assert_eq!(begun.recv().unwrap(), Path::new("b"));
            release.send(()).unwrap();
        });
    }

    /// Each of those that were under way counted, and all waited for 30 s after one interruption.
    #[test]
    fn one_failure_of_the_destination_is_one() {
        let (all_begun, count) = (Barrier::new(4), AtomicUsize::new(0));
        let (begin, begun) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let to = |_: &Path| {
            begin.send(()).unwrap();
            if count.fetch_add(1, Ordering::Relaxed) < 4 {
                all_begun.wait();
            } else {
                let _ = released.lock().unwrap().recv();
            }
            Err(io::ErrorKind::ConnectionAborted.into())
        };
        deliver(to, |shared| {
            for name in ["a", "b", "c", "d"] {
                push(shared, name);
            }
            // Until one of them is tried again.
            (0..5).for_each(|_| begun.recv().unwrap());
            assert_eq!(shared.lock().failures, 1);
            drop(release);
        });
    }
}
