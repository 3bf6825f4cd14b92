//! Which file system a device holds, by what stands at its beginning: only those that are known to be safe as a private
//! root are mounted, and by name, never by the kernel's guess.

use std::io;
use std::os::unix::fs::FileExt;

use crate::error::{Error, ErrorKind};

/// A file system that a private root can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// The kernel's name for it.
    pub(super) name: &'static str,
    /// What it is mounted with.
    pub(super) options: &'static [&'static str],
    /// What a copy that nobody sees again is mounted with in addition.
    pub(super) for_copies: &'static [&'static str],
}

/// Also for ext2 and ext3, whose driver it is.
/// In a copy nothing has to outlive a loss of power; and its device has no cache to be emptied, since what it has
/// acknowledged is there. So nobody waits for that.
const EXT4: Kind = Kind { name: "ext4", options: &[], for_copies: &["nobarrier"] };
/// All copies of an image have the same UUID, which XFS takes only once unless it is told not to mind.
const XFS: Kind = Kind { name: "xfs", options: &["nouuid"], for_copies: &[] };

/// What is on the device from `start` on; `None` if it is nothing that is known here. (btrfs is not: its driver takes all devices of one
/// UUID, as copies of an image are, for one device.)
///
/// # Errors
/// The device cannot be read.
pub(super) fn on(device: &impl FileExt, start: u64) -> io::Result<Option<Kind>> {
    let at = |offset, wanted: &[u8]| {
        let mut found = vec![0; wanted.len()];
        match device.read_exact_at(&mut found, start + offset) {
            Ok(()) => Ok(found == wanted),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    };
    if at(1024 + 56, &[0x53, 0xef])? {
        return Ok(Some(EXT4));
    }
    Ok(at(0, b"XFSB")?.then_some(XFS))
}

/// That `what` cannot be a root.
pub(super) fn none(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "No file system that can be a root is on")
        .on(what)
        .advise("make one of ext4 or XFS")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn file_systems_are_known_by_their_magic() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, offset: u64, bytes: &[u8]| {
            let file = File::options().read(true).write(true).create_new(true).open(dir.path().join(name));
            let file = file.unwrap();
            file.write_all_at(bytes, offset).unwrap();
            file.set_len(8192).unwrap();
            on(&file, 0).unwrap().map(|kind| kind.name)
        };
        assert_eq!(make("ext", 1080, &[0x53, 0xef]), Some("ext4"));
        assert_eq!(make("xfs", 0, b"XFSB"), Some("xfs"));
        assert_eq!(make("mbr", 510, &[0x55, 0xaa]), None);
        let short = File::open("/dev/null").unwrap();
        assert_eq!(on(&short, 0).unwrap(), None);
    }
}
