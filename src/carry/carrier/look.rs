//! What is in the carried directory, compared with what is known of it: what differs is put into the queue.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::{Shared, State};
use crate::carry::entry::{Kind, Version, escape};
use crate::carry::known::Known;
use crate::carry::queue::Rank;
use crate::carry::watch::Look;
use crate::error::plain;

impl Shared<'_> {
    /// Remembers everything as it is at the beginning, so that only what changes is carried.
    pub(super) fn take_stock(&self) {
        let mut left = vec![PathBuf::new()];
        let mut state = self.lock();
        while let Some(directory) = left.pop() {
            for (name, seen) in self.tree.list(&directory).unwrap_or_default() {
                let path = directory.join(name);
                let is_directory = seen.kind == Kind::Directory;
                if !self.rules.takes(&path, is_directory) {
                    continue;
                }
                if state.known.get(&path).is_none() {
                    let seen = seen.before_reading();
                    let attributes = self.tree.hash_of_attributes(&path, seen.kind).unwrap_or(0);
                    state.known.set(&path, Known::of(seen, attributes));
                }
                if is_directory {
                    left.push(path);
                }
            }
        }
        if let Ok(Some(seen)) = self.tree.version(Path::new("")) {
            state.known.set(Path::new(""), Known::of(seen, 0));
        }
    }

    /// Looks at directories, and puts into the queue what is not as it was.
    pub(super) fn look(&self, look: Look) {
        self.lock().queue.is_growing = true;
        self.look_at(look);
        self.lock().queue.is_growing = false;
        self.wake.notify_all();
    }

    fn look_at(&self, look: Look) {
        let is_directory = |version: Version| version.kind == Kind::Directory;
        match self.tree.version(Path::new("")) {
            Ok(Some(version)) if is_directory(version.clone()) => {}
            Ok(_) => {
                let place = escape(self.tree.place());
                return self.notes.add(format!("/{place} is not there any more: nothing of it is removed"));
            }
            Err(error) => {
                self.lock().rescan = true;
                return self.notes.add(format!(
                    "/{} cannot be read: {}",
                    escape(self.tree.place()),
                    plain(&error)
                ));
            }
        }
        let mut left: Vec<_> = match look {
            Look::AtAll => {
                self.lock().rescan = false;
                vec![(PathBuf::new(), true)]
            }
            Look::At(directories) => directories.into_iter().map(|path| (path, false)).collect(),
        };
        while let Some((directory, deep)) = left.pop() {
            if !directory.as_os_str().is_empty() {
                match self.tree.version(&directory) {
                    Ok(Some(version))
                        if is_directory(version.clone()) && self.rules.takes(&directory, true) =>
                    {
                        self.meet(&directory, version);
                    }
                    // Whoever removed it has changed the one above it.
                    Ok(_) => continue,
                    Err(error) => {
                        self.notes.add(format!("{} is NOT carried: {}", escape(&directory), plain(&error)));
                        continue;
                    }
                }
            }
            let entries = match self.tree.list(&directory) {
                Ok(entries) => entries,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    continue;
                }
                Err(error) => {
                    self.notes.add(format!(
                        "/{} cannot be read: {}",
                        escape(&self.tree.whole(&directory)),
                        plain(&error)
                    ));
                    continue;
                }
            };
            let mut there = HashSet::new();
            for (name, version) in entries {
                let path = directory.join(name);
                if !self.rules.takes(&path, version.kind == Kind::Directory) {
                    continue;
                }
                let before = self.meet(&path, version.clone());
                if version.kind == Kind::Directory && (deep || before != Some(version.inode)) {
                    left.push((path.clone(), true));
                }
                there.insert(path);
            }
            // There may be many directories left.
            self.wake.notify_all();
            let mut state = self.lock();
            for path in state.known.within(&directory) {
                if !there.contains(&path) && !path.as_os_str().is_empty() {
                    self.miss(&mut state, &path);
                }
            }
        }
    }

    /// Something is there. If it was a directory before, its number.
    fn meet(&self, path: &Path, version: Version) -> Option<u64> {
        let may_differ = |known: &Known| known.seen.may_differ(&version);
        let is_to_be_read = self.lock().known.get(path).is_some_and(may_differ);
        let version = version.before_reading();
        let read = is_to_be_read.then(|| self.tree.hash_of_attributes(path, version.kind));
        let attributes = read.and_then(Result::ok);
        let mut state = self.lock();
        let before = state.known.get(path);
        let inode = before.filter(|known| known.is_directory()).map(|known| known.seen.inode);
        if version.kind == Kind::Other {
            self.notes.add("devices, pipes and sockets are not carried".to_owned());
            return inode;
        }
        let is_known = |known: &Known| {
            known.seen.is_same(&version) && attributes.is_none_or(|attributes| attributes == known.attributes)
        };
        if before.is_some_and(is_known) {
            // It may have waited for whoever was writing it.
            state.queue.touch(path);
            if attributes.is_some() {
                // They need not be read again before it changes again.
                state.known.see(path, version);
            }
            return inode;
        }
        let (rank, size) = (Rank::of(Some(version.kind)), version.size);
        if state.push(path, rank, size) {
            state.known.see(path, version);
        }
        inode
    }

    /// Something is not there any more, and nothing that was in it.
    fn miss(&self, state: &mut State, path: &Path) {
        for path in state.known.below(path) {
            let is_there = state.known.get(&path).is_some_and(Known::is_there);
            if is_there && self.deletes {
                state.push(&path, Rank::Removal, 0);
            } else if !is_there {
                // If it waits it is found to be gone in its turn.
                state.known.forget(&path);
            }
        }
    }
}

impl State {
    fn push(&mut self, path: &Path, rank: Rank, bytes: u64) -> bool {
        let fits = self.queue.push(path, rank, bytes, self.unlimited);
        // It is found again when there is room.
        self.rescan |= !fits;
        fits
    }
}
