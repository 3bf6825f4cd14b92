//! A directory of this machine, or of any network file system that is mounted here.
//!
//! The tree there was made by sessions, and so is not trusted any more than they are: it is never left, and no symbolic link
//! in it is followed. A file that root owns inside must not become one of the host's root, nor one with set-id bits: what is
//! root's inside belongs to the owner of the directory, the set-id bits are left out, and how it was is kept as an
//! attribute beside (`user.memdev`). Where everything is one person's, whom that attribute could have been forged by, it is not
//! asked for owners and rights: all is the owner's here, and the person's inside.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::{Aside, Attributes, Content, Found, Properties, Session, Store, Stored, TEMPORARY, is_temporary};
use crate::carry::delivery::{conflict_name, timestamp};
use crate::carry::entry::{Kind, Meta, Stamp, Time, Version};
use crate::carry::tree::{Beneath, remove_other_attributes, user_attributes};
use crate::error::{Error, ErrorKind, Result};
use crate::root::reach;

/// How many files are on their way at the same time: the file system may be another machine's, or wait for a disk.
const AT_ONCE: usize = 8;

/// How a file was inside, and whose it is: `MODE UID GID SECONDS ID NAME`, the mode in octal, the seconds those of its
/// time, and then the session's id and name. Whoever edits the file there later changes its time, and so it is nobody's.
const INSIDE: &str = "user.memdev";

/// How old a temporary file of somebody else must be to be taken for abandoned, in seconds.
const ABANDONED: f64 = 24.0 * 3600.0;

/// How the name begins that a directory gets whose own one is not known any more.
const FOUND: &str = "found";

/// The store.
pub(super) struct Directory {
    root: Beneath,
    /// Who owns it, and so what is root's inside.
    owner: (u32, u32),
    /// User and group inside of the one whose everything is, if it is one's.
    person: Option<(u32, u32)>,
    tag: String,
    count: AtomicU64,
    has_attributes: bool,
    has_links: bool,
    has_owners: AtomicBool,
}

impl Directory {
    pub(super) fn open(path: &Path, tag: &str, person: Option<(u32, u32)>) -> Result<Self> {
        let failed = |error: Errno| {
            Error::io("Cannot carry to", error).on_path(path).advise("make the directory, or mount it")
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // What root writes must not go where somebody else has a link point to.
        let way = reach::without_links(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => failed(Errno::NOENT),
            _ => error,
        })?;
        let root = reach::open(&way, flags).map_err(failed)?;
        let stat = rustix::fs::fstat(&root).map_err(failed)?;
        let mut store = Self {
            root: Beneath(root),
            owner: (stat.st_uid, stat.st_gid),
            person,
            tag: tag.to_owned(),
            count: AtomicU64::new(0),
            has_attributes: true,
            has_links: true,
            has_owners: AtomicBool::new(true),
        };
        store.try_out().map_err(|error| {
            Error::io("Cannot write to", error)
                .on_path(path)
                .advise("see who may write there, and how full it is")
        })?;
        Ok(store)
    }

    /// Finds out what it can keep.
    fn try_out(&mut self) -> io::Result<()> {
        let name = self.temporary();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = self.root.open(Path::new(&name), flags, Mode::RUSR | Mode::WUSR)?;
        self.has_attributes =
            rustix::fs::fsetxattr(&file, INSIDE, b"600 0 0 0  ", XattrFlags::empty()).is_ok();
        rustix::fs::unlinkat(&self.root.0, &name, AtFlags::empty())?;
        self.has_links = match rustix::fs::symlinkat("x", &self.root.0, &name) {
            Ok(()) => {
                rustix::fs::unlinkat(&self.root.0, &name, AtFlags::empty())?;
                true
            }
            Err(_) => false,
        };
        Ok(())
    }

    fn temporary(&self) -> OsString {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{TEMPORARY}{}-{}-{n}", self.tag, std::process::id()).into()
    }

    fn outside(&self, meta: &Meta) -> (u32, u32) {
        let of = |id, owner| if id == 0 || self.person.is_some() { owner } else { id };
        (of(meta.uid, self.owner.0), of(meta.gid, self.owner.1))
    }

