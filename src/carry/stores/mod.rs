//! Where files are carried to: one trait, one file for each kind.
//!
//! A store shows a file under its name whole or not at all, whatever happens meanwhile to whoever writes it. What cannot be
//! kept there is left out, and said once ([`Store::lacks`]).

mod address;
mod beside;
mod directory;
mod http;
mod names;
mod netrc;
mod s3;
mod secret;
mod sftp;
mod webdav;

pub(crate) use directory::copy;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::entry::{Kind, Meta, Stamp, Time};
use crate::error::{Error, ErrorKind, Result};

/// How the names begin that files have until they are whole.
const TEMPORARY: &str = ".memdev-carry-";

/// Whether this is the name of a file that is not whole yet.
pub(crate) fn is_temporary(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())
}

/// Whether a server may mean a file in a directory by this name.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|c| matches!(c, b'/' | 0))
}

/// How old a temporary file of somebody else must be to be taken for abandoned, in seconds.
const ABANDONED: i64 = 24 * 3600;

/// A name on a server for what is not whole yet. When that began is in it: servers tell no time that is not set.
fn temporary(tag: &str, n: u64) -> OsString {
    format!("{TEMPORARY}{tag}-{}-{n}-{}", std::process::id(), Time::now().seconds).into()
}

/// Whether nobody is going to finish what has this name on a server: it is of a carrier of this session before this one, or old.
fn is_abandoned(name: &OsStr, tag: &str) -> bool {
    let Some(name) = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY)) else { return false };
    let [begun, _, process, whose] = name.rsplitn(4, '-').collect::<Vec<_>>()[..] else { return false };
    let is_old = str::parse(begun).is_ok_and(|begun: i64| Time::now().seconds - begun > ABANDONED);
    is_old || (whose == tag && process != std::process::id().to_string())
}

/// How often a file is tried to get its name while others change what has it.
const ATTEMPTS: u32 = 5;

/// What is said after so many.
fn contended() -> io::Error {
    io::Error::other("others keep changing what has the name")
}

/// Nothing, if there is none.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// An extended attribute: its name and its value.
pub(crate) type Attribute = (OsString, Vec<u8>);

/// Extended attributes.
pub(crate) type Attributes = Vec<Attribute>;

/// What is to be left at the destination beside content.
#[derive(Clone, Debug, Default)]
pub(crate) struct Properties {
    /// Mode and owner.
    pub(crate) meta: Meta,
    /// When the content was changed.
    pub(crate) modified: Time,
    /// Attributes for everybody's use.
    pub(crate) attributes: Attributes,
    /// Whose version it is.
    pub(crate) session: Session,
}

/// A session, as it is known at a destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Session {
    /// What nobody else has.
    pub(crate) id: String,
    /// What people call it: no spaces.
    pub(crate) name: String,
}

/// What is there.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) kind: Kind,
    pub(crate) stamp: Stamp,
    /// As it was carried, where the store can tell.
    pub(crate) meta: Option<Meta>,
    /// Its mode, where that is all of it that the store can tell.
    pub(crate) mode: Option<u32>,
    /// The session that left it there, where the store can tell.
    pub(crate) session: Option<Session>,
}

/// A file's content. It is read to its end, or else was not what it said: its last bytes come only if it is whole.
pub(crate) trait Content: Read {
    /// Bytes.
    fn size(&self) -> u64;

    /// The file, if it has holes that need not be read. Whoever takes it instead of reading calls [`Self::verify`] then.
    fn sparse(&self) -> Option<&File> {
        None
    }

    /// Whether it is to have holes where it is left, and they need not be read.
    fn has_holes(&self) -> bool {
        self.sparse().is_some()
    }

    /// Of one that has holes and no file: skips the hole that is next, and tells how long it was. Whoever does not ask reads zeros.
    fn skip_hole(&mut self) -> u64 {
        0
    }

    /// Whether it still is what it was.
    ///
    /// # Errors
    /// `ResourceBusy` if it is not.
    fn verify(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A content that is a file on this machine, where nobody is expected to change it.
pub(crate) struct Stored {
    file: File,
    size: u64,
    is_sparse: bool,
}

impl Stored {
    /// # Errors
    /// What the system says.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_sparse = metadata.blocks().saturating_mul(512) < metadata.len() && metadata.len() > 1 << 20;
        Ok(Self { size: metadata.len(), file, is_sparse })
    }
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Content for Stored {
    fn size(&self) -> u64 {
        self.size
    }

    fn sparse(&self) -> Option<&File> {
        self.is_sparse.then_some(&self.file)
    }
}

/// A content that is in memory.
struct Text<'a>(&'a [u8]);

impl Read for Text<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Content for Text<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

/// How long a buffer is to be for a content of this size: it need not be `most` bytes for a short one, which may be longer than it says.
pub(crate) fn room(size: u64, most: usize) -> usize {
    const LEAST: usize = 16 << 10;
    usize::try_from(size.saturating_add(1)).map_or(most, |size| size.clamp(LEAST, most))
}

/// Hands over a content in parts, and where in the file each belongs: all of it, or of a file with holes what is no hole.
fn parts(content: &mut dyn Content, take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    const PART: usize = 256 << 10;
    let mut at = 0;
    let size = content.size();
    let mut buffer = vec![0; room(size, PART)];
    let Some(mut from) = content.sparse() else {
        loop {
            at += content.skip_hole();
            let got = content.read(&mut buffer)?;
            if got == 0 {
                return Ok(());
            }
            take(at, &buffer[..got])?;
            at += got as u64;
        }
    };
    while at < size {
        let data = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole until the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(data))?.min(size);
        from.seek(SeekFrom::Start(data))?;
        at = data;
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(PART).min(PART);
            let got = from.read_at(&mut buffer[..most], at)?;
            if got == 0 {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            take(at, &buffer[..got])?;
            at += got as u64;
        }
    }
    content.verify()
}

