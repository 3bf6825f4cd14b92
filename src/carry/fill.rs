//! The carried directory is filled from the destination, before anybody is inside.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ring::digest::{Context, SHA256};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::delivery::{CONFLICT, Notes, hash_of_link};
use super::entry::{Kind, Meta, Time, Version, escape, hexadecimal};
use super::known::{Known, KnownPaths};
use super::rules::Rules;
use super::stores::{self, Content, Found, Store};
use super::together::together;
use super::tree::{Beneath, Tree, remove_other_attributes};
use crate::error::{Error, Result};

const PART: usize = 256 << 10;

/// What it takes to fill.
pub(crate) struct Fill<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) store: &'a dyn Store,
    pub(crate) rules: &'a Rules,
    pub(crate) notes: &'a Notes,
    /// Is told how many files there are.
    pub(crate) progress: &'a mut (dyn FnMut(u64) + Send),
}

/// What is still to be taken over.
enum Left {
    /// What is in a directory that is here already.
    In(PathBuf),
    File(PathBuf, Found),
}

/// What has been taken over.
struct Taken<'a> {
    known: &'a mut KnownPaths,
    files: u64,
    conflicts: u64,
    progress: &'a mut (dyn FnMut(u64) + Send),
}

/// Who looks and fetches; there are several at once.
struct Filler<'a> {
    tree: &'a Tree,
    store: &'a dyn Store,
    rules: &'a Rules,
    notes: &'a Notes,
    taken: Mutex<Taken<'a>>,
}

impl Fill<'_> {
    /// Copies everything, over what the image has there, and remembers it. Gives the number of files.
    ///
    /// # Errors
    /// What the destination or the private root says; then nobody is to be let in.
    pub(crate) fn run(&mut self, known: &mut KnownPaths) -> Result<u64> {
        let Self { tree, store, rules, notes, .. } = *self;
        let taken = Taken { known, files: 0, conflicts: 0, progress: &mut *self.progress };
        let filler = Filler { tree, store, rules, notes, taken: Mutex::new(taken) };
        together(store.at_once(), vec![Left::In(PathBuf::new())], |left| match left {
            Left::In(directory) => filler.look(&directory),
            Left::File(path, found) => filler.take(&path, &found).map(|()| Vec::new()),
        })?;
        let Taken { files, conflicts, .. } = *filler.lock();
        if conflicts > 0 {
            notes.add(format!(
                "there are {conflicts} files that are called *.conflict-*: two sessions had changed the same"
            ));
        }
        Ok(files)
    }
}

impl<'a> Filler<'a> {
    fn lock(&self) -> MutexGuard<'_, Taken<'a>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the directories that are in one, and tells what there is to be fetched.
    fn look(&self, directory: &Path) -> Result<Vec<Left>> {
        let failed =
            |error| Error::io("Cannot list at the destination", error).on(format!("'{}'", escape(directory)));
        // What is abandoned there is in nobody's way.
        if let Err(error) = self.store.sweep(directory) {
            tracing::warn!(directory = %escape(directory), %error, "Cannot remove what was abandoned");
        }
        // What is replaced meanwhile may be listed twice.
        let listed: BTreeMap<_, _> = self.store.list(directory).map_err(failed)?.into_iter().collect();
        let (mut directories, mut files) = (Vec::new(), Vec::new());
        for (name, found) in listed {
            let path = directory.join(&name);
            if !self.rules.takes(&path, found.kind == Kind::Directory) {
                continue;
            }
            if is_conflict(&name) {
                self.lock().conflicts += 1;
            }
            match found.kind {
                Kind::Other => self
                    .notes
                    .add(format!("{} is no file at the destination: it is not taken over", escape(&path))),
                Kind::Directory => {
                    self.take(&path, &found)?;
                    directories.push(Left::In(path));
                }
                Kind::File | Kind::Link => files.push(Left::File(path, found)),
            }
        }
        // The files come first, which are the last: they are as they were listed then.
        directories.append(&mut files);
        Ok(directories)
    }

