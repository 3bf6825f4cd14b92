//! A rest that is encrypted: one archive, which `age --decrypt` makes a tar of.
//!
//! ```text
//! about/N      what the Nth thing is, as an element of `entries.json`; of a file with holes, where its `data` are
//! files/PATH   behind it, if it is a file, its content; of a file with holes its data, one behind the other
//! ```
//!
//! Nothing of this is in clear on the disk, names as little as contents.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde_json::{Value, json};
use tar::{Archive, Builder, EntryType, Header};

use super::age::{Decryption, Encryption};
use super::create;
use super::rest::{Rest, Written};
use super::resume::is_file;
use crate::carry::entry::Version;
use crate::carry::stores::Content;
use crate::carry::tree::Source;
use crate::error::{Error, Result, plain};

const REST: &str = "rest.age";

/// The most that is read of what says what a thing is, in bytes.
const ABOUT_MAX: u64 = 64 << 20;

/// What of a file is read before it is written that it is there: most that cannot be read cannot be read from the beginning.
const FIRST: usize = 64 << 10;

/// Why writing stopped.
enum Stopped {
    /// This one could not be read to its end.
    Torn(PathBuf, io::Error),
    There(io::Error),
}

/// Writes what is at these paths, encrypted.
///
/// # Errors
/// It cannot be encrypted or written.
pub(super) fn write(
    rest: &Rest<'_>,
    directory: &Path,
    paths: &[PathBuf],
    recipient: &str,
) -> io::Result<Written> {
    let place = directory.join(REST);
    let mut torn = BTreeMap::new();
    loop {
        let file = create(&place)?;
        let mut age = Encryption::begin(recipient, file.try_clone()?)?;
        match pack(rest, &mut age.input, paths, &torn) {
            Ok(written) => {
                age.end()?;
                file.sync_all()?;
                return Ok(written);
            }
            // It knows why it does not listen any more.
            Err(Stopped::There(error)) => return Err(age.end().err().unwrap_or(error)),
            // What is in the archive of it cannot be taken back: once more, without it.
            Err(Stopped::Torn(path, error)) => drop(torn.insert(path, error)),
        }
        fs::remove_file(&place)?;
    }
}

fn pack(
    rest: &Rest<'_>,
    to: impl Write,
    paths: &[PathBuf],
    torn: &BTreeMap<PathBuf, io::Error>,
) -> std::result::Result<Written, Stopped> {
    let mut archive = Builder::new(BufWriter::with_capacity(64 << 10, to));
    let mut written = Written::default();
    for path in paths {
        if let Some(error) = torn.get(path) {
            written.miss(path, error);
            continue;
        }
        let described = rest.describe(path).and_then(|described| {
            let Some((entry, source)) = described else { return Ok(None) };
            Ok(Some((entry, source.map(Data::new).transpose()?)))
        });
        let (mut entry, data) = match described {
            Ok(Some(described)) => described,
            Ok(None) => continue,
            Err(error) => {
                written.miss(path, &error);
                continue;
            }
        };
        if let Some(data) = data.as_ref().filter(|data| data.source.is_sparse) {
            entry["data"] = json!(data.segments);
        }
        let text = entry.to_string();
        let name = format!("about/{}", written.entries);
        append(&mut archive, Path::new(&name), text.len() as u64, text.as_bytes()).map_err(Stopped::There)?;
        if let Some(mut data) = data {
            let appended = append(&mut archive, &Path::new("files").join(path), data.length(), &mut data);
            appended.map_err(|error| match data.has_failed {
                true => Stopped::Torn(path.clone(), error),
                false => Stopped::There(error),
            })?;
            written.bytes += data.source.version.size;
        }
        written.entries += 1;
    }
    archive.into_inner().and_then(|mut to| to.flush()).map_err(Stopped::There)?;
    Ok(written)
}

fn append(archive: &mut Builder<impl Write>, name: &Path, size: u64, from: impl Read) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o600);
    header.set_size(size);
    archive.append_data(&mut header, name, from)
}

