//! A disk, byte by byte; its holes are zero.

use super::Content;
use crate::base::Extents;
use crate::error::{Error, Result};
use crate::save::{Extent, Kind};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) struct Raw {
    file: File,
    size: u64,
    extents: Extents,
}

impl Raw {
    pub(super) fn of(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self { extents: Extents::of_file(&file, size), file, size })
    }
}

impl Content for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&mut self, offset: u64) -> Result<Extent> {
        let run = self.extents.runs(offset..self.size).next();
        let (range, data) = run.map_or((offset..self.size, false), |run| (run.range(), run.data));
        Ok(Extent { range, kind: if data { Kind::Data } else { Kind::Zero } })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| Error::io("Cannot read the image", error))
    }
}
