//! A file that appears when it is complete.

use crate::error::{Error, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file on its way to its name. It goes if it does not get there.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    folder: PathBuf,
    /// `None` as long as it has no name.
    temporary: Option<PathBuf>,
    file: File,
}

impl Target {
    /// Begins a file that is to be at `path`.
    ///
    /// # Errors
    /// None can be made there.
    pub fn create(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::io("Cannot write", error)
                .on_path(path)
                .advise("give a file in a directory that you may write to")
        };
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let Some(name) = path.file_name().filter(|_| !path.is_dir()) else {
            return Err(failed(io::Error::from(io::ErrorKind::IsADirectory)));
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let (path, folder) = (path.to_owned(), folder.to_owned());
        match open(&folder, flags, Mode::from_raw_mode(0o666)) {
            Ok(file) => Ok(Self { path, folder, temporary: None, file: file.into() }),
            // File systems that have only files with names.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
                let temporary = folder.join(temporary_name(name));
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary);
                Ok(Self { path, folder, file: file.map_err(failed)?, temporary: Some(temporary) })
            }
            Err(error) => Err(failed(error.into())),
        }
    }

    fn failed(&self, what: &str, error: impl Into<io::Error>) -> Error {
        Error::io(what, error).on_path(&self.path)
    }

    pub(super) fn set_len(&mut self, bytes: u64) -> Result<()> {
        self.file.set_len(bytes).map_err(|error| self.failed("Cannot write", error))
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| self.failed("Cannot write", error))
    }

    /// What is written to this comes into the file, from its beginning on.
    pub fn stream(&self) -> impl io::Write {
        &self.file
    }

    /// Puts it on the disk, and gives it its name.
    ///
    /// # Errors
    /// What the file system says.
    pub fn finish(mut self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.failed("Cannot put on the disk", error))?;
        if self.temporary.is_none() {
            let name = self.path.file_name().unwrap_or_default();
            let temporary = self.folder.join(temporary_name(name));
            let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            linkat(CWD, unnamed, CWD, &temporary, AtFlags::SYMLINK_FOLLOW)
                .map_err(|error| self.failed("Cannot name", error))?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path).map_err(|error| self.failed("Cannot name", error))?;
        }
        self.temporary = None;
        let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| self.failed("Cannot put on the disk the name of", error))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // It is of no use to anybody, and there is nobody to tell.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// A name that nobody else uses: it is there for a moment only, or until this process ends.
fn temporary_name(name: &std::ffi::OsStr) -> std::ffi::OsString {
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.part", std::process::id()));
    temporary
}
