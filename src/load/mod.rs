//! A session that begins as a saved image: what is in the file, and how it gets into the session.
//!
//! ```text
//!   file ── Content: Raw, Qcow2 ── extents, bytes ──> load ──> several connections to one session that nobody uses yet
//! ```
//!
//! A file over a base (qcow2 with a backing file) has what was written, and all of that is written again. A file without
//! one has everything: only what differs from what the session has, which is its base, is written, so that a session takes
//! no memory for what it has in common with its base.
//!
//! The file is not trusted. Nothing that is said in it makes anything else be opened: who its base is, is only told.

mod qcow2;
mod raw;
#[cfg(test)]
mod tests;
mod writers;

pub use qcow2::{Qcow2, ReadAt};

use crate::client::{Client, Haggling};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::overlay::is_zero;
use crate::proto::{CommandFlags, META_NAME_BASE_ALLOCATION, STATE_ZERO};
use crate::save::{Extent, Kind, Source};
use raw::Raw;
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use writers::{Job, Writers};

/// Bytes that are read and compared at a time.
const AT_ONCE: u64 = 1 << 20;
/// The unit in which a file is compared with a base: the smallest block that a session can have.
const BLOCK: usize = 4096;
/// The longest range that is asked about, or zeroed, at once.
const MOST: u32 = 1 << 30;

/// What kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A disk, byte by byte.
    Raw,
    /// QEMU's.
    Qcow2,
}

/// The base that a file says it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its path, as a rule: relative ones begin where the file lies.
    pub name: OsString,
    /// What kind of file it is to be, if that is said.
    pub format: Option<String>,
}

/// What is in a file.
trait Content {
    fn size(&self) -> u64;

    /// What begins at `offset`, which is within it. It may go on in the next extent.
    fn extent(&mut self, offset: u64) -> Result<Extent>;

    /// Fills `buffer` with what is there from `offset` on, all of which is data.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// A saved image, open.
pub struct Saved {
    content: Box<dyn Content>,
    backing: Option<Backing>,
    /// For errors.
    file: String,
}

impl Saved {
    /// Opens the file at `path`. Without a `format` it is qcow2 if it begins like one, and raw otherwise.
    ///
    /// # Errors
    /// It cannot be read, is no file, or is a kind of qcow2 that is not read here.
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self> {
        const HOW: &str = "give the path of a saved image, qcow2 or raw";
        let failed = |error| Error::io("Cannot read", error).on_path(path).advise(HOW);
        // Looked at before it is opened: opening a FIFO would wait for a writer.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() {
            return Err(Error::new(ErrorKind::Invalid, "Not a file:").on_path(path).advise(HOW));
        }
        let file = File::open(path).map_err(failed)?;
        let mut magic = [0; 4];
        let is_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == qcow2::MAGIC;
        let format = format.unwrap_or(if is_qcow2 { Format::Qcow2 } else { Format::Raw });
        let shown = format!("({})", path.display());
        match format {
            Format::Raw => {
                let content = Raw::of(file).map_err(failed)?;
                Ok(Self { content: Box::new(content), backing: None, file: shown })
            }
            Format::Qcow2 => {
                let qcow2 = Qcow2::of(file).map_err(|error| error.on(&shown))?;
                Ok(Self { backing: qcow2.backing().cloned(), content: Box::new(qcow2), file: shown })
            }
        }
    }

    /// What begins at `offset`, without what is behind the end of a device of `size` bytes, within its last sector.
    fn extent(&mut self, offset: u64, size: u64) -> Result<Extent> {
        let Extent { range, kind } = self.content.extent(offset).map_err(|error| error.on(&self.file))?;
        Ok(Extent { range: range.start..range.end.min(size), kind })
    }

    fn read(&mut self, range: &Range<u64>) -> Result<Vec<u8>> {
        let mut data = vec![0; in_memory(range.end - range.start)];
        self.content.read(range.start, &mut data).map_err(|error| error.on(&self.file))?;
        Ok(data)
    }

    /// Bytes of data, up to the end of a device of `size` bytes.
    fn data_bytes(&mut self, size: u64) -> Result<u64> {
        let (mut bytes, mut at) = (0, 0);
        while at < size {
            let extent = self.extent(at, size)?;
            if extent.kind == Kind::Data {
                bytes += extent.range.end - at;
            }
            at = extent.range.end;
        }
        Ok(bytes)
    }

    /// Bytes of the device.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.content.size()
    }

    /// Which base it is over; without one it is whole.
    #[must_use]
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Whether a device of `bytes` can begin as this: QEMU knows whole sectors only.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        self.size() == bytes || self.backing.is_some() && self.size() == bytes.next_multiple_of(512)
    }
}

impl Source for Saved {
    fn size(&self) -> u64 {
        self.content.size()
    }

