//! Any file system that the machine's kernel mounts: both are mounted, read-only and in no tree, and walked.
//!
//! The devices must be copies that nobody else has: a file system that was in use has its journal replayed when it is
//! mounted, and that is written. The kernel's driver reads what the session's user wrote; for ext4 there is a way without
//! that ([`super::ext4`]).

use super::compare::{Pair, same_bytes};
use super::disk::Side;
use super::tree::{Kind, Name, Stat, Time, Tree, Xattrs};
use crate::attach::{self, Attached, Options};
use crate::error::{Error, ErrorKind, Result};
use crate::root::mounts::{self, NODEV, NOEXEC, NOSUID, RDONLY, Setting};
use crate::root::partition::Table;
use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, ResolveFlags, SeekFrom, StatxFlags, StatxTimestamp, getxattr, listxattr,
    openat2, readlinkat, seek, statx,
};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What a file system is known by: where its magic is, what that is, its driver's name, and what that is told.
type Known = (u64, &'static [u8], &'static str, &'static [&'static str]);
const KNOWN: &[Known] = &[
    (1024 + 56, &[0x53, 0xef], "ext4", &[]),
    // Both have the same UUID.
    (0, b"XFSB", "xfs", &["nouuid"]),
    (65536 + 64, b"_BHRfS_M", "btrfs", &[]),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "f2fs", &[]),
    (82, b"FAT32", "vfat", &[]),
    (54, b"FAT1", "vfat", &[]),
];

/// The longest list of names of attributes, and the longest value of one, that the kernel gives.
const LONGEST: usize = 65536;

/// A file system that is mounted for as long as this is there.
pub struct Mounted {
    // In the order of letting go: files, the file system, its device.
    /// The file that was last read, which is likely to be read on.
    last: Option<(Arc<[u8]>, File)>,
    root: OwnedFd,
    _device: Attached,
    side: Side,
    /// The number of the device that the root directory is on: subvolumes have others.
    device: Option<(u32, u32)>,
}

impl Mounted {
    /// Attaches what `options` say, a copy that nobody else has or a device that refuses writes, and mounts the file system on
    /// it, or on this partition of it.
    ///
    /// # Errors
    /// What attaching says; it is no file system that is known here, or the kernel does not mount it.
    pub fn attach(options: &Options, partition: Option<u32>, side: Side) -> Result<Self> {
        let attached = attach::attach(options)?;
        let path = attached.device().path();
        let failed = |error| Error::io("Cannot read", error).on_path(&path);
        if let Some(number) = partition {
            let part = Table::of_file(&File::open(&path).map_err(failed)?)?.find(number)?;
            attached.narrow(part.offset, part.length)?;
        }
        let (name, told) = known(&File::open(&path).map_err(failed)?).ok_or_else(|| {
            let error = Error::new(ErrorKind::Unsupported, "No file system that is known is on the disk of");
            error.on(side.owner())
        })?;
        let mut settings =
            vec![Setting::Pair("source", path.to_str().unwrap_or_default()), Setting::Flag("ro")];
        settings.extend(told.iter().map(|option| Setting::Flag(option)));
        let root = mounts::new(name, &settings, RDONLY | NODEV | NOSUID | NOEXEC)
            .map_err(|error| error.on(format!("({name}, of {})", side.owner())).advise("see dmesg"))?;
        Ok(Self { last: None, root, _device: attached, side, device: None })
    }

    fn failed(&self, path: &[u8], error: impl Into<std::io::Error>) -> Error {
        let path = super::quoted("/", path);
        Error::io(format!("Cannot look at {path} of"), error).on(self.side.owner())
    }

    /// Opens what is there and nothing that it leads to.
    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
        let name = if path.is_empty() { &b"."[..] } else { path };
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, name, flags, Mode::empty(), resolve).map_err(|error| self.failed(path, error))
    }

    fn file(&mut self, path: &Arc<[u8]>) -> Result<&File> {
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            self.last = None;
            // Only regular files are read, and a device or a pipe would not be opened: see the flags.
            let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME)?;
            self.last = Some((Arc::clone(path), file.into()));
        }
        self.last.as_ref().map(|(_, file)| file).ok_or_else(|| self.failed(path, Errno::BADF))
    }
}

/// Which driver is for what is on the device, and what that is told.
fn known(device: &File) -> Option<(&'static str, &'static [&'static str])> {
    let is_there = |at: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        device.read_exact_at(&mut found, at).is_ok() && found == magic
    };
    KNOWN.iter().find(|(at, magic, ..)| is_there(*at, magic)).map(|&(_, _, name, told)| (name, told))
}

fn time(stamp: StatxTimestamp) -> Time {
    Time { seconds: stamp.tv_sec, nanoseconds: stamp.tv_nsec }
}

