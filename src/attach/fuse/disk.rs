//! The one file: what the kernel asks of it becomes NBD requests, and their replies the kernel's answers.
//!
//! The thread that takes a request from the kernel sends it on and takes the next; the thread that receives from the
//! server answers the kernel. So as many are under way as the kernel likes.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::client::Submitter;
use crate::proto::{self, Command, CommandFlags, TransmissionFlags};

use super::super::control::Told;

/// The most data in one request: what kernels take by default. Less where the server takes less.
const PAYLOAD_MAX: u32 = 1 << 20;

/// Requests that the kernel may have under way without anybody waiting for each. Its default of 12 is for file systems
/// that work off one at a time.
const BACKGROUND: u16 = 512;

/// Nothing about the file ever changes.
const FOR_EVER: Duration = Duration::from_secs(1 << 40);

const ROOT: u64 = 1;
const FILE: u64 = 2;

/// What the kernel waits for while a request is under way.
pub(in crate::attach) enum Asked {
    /// Data.
    Read(ReplyData),
    /// That so many bytes were written.
    Write(ReplyWrite, u32),
    /// That it is done.
    Do(ReplyEmpty),
}

impl Asked {
    /// Answers the kernel with what the server says.
    pub(in crate::attach) fn answer(self, result: Result<&[u8], proto::Errno>) {
        match (self, result) {
            (Self::Read(reply), Ok(data)) => reply.data(data),
            (Self::Write(reply, length), Ok(_)) => reply.written(length),
            (Self::Do(reply), Ok(_)) => reply.ok(),
            (Self::Read(reply), Err(errno)) => reply.error(to_kernel(errno)),
            (Self::Write(reply, _), Err(errno)) => reply.error(to_kernel(errno)),
            (Self::Do(reply), Err(errno)) => reply.error(to_kernel(errno)),
        }
    }
}

/// The system's number for what a server says.
fn to_kernel(errno: proto::Errno) -> Errno {
    match errno {
        proto::Errno::Perm => Errno::EPERM,
        proto::Errno::NoMem => Errno::ENOMEM,
        proto::Errno::Inval => Errno::EINVAL,
        proto::Errno::NoSpc => Errno::ENOSPC,
        proto::Errno::Overflow => Errno::EOVERFLOW,
        proto::Errno::NotSup => Errno::EOPNOTSUPP,
        proto::Errno::Io | proto::Errno::Shutdown => Errno::EIO,
    }
}

/// A file system with one file, which is an export.
pub(in crate::attach) struct Disk {
    name: String,
    told: Told,
    read_only: bool,
    cached: bool,
    lanes: Vec<Submitter<Asked>>,
    next: AtomicUsize,
    ending: Arc<AtomicBool>,
}

impl Disk {
    /// The file `name` with what `told` tells of; requests go to `lanes` (at least one) in turn. When the kernel wants
    /// the file no more, `ending` is set before the server is told. If it is `cached`, the kernel keeps what it has read
    /// and is to write, as of any file: for who has no cache of its own.
    pub(in crate::attach) fn new(
        name: String,
        told: Told,
        (read_only, cached): (bool, bool),
        lanes: Vec<Submitter<Asked>>,
        ending: Arc<AtomicBool>,
    ) -> Self {
        let read_only = read_only || told.flags.contains(TransmissionFlags::READ_ONLY);
        Self { name, told, read_only, cached, lanes, next: AtomicUsize::new(0), ending }
    }

    fn submit(&self, command: Command, flags: CommandFlags, range: (u64, u32), payload: &[u8], asked: Asked) {
        let lane = self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len();
        let (offset, length) = range;
        if let Err(asked) = self.lanes[lane].submit(command, flags, offset, length, payload, asked) {
            asked.answer(Err(proto::Errno::Io));
        }
    }

    fn can(&self, what: TransmissionFlags) -> bool {
        self.told.flags.contains(what)
    }

