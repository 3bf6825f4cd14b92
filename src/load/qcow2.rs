//! Reading qcow2, versions 2 and 3, as QEMU's `docs/interop/qcow2.txt` has it: the image's active state, not its internal
//! snapshots.
//!
//! ```text
//!   offset in the disk ── L1 table (in memory) ── L2 table (one in memory) ── cluster: nothing, zero, data, deflated
//! ```
//!
//! Whatever is in the file, nothing but the file is read, no more than a table and a cluster of it is in memory beside the
//! first table (32 MiB at most), and looking at every cluster once takes no longer than the disk's size allows.

use super::{Backing, Content};
use crate::error::{Error, ErrorKind, Result};
use crate::save::{Extent, Kind};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of the header of version 2, and of the part of version 3's that has to be there.
const HEADER_2: usize = 72;
const HEADER_3: usize = 104;
/// The longest L1 table that QEMU reads, in bytes.
const MOST_L1: u64 = 32 << 20;
/// The longest name of a backing file.
const MOST_NAME: u32 = 1023;

/// Incompatible features: one that does not matter to who only reads,
const DIRTY: u64 = 1;
/// and those that are not read here.
const FEATURES: &[(u64, &str, &str)] = &[
    (2, "is marked as corrupt", "try qemu-img check -r all"),
    (4, "keeps its data in another file", CONVERT),
    (8, "is not compressed by deflate", CONVERT),
    (16, "has subclusters", "convert it: qemu-img convert -O qcow2 -o extended_l2=off"),
];
const CONVERT: &str = "convert it: qemu-img convert -O qcow2";

/// Header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// In an entry of either table: where something lies.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const DEFLATED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// What the header says that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1_offset: u64,
    /// As many as the size takes; there may be more in the file.
    l1_entries: usize,
    backing: Option<Backing>,
}

/// What a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    Nothing,
    Zero,
    Data { at: u64 },
    Deflated { at: u64, length: u64 },
}

/// Bytes that can be read anywhere: a file, or what is in memory.
pub trait ReadAt {
    /// Reads some from `offset` on; none at the end.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
}

impl ReadAt for &[u8] {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

/// An image, open.
pub struct Qcow2<F = File> {
    file: F,
    header: Header,
    l1: Vec<u64>,
    /// The L2 table that was looked at last, and its number in the L1 table.
    l2: Option<(usize, Vec<u64>)>,
    /// The cluster that was inflated last, and where it lies in the disk.
    inflated: Option<(u64, Vec<u8>)>,
}

impl<F: ReadAt> Qcow2<F> {
    /// Reads the header and the first table of `file`.
    ///
    /// # Errors
    /// It is no qcow2, or is a kind that is not read here.
    pub fn of(file: F) -> Result<Self> {
        let mut first = vec![0; 64 << 10];
        let length = read_as_much(&file, &mut first, 0)?;
        first.truncate(length);
        let mut header = Header::parse(&first)?;
        let mut bytes = vec![0; header.l1_entries * 8];
        read_all_of(&file, &mut bytes, header.l1_offset)?;
        header.backing = header.backing.filter(|backing| !backing.name.is_empty());
        Ok(Self { file, l1: words(&bytes), header, l2: None, inflated: None })
    }