/// What of a file is no hole: read to its end, or not at all.
struct Data {
    source: Source,
    /// Where, and how long, in bytes.
    segments: Vec<(u64, u64)>,
    /// Of which segment how much has been read.
    at: (usize, u64),
    /// What was read of it in advance.
    first: VecDeque<u8>,
    has_failed: bool,
}

impl Data {
    fn new(source: Source) -> io::Result<Self> {
        let size = source.version.size;
        let segments = if source.is_sparse { segments(source.file(), size)? } else { vec![(0, size)] };
        let mut this = Self { source, segments, at: (0, 0), first: VecDeque::new(), has_failed: false };
        let mut first = vec![0; FIRST];
        let got = this.next(&mut first)?;
        this.first.extend(&first[..got]);
        Ok(this)
    }

    fn length(&self) -> u64 {
        self.segments.iter().map(|(_, length)| length).sum()
    }

    fn next(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(&(begin, length)) = self.segments.get(self.at.0) else { return Ok(0) };
        let most = usize::try_from(length - self.at.1).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.source.file().read_at(&mut buffer[..most], begin + self.at.1)?;
        if got == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at.1 += got as u64;
        if self.at.1 == length {
            self.at = (self.at.0 + 1, 0);
            self.source.verify()?;
        }
        Ok(got)
    }
}

impl Read for Data {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.first.is_empty() {
            return self.first.read(buffer);
        }
        let got = self.next(buffer);
        self.has_failed |= got.is_err();
        got
    }
}

/// Where a file has data.
fn segments(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(begin))?.min(size);
        if end <= begin {
            break;
        }
        all.push((begin, end - begin));
        at = end;
    }
    Ok(all)
}

/// Is given every thing in turn: its number, what it is, and its content if it is a file.
pub(super) type Take<'a> = &'a mut dyn FnMut(usize, &Value, Option<&mut dyn Content>) -> Result<()>;

/// Reads what [`write()`] has written, with the key in the file `identity`; `count` is how many things there are.
///
/// # Errors
/// It cannot be decrypted, or is not whole; what `take` says.
pub(super) fn read(directory: &Path, identity: &Path, count: u64, take: Take<'_>) -> Result<()> {
    let place = directory.join(REST);
    let failed = |error: io::Error| Error::io("Cannot read from the spool", error).on_path(&place);
    let mut age = File::open(&place).and_then(|file| Decryption::begin(identity, file)).map_err(failed)?;
    match unpack(&mut age, take) {
        Ok(found) => {
            age.end().map_err(failed)?;
            if found == count { Ok(()) } else { Err(failed(io::ErrorKind::UnexpectedEof.into())) }
        }
        Err(Unpacked::Unread(error)) => Err(failed(age.end().err().unwrap_or(error))),
        Err(Unpacked::Refused(error)) => Err(error),
    }
}

enum Unpacked {
    Unread(io::Error),
    Refused(Error),
}

fn unpack(from: impl Read, take: Take<'_>) -> std::result::Result<u64, Unpacked> {
    let mut archive = Archive::new(BufReader::with_capacity(64 << 10, from));
    let mut entries = archive.entries().map_err(Unpacked::Unread)?;
    let mut number = 0;
    while let Some(about) = entries.next() {
        let entry = about.and_then(|about| {
            let mut text = Vec::new();
            about.take(ABOUT_MAX).read_to_end(&mut text)?;
            Ok(serde_json::from_slice::<Value>(&text)?)
        });
        let entry = entry.map_err(Unpacked::Unread)?;
        if is_file(&entry) {
            let content = entries.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
            let content = content.and_then(|content| Whole::new(content, &entry));
            let mut content = content.map_err(Unpacked::Unread)?;
            let taken = take(number, &entry, Some(&mut content));
            // What was given was not whole, whatever is said of that.
            taken.map_err(|error| match content.torn {
                Some(torn) => Unpacked::Unread(torn),
                None => Unpacked::Refused(error),
            })?;
        } else {
            take(number, &entry, None).map_err(Unpacked::Refused)?;
        }
        number += 1;
    }
    Ok(number as u64)
}

