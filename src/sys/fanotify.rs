//! What the kernel tells of changes in a whole file system (`fanotify(7)`), and whether a file is open for writing
//! (`fcntl(2)`, leases), which no crate at hand wraps.
//!
//! # Safety
//! The kernel is given strings that end with 0, and one buffer of this file's own that begins with its length, as
//! `struct file_handle` does; it writes to neither.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A changed directory, or that the kernel could not keep count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Something in the directory with this handle: `struct file_handle` as the kernel wrote it.
    Directory(Vec<u8>),
    /// Events were lost: anything may have changed.
    Lost,
}

/// Has the kernel tell of every file that is made, removed, renamed, closed after writing or given other attributes in the
/// file system that `root` is a directory of, whoever does it and by whichever mount.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `EINVAL`, `ENODEV`, `EOPNOTSUPP` or `EXDEV` if this kernel or file system cannot.
pub(crate) fn watch(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_REPORT_DIR_FID
        | libc::FAN_REPORT_NAME;
    // SAFETY: no memory is given.
    let group = unsafe { libc::fanotify_init(flags, 0) };
    if group < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, for this call alone.
    let group = unsafe { OwnedFd::from_raw_fd(group) };
    let mask = libc::FAN_CLOSE_WRITE
        | libc::FAN_CREATE
        | libc::FAN_DELETE
        | libc::FAN_MOVED_FROM
        | libc::FAN_MOVED_TO
        | libc::FAN_ATTRIB
        | libc::FAN_ONDIR;
    let add = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: the path is a string that ends with 0.
    let marked =
        unsafe { libc::fanotify_mark(group.as_raw_fd(), add, mask, root.as_raw_fd(), c".".as_ptr()) };
    if marked == 0 { Ok(group) } else { Err(io::Error::last_os_error()) }
}

/// What is in a buffer that was read from such a group. What is not understood is taken for a loss, so that nothing is
/// missed.
#[expect(clippy::disallowed_methods, reason = "the kernel's own order")]
pub(crate) fn parse(mut bytes: &[u8]) -> Vec<Told> {
    const HEADER: usize = size_of::<libc::fanotify_event_metadata>();
    // An information record begins with its kind, padding and length, and the file system's id.
    const INFORMATION: usize = 12;
    let mut all = Vec::new();
    while let Some(length) = bytes.first_chunk::<4>().map(|length| u32::from_ne_bytes(*length) as usize) {
        let Some((event, rest)) = bytes.split_at_checked(length).filter(|_| length >= HEADER) else {
            all.push(Told::Lost);
            break;
        };
        bytes = rest;
        let record = &event[HEADER..];
        let kind = record.first().copied();
        let is_directory = kind.is_some_and(|kind| {
            [libc::FAN_EVENT_INFO_TYPE_DFID_NAME, libc::FAN_EVENT_INFO_TYPE_DFID].contains(&kind)
        });
        let handle = record.get(INFORMATION..).filter(|_| is_directory);
        let of_length = handle.and_then(|handle| {
            let count = u32::from_ne_bytes(*handle.first_chunk::<4>()?) as usize;
            handle.get(..count.checked_add(8)?)
        });
        all.push(of_length.map_or(Told::Lost, |handle| Told::Directory(handle.to_vec())));
    }
    all
}

/// Opens the directory with this handle, as a place (`O_PATH`).
///
/// # Errors
/// `ESTALE` if it is no more; `EPERM` without CAP_DAC_READ_SEARCH.
pub(crate) fn open(root: BorrowedFd<'_>, handle: &[u8]) -> io::Result<OwnedFd> {
    if handle.len() < 8 || handle.len() > 8 + 128 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The kernel reads two numbers of four bytes at its beginning.
    let mut aligned = [0_u64; 17];
    for (word, part) in aligned.iter_mut().zip(handle.chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        #[expect(clippy::disallowed_methods, reason = "the kernel's own order")]
        {
            *word = u64::from_ne_bytes(bytes);
        }
    }
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: `aligned` begins with the count of the bytes that follow, all of which are in it: it has room for the longest
    // handle, and `handle` came whole from the kernel, which checks the count as well.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), aligned.as_mut_ptr(), flags) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor, for this call alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody has the regular file `file`, which is open for reading only, open for writing, or mapped so. Signals
/// must be blocked: one may come if it is opened just now.
///
/// # Errors
/// This file system has no leases.
pub(crate) fn is_being_written(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: no memory is given.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EAGAIN) { Ok(true) } else { Err(error) };
    }
    // At once, since whoever opens it waits for that.
    // SAFETY: no memory is given.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_cut_off_or_strange_is_a_loss() {
        assert_eq!(parse(&[]), []);
        assert_eq!(parse(&[200, 0, 0, 0, 1]), [Told::Lost]);
        assert_eq!(parse(&[0; 24]), [Told::Lost]);
        // An event without more, as that of an overflow.
        let mut event = [0; 24];
        event[0] = 24;
        assert_eq!(parse(&event), [Told::Lost]);
    }

    #[test]
    fn handles_of_a_wrong_length_are_refused() {
        let root = std::fs::File::open("/").unwrap();
        for length in [0, 7, 137, 4096] {
            assert!(open(root.as_fd(), &vec![0; length]).is_err());
        }
    }

    #[test]
    fn who_writes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let writer = std::fs::File::create(&path).unwrap();
        let reader = std::fs::File::open(&path).unwrap();
        assert!(is_being_written(reader.as_fd()).unwrap());
        drop(writer);
        assert!(!is_being_written(reader.as_fd()).unwrap());
        assert!(std::fs::File::options().write(true).open(&path).is_ok());
    }
}
