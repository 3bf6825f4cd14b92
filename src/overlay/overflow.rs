//! A file for blocks of sealed overlays that memory is short for: what is written to it is ciphertext, whose keys never leave memory.
//!
//! ```text
//!   numbers   | slots of the arena ......... | places in the file ............ |
//!                 block in memory                 block number N of the file, at byte (N - slots) * block size
//! ```
//!
//! A place is counted, held and paid for as a slot is, by its number in the arena's ledger; only its bytes are elsewhere. What is in a place
//! never changes: a block that is written to is in memory.
//!
//! The file has no name from its first moment on (`O_TMPFILE`), so there is nothing to be cleared after any end.

use super::BlockSize;
use crate::error::{Error, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A file that is open and has no name, and how large it may become.
#[derive(Debug)]
pub struct OverflowFile {
    file: File,
    bytes: u64,
}

impl OverflowFile {
    /// Makes it in `dir`, for at most `bytes` bytes.
    ///
    /// # Errors
    /// When there is no such directory, it cannot be written to, or its file system has no files without names.
    pub fn make(dir: &Path, bytes: u64) -> Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(|error| {
            let failed = Error::io("Cannot make a file for --overflow in", error).on_path(dir);
            match error {
                rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR => {
                    failed.advise("it takes a file system with O_TMPFILE: ext4, XFS, btrfs, tmpfs")
                }
                _ => failed.advise("give a directory that this user may write to"),
            }
        })?;
        Ok(Self { file: file.into(), bytes })
    }
}

/// Ticks for which what goes out was not used: the coldest is looked for first, and then what is less so.
pub(crate) const IDLE: [u16; 5] = [512, 64, 8, 1, 0];
/// A tick.
pub(crate) const TICK: Duration = Duration::from_millis(128);

/// How long nothing is tried after the file has taken no more.
const RETRY: Duration = Duration::from_secs(1);
/// Freed places that are given back to the file system at a time.
const PUNCH_AT_ONCE: usize = 4096;

/// The places.
#[derive(Debug)]
pub struct Overflow {
    file: File,
    block_size: BlockSize,
    /// The number of the first place.
    first: u32,
    places: u32,
    free: Mutex<Free>,
    used: AtomicU64,
    /// When ticks began.
    pub(crate) since: Instant,
    /// It takes no more for now, or there was nothing that could go out.
    is_stuck: AtomicBool,
    /// Where the search for what was not used lately goes on, and who searches.
    pub(crate) hand: Mutex<Hand>,
}

/// Where a search has got.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// The session's serial number.
    pub(crate) session: u64,
    /// And its next block.
    pub(crate) block: u64,
    /// How cold what is looked for must be: an index of [`IDLE`].
    pub(crate) level: usize,
}

#[derive(Debug)]
struct Free {
    /// Places that were used, and have nothing in the file by now.
    clean: Vec<u32>,
    /// Those that still have.
    dirty: Vec<u32>,
    /// From here on they were never used.
    fresh: u32,
    stuck_since: Option<Instant>,
}

impl Overflow {
    pub(super) fn new(file: OverflowFile, block_size: BlockSize, first: u32) -> Self {
        let OverflowFile { file, bytes } = file;
        let most = u64::from(u32::MAX - first);
        let places = u32::try_from((bytes / block_size.bytes()).min(most)).unwrap_or(u32::MAX - first);
        let free = Free { clean: Vec::new(), dirty: Vec::new(), fresh: first, stuck_since: None };
        Self {
            file,
            block_size,
            first,
            places,
            free: Mutex::new(free),
            used: AtomicU64::new(0),
            since: Instant::now(),
            is_stuck: AtomicBool::new(false),
            hand: Mutex::default(),
        }
    }

    /// How many places there are.
    #[must_use]
    pub fn places(&self) -> u32 {
        self.places
    }

    /// Bytes that it may hold.
    #[must_use]
    pub fn limit(&self) -> u64 {
        u64::from(self.places) * self.block_size.bytes()
    }