    /// Takes over one thing, and remembers it.
    fn take(&self, path: &Path, found: &Found) -> Result<()> {
        let hash = self.fetch(path, found).map_err(|error| {
            Error::io("Cannot fill in from the destination", error).on(format!("'{}'", escape(path)))
        })?;
        let seen = self.tree.version(path).ok().flatten().map(Version::before_reading);
        // As they are here now: some may not be held.
        let attributes = seen.as_ref().and_then(|seen| self.tree.hash_of_attributes(path, seen.kind).ok());
        let mut taken = self.lock();
        if let Some(seen) = seen {
            let there = Some(found.stamp.clone());
            taken.known.set(path, Known { seen, there, hash, attributes: attributes.unwrap_or(0) });
        }
        if found.kind != Kind::Directory {
            taken.files += 1;
            let files = taken.files;
            (taken.progress)(files);
        }
        Ok(())
    }

    /// Its hash, if it has one.
    fn fetch(&self, path: &Path, found: &Found) -> io::Result<Option<String>> {
        let (beneath, whole) = (self.tree.beneath(), self.tree.whole(path));
        let there = self.tree.version(path)?;
        if there.is_some_and(|there| there.kind != Kind::Directory || found.kind != Kind::Directory) {
            remove(beneath, &whole)?;
        }
        let meta = match &found.meta {
            Some(meta) => meta.clone(),
            None => self.usual(found)?,
        };
        let (parent, name) = beneath.parent(&whole)?;
        match found.kind {
            Kind::Directory => {
                match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let directory = beneath.open(&whole, flags, Mode::empty())?;
                self.dress(&directory, path, &meta)?;
                Ok(None)
            }
            Kind::Link => {
                let target = self.store.target(path)?;
                rustix::fs::symlinkat(&target, &parent, name)?;
                let owner = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
                let no_follow = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(&parent, name, Some(owner.0), Some(owner.1), no_follow)?;
                rustix::fs::utimensat(&parent, name, &times(found.stamp.modified), no_follow)?;
                Ok(Some(hash_of_link(&target)))
            }
            _ => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let file = File::from(beneath.open(&whole, flags, Mode::RUSR | Mode::WUSR)?);
                let hash = copy(&mut *self.store.get(path)?, &file)?;
                if file.metadata()?.len() != found.stamp.size {
                    return Err(io::Error::other("it changes while it is read; try again"));
                }
                let file = OwnedFd::from(file);
                self.dress(&file, path, &meta)?;
                rustix::fs::futimens(&file, &times(found.stamp.modified))?;
                Ok(hash)
            }
        }
    }

    /// What a file gets that the destination does not know more of: it belongs to whom the carried directory does, and may be
    /// read by whoever may see that.
    fn usual(&self, found: &Found) -> io::Result<Meta> {
        let owner = self.tree.version(Path::new(""))?.map(|version| version.meta).unwrap_or_default();
        let usual = if found.kind == Kind::Directory { 0o755 } else { 0o644 };
        Ok(Meta { mode: found.mode.unwrap_or(usual), ..owner })
    }

    fn dress(&self, file: &OwnedFd, path: &Path, meta: &Meta) -> io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(meta.mode))?;
        let Some(attributes) = self.store.attributes(path)? else { return Ok(()) };
        // A directory may be the image's, and have others; a file is a new one.
        if FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::Directory {
            remove_other_attributes(file.as_fd(), &attributes)?;
        }
        for (name, value) in attributes {
            if let Err(error) =
                rustix::fs::fsetxattr(file.as_fd(), name.as_os_str(), &value, XattrFlags::empty())
            {
                self.notes.add(not_held(path, error).ok_or(error)?);
            }
        }
        Ok(())
    }
}

/// What is to be told of an attribute that was not taken over, if that does not hold up the file.
fn not_held(path: &Path, why: Errno) -> Option<String> {
    const AND_THEN: &str = "what is delivered loses them at the destination as well";
    match why {
        Errno::NOTSUP => Some(format!("the private root holds no extended attributes: {AND_THEN}")),
        Errno::NOSPC | Errno::TOOBIG => {
            let path = escape(path);
            Some(format!("{path} has extended attributes that the private root cannot hold: {AND_THEN}"))
        }
        _ => None,
    }
}