    fn attributes(&self, inode: u64) -> FileAttr {
        let (kind, size, perm, nlink) = if inode == ROOT {
            (FileType::Directory, 0, 0o500, 2)
        } else {
            (FileType::RegularFile, self.told.size, 0o600, 1)
        };
        FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let most = PAYLOAD_MAX.min(self.told.maximum.max(4096)) / 4096 * 4096;
        // The nearest that is possible is as good.
        let _ = config.set_max_write(most);
        let _ = config.set_max_background(BACKGROUND);
        // Requests of the loop device run side by side; without it each waits for the one before.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            tracing::info!("This kernel's FUSE does one direct request after the other");
        }
        if self.cached && config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).is_err() {
            tracing::info!("This kernel's FUSE writes what is written at once");
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo(ROOT) && name == self.name.as_str() {
            reply.entry(&FOR_EVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match inode {
            INodeNo(inode @ (ROOT | FILE)) => reply.attr(&FOR_EVER, &self.attributes(inode)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.acc_mode() != fuser::OpenAccMode::O_RDONLY;
        if inode != INodeNo(FILE) {
            reply.error(Errno::EISDIR);
        } else if writes && self.read_only {
            reply.error(Errno::EROFS);
        } else {
            // Else nothing is cached here: the block device on top has a cache, and what it writes is to reach the session
            // before it hears that it was written.
            let flags = if self.cached {
                FopenFlags::FOPEN_KEEP_CACHE
            } else {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            };
            reply.opened(FileHandle(0), flags | FopenFlags::FOPEN_NOFLUSH);
        }
    }

    /// The kernel tells when it has written to what it caches; nobody wants to know.
    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if inode == INodeNo(FILE) && size.is_none_or(|size| size == self.told.size) {
            reply.attr(&FOR_EVER, &self.attributes(FILE));
        } else {
            reply.error(Errno::EPERM);
        }
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // As a file does: what lies beyond the end is left out.
        let length = u64::from(size).min(self.told.size.saturating_sub(offset));
        match u32::try_from(length) {
            Ok(0) | Err(_) => reply.data(&[]),
            Ok(length) => {
                self.submit(Command::Read, CommandFlags::NONE, (offset, length), &[], Asked::Read(reply));
            }
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Ok(length) = u32::try_from(data.len()) else { return reply.error(Errno::EINVAL) };
        if offset.checked_add(u64::from(length)).is_none_or(|end| end > self.told.size) {
            return reply.error(Errno::ENOSPC);
        }
        self.submit(Command::Write, CommandFlags::NONE, (offset, length), data, Asked::Write(reply, length));
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        if !self.can(TransmissionFlags::SEND_FLUSH) {
            return reply.ok();
        }
        self.submit(Command::Flush, CommandFlags::NONE, (0, 0), &[], Asked::Do(reply));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // A hole that is punched reads as zeroes, and the loop device counts on it: it punches for discards and for
        // zeroing alike. TRIM promises nothing about what is read afterwards, so both are WRITE_ZEROES, which may make
        // holes unless it is told not to.
        let flags = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => CommandFlags::NONE,
            libc::FALLOC_FL_ZERO_RANGE => CommandFlags::NO_HOLE,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        if !self.can(TransmissionFlags::SEND_WRITE_ZEROES) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let length = length.min(self.told.size.saturating_sub(offset));
        match u32::try_from(length) {
            Ok(0) => reply.ok(),
            Ok(length) => {
                self.submit(Command::WriteZeroes, flags, (offset, length), &[], Asked::Do(reply));
            }
            // The loop device never asks for 4 GiB at once.
            Err(_) => reply.error(Errno::EINVAL),
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        // The block size is what the loop device takes for the granularity of discards.
        reply.statfs(self.told.size.div_ceil(4096), 0, 0, 1, 0, 4096, 255, 4096);
    }

    fn destroy(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.lanes.iter().for_each(Submitter::disconnect);
    }
}
