//! What is in a directory in memory, on its way from one session to its fork: read by a process that is in the one, with no
//! more rights than its root has, and written by one that is in the other. So it does not matter that either may lie.
//!
//! ```text
//!   D F L H P W  path, owner, group, mode, time, attributes;  F: pieces, L: target, H: the path of the same file
//!   E                                                          pieces: length, bytes; or ZEROES, length; a length of 0 ends
//! ```
//!
//! Sockets are left out: nobody listens on them in the fork. It is not of one instant: who reads has to take what is there.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// The longest piece of a file.
const PIECE: usize = 64 << 10;
/// In place of a piece's length: so many zeroes, which are not sent, and take no memory there.
const ZEROES: u32 = u32::MAX;

/// The most of a path, a target, a name or a value.
const BYTES_MAX: usize = 64 << 10;
const ATTRIBUTES_MAX: u32 = 1024;

/// Sends what is in `directory`, itself included, as far as it is on the device `device`.
///
/// # Errors
/// That it cannot be sent. What cannot be read is left out.
pub(super) fn send(directory: &Path, device: u64, to: impl Write) -> io::Result<()> {
    let mut sender = Sender { to: BufWriter::new(to), device, seen: HashMap::new() };
    if fs::symlink_metadata(directory).is_ok_and(|metadata| metadata.is_dir() && metadata.dev() == device) {
        sender.send(directory, Path::new("."))?;
    }
    sender.to.write_all(b"E")?;
    sender.to.flush()
}

struct Sender<W: Write> {
    to: BufWriter<W>,
    device: u64,
    /// Files with several names, by inode.
    seen: HashMap<u64, PathBuf>,
}

impl<W: Write> Sender<W> {
    fn send(&mut self, from: &Path, path: &Path) -> io::Result<()> {
        let Ok(metadata) = fs::symlink_metadata(from) else { return Ok(()) };
        let kind = metadata.file_type();
        if metadata.dev() != self.device {
            // Something is mounted there, which needs something to be mounted on.
            self.entry(if kind.is_dir() { b'D' } else { b'F' }, from, path, &metadata)?;
            return if kind.is_dir() { Ok(()) } else { self.to.write_all(&[0; 4]) };
        }
        if !kind.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = self.seen.get(&metadata.ino()).cloned() {
                self.entry(b'H', from, path, &metadata)?;
                return self.bytes(first.as_os_str().as_bytes());
            }
            self.seen.insert(metadata.ino(), path.to_owned());
        }
        if kind.is_dir() {
            self.entry(b'D', from, path, &metadata)?;
            let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
            for entry in entries.flatten() {
                self.send(&entry.path(), &path.join(entry.file_name()))?;
            }
        } else if kind.is_file() {
            // Not by way of a link that has taken its place, and without waiting for anybody.
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let Ok(file) = File::options().read(true).custom_flags(flags).open(from) else { return Ok(()) };
            self.entry(b'F', from, path, &metadata)?;
            self.pieces(file)?;
        } else if kind.is_symlink() {
            let Ok(target) = fs::read_link(from) else { return Ok(()) };
            self.entry(b'L', from, path, &metadata)?;
            self.bytes(target.as_os_str().as_bytes())?;
        } else if kind.is_fifo() {
            self.entry(b'P', from, path, &metadata)?;
        } else if kind.is_char_device() && metadata.rdev() == 0 {
            // By which an overlay says that something is not there.
            self.entry(b'W', from, path, &metadata)?;
        }
        Ok(())
    }

    fn entry(&mut self, kind: u8, from: &Path, path: &Path, metadata: &Metadata) -> io::Result<()> {
        self.to.write_all(&[kind])?;
        self.bytes(path.as_os_str().as_bytes())?;
        for number in [metadata.uid(), metadata.gid(), metadata.mode() & 0o7777] {
            self.to.write_all(&number.to_be_bytes())?;
        }
        self.to.write_all(&metadata.mtime().to_be_bytes())?;
        self.to.write_all(&metadata.mtime_nsec().to_be_bytes())?;
        let attributes = if kind == b'H' { Vec::new() } else { attributes(from) };
        self.to.write_all(&u32::try_from(attributes.len()).unwrap_or(0).to_be_bytes())?;
        for (name, value) in attributes {
            self.bytes(name.as_bytes())?;
            self.bytes(&value)?;
        }
        Ok(())
    }

    /// What is in the file, as long as it is at this moment. Holes are passed over: a file that takes no memory may be of any
    /// length.
    fn pieces(&mut self, mut file: File) -> io::Result<()> {
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            // Where nobody knows of holes there are none, and behind the last data there is nothing.
            let data = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => data.min(size),
                Err(rustix::io::Errno::NXIO) => size,
                Err(_) => at,
            };
            if data > at {
                self.to.write_all(&ZEROES.to_be_bytes())?;
                self.to.write_all(&(data - at).to_be_bytes())?;
                at = data;
                continue;
            }
            let wanted = usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE));
            let got = match file.seek(SeekFrom::Start(at)).and_then(|_| file.read(&mut piece[..wanted])) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // As if it ended here.
                Ok(0) | Err(_) => break,
                Ok(got) => got,
            };
            self.bytes(&piece[..got])?;
            at += got as u64;
        }
        self.to.write_all(&[0; 4])
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes())?;
        self.to.write_all(bytes)
    }
}

