//! One file an attachment, locked by its daemon for as long as it lives.
//!
//! The lock (`flock`) belongs to an open file description, which the command that attaches makes and hands to the daemon:
//! it is free when both have ended, in whichever way, and not before. Process numbers are for people only.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};

/// Where attachments are written down. Not below `/run/memdev`, which may be the directory of a server's user, and be
/// removed with the server.
pub const DIRECTORY: &str = "/run/memdev-attach";

/// What is written down of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The device's name, as `loop3`.
    pub device: String,
    /// `fuse` or `nbd`.
    pub backend: String,
    /// The image's path, or the URI of the export.
    pub source: String,
    /// The export, with the session's id if it has one.
    pub export: String,
    /// Bytes.
    pub size: u64,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Connections to the server.
    pub connections: u32,
    /// The daemon's process number when it was started; 0 if there is none.
    pub pid: u32,
    /// What the private root is called whose disk it is, if it is one's.
    pub root: Option<String>,
}

impl Record {
    /// The record as JSON has it, with the device's path.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "device": format!("/dev/{}", self.device),
            "backend": self.backend,
            "source": self.source,
            "export": self.export,
            "size": self.size,
            "read_only": self.read_only,
            "connections": self.connections,
            "pid": self.pid,
            "root": self.root,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let number = |key: &str| value[key].as_u64().and_then(|number| u32::try_from(number).ok());
        Some(Self {
            device: text("device")?.strip_prefix("/dev/")?.to_owned(),
            backend: text("backend")?,
            source: text("source")?,
            export: text("export")?,
            size: value["size"].as_u64()?,
            read_only: value["read_only"].as_bool()?,
            connections: number("connections")?,
            pid: number("pid")?,
            root: text("root"),
        })
    }
}

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
}

/// One record's file.
#[derive(Debug)]
pub(crate) struct Entry {
    id: String,
    file: File,
}

impl Directory {
    /// Opens the directory, and makes it if it is missing.
    ///
    /// # Errors
    /// `Denied` if this process may not, or if somebody else may write there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| {
            let denied = error.kind() == io::ErrorKind::PermissionDenied;
            let error = Error::io("Cannot keep track of devices in", error).on_path(path);
            if denied { error.advise("run it as root") } else { error }
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        let stat = rustix::fs::fstat(&fd).map_err(|errno| failed(errno.into()))?;
        // What is read here decides which devices are freed.
        let others = Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH);
        if others || stat.st_uid != rustix::process::geteuid().as_raw() {
            let why = format!("Cannot trust {}: others can write there", path.display());
            return Err(Error::new(ErrorKind::Denied, why).advise("remove it"));
        }
        Ok(Self { fd })
    }

    /// A new record's file, locked, and empty: a name appears only once it is locked, so that nobody takes it for
    /// abandoned.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn create(&self, id: &str) -> Result<Entry> {
        let failed = |errno: Errno| Error::io("Cannot write down the device", errno);
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(failed)?;
        let unnamed = format!("/proc/self/fd/{}", fd.as_raw_fd());
        rustix::fs::linkat(CWD, unnamed, &self.fd, id, AtFlags::SYMLINK_FOLLOW).map_err(failed)?;
        Ok(Entry { id: id.to_owned(), file: fd.into() })
    }

    /// All records' files.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn entries(&self) -> Result<Vec<Entry>> {
        let failed = |errno: Errno| Error::io("Cannot list the devices that are attached", errno);
        let mut entries = Vec::new();
        for name in Dir::read_from(&self.fd).map_err(failed)? {
            let name = name.map_err(failed)?;
            let Some(id) = name.file_name().to_str().ok().filter(|name| is_id(name)) else { continue };
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&self.fd, id, flags, Mode::empty()) {
                Ok(fd) => entries.push(Entry { id: id.to_owned(), file: fd.into() }),
                // It has just been removed.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(entries)
    }

    /// Removes a record. That it has gone already is fine.
    pub(crate) fn remove(&self, id: &str) {
        remove(self.fd.as_fd(), id);
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Removes the record `id` from the directory `fd`. That it has gone already is fine.
pub(super) fn remove(fd: BorrowedFd<'_>, id: &str) {
    match rustix::fs::unlinkat(fd, id, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => tracing::warn!(%error, id, "Cannot remove the record of a device"),
    }
}

impl Entry {
    /// The attachment's id, which its device carries: 32 hexadecimal digits.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What is written down; `None` while it is being made.
    pub(super) fn record(&self) -> Option<Record> {
        Record::from_json(&self.read()?)
    }

    /// What is written down, whatever it means; `None` while it is being made.
    pub(crate) fn read(&self) -> Option<Value> {
        let mut text = Vec::new();
        let length = self.file.metadata().ok()?.len();
        let mut at = 0;
        // Not through the cursor, which all who hold this file share.
        while at < length {
            let mut part = [0; 4096];
            let got = self.file.read_at(&mut part, at).ok().filter(|&got| got > 0)?;
            text.extend_from_slice(&part[..got]);
            at += got as u64;
        }
        serde_json::from_slice(&text).ok()
    }

    /// Writes it down. To be called before the device is made, so that a record names every device there is.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn write(&self, record: &Record) -> Result<()> {
        self.write_down(&record.to_json()).map_err(|error| Error::io("Cannot write down the device", error))
    }

    /// Writes down what is to be read again.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn write_down(&self, value: &Value) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(format!("{value:#}\n").as_bytes(), 0)
    }

    /// Whether all who served it have ended. If so, it is locked until this value is dropped.
    pub(crate) fn is_abandoned(&self) -> bool {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => true,
            Err(Errno::WOULDBLOCK) => false,
            Err(error) => {
                tracing::warn!(%error, id = self.id, "Cannot tell whether a device is served");
                false
            }
        }
    }
}

