//! A whole block device, by the name that the kernel gives it.

use std::fs;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// A device node is made within milliseconds of its device, by the kernel or by udev.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// A whole block device, as `/dev/loop3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    name: String,
}

impl Device {
    /// The device of this name, if it can be one: a name has no `/`, and is not empty.
    pub(super) fn named(name: &str) -> Option<Self> {
        let fine = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        fine.then(|| Self { name: name.to_owned() })
    }

    /// The device whose node is at `path`.
    ///
    /// # Errors
    /// There is no block device, or it is a partition.
    pub(super) fn of_path(path: &Path) -> Result<Self> {
        let failed = |error| Error::io("Cannot use device", error).on_path(path);
        let refused = |why: &str| Error::new(ErrorKind::Invalid, format!("{} is {why}", path.display()));
        let metadata = fs::metadata(path).map_err(failed)?;
        if !metadata.file_type().is_block_device() {
            return Err(refused("no block device").advise("give one as /dev/loop3 or /dev/nbd0"));
        }
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let link = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).map_err(failed)?;
        if link.join("partition").exists() {
            return Err(refused("a partition").advise("give the whole device"));
        }
        let name = link.file_name().and_then(|name| name.to_str()).and_then(Self::named);
        name.ok_or_else(|| refused("no device that can be used"))
    }

    /// The kernel's name, as `loop3`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// What the kernel says of it.
    pub(super) fn sysfs(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }

    /// One value of what the kernel says of it, as `size` or `loop/backing_file`.
    pub(super) fn attribute(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.sysfs().join(name)).ok().map(|text| text.trim_end().to_owned())
    }

    /// Waits until the node is there, and is this device's.
    ///
    /// # Errors
    /// It does not come: nobody makes device nodes here.
    pub(super) fn wait_for_node(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            if Self::of_path(&self.path()).is_ok_and(|found| found == *self) {
                return Ok(());
            }
            if start.elapsed() > NODE_PATIENCE {
                return Err(Error::new(ErrorKind::NotFound, "Nobody makes the device node")
                    .on_path(self.path())
                    .advise("mount a devtmpfs on /dev"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the device has `size` bytes, and its first and last sector can be read.
    ///
    /// # Errors
    /// It keeps another size, or cannot be read.
    pub(super) fn wait_until_ready(&self, size: u64) -> Result<()> {
        let failed = |error| Error::io("Cannot read the new device", error).on_path(self.path());
        self.wait_for_node()?;
        let start = Instant::now();
        let file = loop {
            // Opened anew each time: the kernel takes over a device's size when it is opened.
            let mut file = fs::File::open(self.path()).map_err(failed)?;
            let found = file.seek(SeekFrom::End(0)).map_err(failed)?;
            if found == size {
                break file;
            }
            if start.elapsed() > NODE_PATIENCE {
                let why = format!("{} has {found} bytes instead of {size}", self.path().display());
                return Err(Error::new(ErrorKind::Io, why));
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, 0).map_err(failed)?;
        file.read_exact_at(&mut sector, size - SECTOR).map_err(failed)
    }
}

/// What a device of this id is called in the kernel.
pub(super) fn mark(id: &str) -> String {
    format!("memdev:{id}")
}

/// Bytes in a sector: what the kernel counts devices' sizes in.
pub(super) const SECTOR: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_way_out_of_their_directory() {
        for bad in ["", "../sda", "a/b", ".", "loop 1"] {
            assert_eq!(Device::named(bad), None, "{bad}");
        }
        assert_eq!(Device::named("loop12").unwrap().path(), Path::new("/dev/loop12"));
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        let say = |path: &str| Device::of_path(Path::new(path)).unwrap_err().to_string();
        assert!(say("/dev/null").contains("no block device"));
        assert!(say("/no/such").contains("no such file"));
    }
}
