//! Two disks of the same history, of which one was written to since: read as if each were there as a whole, although
//! most of what they hold is the same, and read once.

use crate::base::cannot_open;
use crate::error::{Error, ErrorKind, Result};
use crate::load::Saved;
use crate::save::{Extent, Kind, Remote, Source};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A disk that nobody writes to.
pub trait Disk {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` with what is there from `offset` on.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

impl Disk for Remote {
    fn size(&self) -> u64 {
        Source::size(self)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        Source::read(self, offset, buffer)
    }
}

impl Disk for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = start.checked_add(buffer.len()).and_then(|end| self.get(start..end));
        buffer.copy_from_slice(bytes.ok_or_else(|| Error::new(ErrorKind::Invalid, "Beyond the end"))?);
        Ok(())
    }
}

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Raw {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| cannot_open(path, error);
        let mut file = File::open(path).map_err(failed)?;
        // A block device has no length but where its end is.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), size })
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(buffer, offset);
        read.map_err(|error| Error::io("Cannot read image", error).on_path(&self.path))
    }
}

/// What was saved of a session, over the base that it was made of.
pub struct Layered {
    top: Saved,
    base: Raw,
    /// From the beginning to the end.
    extents: Vec<Extent>,
}

impl Layered {
    /// Puts `top` over `base`.
    ///
    /// # Errors
    /// It is not of the base's size, or cannot be read.
    pub fn new(mut top: Saved, base: Raw) -> Result<Self> {
        if !top.fits(base.size) {
            let message =
                format!("The session has {} bytes, and its base cannot have {}:", top.size(), base.size);
            let error = Error::new(ErrorKind::Invalid, message).on_path(&base.path);
            return Err(error.advise("give the image that it was made of with --base"));
        }
        let extents = Source::extents(&mut top, true)?;
        Ok(Self { top, base, extents })
    }

    /// What was written, if that is known: a whole file does not tell.
    #[must_use]
    pub fn written(&self) -> Written {
        match self.top.backing() {
            Some(_) => Written::of_extents(&self.extents),
            None => Written::Unknown,
        }
    }
}

impl Disk for Layered {
    fn size(&self) -> u64 {
        // QEMU's are whole sectors.
        self.base.size
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let next = self.extents.partition_point(|extent| extent.range.end <= at);
            let Some(Extent { range, kind }) = self.extents.get(next) else {
                return Err(Error::new(ErrorKind::Invalid, "Beyond the end of what was saved"));
            };
            let length = (rest.len() as u64).min(range.end - at);
            let (part, behind) = rest.split_at_mut(usize::try_from(length).unwrap_or(rest.len()));
            match kind {
                Kind::Nothing => self.base.read(at, part)?,
                Kind::Zero => part.fill(0),
                Kind::Data => Source::read(&mut self.top, at, part)?,
            }
            (at, rest) = (at + length, behind);
        }
        Ok(())
    }
}

/// Which of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The base.
    Before,
    /// What became of it.
    Now,
}

impl Side {
    /// Whose file system it is, for people.
    #[must_use]
    pub fn owner(self) -> &'static str {
        match self {
            Self::Before => "the base",
            Self::Now => "the session",
        }
    }
}

/// Where the two disks may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// In these bytes and in no others; in order and apart.
    In(Vec<Range<u64>>),
    /// That is found out by reading both.
    Unknown,
}

impl Written {
    /// What was written, as a source tells.
    ///
    /// # Errors
    /// It cannot tell.
    pub fn of(source: &mut impl Source) -> Result<Self> {
        Ok(Self::of_extents(&source.extents(true)?))
    }

    fn of_extents(extents: &[Extent]) -> Self {
        let written = extents.iter().filter(|extent| extent.kind != Kind::Nothing);
        Self::In(written.map(|extent| extent.range.clone()).collect())
    }
}

/// Bytes that are read at once where little is asked for: what is beside it is likely to be asked for next.
const CHUNK: u64 = 64 << 10;
/// Chunks of a generation of the cache; there are two.
const GENERATION: usize = 256;
/// Bytes that are read at once at most.
pub(super) const AT_ONCE: u64 = 1 << 20;

/// The two disks.
pub struct Disks {
    before: Box<dyn Disk>,
    now: Box<dyn Disk>,
    written: Written,
    /// What was read of late, and what was read before that.
    young: HashMap<(Side, u64), Box<[u8]>>,
    old: HashMap<(Side, u64), Box<[u8]>>,
}

impl Disks {
    /// The two of them; `written`: where they may differ.
    #[must_use]
    pub fn new(before: Box<dyn Disk>, now: Box<dyn Disk>, written: Written) -> Self {
        // Behind the end of the shorter nothing is the same.
        let written = if before.size() == now.size() { written } else { Written::Unknown };
        Self { before, now, written, young: HashMap::new(), old: HashMap::new() }
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self, side: Side) -> u64 {
        self.disk(side).size()
    }

    fn disk(&self, side: Side) -> &dyn Disk {
        match side {
            Side::Before => &*self.before,
            Side::Now => &*self.now,
        }
    }

    /// Fills `buffer` with what is there from `offset` on.
    ///
    /// # Errors
    /// It cannot be read, or is behind the end.
    pub fn read(&mut self, side: Side, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|&end| end <= self.size(side));
        let Some(end) = end else {
            let error = Error::new(ErrorKind::Invalid, "Something would lie behind the end of the disk of");
            return Err(error.on(side.owner()));
        };
        if end - offset > CHUNK {
            return self.read_through(side, offset, buffer);
        }
        let mut rest = buffer;
        let mut at = offset;
        while !rest.is_empty() {
            let within = usize::try_from(at % CHUNK).unwrap_or(0);
            let chunk = self.chunk(side, at / CHUNK)?;
            let length = rest.len().min(chunk.len() - within);
            let (part, behind) = rest.split_at_mut(length);
            part.copy_from_slice(&chunk[within..within + length]);
            (rest, at) = (behind, at + length as u64);
        }
        Ok(())
    }

    fn read_through(&mut self, side: Side, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match side {
            Side::Before => self.before.read(offset, buffer),
            Side::Now => self.now.read(offset, buffer),
        }
    }

    fn chunk(&mut self, side: Side, number: u64) -> Result<&[u8]> {
        let start = number * CHUNK;
        let end = (start + CHUNK).min(self.size(side));
        // What is the same on both is read, and kept, once.
        let known = match &self.written {
            Written::In(ranges) => !touches(ranges, &(start..end)),
            Written::Unknown => false,
        };
        let key = (if known { Side::Before } else { side }, number);
        if !self.young.contains_key(&key) {
            let chunk = match self.old.remove(&key) {
                Some(chunk) => chunk,
                None => {
                    let mut chunk = vec![0; usize::try_from(end - start).unwrap_or(0)].into_boxed_slice();
                    self.read_through(key.0, start, &mut chunk)?;
                    chunk
                }
            };
            if self.young.len() >= GENERATION {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(key, chunk);
        }
        Ok(&self.young[&key])
    }

    /// Looks whether one can be the base of the other: whether what was not written is the same, in some places from the
    /// beginning to the end.
    ///
    /// # Errors
    /// It is not, or they cannot be read.
    pub fn check_history(&mut self) -> Result<()> {
        const PLACES: u64 = 64;
        const LENGTH: u64 = 4096;
        let Written::In(written) = &self.written else { return Ok(()) };
        let size = self.before.size();
        let places = (0..PLACES).map(|place| {
            let start = size / PLACES * place / LENGTH * LENGTH;
            start..(start + LENGTH).min(size)
        });
        let places: Vec<_> = places.filter(|place| !touches(written, place)).collect();
        for place in places {
            let length = usize::try_from(place.end - place.start).unwrap_or(0);
            let (mut before, mut now) = (vec![0; length], vec![0; length]);
            self.read_through(Side::Before, place.start, &mut before)?;
            self.read_through(Side::Now, place.start, &mut now)?;
            if before != now {
                let error = Error::new(ErrorKind::Invalid, "The session was not made of this base");
                return Err(error.advise("give the image that it was made of with --base"));
            }
        }
        Ok(())
    }

    /// Whether the two may differ in `range`.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn differ(&mut self, range: Range<u64>) -> Result<bool> {
        if let Written::In(ranges) = &self.written {
            return Ok(touches(ranges, &range));
        }
        let (mut before, mut now) = (Vec::new(), Vec::new());
        let mut at = range.start;
        while at < range.end {
            let length = usize::try_from((range.end - at).min(CHUNK)).unwrap_or(0);
            before.resize(length, 0);
            now.resize(length, 0);
            self.read(Side::Before, at, &mut before)?;
            self.read(Side::Now, at, &mut now)?;
            if before != now {
                return Ok(true);
            }
            at += length as u64;
        }
        Ok(false)
    }
}

/// Whether any of the ranges, which are in order and apart, has a byte in common with `range`.
pub(super) fn touches(ranges: &[Range<u64>], range: &Range<u64>) -> bool {
    let at = ranges.partition_point(|other| other.end <= range.start);
    !range.is_empty() && ranges.get(at).is_some_and(|other| other.start < range.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_touch_where_they_have_a_byte_in_common() {
        let ranges = [10..20, 30..31];
        for (range, expected) in [
            (0..10, false),
            (0..11, true),
            (19..20, true),
            (20..30, false),
            (20..31, true),
            (31..99, false),
            (15..15, false),
            (0..99, true),
        ] {
            assert_eq!(touches(&ranges, &range), expected, "{range:?}");
        }
    }

    /// Counts what is read of it.
    struct Counted(Vec<u8>, std::rc::Rc<std::cell::Cell<u64>>);

    impl Disk for Counted {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.1.set(self.1.get() + buffer.len() as u64);
            self.0.read(offset, buffer)
        }
    }

    #[test]
    fn what_is_the_same_is_read_once_and_what_is_not_is_told_apart() {
        let base: Vec<u8> = (0..300_000_u32).map(|n| n.to_be_bytes()[2]).collect();
        let mut session = base.clone();
        session[140_000] ^= 1;
        let (of_base, of_session) = (std::rc::Rc::default(), std::rc::Rc::default());
        let before = Counted(base.clone(), std::rc::Rc::clone(&of_base));
        let now = Counted(session.clone(), std::rc::Rc::clone(&of_session));
        let written = Written::In(std::iter::once(139_264..143_360).collect());
        let mut disks = Disks::new(Box::new(before), Box::new(now), written);
        let mut buffer = vec![0; 1000];
        for at in (0..299_000).step_by(777) {
            let start = usize::try_from(at).unwrap();
            disks.read(Side::Before, at, &mut buffer).unwrap();
            assert_eq!(buffer, base[start..start + 1000]);
            disks.read(Side::Now, at, &mut buffer).unwrap();
            assert_eq!(buffer, session[start..start + 1000]);
        }
        assert_eq!((of_base.get(), of_session.get()), (300_000, CHUNK));
        assert!(disks.differ(139_000..140_000).unwrap(), "what was written may differ");
        assert!(!disks.differ(143_360..300_000).unwrap());
        assert!(disks.read(Side::Now, 299_500, &mut buffer).is_err());
        assert!(disks.read(Side::Now, u64::MAX, &mut buffer).is_err());
    }

    #[test]
    fn where_nobody_knows_what_was_written_both_are_read() {
        let (base, mut session) = (vec![7; 200_000], vec![7; 200_000]);
        session[150_000] = 8;
        let mut disks = Disks::new(Box::new(base), Box::new(session), Written::Unknown);
        assert!(!disks.differ(0..150_000).unwrap());
        assert!(disks.differ(149_000..151_000).unwrap());
        assert!(!disks.differ(150_001..200_000).unwrap());
    }
}