impl AsFd for Entry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn is_id(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::super::random_name;
    use super::*;

    fn some_id() -> String {
        random_name().unwrap()
    }

    fn record() -> Record {
        Record {
            device: "loop3".into(),
            backend: "fuse".into(),
            source: "/srv/root.img".into(),
            export: "root@abc".into(),
            size: 1 << 40,
            read_only: true,
            connections: 2,
            pid: 4711,
            root: Some("kiosk".into()),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(&dir.path().join("state")).unwrap();
        let entry = directory.create(&some_id()).unwrap();
        assert_eq!(directory.entries().unwrap()[0].record(), None, "nothing is written down yet");
        entry.write(&record()).unwrap();
        let shorter = Record { source: "x".into(), ..record() };
        entry.write(&shorter).unwrap();
        let entries = directory.entries().unwrap();
        assert_eq!((entries.len(), entries[0].id()), (1, entry.id()));
        assert_eq!(entries[0].record(), Some(shorter));
        directory.remove(entry.id());
        directory.remove(entry.id());
        assert!(directory.entries().unwrap().is_empty());
    }

    #[test]
    fn it_is_abandoned_when_all_who_hold_it_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let entry = directory.create(&some_id()).unwrap();
        let daemon = entry.file.try_clone().unwrap();
        let found = || directory.entries().unwrap().remove(0);
        assert!(!found().is_abandoned());
        drop(entry);
        assert!(!found().is_abandoned(), "the daemon has it still");
        drop(daemon);
        let mine = found();
        assert!(mine.is_abandoned());
        assert!(!found().is_abandoned(), "one at a time frees it");
    }

    #[test]
    fn strange_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("README"), "x").unwrap();
        std::fs::write(dir.path().join("0".repeat(32)), "not JSON").unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let entries = directory.entries().unwrap();
        assert_eq!((entries.len(), entries[0].record()), (1, None));
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Directory::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("others can write there"), "{error}");
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        assert!(Directory::open(&dir.path().join("link")).is_err());
    }
}
