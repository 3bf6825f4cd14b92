//! What is to be delivered: paths, no contents. A path that changes again before its turn is there once, and what is read in its turn
//! is the newest version. With no room for more, the rest is found by looking again when there is.
//!
//! The order keeps a tree usable at every moment: directories before what is in them, files before links to them, and what
//! was removed last of all, since it may have been renamed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::entry::Kind;

/// The most paths that wait.
pub(crate) const PATHS_MAX: usize = 1 << 16;

const FIRST_DELAY: Duration = Duration::from_millis(250);
/// The longest time until something is tried again.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// When its turn comes, roughly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Made before what is in it.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// It is not there any more.
    Removal,
}

impl Rank {
    pub(crate) const ALL: [Self; 4] = [Self::Directory, Self::File, Self::Link, Self::Removal];

    pub(crate) fn of(kind: Option<Kind>) -> Self {
        match kind {
            Some(Kind::Directory) => Self::Directory,
            Some(Kind::Link) => Self::Link,
            Some(Kind::File | Kind::Other) => Self::File,
            None => Self::Removal,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Item {
    rank: Rank,
    bytes: u64,
    /// How often it has failed.
    failures: u32,
    /// It is not to be tried before.
    later: Option<Instant>,
    /// It is being delivered.
    in_flight: bool,
    /// It has changed since that began.
    again: bool,
}

/// The queue.
#[derive(Default)]
pub(crate) struct Queue {
    items: HashMap<PathBuf, Item>,
    ready: [BTreeSet<PathBuf>; 4],
    later: BTreeMap<Instant, Vec<PathBuf>>,
    counts: [usize; 4],
    bytes: u64,
    /// What is being removed: one at a time, since a directory has to be empty.
    removing: Option<PathBuf>,
    /// The tree is being looked at: what comes before links and removals may not be in it yet.
    pub(crate) is_growing: bool,
}

impl Queue {
    /// How many paths are in it, those in flight with them.
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// About how many bytes of files.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a path, or tells that it has changed again. `false` if there is no room, unless there is no limit.
    pub(crate) fn push(&mut self, path: &Path, rank: Rank, bytes: u64, unlimited: bool) -> bool {
        if let Some(item) = self.items.get_mut(path) {
            self.bytes = self.bytes - item.bytes + bytes;
            item.bytes = bytes;
            if item.in_flight {
                item.again = true;
            }
            let (old, waits) = (item.rank, item.later.is_some());
            if old != rank {
                item.rank = rank;
                self.counts[old as usize] -= 1;
                self.counts[rank as usize] += 1;
                if self.ready[old as usize].remove(path) {
                    self.ready[rank as usize].insert(path.to_owned());
                }
            }
            if waits {
                self.ready_again(path.to_owned());
            }
            return true;
        }
        if self.items.len() >= PATHS_MAX && !unlimited {
            return false;
        }
        let item = Item { rank, bytes, failures: 0, later: None, in_flight: false, again: false };
        self.items.insert(path.to_owned(), item);
        self.counts[rank as usize] += 1;
        self.bytes += bytes;
        self.ready[rank as usize].insert(path.to_owned());
        true
    }

    /// The next whose turn it is; it is in flight from now on.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<PathBuf> {
        self.wake(now);
        for rank in Rank::ALL {
            let before: usize = self.counts[..rank as usize].iter().sum();
            // Files make the directories that they need, and so need not wait for others.
            if (before > 0 || self.is_growing) && rank >= Rank::Link {
                return None;
            }
            if rank == Rank::Removal && self.removing.is_some() {
                return None;
            }
            let ready = &mut self.ready[rank as usize];
            // What is in a directory is removed before it.
            let path = if rank == Rank::Removal { ready.pop_last() } else { ready.pop_first() };
            if let Some(path) = path {
                if rank == Rank::Removal {
                    // What is in it could not be removed: that comes first.
                    let is_inner = |other: &PathBuf| *other != path && other.starts_with(&path);
                    if self.later.values().flatten().any(is_inner) {
                        ready.insert(path);
                        return None;
                    }
                    self.removing = Some(path.clone());
                }
                if let Some(item) = self.items.get_mut(&path) {
                    item.in_flight = true;
                    item.again = false;
                }
                return Some(path);
            }
        }
        None
    }

    /// It has been delivered, or need not be.
    pub(crate) fn done(&mut self, path: &Path) {
        if self.removing.as_deref() == Some(path) {
            self.removing = None;
        }
        let Some(item) = self.items.get_mut(path) else { return };
        if item.again {
            *item = Item { in_flight: false, again: false, failures: 0, later: None, ..*item };
            let rank = item.rank;
            self.ready[rank as usize].insert(path.to_owned());
            return;
        }
        let item = *item;
        self.items.remove(path);
        self.counts[item.rank as usize] -= 1;
        self.bytes -= item.bytes;
    }

    /// Something has happened to it: if it waits for its time it need not any more.
    pub(crate) fn touch(&mut self, path: &Path) {
        if self.items.get(path).is_some_and(|item| item.later.is_some()) {
            self.ready_again(path.to_owned());
        }
    }

    /// It could not be: it is tried again, each time later, but not later than that.
    pub(crate) fn failed(&mut self, path: &Path, now: Instant, longest: Duration) {
        if self.removing.as_deref() == Some(path) {
            self.removing = None;
        }
        let Some(item) = self.items.get_mut(path) else { return };
        item.failures += 1;
        let delay = delay(item.failures).min(longest);
        item.in_flight = false;
        item.again = false;
        item.later = Some(now + delay);
        self.later.entry(now + delay).or_default().push(path.to_owned());
    }

    /// All that had to wait need not any more.
    pub(crate) fn hurry(&mut self) {
        for path in std::mem::take(&mut self.later).into_values().flatten() {
            self.ready_again(path);
        }
    }

    /// When the next of those that wait is to be tried.
    pub(crate) fn next_time(&self) -> Option<Instant> {
        self.later.keys().next().copied()
    }

    /// Everything that is in it, in the order of delivery.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let mut all: Vec<_> = self.items.iter().map(|(path, item)| (item.rank, path.clone())).collect();
        all.sort();
        all.into_iter().map(|(_, path)| path).collect()
    }

    fn wake(&mut self, now: Instant) {
        while let Some(entry) = self.later.first_entry().filter(|entry| *entry.key() <= now) {
            for path in entry.remove() {
                self.ready_again(path);
            }
        }
    }

    fn ready_again(&mut self, path: PathBuf) {
        let Some(item) = self.items.get_mut(&path).filter(|item| !item.in_flight) else { return };
        item.later = None;
        self.ready[item.rank as usize].insert(path);
    }
}

/// How long to wait after so many failures in a row.
pub(crate) fn delay(failures: u32) -> Duration {
    FIRST_DELAY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(queue: &mut Queue) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(path) = queue.pop(Instant::now()) {
            queue.done(&path);
            order.push(path.display().to_string());
        }
        order
    }