    /// Of a whole file everything was written.
    fn extents(&mut self, written: bool) -> Result<Vec<Extent>> {
        let (size, mut extents, mut at) = (self.content.size(), Vec::new(), 0);
        while at < size {
            let mut extent = self.extent(at, size)?;
            extent.range.start = at;
            at = extent.range.end;
            if extent.kind == Kind::Nothing && (self.backing.is_none() || !written) {
                extent.kind = Kind::Zero;
            }
            extents.push(extent);
        }
        Ok(extents)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.content.read(offset, buffer).map_err(|error| error.on(&self.file))
    }
}

/// Is told how many bytes of data are done, and how many there are. What it fails with ends the loading.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Makes the session at `uri`, which is its base still, what `saved` is. Nobody else may use it meanwhile.
///
/// # Errors
/// `progress` says so, the file cannot be read or is none, or the server refuses. The session is of no use then.
pub fn load(saved: &mut Saved, uri: &Uri, progress: Progress<'_>) -> Result<()> {
    let mut session = Session::open(uri)?;
    let size = session.client.size();
    let total = saved.data_bytes(size)?;
    let is_whole = saved.backing.is_none();
    let mut done = 0;
    progress(done, total)?;
    let writers = Writers::start(uri)?;
    let mut feed = || -> Result<()> {
        let mut at = 0;
        while at < size {
            let Extent { range, kind } = saved.extent(at, size)?;
            match (kind, is_whole) {
                (Kind::Nothing, false) => {}
                (Kind::Zero, false) => writers.give(Job::Zero(range.clone()))?,
                // Without a base what is not there is zero.
                (Kind::Nothing | Kind::Zero, true) => {
                    for range in session.data_within(range.clone())? {
                        writers.give(Job::Zero(range))?;
                    }
                }
                (Kind::Data, _) => {
                    let mut from = range.start;
                    while from < range.end {
                        let part = from..range.end.min((from / AT_ONCE + 1) * AT_ONCE);
                        let data = saved.read(&part)?;
                        if is_whole {
                            session.give_what_differs(part.start, &data, &writers)?;
                        } else {
                            writers.give(Job::Write(part.start, data))?;
                        }
                        done += part.end - part.start;
                        progress(done, total)?;
                        from = part.end;
                    }
                }
            }
            at = range.end;
        }
        Ok(())
    };
    let fed = feed();
    // What a writer has to say is the reason why nothing more could be given to it.
    writers.finish().and(fed)
}

fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The session as it is at first: its base.
struct Session {
    client: Client,
    allocation: Option<u32>,
}

impl Session {
    fn open(uri: &Uri) -> Result<Self> {
        let mut server = Haggling::connect(uri)?;
        let contexts = if server.structured_replies() {
            server.set_meta_contexts(&uri.export, &[META_NAME_BASE_ALLOCATION])?
        } else {
            Vec::new()
        };
        let allocation = contexts.first().map(|context| context.id);
        Ok(Self { client: server.go(&uri.export)?, allocation })
    }

    /// The parts of `range` that the server does not know to be zero.
    fn data_within(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let Some(context) = self.allocation else { return Ok(vec![range]) };
        let mut data: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let length = u32::try_from(range.end - at).unwrap_or(MOST).min(MOST);
            let before = at;
            for told in self.client.block_status(at, length, CommandFlags::NONE)? {
                if told.context != context {
                    continue;
                }
                let end = (told.offset + told.length).min(range.end);
                if told.flags & STATE_ZERO == 0 {
                    match data.last_mut() {
                        Some(last) if last.end == at => last.end = end,
                        _ => data.push(at..end),
                    }
                }
                at = end;
            }
            if at == before {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "The server told of nothing when asked what is where",
                ));
            }
        }
        Ok(data)
    }

    /// Compares `data` with what is there from `offset` on.
    fn give_what_differs(&mut self, offset: u64, data: &[u8], writers: &Writers) -> Result<()> {
        let mut there = vec![0; data.len()];
        self.client.read(offset, &mut there)?;
        for (range, zero) in differences(data, &there) {
            let at = offset + range.start as u64;
            writers.give(if zero {
                Job::Zero(at..at + range.len() as u64)
            } else {
                Job::Write(at, data[range].to_vec())
            })?;
        }
        Ok(())
    }
}

/// The runs of blocks in which `wanted` is not what is `there`, and whether each is zero.
fn differences(wanted: &[u8], there: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for (index, (wanted, there)) in wanted.chunks(BLOCK).zip(there.chunks(BLOCK)).enumerate() {
        if wanted == there {
            continue;
        }
        let (at, zero) = (index * BLOCK, is_zero(wanted));
        match runs.last_mut() {
            Some((last, of)) if last.end == at && *of == zero => last.end = at + wanted.len(),
            _ => runs.push((at..at + wanted.len(), zero)),
        }
    }
    runs
}
