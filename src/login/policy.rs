//! How many logins of one user there can be at once, and a private root that several share.
//!
//! One that is shared has a *keeper*: a process that belongs to no login, and whose child the launcher is. Every login holds
//! the writing end of the user's FIFO; when the last has closed it, the keeper ends the root. The user's lock is taken while
//! a login looks for a keeper, and while a keeper finds out whether it is needed, and ends: so none goes in that is about to
//! be thrown out.
//!
//! ```text
//!   login ──── FIFO ───┐
//!   login ──── FIFO ───┴──> keeper ── pipe ──> launcher ── process 1
//!     └ its own command, beside process 1
//! ```

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde_json::json;

use super::quiet;
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::root::{Run, Session, child, sessions};
use crate::sys;

/// The files by which logins of one user know of each other.
pub(super) struct Places {
    directory: PathBuf,
}

impl Places {
    /// Those in `directory`, which is made if it is missing, and root's alone.
    ///
    /// # Errors
    /// `Denied` if it is somebody else's.
    pub(super) fn open(directory: PathBuf) -> Result<Self> {
        let failed =
            |error: io::Error| Error::io("Cannot keep track of logins in", error).on_path(&directory);
        DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(failed)?;
        let meta = directory.metadata().map_err(failed)?;
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
            let why = format!("Cannot trust {}: it is not root's alone", directory.display());
            return Err(Error::new(ErrorKind::Denied, why).advise("remove it"));
        }
        Ok(Self { directory })
    }

    fn file(&self, uid: u32, what: &str) -> PathBuf {
        self.directory.join(format!("{uid}.{what}"))
    }

    /// The user's only login, for as long as the lock is open. `None` if there is another.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn only(&self, uid: u32) -> Result<Option<OwnedFd>> {
        lock_if_free(&self.file(uid, "only"))
    }

    /// One of `most` logins that the user may have at once, for as long as the lock is open. `None` if there are as many.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn one_of(&self, uid: u32, most: usize) -> Result<Option<OwnedFd>> {
        for number in 0..most {
            let taken = lock_if_free(&self.file(uid, &format!("login-{number}")))?;
            if taken.is_some() {
                return Ok(taken);
            }
        }
        Ok(None)
    }

    /// The root that all logins of the user share, made if there is none: its name, and what keeps it for as long as it is
    /// open.
    ///
    /// # Errors
    /// What stands in the way of the private root.
    pub(super) fn shared(&self, uid: u32, mut run: Run) -> Result<(String, OwnedFd)> {
        let failed = |error: io::Error| Error::io("Cannot share a private root", error);
        let name = format!("login-{uid}");
        let lock = self.file(uid, "lock");
        let _turn = take_turn(&lock)?;
        let door = self.file(uid, "door");
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
        if let Ok(hold) = rustix::fs::open(&door, flags | OFlags::WRONLY, Mode::empty())
            && sessions(&run.sessions)?.iter().any(|session| session.name == name)
        {
            return Ok((name, hold));
        }
        let _ = std::fs::remove_file(&door);
        rustix::fs::mknodat(rustix::fs::CWD, &door, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .map_err(|error| failed(error.into()))?;
        let open =
            |how| rustix::fs::open(&door, flags | how, Mode::empty()).map_err(|error| failed(error.into()));
        let watched = open(OFlags::RDONLY)?;
        let hold = open(OFlags::WRONLY)?;
        run.name = Some(name.clone());
        let (ours, theirs) = control::pair().map_err(failed)?;
        let keeper = child::start_alone(|| {
            let _ = rustix::process::setsid();
            sys::process::keep_only(3, &[watched.as_fd(), theirs.as_fd()]).map_err(failed)?;
            let _ = rustix::thread::set_name(c"memdev-keeper");
            keep(run, watched.as_fd(), theirs, &lock, &door)
        });
        keeper.map_err(failed)?;
        let died = || Error::new(ErrorKind::Io, "The keeper of a shared private root has died");
        let (told, _) = control::receive(ours.as_fd()).map_err(failed)?.ok_or_else(died)?;
        control::error_from_json(&told).map_or(Ok((name, hold)), Err)
    }
}

fn open_lock(path: &Path) -> Result<OwnedFd> {
    let opened = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.map(OwnedFd::from).map_err(|error| Error::io("Cannot open", error).on_path(path))
}

fn lock_if_free(path: &Path) -> Result<Option<OwnedFd>> {
    let lock = open_lock(path)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(Error::io("Cannot count the logins of a user", error)),
    }
}

fn take_turn(path: &Path) -> Result<OwnedFd> {
    let lock = open_lock(path)?;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("Cannot lock", error).on_path(path)),
        }
    }
}