    /// The base it is over, as it says.
    #[must_use]
    pub fn backing(&self) -> Option<&Backing> {
        self.header.backing.as_ref()
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// Looks at every cluster, and reads all data once; returns how many bytes of it there are. For the fuzzer.
    ///
    /// # Errors
    /// What is found to be wrong with it.
    pub fn read_all(&mut self) -> Result<u64> {
        let (mut at, mut bytes) = (0, 0);
        while at < self.header.size {
            let Extent { range, kind } = self.extent(at)?;
            if kind == Kind::Data {
                let step = self.header.cluster_size().min(range.end - at);
                let mut buffer = vec![0; super::in_memory(step)];
                self.read(at, &mut buffer)?;
                bytes += step;
                at += step;
            } else {
                at = range.end;
            }
        }
        Ok(bytes)
    }

    /// The L2 table for `offset`, if there is one.
    fn table(&mut self, offset: u64) -> Result<Option<&[u64]>> {
        let index = super::in_memory(offset / self.header.bytes_per_table());
        let at = self.l1.get(index).map_or(0, |entry| entry & OFFSET);
        if at == 0 {
            return Ok(None);
        }
        self.header.check_aligned(at)?;
        if self.l2.as_ref().is_none_or(|(number, _)| *number != index) {
            let mut bytes = vec![0; super::in_memory(self.header.cluster_size())];
            read_all_of(&self.file, &mut bytes, at)?;
            self.l2 = Some((index, words(&bytes)));
        }
        Ok(self.l2.as_ref().map(|(_, table)| table.as_slice()))
    }

    fn cluster(&mut self, offset: u64) -> Result<Cluster> {
        let within = offset % self.header.bytes_per_table() / self.header.cluster_size();
        let entry = self.table(offset)?.map(|table| table[super::in_memory(within)]);
        self.header.cluster(entry.unwrap_or(0))
    }

    /// Fills `buffer` with a part of one cluster, `from` bytes from its beginning on.
    fn read_part(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let size = self.header.cluster_size();
        let from = offset % size;
        match self.cluster(offset)? {
            Cluster::Nothing | Cluster::Zero => buffer.fill(0),
            Cluster::Data { at } => read_all_of(&self.file, buffer, at + from)?,
            Cluster::Deflated { at, length } => {
                let begin = offset - from;
                if self.inflated.as_ref().is_none_or(|(known, _)| *known != begin) {
                    let mut deflated = vec![0; super::in_memory(length)];
                    // The last sector of what is said to be there may lie behind the file's end.
                    let there = read_as_much(&self.file, &mut deflated, at)?;
                    self.inflated = Some((begin, inflate(&deflated[..there], super::in_memory(size))?));
                }
                if let Some((_, bytes)) = &self.inflated {
                    let from = super::in_memory(from);
                    buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
                }
            }
        }
        Ok(())
    }
}

impl<F: ReadAt> Content for Qcow2<F> {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn extent(&mut self, offset: u64) -> Result<Extent> {
        let (cluster, per_table) = (self.header.cluster_size(), self.header.bytes_per_table());
        let mut kind = None;
        let mut end = offset;
        // Up to the end of the table, so that what a call takes is bounded.
        let last = ((offset / per_table + 1).saturating_mul(per_table)).min(self.header.size);
        if self.table(offset)?.is_none() {
            return Ok(Extent { range: offset..last, kind: Kind::Nothing });
        }
        while end < last {
            let here = match self.cluster(end)? {
                Cluster::Nothing => Kind::Nothing,
                Cluster::Zero => Kind::Zero,
                Cluster::Data { .. } | Cluster::Deflated { .. } => Kind::Data,
            };
            if *kind.get_or_insert(here) != here {
                break;
            }
            end = ((end / cluster + 1) * cluster).min(last);
        }
        Ok(Extent { range: offset..end, kind: kind.unwrap_or(Kind::Nothing) })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let size = self.header.cluster_size();
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let length = super::in_memory(size - at % size).min(rest.len());
            let (part, others) = rest.split_at_mut(length);
            self.read_part(at, part)?;
            (at, rest) = (at + length as u64, others);
        }
        Ok(())
    }
}

impl Header {
    /// Reads the header at the beginning of `bytes`, which are the file's first 64 KiB, or all of it.
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields { bytes, at: 0 };
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(bad("is no qcow2"));
        }
        if bytes.len() < HEADER_2 {
            return Err(bad("ends within its header"));
        }
        fields.at = 4;
        let version = fields.u32()?;
        if !(2..=3).contains(&version) {
            return Err(unsupported(&format!("is qcow2 of version {version}")).advise(CONVERT));
        }
        let (name_at, name_length) = (fields.u64()?, fields.u32()?);
        let cluster_bits = fields.u32()?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad("has clusters of a size that there is not"));
        }
        let size = fields.u64()?;
        if fields.u32()? != 0 {
            return Err(unsupported("is encrypted").advise(CONVERT));
        }
        let (l1_size, l1_offset) = (fields.u32()?, fields.u64()?);
        // Behind that: refcounts and snapshots, which nothing here looks at.
        fields.at = HEADER_2;
        let header_length = if version == 2 { HEADER_2 } else { fields.check_version_3()? };
        let mut header = Self { version, cluster_bits, size, l1_offset, l1_entries: 0, backing: None };
        let entries = size.div_ceil(header.bytes_per_table());
        if size > i64::MAX.cast_unsigned() || entries > u64::from(l1_size) || entries * 8 > MOST_L1 {
            return Err(bad("has a table that does not fit its size"));
        }
        header.check_aligned(l1_offset)?;
        header.l1_entries = super::in_memory(entries);
        fields.at = header_length;
        // The name lies behind the extensions, within the first cluster; there need not be an end of them before it.
        let format = fields.backing_format(if name_at == 0 { header.cluster_size() } else { name_at })?;
        if name_at > 0 {
            let begin = super::in_memory(name_at);
            let name = begin.checked_add(name_length as usize).and_then(|end| bytes.get(begin..end));
            let name = name.filter(|_| name_length <= MOST_NAME);
            let name = name.ok_or_else(|| bad("has a backing file without a name"))?;
            header.backing = Some(Backing { name: OsString::from_vec(name.to_vec()), format });
        }
        Ok(header)
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one L2 table is about.
    fn bytes_per_table(&self) -> u64 {
        (self.cluster_size() / 8) << self.cluster_bits
    }

    fn check_aligned(&self, offset: u64) -> Result<()> {
        if offset.is_multiple_of(self.cluster_size()) {
            Ok(())
        } else {
            Err(bad("has a table between clusters"))
        }
    }

    /// What an entry of an L2 table says.
    fn cluster(&self, entry: u64) -> Result<Cluster> {
        if entry & DEFLATED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let at = entry & ((1 << bits) - 1);
            let sectors = ((entry & (DEFLATED - 1)) >> bits) + 1;
            return Ok(Cluster::Deflated { at, length: sectors * 512 - at % 512 });
        }
        let at = entry & OFFSET;
        if self.version >= 3 && entry & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if at == 0 {
            return Ok(Cluster::Nothing);
        }
        if !at.is_multiple_of(self.cluster_size()) {
            return Err(bad("has data between clusters"));
        }
        Ok(Cluster::Data { at })
    }
}

