//! One thing is left at the destination, and what somebody else has left there under the same name is kept.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ring::digest::{Context, SHA256};

use super::entry::{Kind, Stamp, Time, escape, hexadecimal};
use super::known::Known;
use super::stores::{Content, Found, InTheWay, Properties, Session, Store};
use super::tree::Source;

/// The most notes that are kept word by word.
const NOTES_MAX: usize = 100;

/// The most bytes that all notes together have: they have to fit into one message, in which some of them take two.
const NOTES_BYTES_MAX: usize = 16 << 10;

/// The longest name that file systems take, in bytes.
const NAME_MAX: usize = 255;

const PART: usize = 256 << 10;

/// What people are to be told, each thing once.
#[derive(Default)]
pub(crate) struct Notes(Mutex<BTreeSet<String>>);

impl Notes {
    pub(crate) fn add(&self, note: String) {
        let note = shorten(note);
        if let Ok(mut notes) = self.0.lock()
            && notes.len() < NOTES_MAX
            && notes.iter().map(String::len).sum::<usize>() + note.len() <= NOTES_BYTES_MAX
        {
            notes.insert(note);
        }
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().map(|notes| notes.iter().cloned().collect()).unwrap_or_default()
    }
}

/// A line that can be read: of a path that goes on and on, its beginning and its end.
pub(crate) fn shorten(line: String) -> String {
    const KEPT: usize = 150;
    let length = line.chars().count();
    if length <= 3 * KEPT {
        return line;
    }
    let begin = line.chars().take(KEPT);
    begin.chain("[...]".chars()).chain(line.chars().skip(length - KEPT)).collect()
}

/// Who delivers, and where to.
pub(crate) struct Delivery<'a> {
    pub(crate) store: &'a dyn Store,
    pub(crate) session: &'a Session,
    pub(crate) notes: &'a Notes,
}

impl Delivery<'_> {
    /// Leaves a file there. `known` is what was left there before.
    ///
    /// # Errors
    /// What the store, or who reads the content, says.
    pub(crate) fn file(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        known: Option<&Known>,
    ) -> io::Result<(Stamp, Option<String>)> {
        let hash = RefCell::new(None);
        let context = (!content.has_holes()).then(|| Context::new(&SHA256));
        let size = content.size();
        let mut reading = Hashing { content, context, hash: &hash };
        // What is of another size need not be read, of which some may have more than anybody would wait for.
        let new = |found: &Found| hash.borrow().clone().filter(|_| found.stamp.size == size);
        let mut delivered = Delivered { delivery: self, path, known, new: &new };
        let stamp = self.store.put(path, &mut reading, properties, &mut delivered)?;
        Ok((stamp, hash.into_inner()))
    }

    /// Leaves a symbolic link there.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        known: Option<&Known>,
    ) -> io::Result<Stamp> {
        let new = |_: &Found| Some(hash_of_link(target));
        let mut delivered = Delivered { delivery: self, path, known, new: &new };
        self.store.link(path, target, properties, &mut delivered)
    }

    /// Leaves a directory there.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn directory(
        &self,
        path: &Path,
        properties: &Properties,
        known: Option<&Known>,
    ) -> io::Result<Stamp> {
        let mut delivered = Delivered { delivery: self, path, known, new: &|_| None };
        self.store.make_directory(path, properties, &mut delivered)
    }

    /// Removes what was left there, if it still is that.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn remove(&self, path: &Path, known: &Known) -> io::Result<()> {
        let Some(found) = self.store.find(path)? else { return Ok(()) };
        if found.kind == Kind::Directory {
            return match self.store.remove(path, Kind::Directory) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    self.notes
                        .add(format!("{} is not empty at the destination: it stays there", escape(path)));
                    Ok(())
                }
                result => result,
            };
        }
        if self.is_ours(&found, path, Some(known))? {
            return self.store.remove(path, found.kind);
        }
        self.notes.add(format!("{} has been changed at the destination: it stays there", escape(path)));
        Ok(())
    }

    /// Whether what was found is what this session has left there or found when it began.
    fn is_ours(&self, found: &Found, at: &Path, known: Option<&Known>) -> io::Result<bool> {
        if found.session.as_ref().is_some_and(|session| session.id == self.session.id) {
            return Ok(true);
        }
        let Some(known) = known else { return Ok(false) };
        let Some(there) = &known.there else { return Ok(false) };
        // A time in whole seconds is not known better, and two versions may have the same one.
        let is_exact = found.stamp.modified.nanoseconds != 0 || found.stamp.tag.is_some();
        if *there == found.stamp && (is_exact || known.hash.is_none()) {
            return Ok(true);
        }
        // Some file systems forget times, or round them later than they say.
        Ok(known.hash.is_some() && there.size == found.stamp.size && self.hash(found, at)? == known.hash)
    }

    fn hash(&self, found: &Found, at: &Path) -> io::Result<Option<String>> {
        match found.kind {
            Kind::File => hash_of(&mut *self.store.get(at)?).map(Some),
            Kind::Link => Ok(Some(hash_of_link(&self.store.target(at)?))),
            _ => Ok(None),
        }
    }
}

/// What is on its way to a name that something else may have.
struct Delivered<'a> {
    delivery: &'a Delivery<'a>,
    path: &'a Path,
    /// What was left there before.
    known: Option<&'a Known>,
    /// The hash of what is on its way, if what was found might be the same.
    new: &'a dyn Fn(&Found) -> Option<String>,
}