    #[test]
    fn directories_come_before_files_before_links_and_removals_last() {
        let mut queue = Queue::default();
        for (path, rank) in [
            ("gone", Rank::Removal),
            ("gone/deep", Rank::Removal),
            ("link", Rank::Link),
            ("d/file", Rank::File),
            ("d/e", Rank::Directory),
            ("d", Rank::Directory),
        ] {
            assert!(queue.push(Path::new(path), rank, 1, false));
        }
        assert_eq!((queue.len(), queue.bytes()), (6, 6));
        assert_eq!(all(&mut queue), ["d", "d/e", "d/file", "link", "gone/deep", "gone"]);
        assert_eq!((queue.len(), queue.bytes()), (0, 0));
    }

    #[test]
    fn what_changes_again_meanwhile_is_delivered_again_and_once() {
        let mut queue = Queue::default();
        let x = Path::new("x");
        for n in 0..5 {
            queue.push(x, Rank::File, n, false);
        }
        assert_eq!(queue.pop(Instant::now()).as_deref(), Some(x));
        assert_eq!(queue.pop(Instant::now()), None);
        for _ in 0..5 {
            queue.push(x, Rank::File, 7, false);
        }
        assert_eq!(queue.pop(Instant::now()), None, "it is in flight");
        queue.done(x);
        assert_eq!(all(&mut queue), ["x"]);
    }

