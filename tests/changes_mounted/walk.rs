//! A plain walk of a mounted tree that remembers everything, and what differs between two of them: what `memdev changes` is
//! held against. It shares no code and no idea with it: all is read, nothing is left out because it cannot have changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A tree by paths, each from `/` on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Walk(pub(crate) BTreeMap<Vec<u8>, Seen>);

/// What was seen under a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    pub(crate) inode: u64,
    links: u64,
    /// Of what a file holds, where a link leads to, which device it is.
    content: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What is told of a path: the word, in what it differs, and which name leads to the same file.
pub(crate) type Told = (String, BTreeSet<String>, Option<Vec<u8>>);

impl Walk {
    pub(crate) fn of(root: &Path) -> Self {
        let mut walk = Self::default();
        let mut left = vec![PathBuf::new()];
        while let Some(below) = left.pop() {
            let path = root.join(&below);
            let metadata = fs::symlink_metadata(&path).expect("what is listed is there");
            if metadata.is_dir() {
                let entries = fs::read_dir(&path).expect("directories can be listed");
                left.extend(entries.map(|entry| below.join(entry.unwrap().file_name())));
            }
            let name = [b"/", below.as_os_str().as_bytes()].concat();
            walk.0.insert(name, Seen::of(&path, &metadata));
        }
        walk
    }

    /// The paths of regular files that have several names, all of these by the first.
    fn groups(&self) -> HashMap<u64, Vec<&Vec<u8>>> {
        let mut groups: HashMap<u64, Vec<_>> = HashMap::new();
        for (path, seen) in self.0.iter().filter(|(_, seen)| seen.kind != "directory") {
            groups.entry(seen.inode).or_default().push(path);
        }
        groups.values_mut().for_each(|paths| paths.sort_by_key(|path| in_order(path)));
        groups
    }

    /// What has to be told of `now` against this.
    pub(crate) fn expected(&self, now: &Self) -> BTreeMap<Vec<u8>, Told> {
        let (groups_before, groups_now) = (self.groups(), now.groups());
        let is_in_both = |path: &&Vec<u8>| {
            let in_both = self.0.get(*path).zip(now.0.get(*path));
            in_both.is_some_and(|(one, other)| one.kind != "directory" && other.kind != "directory")
        };
        let first = |groups: &HashMap<u64, Vec<&Vec<u8>>>, seen: &Seen| {
            groups
                .get(&seen.inode)
                .and_then(|group| group.iter().find(|path| is_in_both(path)).map(|path| (*path).clone()))
        };
        let mut told = BTreeMap::new();
        for path in self.0.keys().chain(now.0.keys()) {
            let (before, after) = (self.0.get(path), now.0.get(path));
            let mut link = after.filter(|seen| seen.kind != "directory").and_then(|seen| {
                let first = groups_now[&seen.inode][0];
                (first != path).then(|| first.clone())
            });
            let mut what = BTreeSet::new();
            let word = match (before, after) {
                (None, _) => "added",
                (_, None) => "deleted",
                (Some(before), Some(after)) => {
                    let mut add = |name: &str, differs: bool| {
                        if differs {
                            what.insert(name.to_owned());
                        }
                    };
                    add("type", before.kind != after.kind);
                    add("content", before.kind == after.kind && before.content != after.content);
                    add("mode", before.mode != after.mode);
                    add("owner", before.owner != after.owner);
                    add("xattrs", before.xattrs != after.xattrs);
                    add("mtime", before.mtime != after.mtime);
                    let both = is_in_both(&path);
                    add("links", both && first(&groups_before, before) != first(&groups_now, after));
                    if !what.contains("links") {
                        link = None;
                    }
                    if what.is_empty() {
                        continue;
                    }
                    "modified"
                }
            };
            told.insert(path.clone(), (word.to_owned(), what, link));
        }
        told
    }
}

impl Seen {
    fn of(path: &Path, metadata: &Metadata) -> Self {
        let kind = metadata.file_type();
        let mut content = DefaultHasher::new();
        let kind = if kind.is_file() {
            metadata.len().hash(&mut content);
            content.write(&fs::read(path).expect("files can be read"));
            "file"
        } else if kind.is_dir() {
            "directory"
        } else if kind.is_symlink() {
            fs::read_link(path).expect("links can be read").hash(&mut content);
            "symlink"
        } else if kind.is_block_device() || kind.is_char_device() {
            metadata.rdev().hash(&mut content);
            if kind.is_block_device() { "block device" } else { "character device" }
        } else if kind.is_fifo() {
            "fifo"
        } else {
            "socket"
        };
        Self {
            kind,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            inode: metadata.ino(),
            links: metadata.nlink(),
            content: content.finish(),
            xattrs: xattrs(path),
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).expect("attributes can be listed");
    let names = names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("attributes can be read");
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// As a walk in order has them: what is in a directory before what has a longer name than it.
pub(crate) fn in_order(path: &[u8]) -> Vec<u8> {
    path.iter().map(|&byte| if byte == b'/' { 0 } else { byte }).collect()
}

/// What `memdev changes --json` told, and in which order.
pub(crate) fn told(json: &[u8]) -> Vec<(Vec<u8>, Told)> {
    let list: Vec<Value> = serde_json::from_slice(json).expect("JSON");
    let bytes = |change: &Value, key: &str| match change[format!("{key}_hex")].as_str() {
        Some(hex) => Some(
            (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).unwrap()).collect(),
        ),
        None => change[key].as_str().map(|text| text.as_bytes().to_vec()),
    };
    let one = |change: &Value| {
        let what = change["what"].as_array().into_iter().flatten();
        let what = what.map(|name| name.as_str().unwrap().to_owned()).collect();
        let word = change["change"].as_str().unwrap().to_owned();
        (bytes(change, "path").unwrap(), (word, what, bytes(change, "link")))
    };
    list.iter().map(one).collect()
}

/// Panics, with the first paths that differ, unless the two are the same.
#[track_caller]
pub(crate) fn assert_same(found: &[(Vec<u8>, Told)], expected: &BTreeMap<Vec<u8>, Told>, what: &str) {
    assert!(found.is_sorted_by_key(|(path, _)| in_order(path)), "{what}: out of order");
    let found: BTreeMap<_, _> = found.iter().cloned().collect();
    let paths: BTreeSet<_> = found.keys().chain(expected.keys()).collect();
    let differing = paths.into_iter().filter(|path| found.get(*path) != expected.get(*path));
    let lines: Vec<_> = differing
        .map(|path| {
            let path_shown = PathBuf::from(std::ffi::OsString::from_vec(path.clone()));
            format!("{path_shown:?}: told {:?}, walked {:?}", found.get(path), expected.get(path))
        })
        .take(10)
        .collect();
    assert!(lines.is_empty(), "{what}:\n{}", lines.join("\n"));
}