/// What the keeper does: starts the root, tells `told` what came of it, and ends it when nobody needs it any more.
fn keep(run: Run, watched: BorrowedFd<'_>, told: OwnedFd, lock: &Path, door: &Path) -> Result<()> {
    let held = match Held::start(run) {
        Ok((held, _)) => {
            let _ = control::send(told.as_fd(), &json!({}), &[]);
            held
        }
        Err(error) => {
            let _ = control::send(told.as_fd(), &control::error_to_json(&error), &[]);
            return Ok(());
        }
    };
    drop(told);
    let unused = |wait: Option<&Timespec>| {
        let mut fds =
            [PollFd::from_borrowed_fd(watched, PollFlags::IN), PollFd::new(&held.watch, PollFlags::IN)];
        let _ = poll(&mut fds, wait);
        (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
    };
    loop {
        let (left, over) = unused(None);
        if !left && !over {
            continue;
        }
        let _turn = take_turn(lock)?;
        if over || unused(Some(&Timespec::default())).0 {
            let _ = std::fs::remove_file(door);
            drop(held);
            return Ok(());
        }
    }
}

/// A private root without a command, made by a child of this process.
pub(super) struct Held {
    launcher: Pid,
    /// Becomes readable when the root is gone.
    pub(super) watch: OwnedFd,
    /// Closed, it is to end.
    until: Option<io::PipeWriter>,
}

/// How long a private root may take to be made. What it waits for is a server that does not answer.
const MAKING: Duration = Duration::from_secs(60);

impl Held {
    /// Makes it; returns when it is there.
    ///
    /// # Errors
    /// What stands in its way.
    pub(super) fn start(run: Run) -> Result<(Self, Session)> {
        let failed = |error: io::Error| Error::io("Cannot start a launcher", error);
        let (reader, until) = io::pipe().map_err(failed)?;
        let (ours, theirs) = control::pair().map_err(failed)?;
        let directory = run.sessions.clone();
        let launcher = child::start(|| -> Result<()> {
            sys::process::keep_only(3, &[reader.as_fd(), theirs.as_fd()]).map_err(failed)?;
            child::let_go_of_standard().map_err(failed)?;
            let mut said = false;
            let ended = quiet(|| {
                run.hold(reader.as_fd(), |session| {
                    said = true;
                    control::send(theirs.as_fd(), &json!({ "name": session.name }), &[]).map_err(failed)
                })
            });
            match ended {
                Err(error) if !said => {
                    control::send(theirs.as_fd(), &control::error_to_json(&error), &[]).map_err(failed)
                }
                _ => Ok(()),
            }
        })
        .map_err(failed)?;
        drop((reader, theirs));
        let started = (|| {
            let watch = rustix::process::pidfd_open(launcher, PidfdFlags::empty())
                .map_err(|error| failed(error.into()))?;
            let died = || Error::new(ErrorKind::Io, "The launcher of a private root has died");
            let mut fds = [PollFd::new(&ours, PollFlags::IN)];
            let come = loop {
                match poll(&mut fds, Timespec::try_from(MAKING).ok().as_ref()) {
                    Err(rustix::io::Errno::INTR) => {}
                    come => break matches!(come, Ok(1..)),
                }
            };
            if !come {
                let _ = rustix::process::pidfd_send_signal(&watch, Signal::KILL);
                return Err(Error::new(ErrorKind::Io, "A private root takes too long to be made"));
            }
            let (told, _) = control::receive(ours.as_fd()).map_err(failed)?.ok_or_else(died)?;
            if let Some(error) = control::error_from_json(&told) {
                return Err(error);
            }
            let name = told["name"].as_str().unwrap_or_default();
            let session = sessions(&directory)?.into_iter().find(|session| session.name == name);
            Ok((watch, session.ok_or_else(died)?))
        })();
        match started {
            Ok((watch, session)) => Ok((Self { launcher, watch, until: Some(until) }, session)),
            Err(error) => {
                drop(until);
                let _ = rustix::process::waitpid(Some(launcher), WaitOptions::empty());
                Err(error)
            }
        }
    }
}

impl Drop for Held {
    /// Ends it, and waits until it is gone.
    fn drop(&mut self) {
        self.until = None;
        let _ = rustix::process::waitpid(Some(self.launcher), WaitOptions::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_one_only_login() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(dir.path().join("users")).unwrap();
        let first = places.only(1000).unwrap().unwrap();
        assert!(places.only(1000).unwrap().is_none());
        assert!(places.only(1001).unwrap().is_some());
        drop(first);
        assert!(places.only(1000).unwrap().is_some());
    }

    #[test]
    fn the_directory_must_be_ones_own() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(Places::open(path).err().unwrap().kind(), ErrorKind::Denied);
    }
}
