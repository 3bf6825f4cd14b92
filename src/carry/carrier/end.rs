//! The end: nobody is inside any more, and what is left is delivered, or kept in the spool.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::overview::Main;
use super::{Shared, TELL};
use crate::attach::control;
use crate::carry::Options;
use crate::carry::entry::escape;
use crate::carry::known::Known;
use crate::carry::report::Report;
use crate::carry::spool;
use crate::carry::status::Status;
use crate::carry::stores::Found;
use crate::carry::together::together;
use crate::carry::watch::Look;
use crate::error::plain;

/// Of so many files in one directory, all that is there is asked for at once.
const WORTH_A_LIST: usize = 8;

impl<'a> Main<'a> {
    /// Delivers all that is left, as long as some of it can be; the rest goes into the spool.
    pub(super) fn finish<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, 'a>,
        options: &Options,
        status: &mut Status,
        destination: &str,
    ) -> Report {
        {
            let mut state = self.shared.lock();
            state.at_rest = true;
            state.unlimited = true;
            state.queue.hurry();
            state.failures = 0;
            state.pause = None;
            state.last_success = Instant::now();
        }
        self.shared.look(Look::AtAll);
        let (mut done_at_first, mut told) = (self.shared.lock().delivered.1, Instant::now());
        let mut stopped = false;
        loop {
            let (left, bytes, since, done) = {
                let state = self.shared.lock();
                (state.queue.len(), state.queue.bytes(), state.last_success.elapsed(), state.delivered.1)
            };
            done_at_first = done_at_first.min(done);
            if left == 0 {
                break;
            }
            if told.elapsed() > TELL {
                told = Instant::now();
                self.tell(status, "ending");
                let done = done - done_at_first;
                if let Some(channel) = self.channel {
                    let word = json!({ "done": done, "all": done + bytes });
                    if control::send(channel, &word, &[]).is_err() {
                        self.channel = None;
                    }
                }
            }
            stopped |= self.is_told_to_stop();
            if stopped || since > options.patience {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut state = self.shared.lock();
        state.over = true;
        self.shared.wake.notify_all();
        let paths = state.queue.paths();
        let why = state.last_error.take();
        drop(state);
        if paths.is_empty() {
            self.check(scope, options.patience);
            return Report::default();
        }
        let wanted = spool::Rest {
            tree: self.shared.tree,
            session: self.shared.session,
            destination,
            deletes: options.deletes,
            of_user: options.of_user,
            recipient: options.recipient.as_deref(),
            known: &|path: &Path| self.shared.lock().known.get(path).cloned(),
        };
        let why = why.or_else(|| stopped.then(|| "it was interrupted".to_owned()));
        let left = (paths.len() as u64, 0);
        match wanted.write(&options.spool, &paths) {
            Ok((id, bytes, missing)) => {
                let lost = missing.len() as u64;
                for note in missing {
                    self.shared.notes.add(note);
                }
                Report { left: Some((left.0, bytes)), lost, spooled: Some(id), why, notes: Vec::new() }
            }
            Err(error) => {
                let why = why.unwrap_or_default();
                let why = Some(format!("{why}; and the spool cannot be written: {error}"));
                Report { left: Some(left), lost: left.0, spooled: None, why, notes: Vec::new() }
            }
        }
    }

    fn is_told_to_stop(&mut self) -> bool {
        let Some(channel) = self.channel else { return false };
        let mut fds = [PollFd::from_borrowed_fd(channel, PollFlags::IN)];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !poll(&mut fds, Some(&none)).is_ok_and(|count| count > 0) {
            return false;
        }
        match control::receive(channel) {
            Ok(Some((word, _))) => word["stop"] == true,
            _ => {
                self.channel = None;
                false
            }
        }
    }

    /// As [`Shared::check`], but no longer than a server may take to fail.
    fn check<'scope>(&self, scope: &'scope Scope<'scope, 'a>, patience: Duration) {
        let (ended, end) = mpsc::channel();
        let shared = self.shared;
        // Nobody waits for this thread: the process ends, whatever it does.
        scope.spawn(move || {
            shared.check();
            let _ = ended.send(());
        });
        if end.recv_timeout(patience).is_err() {
            shared.notes.add("not everything that was delivered could be checked in time".to_owned());
        }
    }
}

impl Shared<'_> {
    /// Looks whether everything that was delivered is there still, and tells what is not.
    fn check(&self) {
        let mut delivered: BTreeMap<PathBuf, Vec<(PathBuf, Known)>> = BTreeMap::new();
        for (path, known) in self.lock().known.iter() {
            if known.is_there() && !known.is_directory() {
                let directory = path.parent().unwrap_or(Path::new("")).to_owned();
                delivered.entry(directory).or_default().push((path.clone(), known.clone()));
            }
        }
        let lists = self.store.lists_at_once();
        let Ok(()) = together(self.store.at_once(), delivered.into_iter().collect(), |(directory, all)| {
            match &all[..] {
                [(path, known)] => self.check_one(path, known, self.store.find(path)),
                all if lists && all.len() >= WORTH_A_LIST => self.check_in(&directory, all),
                // Each by itself.
                _ => return Ok(all.into_iter().map(|one| (directory.clone(), vec![one])).collect()),
            }
            Ok::<_, Infallible>(Vec::new())
        });
    }

    /// The same for much of what is in one directory.
    fn check_in(&self, directory: &Path, all: &[(PathBuf, Known)]) {
        let listed: HashMap<_, _> = match self.store.list(directory) {
            Ok(listed) => listed.into_iter().collect(),
            // Each is looked for, which tells what is wrong.
            Err(_) => HashMap::new(),
        };
        for (path, known) in all {
            let found = path.file_name().and_then(|name| listed.get(name));
            let found = found.map_or_else(|| self.store.find(path), |found| Ok(Some(found.clone())));
            self.check_one(path, known, found);
        }
    }

    fn check_one(&self, path: &Path, known: &Known, found: io::Result<Option<Found>>) {
        match found {
            Ok(Some(found)) if Some(&found.stamp) == known.there.as_ref() => {}
            Ok(Some(_)) => self.notes.add(format!(
                "{} has been changed at the destination by somebody else: this session's version may be beside it, as \
                 *.conflict-{}-*",
                escape(path),
                self.session.name
            )),
            Ok(None) => {
                // This session may have removed it itself, and not carry that.
                if self.tree.version(path).ok().flatten().is_some() {
                    self.notes.add(format!(
                        "{} has been removed at the destination by somebody else",
                        escape(path)
                    ));
                }
            }
            Err(error) => self.notes.add(format!("{} cannot be checked: {}", escape(path), plain(&error))),
        }
    }
}