    /// Gives an open file or directory what belongs to it.
    fn dress(&self, file: BorrowedFd<'_>, properties: &Properties) -> io::Result<()> {
        let meta = &properties.meta;
        let (uid, gid) = self.outside(meta);
        let owned = rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        if owned.is_err() {
            self.has_owners.store(false, Ordering::Relaxed);
        }
        // After the owner, which may clear some of it.
        let mode = meta.mode & if self.kind(file)? == Kind::Directory { 0o1777 } else { 0o777 };
        match rustix::fs::fchmod(file, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::PERM | Errno::NOTSUP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
        if !self.has_attributes {
            return Ok(());
        }
        let Meta { mode, uid, gid } = meta;
        let Session { id, name } = &properties.session;
        let inside = format!("{mode:o} {uid} {gid} {} {id} {name}", properties.modified.seconds);
        rustix::fs::fsetxattr(file, INSIDE, inside.as_bytes(), XattrFlags::empty())?;
        // A directory may have had others before; a file is a new one.
        if self.kind(file)? == Kind::Directory {
            remove_other_attributes(file, &properties.attributes)?;
        }
        for (name, value) in &properties.attributes {
            match rustix::fs::fsetxattr(file, name.as_os_str(), value, XattrFlags::empty()) {
                // One that is too long for what is there does not hold up the file.
                Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::NOSPC | Errno::TOOBIG) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn kind(&self, file: BorrowedFd<'_>) -> io::Result<Kind> {
        Ok(Version::of(&rustix::fs::fstat(file)?).kind)
    }

    fn found(&self, path: &Path, version: &Version) -> Found {
        let inside = self.inside(path, version.kind);
        let session = inside.as_ref().filter(|inside| inside.seconds == version.modified.seconds);
        let session = session.map(|inside| inside.session.clone());
        let meta = inside.map(|inside| inside.meta);
        // Without the attribute: as it is, as far as that can be known.
        let of = |id, owner| if id == owner { 0 } else { id };
        let meta = match (self.person, meta) {
            (Some((uid, gid)), _) => Meta { mode: version.meta.mode & 0o1777, uid, gid },
            (None, Some(meta)) => meta,
            (None, None) => Meta {
                mode: version.meta.mode & 0o1777,
                uid: of(version.meta.uid, self.owner.0),
                gid: of(version.meta.gid, self.owner.1),
            },
        };
        Found { kind: version.kind, stamp: stamp(version), meta: Some(meta), mode: None, session }
    }

    fn inside(&self, path: &Path, kind: Kind) -> Option<Inside> {
        if !self.has_attributes || !matches!(kind, Kind::File | Kind::Directory) {
            return None;
        }
        let file = self.root.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).ok()?;
        let mut value = vec![0; 4096];
        let length = rustix::fs::fgetxattr(&file, INSIDE, &mut value[..]).ok()?;
        Inside::parse(&value[..length])
    }

    /// Gives the file that is called `temporary` its name.
    fn expose(&self, parent: &OwnedFd, temporary: &OsStr, path: &Path, aside: Aside<'_>) -> io::Result<()> {
        let (_, name) = self.root.parent(path)?;
        let beside = path.with_file_name(temporary);
        // What is known to be in the way goes first, so that this is undone by no moment in which this process may be killed.
        let mut there = self.root.version(path)?;
        if let Some(version) = &there {
            let found = self.found(path, version);
            if let Some(target) = aside.aside(&found, path)? {
                self.move_aside(path, &target)?;
                aside.kept(&target);
                there = None;
            } else if version.kind == Kind::Directory {
                rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
                there = None;
            }
        }
        if there.is_none() {
            match rustix::fs::renameat_with(parent, temporary, parent, name, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok(()),
                // Somebody was faster.
                Err(Errno::EXIST) => {}
                // This file system cannot be asked so.
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                    return Ok(rustix::fs::renameat(parent, temporary, parent, name)?);
                }
                Err(error) => return Err(error.into()),
            }
        }
        match rustix::fs::renameat_with(parent, temporary, parent, name, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                return Ok(rustix::fs::renameat(parent, temporary, parent, name)?);
            }
            Err(error) => return Err(error.into()),
        }
        let cleared = self.clear_exchanged(parent, temporary, &beside, aside);
        if cleared.is_err() {
            // What has failed is removed, by the temporary name, which must not be theirs then.
            let back = |flags| rustix::fs::renameat_with(parent, temporary, parent, name, flags);
            let _ = back(RenameFlags::EXCHANGE).or_else(|_| back(RenameFlags::NOREPLACE));
        }
        cleared
    }