/// The attributes of a file, as far as they can be read, and are not too many.
fn attributes(path: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut names = vec![0; BYTES_MAX];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names) else { return Vec::new() };
    let names = names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let get = |name: &[u8]| {
        let mut value = vec![0; BYTES_MAX];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).ok()?;
        value.truncate(length);
        Some((OsString::from_vec(name.to_vec()), value))
    };
    names.filter_map(get).take(ATTRIBUTES_MAX as usize).collect()
}

/// What comes, as [`send`] has sent it, one directory after the other.
pub(super) struct Incoming<R: Read>(BufReader<R>);

impl<R: Read> Incoming<R> {
    pub(super) fn new(from: R) -> Self {
        Self(BufReader::new(from))
    }

    /// Makes the next directory's contents in `directory`, which is there; without one it is passed over.
    ///
    /// # Errors
    /// What the file system says, above all that it is full; that what comes makes no sense.
    pub(super) fn make(&mut self, directory: Option<&Path>) -> io::Result<()> {
        // What is made in a directory changes its time.
        let mut times = Vec::new();
        loop {
            let mut kind = [0];
            self.0.read_exact(&mut kind)?;
            if kind == *b"E" {
                break;
            }
            let path = self.path()?;
            let path =
                directory.map(|directory| Ok::<_, io::Error>(directory.join(inner(&path)?))).transpose()?;
            let (user, group, mode) = (self.number()?, self.number()?, self.number()?);
            let time = Timespec { tv_sec: self.long()?, tv_nsec: self.long()? };
            let attributes = self.attributes()?;
            let target = if b"LH".contains(&kind[0]) { self.path()? } else { PathBuf::new() };
            let Some((path, directory)) = path.zip(directory) else {
                if kind == *b"F" {
                    self.file(None)?;
                }
                continue;
            };
            match kind[0] {
                b'D' => match fs::create_dir(&path) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => {}
                },
                b'F' => {
                    let file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
                    self.file(Some(file))?;
                }
                b'L' => symlink(target, &path)?,
                b'H' => {
                    fs::hard_link(directory.join(inner(&target)?), &path)?;
                    continue;
                }
                b'P' => rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0)?,
                b'W' => rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), 0)?,
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
            // Who owned it there may have no number here.
            let _ = lchown(&path, Some(user), Some(group));
            if kind != *b"L" {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
            for (name, value) in attributes {
                let _ = rustix::fs::lsetxattr(&path, name, &value, XattrFlags::empty());
            }
            times.push((path, time));
        }
        for (path, time) in times.into_iter().rev() {
            let times = Timestamps { last_access: time, last_modification: time };
            let _ = rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW);
        }
        Ok(())
    }

    /// What is in a file; without one it is passed over.
    fn file(&mut self, mut file: Option<File>) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut length: u64 = 0;
        loop {
            let count = match self.number()? {
                0 => return file.map_or(Ok(()), |file| file.set_len(length)),
                ZEROES => {
                    length = length.saturating_add(self.long()?.cast_unsigned());
                    if let Some(file) = &mut file {
                        file.seek(SeekFrom::Start(length))?;
                    }
                    continue;
                }
                count => count,
            };
            length += u64::from(count);
            let piece = piece.get_mut(..count as usize).ok_or(io::ErrorKind::InvalidData)?;
            self.0.read_exact(piece)?;
            if let Some(file) = &mut file {
                file.write_all(piece)?;
            }
        }
    }

    fn attributes(&mut self) -> io::Result<Vec<(OsString, Vec<u8>)>> {
        let count = self.number()?;
        if count > ATTRIBUTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        (0..count).map(|_| Ok((OsString::from_vec(self.bytes()?), self.bytes()?))).collect()
    }

    fn path(&mut self) -> io::Result<PathBuf> {
        Ok(OsString::from_vec(self.bytes()?).into())
    }

    fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let length = self.number()? as usize;
        if length > BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn long(&mut self) -> io::Result<i64> {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes)?;
        Ok(i64::from_be_bytes(bytes))
    }
}

