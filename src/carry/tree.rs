//! The carried directory of a private root, seen from outside.
//!
//! Whoever is inside may be hostile, and changes the tree while it is looked at. So nothing is reached but by one descriptor
//! of the private root's own file system, by `openat2` that follows no symbolic link, leaves neither the tree nor the mount;
//! and of what is opened, nothing is read that is no regular file.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::entry::{Kind, TICK, Time, Version};
use super::known::hash_of_attributes;
use super::stores::{Attribute, Attributes};
use crate::sys::fanotify;

/// The most that is kept of a file's attributes, in bytes.
const ATTRIBUTES_MAX: usize = 64 << 10;

/// How often something is opened while somebody renames something.
const TRIES: u32 = 100;

/// Below a descriptor of a directory, by paths from there. The same for where files come from and where they go to.
pub(crate) struct Beneath(pub(crate) OwnedFd);

impl Beneath {
    /// Opens what is at `path`; the directory itself by an empty one.
    pub(crate) fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.0, path, flags, mode, resolve) {
                Err(Errno::INTR) => {}
                // Somebody renames something meanwhile; or has a lease, by which it can say so for as long as it likes.
                Err(Errno::AGAIN) if tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    /// The directory that `path` is in, and its name there.
    pub(crate) fn parent<'a>(&self, path: &'a Path) -> rustix::io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, name))
    }

    /// What is at `path`; `None` if nothing is, or what was above it is no directory any more.
    pub(crate) fn version(&self, path: &Path) -> io::Result<Option<Version>> {
        match self.open(path, OFlags::PATH, Mode::empty()).and_then(|fd| rustix::fs::fstat(&fd)) {
            Ok(stat) => Ok(Some(Version::of(&stat))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What is in the directory.
    pub(crate) fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Version)>> {
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let mut all = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            match rustix::fs::statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => all.push((OsString::from_vec(name.to_vec()), Version::of(&stat))),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(all)
    }

    /// Where the symbolic link points to.
    pub(crate) fn target(&self, path: &Path) -> io::Result<OsString> {
        let link = self.open(path, OFlags::PATH, Mode::empty())?;
        Ok(OsString::from_vec(rustix::fs::readlinkat(&link, "", Vec::new())?.into_bytes()))
    }
}

/// The carried directory.
pub(crate) struct Tree {
    /// The root directory of the file system.
    root: Beneath,
    /// The carried one, from there.
    place: PathBuf,
}

impl Tree {
    /// The directory `place`, from `root`, the root directory of a file system, on.
    pub(crate) fn new(root: OwnedFd, place: PathBuf) -> Self {
        Self { root: Beneath(root), place }
    }

    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.0.as_fd()
    }

    pub(crate) fn beneath(&self) -> &Beneath {
        &self.root
    }

    /// The path from the root of the file system.
    pub(crate) fn whole(&self, path: &Path) -> PathBuf {
        // To join an empty one would add a slash.
        if path.as_os_str().is_empty() { self.place.clone() } else { self.place.join(path) }
    }

    pub(crate) fn version(&self, path: &Path) -> io::Result<Option<Version>> {
        self.root.version(&self.whole(path))
    }

    pub(crate) fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Version)>> {
        self.root.list(&self.whole(path))
    }

    pub(crate) fn target(&self, path: &Path) -> io::Result<OsString> {
        self.root.target(&self.whole(path))
    }

    /// The attributes of a file or directory that are for everybody's use.
    pub(crate) fn attributes(&self, path: &Path) -> io::Result<Attributes> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        // What is no file or directory by now is not opened: its device's driver would be asked.
        match self.version(path)?.map(|version| version.kind) {
            Some(Kind::File | Kind::Directory) => {}
            _ => return Ok(Vec::new()),
        }
        let file = self.root.open(&self.whole(path), flags, Mode::empty())?;
        user_attributes(file.as_fd())
    }

    /// What is to be known of a directory's attributes; 0 of anything else.
    pub(crate) fn hash_of_attributes(&self, path: &Path, kind: Kind) -> io::Result<u64> {
        if kind == Kind::Directory { Ok(hash_of_attributes(&self.attributes(path)?)) } else { Ok(0) }
    }

    /// Opens the regular file `path` to be read as it is now.
    ///
    /// # Errors
    /// `ResourceBusy` if it changes just now; `NotFound` if it is no regular file.
    pub(crate) fn read(&self, path: &Path, at_rest: bool) -> io::Result<Source> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOATIME;
        // What is not a file is not even opened: see `attributes`. Device nodes are dead on this mount in any case.
        if self.version(path)?.is_none_or(|version| version.kind != Kind::File) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = match self.root.open(&self.whole(path), flags, Mode::empty()) {
            // Somebody has a lease on it, and is told now that it is wanted.
            Err(Errno::AGAIN) => return Err(busy()),
            result => File::from(result?),
        };
        let stat = rustix::fs::fstat(&file)?;
        let version = Version::of(&stat);
        if version.kind != Kind::File {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !at_rest {
            let age = Time::now().since(version.changed);
            // Where there are no leases, a change is seen by its time alone.
            if (0.0..TICK).contains(&age) || fanotify::is_being_written(file.as_fd()).unwrap_or(false) {
                return Err(busy());
            }
        }
        // In units of 512 bytes, whatever the file system's blocks are.
        let held = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let is_sparse = held < version.size && version.size > 1 << 20;
        Ok(Source { file, version, at: 0, is_sparse })
    }
}

