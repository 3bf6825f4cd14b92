//! What has been seen and delivered, path by path: in memory, and in a journal that outlives the process that writes it.
//!
//! The journal is a file in memory (`memfd`), which the launcher keeps as well, so that who takes over from a carrier that was killed
//! knows what its predecessor had delivered. Its first eight bytes say where the present part begins; then there is one line of JSON for every
//! change. A line that was begun and not ended is not there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use rustix::fs::{FallocateFlags, MemfdFlags};
use serde_json::{Value, json};

use super::entry::{Kind, Stamp, Version, escape, unescape};
use super::stores::Attribute;

/// The journal is written anew when this has been added to it, and four times of what was in it.
const COMPACT_AT: u64 = 4 << 20;

/// What is known of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// The newest version that was seen.
    pub(crate) seen: Version,
    /// What was left at the destination, of whichever version; `None` if nothing was.
    pub(crate) there: Option<Stamp>,
    /// SHA-256 of what was left there.
    pub(crate) hash: Option<String>,
    /// Of a directory: [`hash_of_attributes`], of those that it had when it was last delivered, or the session began.
    pub(crate) attributes: u64,
}

/// All paths that are known.
pub(crate) struct KnownPaths {
    all: BTreeMap<PathBuf, Known>,
    journal: File,
    end: u64,
    /// Bytes that were written since it was written anew, and how many that took.
    written: (u64, u64),
}

impl KnownPaths {
    /// A journal for one session.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn journal() -> io::Result<File> {
        let file = File::from(rustix::fs::memfd_create("memdev-carry", MemfdFlags::CLOEXEC)?);
        file.write_all_at(&8_u64.to_be_bytes(), 0)?;
        Ok(file)
    }

    /// Reads what is in a journal, and goes on with it.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn of(journal: File) -> io::Result<Self> {
        let mut start = [0; 8];
        journal.read_exact_at(&mut start, 0)?;
        let start = u64::from_be_bytes(start);
        let length = journal.metadata()?.len();
        let mut text = vec![0; usize::try_from(length.saturating_sub(start)).unwrap_or(0)];
        journal.read_exact_at(&mut text, start)?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut all = BTreeMap::new();
        for line in text[..whole].split(|&byte| byte == b'\n') {
            let Ok(value) = serde_json::from_slice::<Value>(line) else { continue };
            let Some(path) = value["path"].as_str().and_then(unescape) else { continue };
            match Known::from_json(&value) {
                Some(known) => drop(all.insert(path, known)),
                None => drop(all.remove(&path)),
            }
        }
        Ok(Self { all, journal, end: start + whole as u64, written: (0, whole as u64) })
    }

    /// Whether who wrote this journal had filled the directory. (Then it has remembered the directory itself.)
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn was_filled(journal: OwnedFd) -> io::Result<bool> {
        Ok(Self::of(journal.into())?.get(Path::new("")).is_some())
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(crate) fn get(&self, path: &Path) -> Option<&Known> {
        self.all.get(path)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&PathBuf, &Known)> {
        self.all.iter()
    }

    /// Remembers that this version was seen. It is written down with its delivery only: whoever takes over has to look
    /// again at what was not delivered.
    pub(crate) fn see(&mut self, path: &Path, seen: Version) {
        match self.all.get_mut(path) {
            Some(known) => known.seen = seen,
            None => drop(self.all.insert(path.to_owned(), Known::of(seen, 0))),
        }
    }

    /// Remembers what is where, and writes it down.
    pub(crate) fn set(&mut self, path: &Path, known: Known) {
        self.write(path, Some(&known));
        self.all.insert(path.to_owned(), known);
    }

    pub(crate) fn forget(&mut self, path: &Path) {
        if self.all.remove(path).is_some() {
            self.write(path, None);
        }
    }

    /// Those directly in `directory`.
    pub(crate) fn within(&self, directory: &Path) -> Vec<PathBuf> {
        let below = self.all.range(directory.to_owned()..).map(|(path, _)| path);
        let below = below.take_while(|path| path.starts_with(directory));
        below.filter(|path| path.parent() == Some(directory)).cloned().collect()
    }

    /// Those anywhere below `directory`, and itself.
    pub(crate) fn below(&self, directory: &Path) -> Vec<PathBuf> {
        let below = self.all.range(directory.to_owned()..).map(|(path, _)| path);
        below.take_while(|path| path.starts_with(directory)).cloned().collect()
    }

    fn write(&mut self, path: &Path, known: Option<&Known>) {
        let line = line(path, known);
        // Memory for it cannot be had: whoever takes over will deliver some things again.
        if let Err(error) = self.journal.write_all_at(&line, self.end) {
            tracing::warn!(%error, "Cannot write down what was delivered");
            return;
        }
        self.end += line.len() as u64;
        self.written.0 += line.len() as u64;
        if self.written.0 > COMPACT_AT.max(self.written.1 * 4) {
            let _ = self.compact();
        }
    }

    /// One line for each path, behind what is there; then the beginning is set, in one write; then the old part is freed.
    fn compact(&mut self) -> io::Result<()> {
        let text: Vec<u8> = self.all.iter().flat_map(|(path, known)| line(path, Some(known))).collect();
        // On a page of its own, so that all before it can be freed.
        let start = self.end.next_multiple_of(4096);
        self.journal.write_all_at(&text, start)?;
        self.journal.write_all_at(&start.to_be_bytes(), 0)?;
        let _ = rustix::fs::fallocate(
            &self.journal,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            4096,
            start.saturating_sub(4096),
        );
        self.end = start + text.len() as u64;
        self.written = (0, text.len() as u64);
        Ok(())
    }
}