    /// Bytes of the places that are used.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // Every change is one push or pop.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is no use in asking for room in memory by way of it.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        if !self.is_stuck.load(Ordering::Relaxed) {
            return false;
        }
        let mut free = self.lock();
        if free.stuck_since.is_some_and(|since| since.elapsed() < RETRY) {
            return true;
        }
        free.stuck_since = None;
        self.is_stuck.store(false, Ordering::Relaxed);
        false
    }

    /// Notes that no room was made.
    pub(crate) fn get_stuck(&self) {
        self.lock().stuck_since = Some(Instant::now());
        self.is_stuck.store(true, Ordering::Relaxed);
    }

    /// A place that is nobody's.
    pub(super) fn take(&self) -> Option<u32> {
        let mut free = self.lock();
        let Free { clean, dirty, fresh, .. } = &mut *free;
        let number = dirty.pop().or_else(|| clean.pop()).or_else(|| {
            (*fresh - self.first < self.places).then(|| {
                *fresh += 1;
                *fresh - 1
            })
        })?;
        self.used.fetch_add(self.block_size.bytes(), Ordering::Relaxed);
        Some(number)
    }

    /// Takes a place back.
    pub(super) fn free(&self, number: u32) {
        self.lock().dirty.push(number);
        self.used.fetch_sub(self.block_size.bytes(), Ordering::Relaxed);
        self.is_stuck.store(false, Ordering::Relaxed);
    }

    fn offset(&self, number: u32) -> u64 {
        u64::from(number - self.first) * self.block_size.bytes()
    }

    /// Writes a sealed block to its place.
    ///
    /// # Errors
    /// What the file system says; `StorageFull` when it is.
    pub(super) fn write(&self, number: u32, sealed: &[u8]) -> io::Result<()> {
        self.file.write_all_at(sealed, self.offset(number))
    }

    /// Reads it back.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn read(&self, number: u32, sealed: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(sealed, self.offset(number))
    }

    /// Gives some of what was freed back to the file system; returns whether there is more. May wait for a disk.
    pub fn tidy(&self) -> bool {
        let (mut some, more) = {
            let mut free = self.lock();
            let at = free.dirty.len().saturating_sub(PUNCH_AT_ONCE);
            (free.dirty.split_off(at), at > 0)
        };
        some.sort_unstable();
        for run in some.chunk_by(|a, b| a + 1 == *b) {
            let bytes = run.len() as u64 * self.block_size.bytes();
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where it cannot be, the room is used again all the same.
            let _ = rustix::fs::fallocate(&self.file, flags, self.offset(run[0]), bytes);
        }
        self.lock().clean.append(&mut some);
        more
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = OverflowFile::make(dir.path(), 3 * 4096 + 5).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it has no name");
        let overflow = Overflow::new(file, BlockSize::DEFAULT, 100);
        let all: Vec<u32> = std::iter::from_fn(|| overflow.take()).collect();
        assert_eq!(
            (all.as_slice(), overflow.used(), overflow.limit()),
            (&[100, 101, 102][..], 3 * 4096, 3 * 4096)
        );
        overflow.write(101, &[7; 4096]).unwrap();
        overflow.get_stuck();
        assert!(overflow.is_stuck());
        overflow.free(101);
        assert!(!overflow.is_stuck(), "there is room again");
        while overflow.tidy() {}
        let mut bytes = [1; 4096];
        overflow.read(101, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096], "the file system has it back");
        assert_eq!((overflow.take(), overflow.take()), (Some(101), None));
    }

    #[test]
    fn what_is_no_directory_is_refused() {
        let error = OverflowFile::make(Path::new("/no/such/directory"), 1 << 20).unwrap_err();
        let expected = "Cannot make a file for --overflow in /no/such/directory: no such file or directory; \
                        give a directory that this user may write to";
        assert_eq!(error.to_string(), expected);
    }
}