    #[test]
    fn nothing_is_removed_while_something_is_not_delivered() {
        let mut queue = Queue::default();
        let now = Instant::now();
        queue.push(Path::new("old"), Rank::Removal, 0, false);
        queue.push(Path::new("new"), Rank::File, 1, false);
        let new = queue.pop(now).unwrap();
        assert_eq!(queue.pop(now), None, "it is in flight");
        queue.failed(&new, now, LONGEST_DELAY);
        assert_eq!(queue.pop(now), None, "it has failed");
        assert_eq!(queue.next_time(), Some(now + FIRST_DELAY));
        assert_eq!(queue.pop(now + FIRST_DELAY).as_ref(), Some(&new));
        queue.done(&new);
        assert_eq!(all(&mut queue), ["old"]);
    }

    /// What was found first was delivered while the rest of the tree was still looked at: a file that was renamed into a directory that
    /// came later was removed under its old name before it was there under the new one.
    #[test]
    fn nothing_is_removed_while_something_may_be_found() {
        let mut queue = Queue { is_growing: true, ..Queue::default() };
        queue.push(Path::new("old"), Rank::Removal, 0, false);
        queue.push(Path::new("link"), Rank::Link, 0, false);
        assert_eq!(queue.pop(Instant::now()), None);
        queue.push(Path::new("z/new"), Rank::File, 1, false);
        assert_eq!(queue.pop(Instant::now()).as_deref(), Some(Path::new("z/new")));
        queue.done(Path::new("z/new"));
        assert_eq!(queue.pop(Instant::now()), None);
        queue.is_growing = false;
        assert_eq!(all(&mut queue), ["link", "old"]);
    }

    #[test]
    fn a_directory_is_removed_when_nothing_is_in_it() {
        let mut queue = Queue::default();
        let now = Instant::now();
        for path in ["d", "d/a", "d/b"] {
            queue.push(Path::new(path), Rank::Removal, 0, false);
        }
        let b = queue.pop(now).unwrap();
        assert_eq!((b.as_path(), queue.pop(now)), (Path::new("d/b"), None), "one at a time");
        queue.failed(&b, now, LONGEST_DELAY);
        let a = queue.pop(now).unwrap();
        assert_eq!(a, Path::new("d/a"));
        queue.done(&a);
        assert_eq!(queue.pop(now), None, "there is something in it still");
        assert_eq!(queue.pop(now + FIRST_DELAY), Some(b.clone()));
        queue.done(&b);
        assert_eq!(all(&mut queue), ["d"]);
    }

    #[test]
    fn what_was_removed_and_is_there_again_is_no_removal() {
        let mut queue = Queue::default();
        queue.push(Path::new("x"), Rank::Removal, 0, false);
        queue.push(Path::new("x"), Rank::File, 3, false);
        queue.push(Path::new("y"), Rank::Link, 3, false);
        assert_eq!(all(&mut queue), ["x", "y"]);
    }

    #[test]
    fn delays_grow_to_a_limit_and_it_has_an_end() {
        assert_eq!(delay(1), FIRST_DELAY);
        assert_eq!(delay(3), FIRST_DELAY * 4);
        assert_eq!(delay(u32::MAX), LONGEST_DELAY);
        let mut queue = Queue::default();
        let fits =
            (0..PATHS_MAX + 10).filter(|n| queue.push(Path::new(&n.to_string()), Rank::File, 0, false));
        assert_eq!(fits.count(), PATHS_MAX);
        assert!(queue.push(Path::new("0"), Rank::Link, 0, false), "it is there already");
    }
}
