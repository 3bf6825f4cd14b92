//! Which directories may have changed since the last look.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::tree::Tree;
use crate::sys::fanotify::{self, Told};

/// How long changes are collected before they are looked at, from the first on.
const COLLECT: Duration = Duration::from_millis(300);

/// How often everything is looked at where the kernel does not tell.
const EVERY: Duration = Duration::from_secs(5);

/// The most directories that are told apart; with more, everything is looked at.
const DIRECTORIES_MAX: usize = 4096;

/// What to look at.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// These directories, not what is below them.
    At(BTreeSet<PathBuf>),
    /// Everything.
    AtAll,
}

/// The kernel's word, or a clock where it gives none.
pub(crate) struct Watch {
    group: Option<OwnedFd>,
    changed: BTreeSet<PathBuf>,
    lost: bool,
    since: Option<Instant>,
    /// How often events were lost.
    pub(crate) losses: u64,
}

impl Watch {
    /// Begins: what changes from now on is told.
    pub(crate) fn new(tree: &Tree) -> Self {
        let group = fanotify::watch(tree.root());
        if let Err(error) = &group {
            tracing::warn!(%error, "The kernel does not tell of changes: everything is looked at again and again");
        }
        Self { group: group.ok(), changed: BTreeSet::new(), lost: false, since: None, losses: 0 }
    }

    /// Readable when there is something to be heard.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(AsFd::as_fd)
    }

    /// Takes what the kernel has to tell.
    pub(crate) fn hear(&mut self, tree: &Tree) {
        let Some(group) = &self.group else { return };
        let mut buffer = vec![0; 64 << 10];
        let mut handles = BTreeSet::new();
        while let Ok(length @ 1..) = rustix::io::read(group, &mut buffer[..]) {
            for told in fanotify::parse(&buffer[..length]) {
                match told {
                    Told::Directory(handle) => drop(handles.insert(handle)),
                    Told::Lost => {
                        self.lost = true;
                        self.losses += 1;
                    }
                }
            }
            if handles.len() > DIRECTORIES_MAX {
                self.lost = true;
                handles.clear();
            }
        }
        for handle in handles {
            match directory(tree, &handle) {
                Directory::Carried(path) => drop(self.changed.insert(path)),
                Directory::Elsewhere => {}
                Directory::Unknown => self.lost = true,
            }
        }
        if self.changed.len() > DIRECTORIES_MAX {
            self.changed.clear();
            self.lost = true;
        }
        if self.lost || !self.changed.is_empty() {
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// When there will be something to look at.
    pub(crate) fn due(&self, last: Instant) -> Option<Instant> {
        match &self.group {
            Some(_) => self.since.map(|since| since + COLLECT),
            None => Some(last + EVERY),
        }
    }

    /// What to look at, and forget.
    pub(crate) fn take(&mut self) -> Look {
        self.since = None;
        let changed = std::mem::take(&mut self.changed);
        if std::mem::take(&mut self.lost) || self.group.is_none() { Look::AtAll } else { Look::At(changed) }
    }
}

enum Directory {
    /// Its path from the carried one.
    Carried(PathBuf),
    /// It is not below that, or no more.
    Elsewhere,
    /// Its path cannot be had.
    Unknown,
}

/// Where the directory is now. What was removed is noticed in the one above it.
fn directory(tree: &Tree, handle: &[u8]) -> Directory {
    let Ok(found) = fanotify::open(tree.root(), handle) else { return Directory::Elsewhere };
    let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())) else {
        return Directory::Unknown;
    };
    let whole = path.strip_prefix("/").unwrap_or(&path);
    let Ok(inner) = whole.strip_prefix(tree.place()) else {
        // A directory on the way there may have been exchanged.
        return if tree.place().starts_with(whole) { Directory::Unknown } else { Directory::Elsewhere };
    };
    // The kernel's text is not to be trusted: a name may look as if it was removed, or somebody renames it just now.
    let same = || {
        let number = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino));
        let again =
            tree.beneath().open(&tree.whole(inner), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).ok()?;
        Some(number(again.as_fd())? == number(found.as_fd())?)
    };
    if same() == Some(true) {
        return Directory::Carried(inner.to_owned());
    }
    let gone = rustix::fs::fstat(&found).is_ok_and(|stat| stat.st_nlink == 0);
    if gone || inner == Path::new("") { Directory::Elsewhere } else { Directory::Unknown }
}
