//! Which files are believed: those that nobody but root can have written.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FileType;

use crate::error::{Error, ErrorKind, Result};
use crate::root::reach;

/// The longest settings file, in bytes.
const SIZE_MAX: u64 = 1 << 20;

const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// The text of a file that must be root's.
///
/// # Errors
/// `Denied` if somebody else could have written it; what the system says.
pub(super) fn read(path: &Path) -> Result<String> {
    let failed = |error: io::Error| Error::io("Cannot read", error).on_path(path);
    // Of a FIFO it is seen that it is none, rather than waited for.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    check(path)?;
    // What was opened: by now another file might have the name, if somebody could have put it there.
    let meta = file.metadata().map_err(failed)?;
    check_one(path, meta.uid(), meta.mode())?;
    let mut text = String::new();
    let size = file.take(SIZE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if u64::try_from(size).unwrap_or(u64::MAX) > SIZE_MAX {
        return Err(Error::new(ErrorKind::Invalid, "More than 1 MiB of settings in").on(path.display()));
    }
    Ok(text)
}

/// Looks whether a file, and all directories on the way to it, are root's, and not to be written by others. A directory
/// that others can write to is fine if they cannot rename what is not theirs (`/tmp`).
///
/// # Errors
/// `Denied` if not; `NotFound`, or what else the system says.
pub(super) fn check(path: &Path) -> Result<()> {
    let mut is_file = false;
    // Also what a symbolic link is in, which says where it points to.
    reach::resolve(path, &mut |part, stat| {
        is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        check_one(part, stat.st_uid, stat.st_mode)
    })?;
    if is_file { Ok(()) } else { Err(Error::new(ErrorKind::Invalid, "Not a file:").on(path.display())) }
}

/// Looks whether a directory is where it seems to be, and stays there: no part of the path is a symbolic link, and nobody but
/// root can rename anything on the way. Whose the directory itself is does not matter.
///
/// # Errors
/// `Denied` if not; `Invalid` if it is no directory; `NotFound`, or what else the system says.
pub(super) fn check_destination(path: &Path) -> Result<()> {
    for part in path.ancestors() {
        let failed = |error: io::Error| {
            Error::io("Cannot carry to", error).on_path(path).advise("make the directory, or mount it")
        };
        let meta = part.symlink_metadata().map_err(failed)?;
        let why = if meta.is_symlink() {
            "it is a symbolic link; name the directory itself"
        } else if !meta.is_dir() {
            "it is no directory"
        } else if part != path && meta.uid() != 0 {
            // Also in a directory like /tmp an owner renames what is the owner's.
            "it is not root's; carry to a directory that only root can put another in the place of"
        } else if part != path && meta.mode() & WRITABLE_BY_OTHERS != 0 {
            "others can write to it; carry to a directory that only root can put another in the place of"
        } else {
            continue;
        };
        let kind = if meta.is_dir() || meta.is_symlink() { ErrorKind::Denied } else { ErrorKind::Invalid };
        return Err(Error::new(
            kind,
            format!("Cannot carry to {} by way of {}: {why}", path.display(), part.display()),
        ));
    }
    Ok(())
}

fn check_one(path: &Path, uid: u32, mode: u32) -> Result<()> {
    let kind = FileType::from_raw_mode(mode);
    // A link has no mode of its own.
    let is_protected = kind == FileType::Symlink || kind == FileType::Directory && mode & STICKY != 0;
    let why = if uid != 0 {
        "it is not root's"
    } else if mode & WRITABLE_BY_OTHERS != 0 && !is_protected {
        "others can write to it"
    } else {
        return Ok(());
    };
    let error = Error::new(ErrorKind::Denied, format!("Cannot trust {}: {why}", path.display()));
    Err(error.advise("chown it to root and chmod it go-w"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn a_destination_is_where_only_root_can_move_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Not in /tmp, where everybody can write.
        let dir = tempfile::tempdir_in("/run").unwrap();
        let (homes, joe) = (dir.path().join("homes"), dir.path().join("homes/joe"));
        fs::create_dir_all(joe.join("work")).unwrap();
        chown(&joe, Some(4711), None).unwrap();
        fs::set_permissions(&joe, Permissions::from_mode(0o777)).unwrap();
        check_destination(&joe).unwrap();
        let why = |path: &Path| check_destination(path).unwrap_err();
        // Joe could put a link to somebody else's in its place.
        assert!(why(&joe.join("work")).to_string().contains("homes/joe: it is not root's"));
        fs::set_permissions(&homes, Permissions::from_mode(0o1777)).unwrap();
        assert!(why(&joe).to_string().contains("homes: others can write to it"), "{}", why(&joe));
        fs::set_permissions(&homes, Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(&joe, dir.path().join("link")).unwrap();
        assert!(why(&dir.path().join("link")).to_string().contains("it is a symbolic link"));
        std::os::unix::fs::symlink(&homes, dir.path().join("way")).unwrap();
        assert_eq!(why(&dir.path().join("way/joe")).kind(), ErrorKind::Denied);
        fs::write(homes.join("file"), "").unwrap();
        assert_eq!(why(&homes.join("file")).kind(), ErrorKind::Invalid);
        assert_eq!(why(&homes.join("none")).kind(), ErrorKind::NotFound);
    }

    #[test]
    fn only_roots_files_are_believed() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings");
        fs::write(&path, "text").unwrap();
        let mode = |mode| fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        assert_eq!(read(&path).unwrap(), "text");
        for bad in [0o664, 0o646] {
            mode(bad);
            let error = read(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.to_string().contains("others can write to it; chown"), "{error}");
        }
        mode(0o600);
        chown(&path, Some(1), None).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("it is not root's"));
        chown(&path, Some(0), None).unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("others can write"));
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(read(&dir.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    /// What a link pointed to was looked at, but not who could have it point elsewhere.
    #[test]
    fn a_link_is_believed_where_nobody_else_can_have_made_it() {
        use std::os::unix::fs::symlink;
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let others = dir.path().join("others");
        fs::write(dir.path().join("settings"), "text").unwrap();
        fs::create_dir(&others).unwrap();
        symlink("settings", dir.path().join("link")).unwrap();
        assert_eq!(read(&dir.path().join("link")).unwrap(), "text");
        symlink("../settings", others.join("link")).unwrap();
        assert_eq!(read(&others.join("link")).unwrap(), "text");
        chown(&others, Some(1), None).unwrap();
        assert_eq!(read(&others.join("link")).unwrap_err().kind(), ErrorKind::Denied);
        // Nor one of root's that leads by it.
        symlink("others/link", dir.path().join("far")).unwrap();
        assert_eq!(read(&dir.path().join("far")).unwrap_err().kind(), ErrorKind::Denied);
    }
}