impl Mounted {
    /// What is said of it, and when that last changed.
    fn stat_and_change(&mut self, path: &Arc<[u8]>) -> Result<(Stat, Time)> {
        let opened = self.open(path, OFlags::PATH)?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat =
            statx(&opened, "", AtFlags::EMPTY_PATH, wanted).map_err(|error| self.failed(path, error))?;
        let mode = u32::from(stat.stx_mode);
        let kind = Kind::of_mode(mode).ok_or_else(|| self.failed(path, Errno::INVAL))?;
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let own = *self.device.get_or_insert(device);
        // What is on another device has numbers of its own.
        let volume = if device == own { 0 } else { u64::from(device.1) + 1 };
        let has_birth = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
        let found = Stat {
            kind,
            mode: mode & 0o7777,
            user: stat.stx_uid,
            group: stat.stx_gid,
            size: if matches!(kind, Kind::File | Kind::Symlink) { stat.stx_size } else { 0 },
            mtime: time(stat.stx_mtime),
            device: kind.is_device().then_some((stat.stx_rdev_major, stat.stx_rdev_minor)),
            links: stat.stx_nlink,
            number: stat.stx_ino ^ volume << 48,
            born: has_birth.then(|| time(stat.stx_btime)),
        };
        Ok((found, time(stat.stx_ctime)))
    }
}

impl Tree for Mounted {
    type Node = Arc<[u8]>;

    fn root(&mut self) -> Result<Arc<[u8]>> {
        Ok(Arc::new([]))
    }

    fn entries(&mut self, directory: &Arc<[u8]>) -> Result<Vec<(Name, Arc<[u8]>)>> {
        let opened = self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut entries = Vec::new();
        for entry in Dir::new(opened).map_err(|error| self.failed(directory, error))? {
            let entry = entry.map_err(|error| self.failed(directory, error))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                let mut path = directory.to_vec();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                entries.push((Name::from(name), Arc::from(path)));
            }
        }
        entries.sort_unstable();
        Ok(entries)
    }

    fn stat(&mut self, node: &Arc<[u8]>) -> Result<Stat> {
        self.stat_and_change(node).map(|(stat, _)| stat)
    }

    fn xattrs(&mut self, node: &Arc<[u8]>) -> Result<Xattrs> {
        let opened = self.open(node, OFlags::PATH)?;
        // Not what a symbolic link leads to: this is where it is itself.
        let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let mut buffer = vec![0; LONGEST];
        let mut found = Xattrs::new();
        let length = match listxattr(path.as_str(), &mut buffer[..]) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => return Ok(found),
            Err(error) => return Err(self.failed(node, error)),
        };
        let mut value = vec![0; LONGEST];
        for name in buffer[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let got = getxattr(path.as_str(), name, &mut value[..]);
            let got = got.map_err(|error| self.failed(node, error))?;
            found.insert(name.to_vec(), value[..got].to_vec());
        }
        Ok(found)
    }

    fn target(&mut self, link: &Arc<[u8]>) -> Result<Vec<u8>> {
        let opened = self.open(link, OFlags::PATH)?;
        let target = readlinkat(&opened, "", Vec::new()).map_err(|error| self.failed(link, error))?;
        Ok(target.into_bytes())
    }

    fn data(&mut self, node: &Arc<[u8]>) -> Result<Vec<Range<u64>>> {
        let size = self.stat(node)?.size;
        let file = self.file(node)?;
        let (mut ranges, mut at) = (Vec::new(), 0);
        while at < size {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // There is no more.
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL) => at,
                Err(error) => return Err(self.failed(node, error)),
            };
            let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
            if start >= end {
                break;
            }
            ranges.push(start..end);
            at = end;
        }
        Ok(ranges)
    }

    fn read(&mut self, node: &Arc<[u8]>, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let read = self.file(node)?.read_exact_at(buffer, offset);
        read.map_err(|error| self.failed(node, error))
    }
}

/// A file system before and after a session has written to it, both mounted.
pub struct MountedPair {
    before: Mounted,
    now: Mounted,
}

impl MountedPair {
    /// Of the two.
    #[must_use]
    pub fn new(before: Mounted, now: Mounted) -> Self {
        Self { before, now }
    }
}

impl Pair for MountedPair {
    type Tree = Mounted;

    fn before(&mut self) -> &mut Mounted {
        &mut self.before
    }

    fn now(&mut self) -> &mut Mounted {
        &mut self.now
    }

    /// A file of the same number and time of birth that was not changed since, in content or otherwise: the kernel notes the
    /// time of that itself, and nobody can set it. Names are changed in directories, which are always looked at.
    fn untouched(&mut self, before: &Arc<[u8]>, now: &Arc<[u8]>) -> Result<bool> {
        let (old, new) = (self.before.stat_and_change(before)?, self.now.stat_and_change(now)?);
        Ok(new.0.kind != Kind::Directory && new.0.born.is_some() && old == new)
    }

    fn same_content(&mut self, before: &Arc<[u8]>, now: &Arc<[u8]>) -> Result<bool> {
        let size = self.now.stat(now)?.size;
        Ok(self.before.stat(before)?.size == size && same_bytes(self, before, now, size)?)
    }
}