/// Who knows what is to become of what is under the name that something is to get.
pub(crate) trait InTheWay {
    /// Whether something is likely to be there.
    fn expects(&self) -> bool {
        true
    }

    /// Where to what was found is to be moved, `None` if it may be replaced. The path is where it can be read at this moment.
    ///
    /// # Errors
    /// It cannot be found out.
    fn aside(&mut self, found: &Found, at: &Path) -> io::Result<Option<PathBuf>>;

    /// Is told when what was found is there, whatever becomes of the rest; maybe once more at the next attempt.
    fn kept(&mut self, target: &Path);
}

/// See [`InTheWay`].
pub(crate) type Aside<'a> = &'a mut dyn InTheWay;

/// One destination. Paths are relative, and plain.
pub(crate) trait Store: Send + Sync {
    /// What it cannot keep: for people.
    fn lacks(&self) -> Vec<&'static str>;

    /// How many may do something here at the same time, to the good of all.
    fn at_once(&self) -> usize;

    /// What is at `path`; nothing if there is nothing.
    fn find(&self, path: &Path) -> io::Result<Option<Found>>;

    /// Whether to list a directory is about as much to ask for as to find one file.
    fn lists_at_once(&self) -> bool {
        true
    }

    /// What is in a directory, temporary files left out.
    fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>>;

    /// The content of a file.
    fn get(&self, path: &Path) -> io::Result<Box<dyn Content + '_>>;

    /// The attributes for everybody's use that it has; `None` where none are kept, so that nothing can be told of them.
    fn attributes(&self, _path: &Path) -> io::Result<Option<Attributes>> {
        Ok(None)
    }

    /// Where a symbolic link points to.
    fn target(&self, path: &Path) -> io::Result<OsString>;

    /// Puts a whole file there, durably.
    fn put(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp>;

    /// Makes a symbolic link.
    fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp>;

    /// Makes a directory, or gives the one that is there these properties.
    fn make_directory(&self, path: &Path, properties: &Properties, aside: Aside<'_>) -> io::Result<Stamp>;

    /// Removes a file, a link or an empty directory.
    fn remove(&self, path: &Path, kind: Kind) -> io::Result<()>;

    /// Removes what a carrier of this session that was killed has left unfinished in a directory.
    fn sweep(&self, _directory: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Opens a destination; `tag` is in the names of this session's temporary files. A server is asked at once whether it can be
/// used, or else when it is needed: whoever takes over for a carrier that was killed waits for one that is away. Everything in a
/// directory is `person`'s, if there is one: see [`Options::of_user`](crate::carry::Options::of_user); these are its user and
/// group inside.
///
/// # Errors
/// It is not there, or of a kind that is not known.
pub(crate) fn open(
    destination: &str,
    tag: &str,
    at_once: bool,
    person: Option<(u32, u32)>,
) -> Result<Box<dyn Store>> {
    match destination.split_once("://") {
        None => Ok(Box::new(directory::Directory::open(Path::new(destination), tag, person)?)),
        Some(("sftp", rest)) => Ok(Box::new(sftp::Sftp::open(destination, rest, tag, at_once)?)),
        Some((scheme @ ("webdav" | "webdavs"), rest)) => {
            let is_secret = scheme == "webdavs";
            Ok(Box::new(webdav::WebDav::open(destination, is_secret, rest, tag, at_once)?))
        }
        Some(("s3", rest)) => Ok(Box::new(s3::S3::open(destination, rest, tag, at_once)?)),
        Some((scheme, _)) => {
            let why = format!("Cannot carry to {scheme}://");
            Err(Error::new(ErrorKind::Unsupported, why)
                .advise("give sftp://[USER@]HOST/PATH, webdavs://[USER@]HOST/PATH, s3://BUCKET/PREFIX, or a directory, if need be one that is mounted"))
        }
    }
}

/// See [`crate::carry::try_answer`].
pub(crate) fn try_answer(answer: &[u8]) {
    sftp::try_answer(answer);
    if let Ok(text) = str::from_utf8(answer) {
        webdav::try_answer(text);
        s3::try_answer(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks this, and does not care what is kept.
    pub(super) struct Asking<F: FnMut(&Found, &Path) -> io::Result<Option<PathBuf>>>(pub(super) F);

    impl<F: FnMut(&Found, &Path) -> io::Result<Option<PathBuf>>> InTheWay for Asking<F> {
        fn aside(&mut self, found: &Found, at: &Path) -> io::Result<Option<PathBuf>> {
            (self.0)(found, at)
        }

        fn kept(&mut self, _target: &Path) {}
    }

    #[test]
    fn only_what_nobody_finishes_is_abandoned() {
        assert!(is_temporary(&temporary("tag", 7)));
        assert!(!is_abandoned(&temporary("tag", 7), "tag"), "it is being written");
        assert!(!is_abandoned(&temporary("other", 7), "tag"), "somebody else writes it");
        let now = Time::now().seconds;
        assert!(is_abandoned(format!("{TEMPORARY}tag-0-7-{now}").as_ref(), "tag"), "who wrote it is no more");
        assert!(is_abandoned(format!("{TEMPORARY}other-0-7-{}", now - 90_000).as_ref(), "tag"));
        for name in ["x", "tag-0-7-1", ".memdev-carry-x", ".memdev-carry-tag-0-7", ".memdev-carry-o-0-7-x"] {
            assert!(!is_abandoned(name.as_ref(), "tag"), "{name}");
        }
    }
}
