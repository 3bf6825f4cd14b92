//! Where the partitions of a disk's image lie, by its GPT or its MBR.
//!
//! Pure but for the reads that it is lent: nothing is mounted, no device is made and no kernel asked, so an ordinary user
//! can name a partition, too. The table is data that somebody else made. Every number in it is checked before it is used,
//! every chain has an end, and a table that cannot be right is an error that says what is wrong with it, never a guess.
//!
//! ```text
//!  MBR   sector 0: four entries ── one of them extended ──> EBR ──> EBR ──> ...   logical partitions, from 5 on
//!  GPT   sector 0: an entry of type EE, "not for you"
//!        sector 1: header ──> array of entries          last sector: a second header, used when the first is damaged
//! ```

mod gpt;
mod mbr;
#[cfg(test)]
mod tests;

use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Bytes in a sector of an MBR's disk; a GPT's may also have [`LARGE_SECTOR`].
const SECTOR: u64 = 512;
/// Bytes in a sector of a disk whose sectors are large.
const LARGE_SECTOR: u64 = 4096;

/// How a disk says where its partitions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// GUID partition table, of UEFI.
    Gpt,
    /// Master boot record, with logical partitions in extended ones.
    Mbr,
}

/// One partition. What it says was not compared with the image's end yet: see [`Table::find`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// The number the kernel gives it, from 1: that of `/dev/sda2` is 2.
    pub number: u32,
    /// Its first byte in the image.
    pub offset: u64,
    /// Its bytes; at least one sector.
    pub length: u64,
}

/// The partitions of a disk, by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    scheme: Scheme,
    size: u64,
    partitions: Vec<Partition>,
    /// The numbers of extended partitions, which hold others and no file system.
    extended: Vec<u32>,
}

/// The image as these parsers see it: bytes, by their place.
struct Disk<'a> {
    size: u64,
    read: &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
}

impl Disk<'_> {
    /// The `length` bytes at `offset`; `what` they are is for people.
    fn bytes(&mut self, offset: u64, length: usize, what: &str) -> Result<Vec<u8>> {
        let length_in_image = u64::try_from(length).unwrap_or(u64::MAX);
        if offset.checked_add(length_in_image).is_none_or(|end| end > self.size) {
            return Err(broken(format!("The partition table's {what} would lie beyond the image's end"))
                .advise("the image is damaged or not whole"));
        }
        let mut bytes = vec![0; length];
        (self.read)(offset, &mut bytes)
            .map_err(|error| Error::io(format!("Cannot read the partition table's {what}"), error))?;
        Ok(bytes)
    }
}

impl Table {
    /// Reads the table of the disk whose bytes are in `file`, a regular file or a block device.
    ///
    /// # Errors
    /// As [`Table::read`].
    pub fn of_file(file: &File) -> Result<Self> {
        // A block device has no length but where its end is.
        let mut end = file;
        let size =
            end.seek(SeekFrom::End(0)).map_err(|error| Error::io("Cannot find the image's end", error))?;
        Self::read(size, &mut |offset, bytes| file.read_exact_at(bytes, offset))
    }

    /// Reads the table of a disk of `size` bytes, of which `read` gives those at an offset.
    ///
    /// # Errors
    /// `NotFound` if there is no table, `Invalid` if there is one that cannot be right, or what `read` says.
    pub fn read(size: u64, read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>) -> Result<Self> {
        let mut disk = Disk { size, read };
        let none = || {
            Error::new(ErrorKind::NotFound, "The image has no partition table")
                .advise("if it is one file system, leave the partition out")
        };
        if size < SECTOR {
            return Err(none());
        }
        let boot = disk.bytes(0, 512, "first sector")?;
        let Some(entries) = mbr::entries(&boot) else { return Err(none()) };
        let mut table = if entries.iter().any(mbr::Entry::is_protective) {
            Self { scheme: Scheme::Gpt, size, partitions: gpt::read(&mut disk)?, extended: Vec::new() }
        } else {
            let (partitions, extended) = mbr::read(&mut disk, &entries)?;
            // The boot sector of a file system ends with the same two bytes, and has no entries.
            if partitions.is_empty() && extended.is_empty() {
                return Err(none());
            }
            Self { scheme: Scheme::Mbr, size, partitions, extended }
        };
        table.partitions.sort_unstable_by_key(|partition| partition.number);
        Ok(table)
    }

    /// GPT or MBR.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// All partitions that could hold a file system, by number.
    #[must_use]
    pub fn partitions(&self) -> &[Partition] {
        &self.partitions
    }

    /// The partition with this number; it lies within the image.
    ///
    /// # Errors
    /// `NotFound` if there is none, with the numbers there are; `Invalid` if it holds others or is not all in the image.
    pub fn find(&self, number: u32) -> Result<Partition> {
        if self.extended.contains(&number) {
            let error = format!("Partition {number} is an extended one, which only holds others");
            return Err(Error::new(ErrorKind::Invalid, error).advise("choose one of those, from 5 on"));
        }
        let found = self.partitions.iter().find(|partition| partition.number == number);
        let Some(&partition) = found else {
            let numbers: Vec<_> = self.partitions.iter().map(|found| found.number.to_string()).collect();
            let there_are = if numbers.is_empty() { "none at all".to_owned() } else { numbers.join(", ") };
            let error = format!("The image has no partition {number}, but {there_are}");
            return Err(Error::new(ErrorKind::NotFound, error));
        };
        if partition.offset.checked_add(partition.length).is_none_or(|end| end > self.size) {
            let error = format!("Partition {number} goes beyond the image's end, at {} bytes", self.size);
            return Err(broken(error).advise("the image is not whole"));
        }
        Ok(partition)
    }
}

/// A table that cannot be right.
fn broken(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The little-endian number of up to eight bytes at `at`, which must be there: both formats have that order.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// As [`number`], of four bytes.
fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}
