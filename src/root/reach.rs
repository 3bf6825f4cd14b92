//! Ways to a file that lead by nobody's symbolic links but root's and this process's user's.
//!
//! Root follows a link of somebody else's wherever it points to, and that can be another place at every look. So the links
//! are looked at one by one, and what is found is opened by a path that has none.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat};

use crate::error::{Error, ErrorKind, Result};

/// The most links on one way, as the kernel has it.
const LINKS_MAX: u32 = 40;

/// The absolute path that `path` is without symbolic links. All that is on the way is shown to `look`: its path, what it is.
///
/// # Errors
/// What the system, or `look`, says.
pub(crate) fn resolve(path: &Path, look: &mut dyn FnMut(&Path, &Stat) -> Result<()>) -> Result<PathBuf> {
    let failed = |error: io::Error| Error::io("Cannot look at", error).on_path(path);
    let whole = std::path::absolute(path).map_err(failed)?;
    let parts = |path: &Path| -> Vec<OsString> {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
    };
    let mut left = parts(&whole);
    let (mut found, mut links) = (PathBuf::from("/"), 0);
    while let Some(part) = left.pop() {
        let next = match Path::new(&part).components().next() {
            Some(Component::Normal(name)) => found.join(name),
            Some(Component::RootDir) => PathBuf::from("/"),
            Some(Component::ParentDir) => found.parent().unwrap_or(Path::new("/")).to_owned(),
            _ => continue,
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&next, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let stat = rustix::fs::fstat(&opened).map_err(|error| failed(error.into()))?;
        look(&next, &stat)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            found = next;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(failed(rustix::io::Errno::LOOP.into()));
        }
        let target = rustix::fs::readlinkat(&opened, "", Vec::new()).map_err(|error| failed(error.into()))?;
        left.extend(parts(Path::new(&OsString::from_vec(target.into_bytes()))));
    }
    Ok(found)
}

/// The same where only the links are looked at: they have to be root's, or this process's user's.
///
/// # Errors
/// `Denied` if one is not; what the system says.
pub(crate) fn without_links(path: &Path) -> Result<PathBuf> {
    let own = [0, rustix::process::geteuid().as_raw()];
    resolve(path, &mut |part, stat| {
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink || own.contains(&stat.st_uid) {
            return Ok(());
        }
        let why = format!("Cannot follow {}: a symbolic link that is not root's", part.display());
        Err(Error::new(ErrorKind::Denied, why).advise("give the path that it stands for"))
    })
}

/// Opens what [`without_links`] has found.
///
/// # Errors
/// What the system says: `ELOOP` if there is a link by now.
pub(crate) fn open(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(CWD, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{lchown, symlink};

    #[test]
    fn links_of_others_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let at = |name: &str| real.join(name);
        fs::create_dir_all(at("d/e")).unwrap();
        fs::write(at("d/e/f"), "x").unwrap();
        symlink("d", at("one")).unwrap();
        symlink(at("one/e/../e"), at("two")).unwrap();
        symlink("three", at("three")).unwrap();
        assert_eq!(without_links(&at("two/f")).unwrap(), at("d/e/f"));
        assert_eq!(without_links(&at("d/./e/../e/f")).unwrap(), at("d/e/f"));
        assert_eq!(without_links(Path::new("/..")).unwrap(), Path::new("/"));
        assert_eq!(without_links(&at("none")).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(without_links(&at("three")).is_err());
        assert!(open(&at("d/e/f"), OFlags::RDONLY).is_ok());
        assert_eq!(open(&at("two/f"), OFlags::RDONLY).unwrap_err(), rustix::io::Errno::LOOP);
        if rustix::process::geteuid().is_root() {
            lchown(at("one"), Some(4711), None).unwrap();
            let error = without_links(&at("two/f")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.to_string().contains("one: a symbolic link"), "{error}");
        }
    }
}
