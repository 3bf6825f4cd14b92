//! The mapping of a base image: an address range that only the kernel reads.
//!
//! # Safety
//!
//! Keeps invariant 1 of the [parent](super): no method gives out a reference or a pointer to the bytes, only spans
//! for the kernel. So a file that shrinks, changes or fails under the mapping is an error of a call, not undefined
//! behaviour and not a signal.

use super::KernelSpan;
use memmap2::{Advice, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;

/// A shared, read-only mapping of the first bytes of a file.
#[derive(Debug)]
pub struct Mapping {
    // None where there is nothing to map: the kernel refuses empty mappings.
    map: Option<MmapRaw>,
}

impl Mapping {
    /// Maps the first `len` bytes of `file`. Nothing is read yet.
    ///
    /// # Errors
    /// What `mmap(2)` says: the file cannot be mapped, or the address space is full.
    pub fn new(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        if len == 0 {
            return Ok(Self { map: None });
        }
        let map = MmapOptions::new().len(len).map_raw_read_only(file)?;
        // A private copy of the server's memory in a child would only cost it page tables.
        map.advise(Advice::DontFork)?;
        // A page that is missing all the same, when it is sent, is read alone and not with megabytes around it.
        map.advise(Advice::Random)?;
        // In a process that locks all of its memory the page cache still has to be able to drop pages of an image.
        map.unlock()?;
        Ok(Self { map: Some(map) })
    }

    /// Bytes in the mapping.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, MmapRaw::len)
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `len` bytes at `offset`, for the kernel to read.
    ///
    /// # Panics
    /// If the range is not within the mapping: callers have validated their requests against its length.
    #[must_use]
    pub fn span(&self, offset: usize, len: usize) -> KernelSpan<'_> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()), "span outside the mapping");
        match &self.map {
            Some(map) => KernelSpan::from_raw(map.as_ptr().wrapping_add(offset), len),
            None => KernelSpan::new(&[]),
        }
    }

    /// Reads the pages of `offset..offset + len` into memory and into the page tables. Blocks for as long as the
    /// disk takes.
    ///
    /// # Errors
    /// `EFAULT` or `EIO` when a page cannot be read: the file is shorter by now, or the disk failed.
    pub fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        match &self.map {
            Some(map) if len > 0 => map.advise_range(Advice::PopulateRead, offset, len),
            _ => Ok(()),
        }
    }

    /// For each page from `offset` (a multiple of the page size) on, whether it is in memory now, in bit 0 of its
    /// byte in `pages`.
    ///
    /// # Errors
    /// What `mincore(2)` says.
    ///
    /// # Panics
    /// If the pages are not within the mapping.
    pub fn residency(&self, offset: usize, pages: &mut [u8]) -> io::Result<()> {
        let page = rustix::param::page_size();
        let end = pages.len().checked_mul(page).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.len().next_multiple_of(page)), "pages outside the mapping");
        let Some(map) = &self.map else { return Ok(()) };
        let start = map.as_ptr().wrapping_add(offset).cast_mut().cast();
        // SAFETY: the range was just checked to be part of our own mapping, and the kernel writes one byte for each
        // page of it, of which `pages` has exactly as many.
        let returned = unsafe { libc::mincore(start, pages.len() * page, pages.as_mut_ptr()) };
        if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_kernel_reads_what_the_file_holds() {
        let file = file_of(&[7; 10_000]);
        let map = Mapping::new(&file, 10_000).unwrap();
        map.populate(0, 10_000).unwrap();
        let (a, mut b) = UnixStream::pair().unwrap();
        assert_eq!(crate::sys::send(a.as_fd(), &[map.span(9_990, 10)]).unwrap(), 10);
        let mut got = [0; 10];
        b.read_exact(&mut got).unwrap();
        assert_eq!(got, [7; 10]);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_of_the_call() {
        let file = file_of(&[7; 3 * 65536]);
        let map = Mapping::new(&file, 3 * 65536).unwrap();
        file.set_len(65536).unwrap();
        let (a, _b) = UnixStream::pair().unwrap();
        let error = crate::sys::send(a.as_fd(), &[map.span(2 * 65536, 100)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert!(map.populate(2 * 65536, 100).is_err());
        assert!(map.populate(0, 65536).is_ok());
    }

    #[test]
    fn residency_tells_what_is_in_memory() {
        let file = file_of(&[1; 8192]);
        let map = Mapping::new(&file, 8192).unwrap();
        map.populate(0, 8192).unwrap();
        let mut pages = [0; 2];
        map.residency(0, &mut pages).unwrap();
        assert_eq!([pages[0] & 1, pages[1] & 1], [1, 1]);
    }

    #[test]
    fn an_empty_file_has_an_empty_mapping() {
        let map = Mapping::new(&file_of(&[]), 0).unwrap();
        assert!(map.is_empty() && map.span(0, 0).is_empty());
        map.populate(0, 0).unwrap();
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn a_span_past_the_end_is_refused() {
        let map = Mapping::new(&file_of(&[1; 100]), 100).unwrap();
        let _ = map.span(50, 51);
    }
}
