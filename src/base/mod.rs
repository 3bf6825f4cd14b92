//! Base images: shared by every session, mapped, and never changed.
//!
//! A [`Source`] is a name and a path; an [`Image`] is what was found there when it was opened. An image is pinned by
//! its descriptor: a file that is renamed over the path, or put in its place by whoever runs the server, makes a *new*
//! image for new sessions, while old sessions keep the old bytes. Nothing here writes, and nothing here reads the mapping
//! in user space (see [`crate::sys`]).

pub mod contents;
mod extents;
mod residency;

pub use extents::{Extents, Run};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::{KernelSpan, Mapping};
use contents::Content;
use residency::Residency;
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities};
use std::fs::{File, FileType, Metadata};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// What tells one file from another, and one version of a file from the next that is renamed over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

impl Identity {
    /// The file's that this is of.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// One opened base image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    opened: SystemTime,
    generation: u64,
    file: File,
    is_device: bool,
    /// The kernel tells what of the file is in memory; to others it says that everything is.
    is_told: bool,
    identity: Identity,
    size: u64,
    mapping: Mapping,
    extents: Extents,
    residency: Residency,
}

impl Image {
    /// Opens and maps the raw image at `path`, read-only.
    ///
    /// # Errors
    /// When there is no such file, it may not be read, it is not a regular file or block device, or it is empty.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| cannot_open(path, error);
        // Looked at before it is opened: opening a FIFO would wait for a writer.
        check_kind(path, std::fs::metadata(path).map_err(failed)?.file_type())?;
        Self::of(File::open(path).map_err(failed)?, path)
    }

    /// Maps the raw image in `file`, which somebody has opened at `path`.
    ///
    /// # Errors
    /// As [`Image::open`]; and when it is open for writing.
    pub fn of(file: File, path: &Path) -> Result<Self> {
        let failed = |error| cannot_open(path, error);
        let metadata = file.metadata().map_err(failed)?;
        check_kind(path, metadata.file_type())?;
        let mode = rustix::fs::fcntl_getfl(&file).map_err(|error| failed(error.into()))?;
        if mode & (OFlags::ACCMODE | OFlags::PATH) != OFlags::RDONLY {
            return Err(refused(path, "not open for reading alone", "open it read-only"));
        }
        let size = length(&file).map_err(failed)?;
        if size == 0 {
            return Err(refused(path, "empty", "give the path of a raw disk image"));
        }
        let mapping = Mapping::new(&file, size)
            .map_err(|error| Error::io("Cannot map image", error).on_path(path).advise("check ulimit -v"))?;
        Ok(Self {
            path: path.to_owned(),
            opened: SystemTime::now(),
            generation: 1,
            identity: Identity::of(&metadata),
            extents: Extents::of_file(&file, size),
            residency: Residency::new(size),
            is_device: metadata.file_type().is_block_device(),
            is_told: is_told(&file, &metadata),
            file,
            size,
            mapping,
        })
    }

    /// The image as somebody sees it whom the kernel does not tell what is in memory.
    #[cfg(test)]
    pub(crate) fn untold(mut self) -> Self {
        self.is_told = false;
        self
    }

    /// Where it lay when it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// When it was opened.
    #[must_use]
    pub fn opened(&self) -> SystemTime {
        self.opened
    }

    /// How many files there were under its name until then, itself included.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Which file it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Bytes in the image, as it was when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the image has data and where it has holes.
    #[must_use]
    pub fn extents(&self) -> &Extents {
        &self.extents
    }

    /// Bytes that the file still has: fewer than [`Image::size`] when somebody truncated it. 0 when that cannot be
    /// told, so that nobody is given bytes of a file that cannot even be asked.
    #[must_use]
    pub fn length_now(&self) -> u64 {
        if self.is_device {
            return length(&self.file).unwrap_or(0);
        }
        rustix::fs::fstat(&self.file).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Whether the bytes can be read, now. May block for as long as the disk takes: for when a send has failed.
    #[must_use]
    pub fn can_read(&self, offset: u64, len: usize) -> bool {
        let end = offset.saturating_add(len as u64);
        end <= self.length_now()
            && usize::try_from(offset).is_ok_and(|offset| self.mapping.populate(offset, len).is_ok())
    }

    /// The bytes of `range`, for the kernel to send.
    ///
    /// # Panics
    /// If the range is not within the image.
    #[must_use]
    pub fn span(&self, offset: u64, len: usize) -> KernelSpan<'_> {
        self.mapping.span(usize::try_from(offset).expect("the image is mapped, so offsets in it fit"), len)
    }

    /// Copies the image's bytes from `offset` on into `out`; bytes past the image's end read as zeroes.
    ///
    /// # Errors
    /// When the file is shorter by now, or the disk fails.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let within = self.size.saturating_sub(offset);
        let within = usize::try_from(within).unwrap_or(usize::MAX).min(out.len());
        let (data, beyond) = out.split_at_mut(within);
        beyond.fill(0);
        self.file.read_exact_at(data, offset)
    }

    /// What it seems to hold. For people; may wait for the disk.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    pub fn contents(&self) -> io::Result<Vec<Content>> {
        self.contents_by(contents::PROBE_SIZE)
    }

    /// The same, by so many bytes at its start.
    fn contents_by(&self, bytes: usize) -> io::Result<Vec<Content>> {
        let mut start = vec![0; bytes];
        start.truncate(usize::try_from(self.size).unwrap_or(usize::MAX));
        self.read_at(0, &mut start)?;
        Ok(contents::probe(&start))
    }

    /// Says in the log if it seems to be no raw disk: nobody would find a file system on what is served.
    fn say_if_not_raw(&self) {
        // If it cannot be read, those who need it will say so.
        for content in self.contents_by(contents::ADVICE_SIZE).unwrap_or_default() {
            let Content { what, advice: Some(advice), .. } = content else { continue };
            let path = self.path.display();
            tracing::warn!("{path} looks like a {what}, and is served as the raw bytes that it is; {advice}");
        }
    }

    /// Whether all data of `range` was seen in memory, so that a read of it does not wait for a disk. Holes count as
    /// seen. Cheap, and only a hint: the kernel may drop a page at any time.
    #[must_use]
    pub fn is_warm(&self, range: Range<u64>) -> bool {
        self.residency.is_seen(&range)
            || self.extents.runs(range).all(|run| !run.data || self.residency.is_seen(&run.range()))
    }

    /// Reads the data of `range` into memory, and remembers that. Blocks for as long as the disk takes: never called
    /// by a worker. What was seen in memory meanwhile is not read again: a client can ask for all of an image many times
    /// over, in a few bytes.
    ///
    /// # Errors
    /// When the file is shorter by now, or the disk fails.
    pub fn warm(&self, range: Range<u64>) -> io::Result<()> {
        self.warm_by(range, |buffer, at| self.file.read_at(buffer, at))
    }

    /// As [`Image::warm`], but not to wait for the disk: if something has to be read from there, it says no, and the kernel
    /// begins with that (since Linux 5.9). To find out where on the disk it lies may take a moment all the same.
    ///
    /// # Errors
    /// As [`Image::warm`], and `Unsupported` if the file system can only wait.
    pub fn warm_at_once(&self, range: Range<u64>) -> io::Result<bool> {
        let read = |buffer: &mut [u8], at| {
            let buffers = &mut [IoSliceMut::new(buffer)];
            Ok(rustix::io::preadv2(&self.file, buffers, at, ReadWriteFlags::NOWAIT)?)
        };
        match self.warm_by(range, read) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn warm_by(
        &self,
        range: Range<u64>,
        read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let length = self.length_now();
        for run in self.extents.runs(range).filter(|run| run.data) {
            let bytes = run.range();
            if bytes.end > length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !self.residency.is_seen(&bytes) {
                // Most of what is cold is asked for by the block, and zeroes take time, too.
                if bytes.end - bytes.start <= 4 << 10 {
                    read_through(&bytes, &mut [0; 4 << 10], &read)?;
                } else {
                    read_through(&bytes, &mut [0; 64 << 10], &read)?;
                }
                self.residency.set_seen(&bytes);
            }
        }
        Ok(())
    }

    /// As [`Image::is_warm`], after a look at what is in memory, of which the kernel tells without waiting.
    #[must_use]
    pub fn is_warm_after_a_look(&self, range: Range<u64>) -> bool {
        self.is_warm(range.clone())
            || (self.is_told && {
                self.residency.look_around(&range, &self.mapping);
                self.is_warm(range)
            })
    }

    /// Forgets what was seen in memory and is there no longer, so that the next read of it does not make a worker
    /// wait. Looks at a bounded part of the image each time it is called and goes on where it stopped.
    pub fn recheck_residency(&self) {
        self.residency.recheck(&self.mapping, self.is_told);
    }
}