fn line(path: &Path, known: Option<&Known>) -> Vec<u8> {
    let mut value = known.map_or_else(|| json!({}), Known::to_json);
    value["path"] = escape(path).into();
    format!("{value}\n").into_bytes()
}

impl Known {
    /// Of what was not left anywhere.
    pub(crate) fn of(seen: Version, attributes: u64) -> Self {
        Self { seen, there: None, hash: None, attributes }
    }

    /// Whether this was carried, and not there before the session.
    pub(crate) fn is_there(&self) -> bool {
        self.there.is_some()
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.seen.kind == Kind::Directory
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "seen": self.seen.to_json(),
            "there": self.there.as_ref().map(Stamp::to_json),
            "hash": self.hash,
            "attributes": self.attributes,
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            seen: Version::from_json(&value["seen"])?,
            there: Stamp::from_json(&value["there"]),
            hash: value["hash"].as_str().map(str::to_owned),
            attributes: value["attributes"].as_u64().unwrap_or(0),
        })
    }
}

/// By what attributes are told from others; 0 for none.
pub(crate) fn hash_of_attributes(attributes: &[Attribute]) -> u64 {
    if attributes.is_empty() {
        return 0;
    }
    // In which order they are told is up to the file system.
    let mut all: Vec<_> = attributes.iter().map(|(name, value)| (name.as_bytes(), &value[..])).collect();
    all.sort_unstable();
    let mut context = Context::new(&SHA256);
    for part in all.into_iter().flat_map(|(name, value)| [name, value]) {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let hash = context.finish();
    hash.as_ref().iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn known(size: u64) -> Known {
        let mut seen = Version::of(&rustix::fs::stat("/").unwrap());
        seen.size = size;
        let there = Some(Stamp { size, modified: seen.modified, tag: None });
        Known { seen, there, hash: Some("00ff".to_owned()), attributes: u64::MAX - size }
    }

    #[test]
    fn attributes_are_told_apart() {
        let hash = |all: &[(&str, &str)]| {
            let all = all.iter().map(|(name, value)| (name.into(), value.as_bytes().to_vec()));
            hash_of_attributes(&all.collect::<Vec<_>>())
        };
        assert_eq!(hash(&[]), 0);
        assert_eq!(hash(&[("user.a", "1"), ("user.b", "2")]), hash(&[("user.b", "2"), ("user.a", "1")]));
        let different = [
            hash(&[("user.a", "1")]),
            hash(&[("user.a", "")]),
            hash(&[("user.a1", "")]),
            hash(&[("user.a", "1"), ("user.b", "")]),
        ];
        assert_eq!(BTreeSet::from(different).len(), different.len());
        let mut older = known(1).to_json();
        older.as_object_mut().unwrap().remove("attributes");
        assert_eq!(Known::from_json(&older), Some(Known { attributes: 0, ..known(1) }));
    }

    #[test]
    fn whoever_takes_over_knows_the_same() {
        let journal = KnownPaths::journal().unwrap();
        let mut paths = KnownPaths::of(journal.try_clone().unwrap()).unwrap();
        assert!(paths.is_empty());
        for n in 0..100 {
            paths.set(&PathBuf::from(format!("d/{n}")), known(n));
        }
        paths.forget(Path::new("d/7"));
        paths.see(Path::new("d/8"), known(1 << 40).seen);
        // Killed within a line.
        journal.write_all_at(b"{\"path\": \"d/torn\"", paths.end).unwrap();
        let mut next = KnownPaths::of(journal.try_clone().unwrap()).unwrap();
        assert_eq!(next.all.len(), 99);
        assert_eq!(next.get(Path::new("d/8")), Some(&known(8)), "what was only seen is looked at again");
        next.set(Path::new("e"), known(1));
        let last = KnownPaths::of(journal).unwrap();
        assert_eq!(last.all.len(), 100);
        assert!(last.get(Path::new("d/torn")).is_none());
    }

    #[test]
    fn it_does_not_grow_with_every_version() {
        let journal = KnownPaths::journal().unwrap();
        let mut paths = KnownPaths::of(journal.try_clone().unwrap()).unwrap();
        for n in 0..60_000 {
            paths.set(Path::new(if n % 2 == 0 { "even" } else { "odd" }), known(n));
        }
        let held = rustix::fs::fstat(&journal).unwrap().st_blocks * 512;
        assert!(u64::try_from(held).unwrap() < 2 * COMPACT_AT, "{held}");
        let next = KnownPaths::of(journal).unwrap();
        assert_eq!(next.get(Path::new("odd")), Some(&known(59_999)));
        assert_eq!(next.all.len(), 2);
    }

    #[test]
    fn what_is_below_is_not_what_begins_alike() {
        let mut paths = KnownPaths::of(KnownPaths::journal().unwrap()).unwrap();
        for path in ["a", "a/b", "a/b/c", "a b", "ab", "b"] {
            paths.set(Path::new(path), known(0));
        }
        let texts = |paths: Vec<PathBuf>| paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(texts(paths.below(Path::new("a"))), ["a", "a/b", "a/b/c"]);
        assert_eq!(texts(paths.within(Path::new("a"))), ["a/b"]);
        assert_eq!(texts(paths.within(Path::new(""))), ["a", "a b", "ab", "b"]);
    }
}
