//! Deliveries: what is in the queue, by as many threads as have something to do.

use std::io;
use std::path::Path;
use std::sync::PoisonError;
use std::thread::Scope;
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

/// So long who delivers waits for something to deliver; then only one does.
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
    /// Delivers what is in the queue, one after the other. While there is more that could be under way, others help.
    pub(super) fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut state = self.lock();
        loop {
            if state.over {
                return;
            }
            let now = Instant::now();
            let paused = state.pause.filter(|pause| *pause > now);
            let next = if paused.is_some() { None } else { state.queue.pop(now) };
            let Some(path) = next else {
                let until = paused.into_iter().chain(state.queue.next_time()).min();
                let wait = until.map_or(LINGER, |until| until.saturating_duration_since(now));
                state.idle += 1;
                let waited = self.wake.wait_timeout(state, wait.clamp(Duration::from_millis(5), LINGER));
                let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                if timeout.timed_out() && until.is_none() && state.workers > 1 {
                    state.workers -= 1;
                    return;
                }
                continue;
            };
            if state.idle == 0 && state.workers < self.store.at_once() && state.queue.has_more() {
                state.workers += 1;
                scope.spawn(|| self.work(scope));
            }
            let known = state.known.get(&path).cloned();
            let at_rest = state.at_rest;
            drop(state);
            let result = self.deliver(&path, known.as_ref(), at_rest);
            state = self.lock();
            state.after(&path, result, at_rest, self.notes);
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
    fn after(&mut self, path: &Path, result: Result<Option<Known>, Trouble>, at_rest: bool, notes: &Notes) {
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
                if !is_about_this_file(&error) {
                    self.failures += 1;
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