/// Reads as a program would, so that the kernel reads ahead for those who read in sequence and only then.
fn read_through(
    bytes: &Range<u64>,
    buffer: &mut [u8],
    read: &impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        let len = (bytes.end - at).min(buffer.len() as u64);
        match read(&mut buffer[..usize::try_from(len).unwrap_or(0)], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => at += got as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// That the image at `path` cannot be opened, in words for who named it.
#[must_use]
pub fn cannot_open(path: &Path, error: io::Error) -> Error {
    Error::io("Cannot open image", error).on_path(path).advise("give the path of a readable raw disk image")
}

fn refused(path: &Path, why: &str, advice: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, format!("Cannot serve {}: it is {why}", path.display())).advise(advice)
}

fn check_kind(path: &Path, kind: FileType) -> Result<()> {
    if kind.is_dir() {
        let advice = "give the path of a raw disk image, or make one of it with mkfs.ext4 -d";
        return Err(refused(path, "a directory", advice));
    }
    if !kind.is_file() && !kind.is_block_device() {
        let why = "neither a regular file nor a block device";
        return Err(refused(path, why, "give the path of a raw disk image"));
    }
    Ok(())
}

/// A name and a path under which an image is offered, the image that is there now, and those before it that sessions are
/// on.
#[derive(Debug)]
pub struct Source {
    name: String,
    now: Mutex<Now>,
    /// Replaced ones. Kept until [`Source::drop_unused`], so that no worker has to unmap one.
    before: Mutex<Vec<Arc<Image>>>,
    /// Whether it was said that what the path names by now cannot be served.
    complained: AtomicBool,
}

#[derive(Debug)]
struct Now {
    path: PathBuf,
    image: Arc<Image>,
    /// Whether the path names it, here, and what is renamed over it is to be seen.
    is_followed: bool,
}

impl Source {
    /// Opens the image at `path`, to be offered as `name`.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open(name: &str, path: &Path) -> Result<Self> {
        let path = absolute(path)?;
        let image = Arc::new(Image::open(&path)?);
        image.say_if_not_raw();
        Ok(Self {
            name: name.to_owned(),
            now: Mutex::new(Now { path, image, is_followed: true }),
            before: Mutex::default(),
            complained: AtomicBool::new(false),
        })
    }

    /// The export name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Changed in one piece.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn before(&self) -> MutexGuard<'_, Vec<Arc<Image>>> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image that sessions were given last, without looking whether there is a newer one.
    #[must_use]
    pub fn latest(&self) -> Arc<Image> {
        Arc::clone(&self.now().image)
    }

    /// That, and those before it that are still there, the newest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Image>> {
        let now = self.now();
        let before = self.before();
        std::iter::once(&now.image).chain(before.iter().rev()).map(Arc::clone).collect()
    }

    /// Whether [`Source::drop_unused`] may find something.
    #[must_use]
    pub fn was_replaced(&self) -> bool {
        !self.before().is_empty()
    }

    /// The image for a session that begins now: what the path names by now, or, while it names nothing that can be
    /// served, what it named last.
    #[must_use]
    pub fn current(&self) -> Arc<Image> {
        let mut now = self.now();
        match std::fs::metadata(&now.path).map(|metadata| Identity::of(&metadata)) {
            Ok(found) if now.is_followed && found != now.image.identity => match Image::open(&now.path) {
                Ok(image) => {
                    tracing::info!(export = self.name, path = %now.path.display(), "image was replaced");
                    self.put(&mut now, image);
                }
                // Once: every client that connects would have it said again.
                Err(error) if !self.complained.swap(true, Ordering::Relaxed) => {
                    tracing::warn!(export = self.name, %error, "keeping the image as it was");
                }
                Err(_) => {}
            },
            _ => {}
        }
        Arc::clone(&now.image)
    }

    /// Offers the image at `path` from now on; those who are given `file` need not be able to open it. What is renamed over
    /// it later is seen if it was at that path, and can be opened.
    ///
    /// # Errors
    /// As [`Image::open`] and [`Image::of`]. The image stays what it was then.
    pub fn replace(&self, path: &Path, file: Option<File>) -> Result<()> {
        let path = absolute(path)?;
        let image = match file {
            Some(file) => Image::of(file, &path)?,
            None => Image::open(&path)?,
        };
        image.say_if_not_raw();
        let there = std::fs::metadata(&path).map(|metadata| Identity::of(&metadata));
        let mut now = self.now();
        now.is_followed = there.is_ok_and(|there| there == image.identity);
        tracing::info!(export = self.name, path = %path.display(), "image was set");
        now.path = path;
        self.put(&mut now, image);
        Ok(())
    }

    fn put(&self, now: &mut Now, mut image: Image) {
        self.complained.store(false, Ordering::Relaxed);
        image.generation = now.image.generation + 1;
        let before = std::mem::replace(&mut now.image, Arc::new(image));
        self.before().push(before);
    }

    /// Unmaps the replaced images that no session is on any more; returns how many are left.
    pub fn drop_unused(&self) -> usize {
        let mut before = self.before();
        // Nobody takes another handle from this list but `all`, whose callers give theirs up at once.
        let unused: Vec<_> = before.extract_if(.., |image| Arc::strong_count(image) == 1).collect();
        let left = before.len();
        drop(before);
        // Without the lock: it takes a while.
        drop(unused);
        left
    }
}

