//! What servers keep beside a file as text, since they have no room for it: kinds, and attributes.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::http::encode;
use super::{Attribute, Attributes};
use crate::carry::entry::unescape;

/// The longest target of a symbolic link, in bytes.
const TARGET_MAX: u64 = 4096;

/// The kinds of files as modes have them.
pub(super) const FILE: u32 = 0o100_000;
pub(super) const DIRECTORY: u32 = 0o040_000;
pub(super) const LINK: u32 = 0o120_000;

/// Any bytes as a word of plain letters.
pub(super) fn word(bytes: &[u8]) -> String {
    encode(bytes)
}

/// The bytes that [`word`] made the word of.
pub(super) fn unword(word: &str) -> Option<Vec<u8>> {
    unescape(word).map(|path| path.into_os_string().into_vec())
}

/// Instead of attributes that are too many to be kept: no list has this.
pub(super) const NOT_KEPT: &str = "!";

/// Attributes as text: `NAME=VALUE`, both words, with spaces between.
pub(super) fn write_attributes(attributes: &[Attribute]) -> String {
    let one = |(name, value): &Attribute| format!("{}={}", word(name.as_bytes()), word(value));
    attributes.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// The attributes that the text has; what is none for everybody's use is left out. `None` if they are not kept.
pub(super) fn read_attributes(text: &str) -> Option<Attributes> {
    let one = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let name = unword(name).filter(|name| name.starts_with(b"user.") && !name.contains(&0))?;
        Some((OsString::from_vec(name), unword(value)?))
    };
    (text != NOT_KEPT).then(|| text.split(' ').filter_map(one).collect())
}

/// The attributes of what a listing has told of, until they are asked for: to fill asks for those of each file.
#[derive(Default)]
pub(super) struct Listed(Mutex<HashMap<PathBuf, Option<Attributes>>>);

impl Listed {
    pub(super) fn note(&self, path: PathBuf, attributes: Option<Attributes>) {
        self.lock().insert(path, attributes);
    }

    /// Those of `path`, if it was listed since they were last asked for.
    pub(super) fn take(&self, path: &Path) -> Option<Option<Attributes>> {
        self.lock().remove(path)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Option<Attributes>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a symbolic link points to that is kept as the content of a file.
///
/// # Errors
/// `InvalidData` if it is no target; what reading says.
pub(super) fn read_target(content: &mut dyn Read) -> io::Result<OsString> {
    let mut target = Vec::new();
    content.take(TARGET_MAX + 1).read_to_end(&mut target)?;
    if target.is_empty() || target.len() as u64 > TARGET_MAX || target.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is a symbolic link to nowhere"));
    }
    Ok(OsString::from_vec(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let attributes =
            vec![("user.a b=".into(), b"1 = \0\xff%\xc3\xa4".to_vec()), ("user.none".into(), Vec::new())];
        let text = write_attributes(&attributes);
        assert!(text.is_ascii(), "{text}");
        assert_eq!(read_attributes(&text), Some(attributes));
        assert_eq!(
            read_attributes("security.evil=1 user.x=%zz nothing user.y=1"),
            Some(vec![("user.y".into(), b"1".to_vec())])
        );
        assert_eq!(read_attributes(&write_attributes(&[])), Some(Vec::new()));
        assert_eq!(read_attributes(NOT_KEPT), None);
    }
}