impl InTheWay for Delivered<'_> {
    fn expects(&self) -> bool {
        self.known.is_some_and(Known::is_there)
    }

    fn aside(&mut self, found: &Found, at: &Path) -> io::Result<Option<PathBuf>> {
        let replaceable = match found.kind {
            Kind::Directory => self.delivery.store.list(at)?.is_empty(),
            Kind::Other => false,
            Kind::File | Kind::Link if self.delivery.is_ours(found, at, self.known)? => true,
            Kind::File | Kind::Link => {
                let new = (self.new)(found);
                new.is_some() && self.delivery.hash(found, at)? == new
            }
        };
        let whose = found.session.as_ref().map_or("other", |session| &session.name);
        Ok((!replaceable).then(|| conflict_name(self.path, whose, &timestamp())))
    }

    fn kept(&mut self, target: &Path) {
        self.delivery.notes.add(format!(
            "{} was changed by another session as well: its version is kept as {}",
            escape(self.path),
            escape(target)
        ));
    }
}

/// SHA-256 of everything that is read.
pub(crate) fn hash_of(from: &mut dyn Read) -> io::Result<String> {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; PART];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(hexadecimal(context.finish().as_ref())),
            got => context.update(&buffer[..got]),
        }
    }
}

/// By what a symbolic link is known.
pub(crate) fn hash_of_link(target: &OsStr) -> String {
    let mut context = Context::new(&SHA256);
    context.update(b"link ");
    context.update(target.as_bytes());
    hexadecimal(context.finish().as_ref())
}

/// What there is in the name of every version that was in the way of a later one, and in every note of one.
pub(crate) const CONFLICT: &str = ".conflict-";

/// `NAME.conflict-SESSION-TIME`, beside `path`; a long name is cut.
pub(crate) fn conflict_name(path: &Path, session: &str, time: &str) -> PathBuf {
    let mut end = format!("{CONFLICT}{session}-{time}");
    end.retain(|c| c != '/');
    let name = path.file_name().unwrap_or_default().as_bytes();
    let mut name = name[..name.len().min(NAME_MAX.saturating_sub(end.len()))].to_vec();
    name.extend_from_slice(end.as_bytes());
    path.with_file_name(OsString::from_vec(name))
}

/// This moment as `20260131T235959.123456Z`.
pub(crate) fn timestamp() -> String {
    let now = Time::now();
    format!("{}.{:06}Z", now.date(), now.nanoseconds / 1000)
}

/// Tells the hash of what was read so far. What has holes is not read whole, and has none.
struct Hashing<'a> {
    content: &'a mut dyn Content,
    context: Option<Context>,
    hash: &'a RefCell<Option<String>>,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.content.read(buffer)?;
        if let Some(context) = &mut self.context {
            context.update(&buffer[..got]);
            *self.hash.borrow_mut() = Some(hexadecimal(context.clone().finish().as_ref()));
        }
        Ok(got)
    }
}

impl Content for Hashing<'_> {
    fn size(&self) -> u64 {
        self.content.size()
    }

    fn sparse(&self) -> Option<&File> {
        self.content.sparse()
    }

    fn has_holes(&self) -> bool {
        self.content.has_holes()
    }

    fn skip_hole(&mut self) -> u64 {
        self.content.skip_hole()
    }

    fn verify(&self) -> io::Result<()> {
        self.content.verify()
    }
}

impl Content for Source {
    fn size(&self) -> u64 {
        self.version.size
    }

    fn sparse(&self) -> Option<&File> {
        self.is_sparse.then(|| self.file())
    }

    fn verify(&self) -> io::Result<()> {
        Self::verify(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_of_one_length() {
        assert_eq!(timestamp().len(), "20260131T235959.123456Z".len());
    }

    #[test]
    fn lines_can_be_read() {
        assert_eq!(shorten("x".repeat(450)).len(), 450);
        let line = shorten(format!("a{}z", "ä".repeat(9000)));
        assert!(line.starts_with("aää") && line.contains("ä[...]ä") && line.ends_with("äz"), "{line}");
        assert_eq!(line.chars().count(), 305);
    }

    /// With longer ones nobody heard the report, and everything was taken for lost.
    #[test]
    fn all_notes_fit_into_a_message() {
        use crate::attach::control;
        use std::os::fd::AsFd;
        let notes = Notes::default();
        for n in 0..NOTES_MAX {
            notes.add(format!("{n}{}", "\u{1f980}".repeat(9000)));
            notes.add(format!("{n}{}", "\\".repeat(9000)));
        }
        assert!(!notes.all().is_empty());
        let (one, other) = control::pair().unwrap();
        let why = Some(shorten("\u{1f980}".repeat(9000)));
        let report = super::super::Report { notes: notes.all(), why, ..Default::default() };
        control::send(one.as_fd(), &report.to_json(), &[]).unwrap();
        let (heard, _) = control::receive(other.as_fd()).unwrap().unwrap();
        assert_eq!(super::super::Report::from_json(&heard), Some(report));
    }

    #[test]
    fn names_of_conflicts_fit() {
        let name = conflict_name(Path::new("a/notes.txt"), "kiosk-1", "T");
        assert_eq!(name, Path::new("a/notes.txt.conflict-kiosk-1-T"));
        let long = conflict_name(Path::new(&"x".repeat(255)), "s", "T");
        assert_eq!(long.file_name().unwrap().len(), 255);
        assert!(long.to_str().unwrap().ends_with(".conflict-s-T"));
        assert_eq!(conflict_name(Path::new("x"), "../../evil", "T"), Path::new("x.conflict-....evil-T"));
    }
}