fn is_conflict(name: &OsStr) -> bool {
    name.to_string_lossy().contains(CONFLICT)
}

fn times(modified: Time) -> Timestamps {
    let time = Timespec { tv_sec: modified.seconds, tv_nsec: modified.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Copies what is not zero, so that a hole takes no memory. Gives the hash of what was read whole: holes are not, since
/// they may be longer than anybody would wait for.
fn copy(from: &mut dyn Content, to: &File) -> io::Result<Option<String>> {
    if from.sparse().is_some() {
        stores::copy(from, to)?;
        return Ok(None);
    }
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; stores::room(from.size(), PART)];
    let mut at = 0;
    loop {
        let got = from.read(&mut buffer)?;
        if got == 0 {
            to.set_len(at)?;
            return Ok(Some(hexadecimal(context.finish().as_ref())));
        }
        let part = &buffer[..got];
        context.update(part);
        if part.iter().any(|&byte| byte != 0) {
            to.write_all_at(part, at)?;
        }
        at += got as u64;
    }
}

/// Removes what is at `path`, with all that is in it.
fn remove(tree: &Beneath, path: &Path) -> io::Result<()> {
    let (parent, name) = tree.parent(path)?;
    let is_directory = tree.version(path)?.is_some_and(|version| version.kind == Kind::Directory);
    if !is_directory {
        return Ok(rustix::fs::unlinkat(&parent, name, AtFlags::empty())?);
    }
    // Depth by depth, without recursion: how deep it is, is the image's business.
    let mut directories = vec![path.to_owned()];
    let mut at = 0;
    while let Some(directory) = directories.get(at).cloned() {
        at += 1;
        for (name, version) in tree.list(&directory)? {
            let inner = directory.join(&name);
            if version.kind == Kind::Directory {
                directories.push(inner);
            } else {
                let (parent, name) = tree.parent(&inner)?;
                rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
            }
        }
    }
    for directory in directories.iter().rev() {
        let (parent, name) = tree.parent(directory)?;
        rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// The carried directory: found below `root`, or made, `person`'s if there is one. Its path from there, without symbolic links.
///
/// # Errors
/// It is no directory, or not on this file system.
pub(crate) fn place(root: &OwnedFd, wanted: &Path, person: Option<(u32, u32)>) -> Result<PathBuf> {
    use rustix::fs::ResolveFlags;
    use std::os::fd::AsRawFd;
    let failed =
        |error: Errno| Error::io("Cannot use the directory that is to be carried,", error).on_path(wanted);
    let inner = wanted.strip_prefix("/").unwrap_or(wanted);
    // Links are followed as inside: an image may have /home somewhere else.
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let open = |path: &Path| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)
    };
    let mut path = PathBuf::new();
    let mut is_new = false;
    for component in inner.components() {
        is_new = false;
        let above = open(if path.as_os_str().is_empty() { Path::new(".") } else { &path }).map_err(failed)?;
        path.push(component);
        if let Err(Errno::NOENT) = open(&path) {
            let mode = Mode::from_raw_mode(0o755);
            rustix::fs::mkdirat(&above, component.as_os_str(), mode).map_err(failed)?;
            is_new = true;
        }
    }
    let found = open(if path.as_os_str().is_empty() { Path::new(".") } else { &path }).map_err(failed)?;
    if let Some((user, group)) = person.filter(|_| is_new) {
        rustix::fs::fchown(&found, Some(Uid::from_raw(user)), Some(Gid::from_raw(group))).map_err(failed)?;
    }
    let real = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
        .map_err(|error| Error::io("Cannot find", error).on_path(wanted))?;
    Ok(real.strip_prefix("/").unwrap_or(&real).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carry::entry::Stamp;
    use crate::carry::stores::{Aside, Attributes, Properties};
    use std::ffi::OsString;

    /// One directory, `d`, with these attributes.
    struct One(Option<Attributes>);

    impl Store for One {
        fn at_once(&self) -> usize {
            2
        }

        fn lacks(&self) -> Vec<&'static str> {
            Vec::new()
        }

        fn find(&self, _path: &Path) -> io::Result<Option<Found>> {
            unreachable!()
        }

        fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>> {
            let stamp = Stamp { size: 0, modified: Time::default(), tag: None };
            let found = Found { kind: Kind::Directory, stamp, meta: None, mode: None, session: None };
            Ok(if path == Path::new("") { vec![("d".into(), found)] } else { Vec::new() })
        }

        fn get(&self, _path: &Path) -> io::Result<Box<dyn Content + '_>> {
            unreachable!()
        }

        fn attributes(&self, _path: &Path) -> io::Result<Option<Attributes>> {
            Ok(self.0.clone())
        }

        fn target(&self, _path: &Path) -> io::Result<OsString> {
            unreachable!()
        }

        fn put(&self, _: &Path, _: &mut dyn Content, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            unreachable!()
        }

        fn link(&self, _: &Path, _: &OsStr, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            unreachable!()
        }

        fn make_directory(&self, _: &Path, _: &Properties, _: Aside<'_>) -> io::Result<Stamp> {
            unreachable!()
        }

        fn remove(&self, _path: &Path, _kind: Kind) -> io::Result<()> {
            unreachable!()
        }
    }

    /// What a directory of the image's has, `user.a` and `user.b`, after it was filled, and what is told.
    fn filled(attributes: Option<Attributes>) -> (Attributes, Vec<String>) {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let own = dir.path().join("d");
        std::fs::create_dir(&own).unwrap();
        for name in ["user.a", "user.b"] {
            rustix::fs::setxattr(&own, name, b"image", XattrFlags::empty())
                .expect("this test takes a file system with attributes on /var/tmp");
        }
        let tree = Tree::new(File::open(dir.path()).unwrap().into(), PathBuf::new());
        let mut known = KnownPaths::of(KnownPaths::journal().unwrap()).unwrap();
        let (rules, notes) = (Rules::new(&[], &[], &[]).unwrap(), Notes::default());
        let store = One(attributes);
        let mut fill =
            Fill { tree: &tree, store: &store, rules: &rules, notes: &notes, progress: &mut |_| {} };
        fill.run(&mut known).unwrap();
        let mut all = tree.attributes(Path::new("d")).unwrap();
        all.sort();
        let remembered = known.get(Path::new("d")).unwrap().attributes;
        assert_eq!(remembered, tree.hash_of_attributes(Path::new("d"), Kind::Directory).unwrap());
        (all, notes.all())
    }

    #[test]
    fn a_directory_of_the_image_has_the_attributes_that_the_destination_has() {
        let of = |name: &str, value: &str| (OsString::from(name), value.as_bytes().to_vec());
        let none = Vec::new();
        let own = vec![of("user.a", "image"), of("user.b", "image")];
        assert_eq!(filled(None), (own, none.clone()), "none are kept there");
        assert_eq!(filled(Some(Vec::new())), (Vec::new(), none.clone()));
        let other = vec![of("user.b", "there"), of("user.c", "there")];
        assert_eq!(filled(Some(other.clone())), (other, none));
    }

    /// They were left out in silence, and the next delivery took them away at the destination.
    #[test]
    fn attributes_that_are_not_held_are_told_of() {
        let of = |name: &str, length: usize| (OsString::from(name), vec![b'x'; length]);
        // No file system takes one as long as that.
        let (all, notes) = filled(Some(vec![of("user.b", 1), of("user.c", 70_000), of("user.d", 70_000)]));
        assert_eq!(all, [of("user.b", 1)]);
        assert_eq!(
            notes,
            [
                "d has extended attributes that the private root cannot hold: what is delivered loses them at the destination as well"
            ]
        );
        let told = not_held(Path::new("d"), Errno::NOTSUP);
        assert_eq!(told, not_held(Path::new("e"), Errno::NOTSUP), "once for all");
        assert_eq!(not_held(Path::new("d"), Errno::IO), None);
    }
}