/// A content of which the holes are not there.
struct Whole<R> {
    from: R,
    size: u64,
    at: u64,
    /// What is left of its data: where, and how long.
    segments: VecDeque<(u64, u64)>,
    has_holes: bool,
    /// Why it could not be read to its end.
    torn: Option<io::Error>,
}

impl<R: Read> Whole<R> {
    fn new(from: R, entry: &Value) -> io::Result<Self> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        let size = Version::from_json(&entry["version"]).ok_or_else(wrong)?.size;
        let has_holes = !entry["data"].is_null();
        let segments: VecDeque<(u64, u64)> = match has_holes {
            true => serde_json::from_value(entry["data"].clone())?,
            false => [(0, size)].into(),
        };
        let mut end = 0;
        for (begin, length) in &segments {
            let next = begin.checked_add(*length).filter(|next| *begin >= end && *next <= size);
            end = next.ok_or_else(wrong)?;
        }
        Ok(Self { from, size, at: 0, segments, has_holes, torn: None })
    }

    /// How far it is to the next data, or to the end.
    fn hole(&self) -> u64 {
        self.segments.front().map_or(self.size, |(begin, _)| *begin) - self.at
    }
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = |length: u64| usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        let hole = most(self.hole());
        if hole > 0 {
            buffer[..hole].fill(0);
            self.at += hole as u64;
            return Ok(hole);
        }
        let Some((begin, length)) = self.segments.front_mut() else { return Ok(0) };
        let most = most(*length);
        let got = match self.from.read(&mut buffer[..most]) {
            Ok(0) if most > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            result => result,
        };
        let got = match got {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                let told = io::Error::new(error.kind(), plain(&error));
                self.torn.get_or_insert(error);
                return Err(told);
            }
            result => result?,
        };
        self.at += got as u64;
        (*begin, *length) = (self.at, *length - got as u64);
        if *length == 0 {
            self.segments.pop_front();
        }
        Ok(got)
    }
}

impl<R: Read> Content for Whole<R> {
    fn size(&self) -> u64 {
        self.size
    }

    fn has_holes(&self) -> bool {
        self.has_holes
    }

    fn skip_hole(&mut self) -> u64 {
        let hole = self.hole();
        self.at += hole;
        hole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// What cannot be read any more, such as a disk that fails.
    struct Failing;

    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(Errno::IO.into())
        }
    }

    /// Why it could not be read.
    fn torn(from: impl Read, take: Take<'_>) -> String {
        match unpack(from, take) {
            Err(Unpacked::Unread(error)) => plain(&error),
            _ => panic!("it was read"),
        }
    }

    /// Who delivered it said that it ended early, instead of the program why.
    #[test]
    fn what_is_torn_is_not_the_destinations_fault() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100_000).unwrap();
        let version = Version::of(&rustix::fs::fstat(&file).unwrap());
        let text = json!({ "version": version.to_json() }).to_string();
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, Path::new("about/0"), text.len() as u64, text.as_bytes()).unwrap();
        append(&mut archive, Path::new("files/x"), 100_000, io::repeat(7).take(100_000)).unwrap();
        let whole = archive.into_inner().unwrap();
        let refused = || Error::new(ErrorKind::Denied, "Cannot deliver");
        let mut take = |_: usize, _: &Value, content: Option<&mut dyn Content>| {
            let read = io::copy(content.unwrap(), &mut io::sink());
            read.map(|_| ()).map_err(|_| refused())
        };
        assert!(matches!(unpack(&whole[..], &mut take), Ok(1)));
        assert_eq!(torn(&whole[..50_000], &mut take), "unexpected end of file");
        let failing = whole[..50_000].chain(Failing);
        assert_eq!(torn(failing, &mut take), "input/output error", "whoever delivers says something else");
        let refuse: Take<'_> = &mut |_, _, _| Err(refused());
        assert!(matches!(unpack(&whole[..50_000], refuse), Err(Unpacked::Refused(_))));
    }
}