/// Those of a file that are for everybody's use, and not memdev's.
pub(crate) fn user_attributes(file: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut names = vec![0; ATTRIBUTES_MAX];
    let length = match rustix::fs::flistxattr(file, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::RANGE) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut all = Vec::new();
    let mut left = ATTRIBUTES_MAX;
    for name in names[..length].split(|&byte| byte == 0) {
        if !name.starts_with(b"user.") || name.starts_with(b"user.memdev") {
            continue;
        }
        let mut value = vec![0; left];
        match rustix::fs::fgetxattr(file, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                left -= length;
                all.push((OsString::from_vec(name.to_vec()), value));
            }
            Err(Errno::NODATA | Errno::RANGE) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all)
}

/// Removes those of a file that are for everybody's use, and not among these.
pub(crate) fn remove_other_attributes(file: BorrowedFd<'_>, kept: &[Attribute]) -> io::Result<()> {
    for (name, _) in user_attributes(file)? {
        if !kept.iter().any(|(kept, _)| *kept == name) {
            match rustix::fs::fremovexattr(file, name) {
                Ok(()) | Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn busy() -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, "it changes while it is read")
}

/// One version of a file, that is read to its end or not at all: its last bytes come only if nothing has changed since the
/// first.
pub(crate) struct Source {
    file: File,
    pub(crate) version: Version,
    at: u64,
    pub(crate) is_sparse: bool,
}

impl Source {
    /// The file, for whoever copies only what is not a hole, and asks [`Self::verify`] then.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether it is still what it was when it was opened.
    ///
    /// # Errors
    /// `ResourceBusy` if it is not.
    pub(crate) fn verify(&self) -> io::Result<()> {
        let now = Version::of(&rustix::fs::fstat(&self.file)?);
        if now == self.version { Ok(()) } else { Err(busy()) }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.version.size - self.at;
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let got = self.file.read_at(&mut buffer[..most], self.at)?;
        if got == 0 {
            return Err(busy());
        }
        self.at += got as u64;
        if self.at == self.version.size {
            self.verify()?;
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn tree(dir: &Path) -> Tree {
        Tree::new(File::open(dir).unwrap().into(), "home/u".into())
    }

    fn at_home() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home/u");
        fs::create_dir_all(&home).unwrap();
        (dir, home)
    }

    #[test]
    fn no_link_leads_out() {
        let (dir, home) = at_home();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        symlink(outside.path(), home.join("out")).unwrap();
        symlink(outside.path().join("secret"), home.join("file")).unwrap();
        let tree = tree(dir.path());
        assert!(tree.read(Path::new("out/secret"), true).is_err());
        assert!(tree.read(Path::new("file"), true).is_err());
        assert!(tree.list(Path::new("out")).is_err());
        assert_eq!(tree.version(Path::new("out/secret")).unwrap(), None);
        assert_eq!(tree.version(Path::new("file")).unwrap().unwrap().kind, Kind::Link);
        assert!(tree.version(Path::new("../../../etc")).is_err());
        // Above the carried directory as well.
        fs::rename(dir.path().join("home"), dir.path().join("old")).unwrap();
        symlink("/", dir.path().join("home")).unwrap();
        assert!(tree.list(Path::new("")).is_err());
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let (dir, home) = at_home();
        rustix::fs::mknodat(rustix::fs::CWD, home.join("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(home.join("socket")).unwrap();
        let tree = tree(dir.path());
        for name in ["pipe", "socket", "none"] {
            assert_eq!(tree.read(Path::new(name), true).err().unwrap().kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    fn the_end_of_a_file_that_has_changed_is_not_given() {
        let (dir, home) = at_home();
        fs::write(home.join("x"), "0123456789").unwrap();
        let tree = tree(dir.path());
        let mut whole = String::new();
        tree.read(Path::new("x"), true).unwrap().read_to_string(&mut whole).unwrap();
        assert_eq!(whole, "0123456789");

        let mut source = tree.read(Path::new("x"), true).unwrap();
        source.read_exact(&mut [0; 4]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        fs::write(home.join("x"), "9876543210").unwrap();
        let error = source.read_to_string(&mut String::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);

        let mut source = tree.read(Path::new("x"), true).unwrap();
        fs::write(home.join("x"), "").unwrap();
        assert!(source.read_to_end(&mut Vec::new()).is_err());
    }

    /// Whoever has a lease on a file is asked to give it back before it is opened, which takes as long as they like (45 s at
    /// the most). It was asked for again and again, with all of a processor, and once more for each file.
    #[test]
    fn a_lease_is_not_waited_for() {
        use std::io::BufRead;
        const HOLD: &str = "import fcntl, os, signal, sys\nsignal.signal(signal.SIGIO, signal.SIG_IGN)\n\
            fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
            print(flush=True)\nsys.stdin.read()";
        let (dir, home) = at_home();
        fs::write(home.join("x"), "held").unwrap();
        let mut command = std::process::Command::new("python3");
        command.args(["-c", HOLD]).arg(home.join("x"));
        let pipe = std::process::Stdio::piped;
        let mut holder = command.stdin(pipe()).stdout(pipe()).spawn().unwrap();
        io::BufReader::new(holder.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let read = tree(dir.path()).read(Path::new("x"), true);
        drop(holder.stdin.take());
        holder.wait().unwrap();
        assert_eq!(read.err().unwrap().kind(), io::ErrorKind::ResourceBusy);
        assert!(tree(dir.path()).read(Path::new("x"), true).is_ok());
    }

    #[test]
    fn a_file_that_somebody_writes_is_left_for_later() {
        let (dir, home) = at_home();
        let writer = File::create(home.join("x")).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let tree = tree(dir.path());
        let error = tree.read(Path::new("x"), false).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        drop(writer);
        assert!(tree.read(Path::new("x"), false).is_ok());
        // Whoever is kept from running in between sees it a tick later: not every time.
        let is_busy = || {
            fs::write(home.join("x"), "now").unwrap();
            tree.read(Path::new("x"), false).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
        };
        assert!((0..100).any(|_| is_busy()), "within a tick nothing is sure");
    }
}