/// Numbers, one behind the other.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk);
        self.at += N;
        bytes.copied().ok_or_else(|| bad("ends within its header"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Checks what version 3 has more; returns the length of the header.
    fn check_version_3(&mut self) -> Result<usize> {
        let features = self.u64()?;
        if let Some((_, why, advice)) = FEATURES.iter().find(|(bit, ..)| features & bit != 0) {
            return Err(unsupported(why).advise(advice));
        }
        if features & !DIRTY != 0 {
            return Err(unsupported("has features that are not known here").advise(CONVERT));
        }
        // Compatible features, autoclear features, the width of refcounts.
        self.at += 20;
        let length = self.u32()? as usize;
        if length < HEADER_3 || !length.is_multiple_of(8) {
            return Err(bad("has a header of a length that there is not"));
        }
        Ok(length)
    }

    /// Looks for the backing file's format among the extensions, which end before `end`.
    fn backing_format(&mut self, end: u64) -> Result<Option<String>> {
        while (self.at as u64) + 8 <= end.min(self.bytes.len() as u64) {
            let (kind, length) = (self.u32()?, self.u32()? as usize);
            if kind == EXTENSION_END {
                break;
            }
            let begin = self.at;
            self.at = begin.saturating_add(length.saturating_add(7) & !7);
            if kind == EXTENSION_BACKING_FORMAT {
                let name = begin.checked_add(length).and_then(|end| self.bytes.get(begin..end));
                let name = name.ok_or_else(|| bad("ends within its header"))?;
                return Ok(Some(String::from_utf8_lossy(name).into_owned()));
            }
        }
        Ok(None)
    }
}

/// A cluster that was deflated.
fn inflate(deflated: &[u8], size: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let pieces = std::iter::once(deflated);
    match miniz_oxide::inflate::decompress_slice_iter_to_slice(&mut bytes, pieces, false, true) {
        Ok(length) if length == size => Ok(bytes),
        _ => Err(bad("has a compressed cluster that is damaged")),
    }
}

/// Reads as much as there is.
fn read_as_much(file: &impl ReadAt, buffer: &mut [u8], offset: u64) -> Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], offset.saturating_add(length as u64)) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("Cannot read the image", error)),
        }
    }
    Ok(length)
}

/// Fills `buffer`, or says that the file is too short for that.
fn read_all_of(file: &impl ReadAt, buffer: &mut [u8], offset: u64) -> Result<()> {
    let length = read_as_much(file, buffer, offset)?;
    if length == buffer.len() { Ok(()) } else { Err(bad("ends before its data does")) }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

fn bad(why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("The image {why}"))
}

fn unsupported(why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("The image {why}"))
}
