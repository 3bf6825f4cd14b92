//! A session as a file: what it held at one moment, without its server's help but for its answers.
//!
//! ```text
//!   Source (one moment)  ── extents, bytes ──>  raw     sparse
//!     Remote: an export that nobody writes to   qcow2   all of it, or what was written, with the base as backing file
//! ```
//!
//! The file appears under its name when it is complete and on the disk, in place of what had the name before. What is
//! interrupted leaves nothing: until then the file has no name at all, where the file system can do that.

mod clusters;
mod qcow2;
mod remote;
mod target;
#[cfg(test)]
mod tests;

pub use remote::Remote;

use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};
pub use target::Target;

/// Bytes that are read and written at a time.
const AT_ONCE: u64 = 1 << 20;

/// What is saved. It must not change meanwhile.
pub trait Source {
    /// Bytes.
    fn size(&self) -> u64;

    /// What it is made of, in order, without gaps; `written`: what of it was written, else all of it.
    ///
    /// # Errors
    /// It cannot be told.
    fn extents(&mut self, written: bool) -> Result<Vec<Extent>>;

    /// Fills `buffer` with what is there from `offset` on.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// A part of a [`Source`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its bytes.
    pub range: Range<u64>,
    /// What it is.
    pub kind: Kind,
}

/// What a part of a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing that is to be saved: it is the base's, or zero in a file where that is the same.
    Nothing,
    /// Zeroes.
    Zero,
    /// Data.
    Data,
}

/// What kind of file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// All of it, byte by byte; what is zero is a hole.
    Raw,
    /// All of it.
    Qcow2,
    /// What was written, over this raw image as backing file.
    Qcow2Over(PathBuf),
}

/// Is told how many bytes of data are done, and how many there are. What it fails with ends the saving.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Saves `source` as `path`.
///
/// # Errors
/// `progress` says so, the source cannot be read, the file cannot be written, or `path` is the base itself.
pub fn save(source: &mut impl Source, path: &Path, format: &Format, progress: Progress<'_>) -> Result<()> {
    if let Format::Qcow2Over(base) = format
        && same_file(base, path)
    {
        let error = Error::new(ErrorKind::Invalid, "This would replace the base:").on_path(path);
        return Err(error.advise("save to another file; no base is ever written"));
    }
    let mut target = Target::create(path)?;
    match format {
        Format::Raw => raw(source, &mut target, progress)?,
        Format::Qcow2 => qcow2::write(source, &mut target, None, progress)?,
        Format::Qcow2Over(base) => {
            let base = std::path::absolute(base)
                .map_err(|error| Error::io("Cannot tell where the base is", error).on_path(base))?;
            qcow2::write(source, &mut target, Some(&base), progress)?;
        }
    }
    target.finish()
}

fn same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    id(one).is_some_and(|one| Some(one) == id(other))
}

fn raw(source: &mut impl Source, target: &mut Target, progress: Progress<'_>) -> Result<()> {
    let extents = source.extents(false)?;
    let data = extents.into_iter().filter(|extent| extent.kind == Kind::Data).map(|extent| extent.range);
    target.set_len(source.size())?;
    copy(source, target, data.map(|range| (range.start, range)).collect(), progress)
}

/// Copies ranges of the source to these places in the file. What is behind the source's end is left as it is.
fn copy(
    source: &mut impl Source,
    target: &mut Target,
    ranges: Vec<(u64, Range<u64>)>,
    progress: Progress<'_>,
) -> Result<()> {
    let total = ranges.iter().map(|(_, range)| range.end - range.start).sum();
    let (mut done, mut buffer) = (0, Vec::new());
    progress(done, total)?;
    for (mut to, range) in ranges {
        let mut at = range.start;
        while at < range.end {
            let length = AT_ONCE.min(range.end - at);
            let here = length.min(source.size().saturating_sub(at));
            buffer.resize(usize::try_from(here).unwrap_or(usize::MAX), 0);
            source.read(at, &mut buffer)?;
            target.write(to, &buffer)?;
            (at, to, done) = (at + length, to + length, done + length);
            progress(done, total)?;
        }
    }
    Ok(())
}
