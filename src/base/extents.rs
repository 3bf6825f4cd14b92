//! Where an image has data and where it has holes, as its file system tells (`SEEK_DATA`, `SEEK_HOLE`).
//!
//! Asked once, when the image is opened: the base never changes. A hole is served as zeroes without touching the
//! mapping, and reported to clients as a hole.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;

/// A maximal range of bytes that are all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Whether it has data; else it is a hole, and reads as zeroes.
    pub data: bool,
}

impl Run {
    /// The bytes of the run.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// The data ranges of an image, in order, neither touching nor overlapping.
#[derive(Debug, Default)]
pub struct Extents {
    data: Vec<Range<u64>>,
}

/// Past this many data ranges an image is taken as data altogether: a map of it would cost more than it saves.
const MOST_RANGES: usize = 1 << 20;

impl Extents {
    /// One range of data from the start to `size`.
    #[must_use]
    pub fn all_data(size: u64) -> Self {
        let whole = 0..size;
        Self { data: vec![whole] }
    }

    /// Asks the file system; what it does not tell (block devices, simple file systems) is data.
    #[must_use]
    pub fn of_file(file: &File, size: u64) -> Self {
        let mut data = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No data from here to the end.
                Err(Errno::NXIO) => break,
                Err(_) => return Self::all_data(size),
            };
            let Ok(end) = seek(file, SeekFrom::Hole(start)) else { return Self::all_data(size) };
            if start < at || end <= start || data.len() == MOST_RANGES {
                return Self::all_data(size);
            }
            if start < size {
                data.push(start..end.min(size));
            }
            at = end;
        }
        Self { data }
    }

    /// The runs that make up `range`, in order, cut to it.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let mut next = self.data.partition_point(|data| data.end <= range.start);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let run = match self.data.get(next) {
                Some(data) if data.start <= at => {
                    next += 1;
                    Run { offset: at, len: data.end.min(range.end) - at, data: true }
                }
                Some(data) => Run { offset: at, len: data.start.min(range.end) - at, data: false },
                None => Run { offset: at, len: range.end - at, data: false },
            };
            at += run.len;
            Some(run)
        })
    }

    /// Bytes of data in all.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data.iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(extents: &Extents, range: Range<u64>) -> Vec<(u64, u64, bool)> {
        extents.runs(range).map(|run| (run.offset, run.len, run.data)).collect()
    }

    #[test]
    fn runs_cover_any_range_without_gap() {
        let extents = Extents { data: vec![10..20, 30..40] };
        assert_eq!(
            runs(&extents, 0..50),
            [(0, 10, false), (10, 10, true), (20, 10, false), (30, 10, true), (40, 10, false)]
        );
        assert_eq!(runs(&extents, 15..35), [(15, 5, true), (20, 10, false), (30, 5, true)]);
        assert_eq!(runs(&extents, 20..30), [(20, 10, false)]);
        assert_eq!(runs(&extents, 45..46), [(45, 1, false)]);
        assert_eq!(runs(&extents, 5..5), []);
        assert_eq!(extents.data_bytes(), 20);
    }

    #[test]
    fn the_file_system_tells_holes() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 4096], 4 << 20).unwrap();
        let extents = Extents::of_file(&file, 8 << 20);
        assert_eq!(extents.data_bytes(), 4096);
        assert_eq!(
            runs(&extents, 4 << 20..(4 << 20) + 8192),
            [(4 << 20, 4096, true), ((4 << 20) + 4096, 4096, false)]
        );
    }
}
