//! Which file system a device holds, by what stands at its beginning: only those that are known to be safe as a private
//! root are mounted, and by name, never by the kernel's guess.

use std::io;
use std::os::unix::fs::FileExt;

/// A file system that a private root can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// The kernel's name for it.
    pub(super) name: &'static str,
    /// What it is mounted with.
    pub(super) options: &'static [&'static str],
}

/// Also for ext2 and ext3, whose driver it is.
const EXT4: Kind = Kind { name: "ext4", options: &[] };
/// All copies of an image have the same UUID, which XFS takes only once unless it is told not to mind.
const XFS: Kind = Kind { name: "xfs", options: &["nouuid"] };

/// What is on the device; `None` if it is nothing that is known here. (btrfs is not: its driver takes all devices of one
/// UUID, as copies of an image are, for one device.)
///
/// # Errors
/// The device cannot be read.
pub(super) fn on(device: &impl FileExt) -> io::Result<Option<Kind>> {
    let at = |offset, wanted: &[u8]| {
        let mut found = vec![0; wanted.len()];
        match device.read_exact_at(&mut found, offset) {
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
            on(&file).unwrap().map(|kind| kind.name)
        };
        assert_eq!(make("ext", 1080, &[0x53, 0xef]), Some("ext4"));
        assert_eq!(make("xfs", 0, b"XFSB"), Some("xfs"));
        assert_eq!(make("mbr", 510, &[0x55, 0xaa]), None);
        let short = File::open("/dev/null").unwrap();
        assert_eq!(on(&short).unwrap(), None);
    }
}