    /// What was under the name until now is under the temporary one, at `beside`: it may be another one than was looked at.
    fn clear_exchanged(
        &self,
        parent: &OwnedFd,
        temporary: &OsStr,
        beside: &Path,
        aside: Aside<'_>,
    ) -> io::Result<()> {
        let Some(version) = self.root.version(beside)? else { return Ok(()) };
        let found = self.found(beside, &version);
        match aside.aside(&found, beside)? {
            Some(target) => {
                self.move_aside(beside, &target)?;
                aside.kept(&target);
            }
            None if version.kind == Kind::Directory => {
                rustix::fs::unlinkat(parent, temporary, AtFlags::REMOVEDIR)?;
            }
            None => rustix::fs::unlinkat(parent, temporary, AtFlags::empty())?,
        }
        Ok(())
    }

    fn move_aside(&self, path: &Path, target: &Path) -> io::Result<()> {
        let (parent, name) = self.root.parent(path)?;
        let (to, new) = self.root.parent(target)?;
        match rustix::fs::renameat_with(&parent, name, &to, new, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if self.root.version(target)?.is_none() => {
                Ok(rustix::fs::renameat(&parent, name, &to, new)?)
            }
            result => Ok(result?),
        }
    }

    /// Has what was renamed in the directory stay renamed, where the file system has such a thing.
    fn settle(parent: &OwnedFd) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(directory) = rustix::fs::openat(parent, ".", flags, Mode::empty()) {
            let _ = rustix::fs::fsync(&directory);
        }
    }

    /// Removes the temporary file when what was to be done with it failed.
    fn or_remove<T>(parent: &OwnedFd, temporary: &OsStr, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            let _ = rustix::fs::unlinkat(parent, temporary, AtFlags::empty());
        }
        result
    }
}

fn stamp(version: &Version) -> Stamp {
    let size = if version.kind == Kind::Directory { 0 } else { version.size };
    let modified = if version.kind == Kind::Directory { Time::default() } else { version.modified };
    Stamp { size, modified, tag: None }
}

/// What the attribute says.
struct Inside {
    meta: Meta,
    seconds: i64,
    session: Session,
}

impl Inside {
    fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let [mode, uid, gid, seconds, id, name] = text.split(' ').collect::<Vec<_>>()[..] else {
            return None;
        };
        let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777)?;
        let meta = Meta { mode, uid: uid.parse().ok()?, gid: gid.parse().ok()? };
        let session = Session { id: id.to_owned(), name: name.to_owned() };
        Some(Self { meta, seconds: seconds.parse().ok()?, session })
    }
}

impl Store for Directory {
    fn at_once(&self) -> usize {
        AT_ONCE
    }

