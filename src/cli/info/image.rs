//! What an image file is and holds.

use std::fmt::Write as _;
use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use memdev::{Error, ErrorKind, Result};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use serde_json::json;

use crate::cli::contents::{self, Content};
use crate::cli::size::human;

/// What was found out about an image.
struct Report {
    size: u64,
    /// Bytes that the file system has data for; the rest are holes.
    data: u64,
    /// Runs of data.
    runs: u64,
    contents: Vec<Content>,
}

/// A description of the image at `path`, as text or JSON.
///
/// # Errors
/// It is missing, cannot be read, is empty or is nothing that could be served.
pub(super) fn show(path: &Path, json: bool) -> Result<String> {
    let report = examine(path)?;
    Ok(if json { report.to_json(path) } else { report.to_text(path) })
}

fn examine(path: &Path) -> Result<Report> {
    let (file, size) = open(path)?;
    let cannot_read = |error: io::Error| Error::io("Cannot read image", error).on_path(path);
    let mut start = vec![0; contents::PROBE_SIZE];
    let length = read_start(&file, &mut start).map_err(cannot_read)?;
    let (data, runs) = count_data(&file, size).map_err(|errno| cannot_read(errno.into()))?;
    Ok(Report { size, data, runs, contents: contents::probe(&start[..length]) })
}

/// Opens an image to read; also gives its size in bytes.
fn open(path: &Path) -> Result<(File, u64)> {
    const ADVICE: &str = "give the path of a raw disk image";
    let cannot_open = |error: io::Error| Error::io("Cannot open image", error).on_path(path).advise(ADVICE);
    // The type is looked at before the file is opened, since opening some devices does something.
    check_type(path, std::fs::metadata(path).map_err(cannot_open)?.file_type())?;
    // NONBLOCK: should it have become a FIFO meanwhile, nobody waits for its writer.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(cannot_open)?;
    check_type(path, file.metadata().map_err(cannot_open)?.file_type())?;
    // The end is also where a block device, whose metadata has no size, ends.
    let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| cannot_open(errno.into()))?;
    if size == 0 {
        return Err(unusable(path, "it is empty"));
    }
    Ok((file, size))
}

fn check_type(path: &Path, file_type: FileType) -> Result<()> {
    let what = match file_type {
        t if t.is_file() || t.is_block_device() => return Ok(()),
        t if t.is_dir() => "it is a directory",
        t if t.is_char_device() => "it is a character device",
        t if t.is_fifo() => "it is a FIFO",
        t if t.is_socket() => "it is a socket",
        _ => "it is no file",
    };
    Err(unusable(path, what))
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("Cannot use image {}: {why}", path.display()))
        .advise("give the path of a raw disk image")
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], u64::try_from(filled).unwrap_or(u64::MAX)) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Bytes of data and how many runs they are in. Where holes cannot be asked for, all is one run of data.
fn count_data(file: &File, size: u64) -> rustix::io::Result<(u64, u64)> {
    let (mut data, mut runs, mut at) = (0, 0, 0);
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here to the end.
            Err(Errno::NXIO) => break,
            // Block devices and some file systems do not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) if at == 0 => return Ok((size, 1)),
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        // A file that shrinks meanwhile must not keep us here.
        if end <= start {
            break;
        }
        data += end - start;
        runs += 1;
        at = end;
    }
    Ok((data, runs))
}

impl Report {
    fn to_text(&self, path: &Path) -> String {
        let mut out = String::new();
        let holes = self.size - self.data;
        let runs = if self.runs == 1 { "run" } else { "runs" };
        let _ = writeln!(out, "image: {}", path.display());
        let _ = writeln!(out, "    format: raw");
        let _ = writeln!(out, "    size: {} ({})", self.size, human(self.size));
        let _ = writeln!(out, "    data: {} ({}) in {} {runs}", self.data, human(self.data), self.runs);
        let _ = writeln!(out, "    holes: {holes} ({})", human(holes));
        if self.contents.is_empty() {
            let _ = writeln!(out, "    holds: nothing known");
        }
        for content in &self.contents {
            let _ = write!(out, "    holds: {}", content.what);
            if let Some(label) = &content.label {
                let _ = write!(out, ", label '{label}'");
            }
            if let Some(uuid) = &content.uuid {
                let _ = write!(out, ", UUID {uuid}");
            }
            out.push('\n');
        }
        for content in &self.contents {
            if let Some(advice) = content.advice {
                let _ = writeln!(out, "    note: this looks like a {}; {advice}", content.what);
            }
        }
        out
    }

    fn to_json(&self, path: &Path) -> String {
        let contents: Vec<_> = self
            .contents
            .iter()
            .map(|content| {
                json!({
                    "type": content.kind,
                    "description": content.what,
                    "label": content.label,
                    "uuid": content.uuid,
                    "advice": content.advice,
                })
            })
            .collect();
        let report = json!({
            "image": path.to_string_lossy(),
            "format": "raw",
            "size": self.size,
            "data": self.data,
            "holes": self.size - self.data,
            "data-runs": self.runs,
            "contents": contents,
        });
        format!("{report:#}\n")
    }
}