/// So that it still names the same file when the server changes its directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Error::io("Cannot resolve the path of image", error).on_path(path))
}

/// Whether `mincore` answers truly: since Linux 5.2 only to the file's owner, and to who may write it. Root is neither
/// of another user's file, once it has given up its capabilities.
fn is_told(file: &File, metadata: &Metadata) -> bool {
    let is_owner = || {
        let owns_all = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::FOWNER);
        metadata.uid() == rustix::process::geteuid().as_raw() || capabilities(None).is_ok_and(owns_all)
    };
    let may_write = || {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
    };
    is_owner() || may_write()
}

fn length(mut file: &File) -> io::Result<u64> {
    // Not fstat: block devices have no size there.
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image_of(bytes: &[u8]) -> (tempfile::NamedTempFile, Image) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let image = Image::open(file.path()).unwrap();
        (file, image)
    }

    /// 64 requests of 28 bytes to cache an image of 4 GB once were 256 GB to be copied.
    #[test]
    fn what_is_in_memory_is_not_read_again() {
        const SIZE: u64 = 1 << 20;
        let (_file, image) = image_of(&[5; 1 << 20]);
        // Bytes that this thread has read, from caches too.
        let bytes_read = || -> u64 {
            let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
            io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
        };
        let before = bytes_read();
        image.warm(0..SIZE).unwrap();
        let first = bytes_read();
        image.warm(0..SIZE).unwrap();
        let second = bytes_read();
        assert!(first - before >= SIZE && second - first < SIZE / 2, "{before}, {first}, {second}");
    }

    #[test]
    fn reads_past_the_end_are_zeroes_up_to_the_block() {
        let (_file, image) = image_of(&[5; 1000]);
        let mut out = [9; 1024];
        image.read_at(0, &mut out).unwrap();
        assert_eq!((out[999], out[1000], out[1023]), (5, 0, 0));
    }

    #[test]
    fn a_truncated_file_is_an_error_not_zeroes() {
        let (file, image) = image_of(&[5; 100_000]);
        file.as_file().set_len(50_000).unwrap();
        assert_eq!((image.size(), image.length_now()), (100_000, 50_000));
        assert!(image.read_at(60_000, &mut [0; 10]).is_err());
        assert!(image.warm(65_536..100_000).is_err());
    }

    #[test]
    fn warming_makes_warm() {
        let (_file, image) = image_of(&[5; 300_000]);
        assert!(!image.is_warm(0..300_000));
        image.warm(0..300_000).unwrap();
        assert!(image.is_warm(0..300_000));
        image.recheck_residency();
        assert!(image.is_warm(123..124));
    }

    #[test]
    fn what_is_on_the_disk_only_is_not_waited_for_and_comes_all_the_same() {
        const SIZE: usize = 4 << 20;
        // Not where temporary files may be in memory.
        let mut file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.write_all(&vec![5; SIZE]).unwrap();
        file.as_file().sync_all().unwrap();
        let image = Image::open(file.path()).unwrap();
        let pages = || {
            let mut pages = vec![0; SIZE / rustix::param::page_size()];
            image.mapping.residency(0, &mut pages).unwrap();
            pages.into_iter().filter(|page| page & 1 == 1).count()
        };
        let wait_until = |what: &str, condition: &dyn Fn() -> bool| {
            let start = std::time::Instant::now();
            while !condition() {
                assert!(start.elapsed().as_secs() < 90, "{what}");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        // A page that somebody looks at just then, as the kernel itself may, is not dropped.
        wait_until("/var/tmp is on a disk, and the kernel drops the file", &|| {
            rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
            pages() == 0
        });
        let was_there = image.warm_at_once(0..4096).unwrap();
        assert_eq!(image.is_warm(0..4096), was_there, "what it says is what it knows");
        // It was begun with, so that it is there sooner or later without anybody's reading it.
        wait_until("the kernel reads what it was asked for", &|| pages() > 0);
        image.warm(0..SIZE as u64).unwrap();
        assert!(image.warm_at_once(0..SIZE as u64).unwrap());
        file.as_file().set_len(0).unwrap();
        assert!(image.warm_at_once(0..4096).is_err());
    }

    #[test]
    fn a_file_renamed_over_the_path_is_a_new_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.img");
        std::fs::write(&path, [1; 10]).unwrap();
        let source = Source::open("root", &path).unwrap();
        let old = source.current();
        assert!(Arc::ptr_eq(&old, &source.current()));
        std::fs::remove_file(&path).unwrap();
        assert!(Arc::ptr_eq(&old, &source.current()));
        std::fs::write(dir.path().join("new"), [2; 20]).unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!((source.current().size(), old.size()), (20, 10));
    }

    #[test]
    fn what_is_no_image_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("empty"), []).unwrap();
        let say = |path: &Path| Image::open(path).unwrap_err().to_string();
        assert!(say(dir.path()).contains("it is a directory"));
        assert!(say(&dir.path().join("empty")).contains("it is empty"));
        assert!(say(&dir.path().join("none")).contains("no such file"));
        assert!(say(Path::new("/dev/null")).contains("neither a regular file nor a block device"));
    }
}