    fn lacks(&self) -> Vec<&'static str> {
        let mut all = Vec::new();
        if !self.has_attributes {
            all.push("extended attributes, set-id bits");
        }
        if !self.has_links {
            all.push("symbolic links");
        }
        if !self.has_owners.load(Ordering::Relaxed) {
            all.push("owners");
        }
        all
    }

    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        Ok(self.root.version(path)?.map(|version| self.found(path, &version)))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>> {
        let all = self.root.list(path)?.into_iter().filter(|(name, _)| !is_temporary(name));
        Ok(all
            .map(|(name, version)| {
                let found = self.found(&path.join(&name), &version);
                (name, found)
            })
            .collect())
    }

    fn get(&self, path: &Path) -> io::Result<Box<dyn Content + '_>> {
        let is_file = |version: Option<Version>| version.is_some_and(|version| version.kind == Kind::File);
        // A pipe would not even be opened.
        if !is_file(self.root.version(path)?) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = self.root.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
        Ok(Box::new(Stored::new(file.into())?))
    }

    fn attributes(&self, path: &Path) -> io::Result<Option<Attributes>> {
        if !self.has_attributes {
            return Ok(None);
        }
        let file = self.root.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
        user_attributes(file.as_fd()).map(Some)
    }

    fn target(&self, path: &Path) -> io::Result<OsString> {
        self.root.target(path)
    }

    fn put(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        let (parent, _) = self.root.parent(path)?;
        let temporary = self.temporary();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&parent, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        let written = (|| {
            copy(content, &file)?;
            self.dress(file.as_fd(), properties)?;
            set_time(&file, properties.modified)?;
            rustix::fs::fsync(&file)?;
            if file.metadata()?.len() != content.size() {
                return Err(io::Error::other("it has another size there than what was written"));
            }
            // While nobody else knows it: as soon as it has its name, somebody may write to it.
            let stamp = stamp(&Version::of(&rustix::fs::fstat(&file)?));
            self.expose(&parent, &temporary, path, aside)?;
            Ok(stamp)
        })();
        let stamp = Self::or_remove(&parent, &temporary, written)?;
        Self::settle(&parent);
        Ok(stamp)
    }

    fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        let (parent, _) = self.root.parent(path)?;
        let temporary = self.temporary();
        rustix::fs::symlinkat(target, &parent, &temporary)?;
        let (uid, gid) = self.outside(&properties.meta);
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let _ = rustix::fs::chownat(&parent, &temporary, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW);
        let times = times(properties.modified);
        let _ = rustix::fs::utimensat(&parent, &temporary, &times, AtFlags::SYMLINK_NOFOLLOW);
        let exposed = (|| {
            let found = rustix::fs::statat(&parent, &temporary, AtFlags::SYMLINK_NOFOLLOW)?;
            self.expose(&parent, &temporary, path, aside)?;
            Ok(stamp(&Version::of(&found)))
        })();
        let stamp = Self::or_remove(&parent, &temporary, exposed)?;
        Self::settle(&parent);
        Ok(stamp)
    }

    fn make_directory(&self, path: &Path, properties: &Properties, aside: Aside<'_>) -> io::Result<Stamp> {
        let (parent, name) = self.root.parent(path)?;
        let there = self.root.version(path)?;
        if let Some(version) = there.filter(|version| version.kind != Kind::Directory) {
            match aside.aside(&self.found(path, &version), path)? {
                Some(target) => {
                    self.move_aside(path, &target)?;
                    aside.kept(&target);
                }
                None => rustix::fs::unlinkat(&parent, name, AtFlags::empty())?,
            }
        }
        match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let directory = self.root.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        self.dress(directory.as_fd(), properties)?;
        Self::settle(&parent);
        Ok(stamp(&Version::of(&rustix::fs::fstat(&directory)?)))
    }

    fn remove(&self, path: &Path, kind: Kind) -> io::Result<()> {
        let (parent, name) = match self.root.parent(path) {
            Err(Errno::NOENT) => return Ok(()),
            result => result?,
        };
        let flags = if kind == Kind::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match rustix::fs::unlinkat(&parent, name, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn sweep(&self, directory: &Path) -> io::Result<()> {
        let own = format!("{TEMPORARY}{}-", self.tag);
        let mine = format!("{own}{}-", std::process::id());
        for (name, version) in self.root.list(directory)? {
            if !is_temporary(&name) || name.as_bytes().starts_with(mine.as_bytes()) {
                continue;
            }
            let is_old = Time::now().since(version.changed) > ABANDONED;
            if is_old || name.as_bytes().starts_with(own.as_bytes()) {
                let path = directory.join(&name);
                match self.remove(&path, version.kind) {
                    // Somebody's directory, which was being exchanged for a file when its carrier was killed.
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                        self.move_aside(
                            &path,
                            &conflict_name(&directory.join(FOUND), "other", &timestamp()),
                        )?;
                    }
                    result => result?,
                }
            }
        }
        Ok(())
    }
}

fn times(modified: Time) -> Timestamps {
    let time = Timespec { tv_sec: modified.seconds, tv_nsec: modified.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn set_time(file: &File, modified: Time) -> io::Result<()> {
    match rustix::fs::futimens(file, &times(modified)) {
        Ok(()) | Err(Errno::PERM | Errno::NOTSUP | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies a content; of a file with holes what is no hole.
pub(crate) fn copy(content: &mut dyn Content, to: &File) -> io::Result<()> {
    super::parts(content, &mut |at, part| to.write_all_at(part, at))?;
    if content.has_holes() {
        to.set_len(content.size())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