/// The path, if it leads nowhere but down.
fn inner(path: &Path) -> io::Result<&Path> {
    let fine = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if fine { Ok(path) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &Path) -> u64 {
        fs::symlink_metadata(path).unwrap().dev()
    }

    #[test]
    fn a_directory_arrives_as_it_was() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/file"), b"here").unwrap();
        fs::set_permissions(at("dir/file"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::hard_link(at("dir/file"), at("same")).unwrap();
        symlink("/nowhere", at("link")).unwrap();
        rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(10 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (8 << 20) + 7).unwrap();
        // Of any length, without taking memory.
        File::create(at("endless")).unwrap().set_len(1 << 42).unwrap();
        let has_attributes = rustix::fs::lsetxattr(at("same"), "user.x", b"y", XattrFlags::empty()).is_ok();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let past = Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };
        let times = Timestamps { last_access: past, last_modification: past };
        rustix::fs::utimensat(CWD, at("dir"), &times, AtFlags::empty()).unwrap();

        let mut bytes = Vec::new();
        send(from.path(), device(from.path()), &mut bytes).unwrap();
        let once = bytes.len();
        send(from.path(), device(from.path()), &mut bytes).unwrap();
        assert!(once < 1 << 20, "what is zero is not sent");
        send(&at("dir"), device(from.path()), &mut bytes).unwrap();
        let mut incoming = Incoming::new(&bytes[..]);
        incoming.make(None).unwrap();
        incoming.make(Some(to.path())).unwrap();
        let made = |name: &str| to.path().join(name);
        assert_eq!(fs::read(made("dir/file")).unwrap(), b"here");
        let metadata = |name: &str| fs::symlink_metadata(made(name)).unwrap();
        assert_eq!(metadata("same").ino(), metadata("dir/file").ino());
        assert_eq!(metadata("dir/file").mode() & 0o7777, 0o640);
        assert_eq!(fs::read_link(made("link")).unwrap(), Path::new("/nowhere"));
        assert!(metadata("fifo").file_type().is_fifo());
        assert_eq!(fs::read(made("sparse")).unwrap(), fs::read(at("sparse")).unwrap());
        assert!(metadata("sparse").blocks() < 2000, "holes stay holes");
        assert_eq!((metadata("endless").len(), metadata("endless").blocks()), (1 << 42, 0));
        assert_eq!((metadata("dir").mtime(), metadata("dir").mtime_nsec()), (1_000_000_000, 5));
        assert!(!made("socket").exists());
        if has_attributes {
            let mut value = [0; 8];
            assert_eq!(rustix::fs::lgetxattr(made("dir/file"), "user.x", &mut value), Ok(1));
        }
        let second = tempfile::tempdir().unwrap();
        incoming.make(Some(second.path())).unwrap();
        assert_eq!(fs::read(second.path().join("file")).unwrap(), b"here");
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for path in ["../x", "/x", "a/../../x"] {
            let mut bytes = vec![b'D'];
            bytes.extend(u32::try_from(path.len()).unwrap().to_be_bytes());
            bytes.extend(path.as_bytes());
            bytes.extend([0; 32]);
            let to = tempfile::tempdir().unwrap();
            assert!(Incoming::new(&bytes[..]).make(Some(to.path())).is_err(), "{path}");
        }
        assert!(Incoming::new(&b"D\xff\xff\xff\xff"[..]).make(None).is_err());
        assert!(Incoming::new(&b""[..]).make(None).is_err());
    }

    #[test]
    fn another_file_system_is_left_out() {
        let from = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        send(from.path(), device(from.path()) + 1, &mut bytes).unwrap();
        assert_eq!(bytes, b"E");
    }
}
