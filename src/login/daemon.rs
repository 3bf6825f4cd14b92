//! `memdev logind`: waits for logins, and starts a worker for each.

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, WaitOptions};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};

use super::talk::{Answer, be_patient};
use super::worker;
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::root::child;
use crate::root::launcher::may_begin;
use crate::root::signals::Signals;
use crate::sys;
use crate::sys::peer;

/// The most logins at once, of one user and of all. Who connects is counted here, but for root, who does so for everybody by login
/// programs; who logs in is counted by its worker, however that came.
pub(super) const MOST_OF_ONE: usize = 64;
const MOST: usize = 1024;

/// How many may wait to be taken in.
const BACKLOG: i32 = 128;

/// How long to wait before a login is taken in after there was no room for one.
const PAUSE: Duration = Duration::from_millis(200);

/// The daemon that makes private roots for those who log in.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// The settings: [`FILE`](super::FILE) unless there is a reason. Read anew for each login.
    pub config: PathBuf,
    /// Where it listens: [`SOCKET`](super::SOCKET) unless there is a reason. The directory is made if it is missing.
    pub socket: PathBuf,
    /// Where attachments are written down.
    pub attachments: PathBuf,
    /// Where running sessions are written down.
    pub sessions: PathBuf,
    /// Where files are kept that could not be delivered: [`SPOOL`](crate::carry::SPOOL) unless there is a reason.
    pub spool: PathBuf,
    /// Where it is written down who carries: [`STATE`](crate::carry::STATE) unless there is a reason.
    pub carriers: PathBuf,
}

impl Daemon {
    /// Where logins of one user know of each other.
    pub(super) fn users(&self) -> PathBuf {
        self.socket.with_file_name("users")
    }

    /// Serves logins until this process gets SIGTERM or SIGINT. Those that are there then stay.
    ///
    /// # Errors
    /// `Denied` if this process is not root's, `InUse` if another daemon is there, and what else the system says.
    pub fn run(self) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(ErrorKind::Denied, "Logins are served by root").advise("run it as root"));
        }
        may_begin()?;
        // It is the user's terminal that counts.
        sys::inherited::remove_variables(&["TERM"]);
        let signals = Signals::catch(&[SIGTERM, SIGINT, SIGCHLD])
            .map_err(|error| Error::io("Cannot watch for signals", error))?;
        let directory = self.socket.parent().unwrap_or(Path::new("/"));
        let _alone = claim(directory)?;
        let listener = listen(&self.socket)?;
        tracing::info!(socket = %self.socket.display(), "Logins are served");
        let mut workers: HashMap<Pid, u32> = HashMap::new();
        loop {
            let mut fds = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("Cannot wait for logins", error)),
            }
            let asked = !fds[0].revents().is_empty();
            if signals.take().iter().any(|signal| [SIGTERM, SIGINT].contains(signal)) {
                let _ = std::fs::remove_file(&self.socket);
                return Ok(());
            }
            while let Ok(Some((pid, _))) = rustix::process::wait(WaitOptions::NOHANG) {
                workers.remove(&pid);
            }
            if asked && let Err(error) = self.take_in(&listener, &signals, &mut workers) {
                tracing::warn!(%error, "Cannot take in a login");
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn take_in(
        &self,
        listener: &OwnedFd,
        signals: &Signals,
        workers: &mut HashMap<Pid, u32>,
    ) -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC;
        let socket = match rustix::net::accept_with(listener, flags) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let uid = peer::credentials(socket.as_fd())?.uid;
        let own = workers.values().filter(|&&user| user == uid).count();
        if workers.len() >= MOST || uid != 0 && own >= MOST_OF_ONE {
            tracing::warn!(uid, "Login refused: too many at once");
            let answer = Answer::Refused("there are too many logins".to_owned());
            // Who has gone needs none. That is no failure of the daemon's, after which others would have to wait.
            let _ = be_patient(socket.as_fd());
            let _ = control::send(socket.as_fd(), &answer.to_json(), &[]);
            return Ok(());
        }
        let worker = child::start_alone(|| -> io::Result<()> {
            signals.forget();
            let _ = rustix::process::setsid();
            let _ = rustix::thread::set_name(c"memdev-worker");
            sys::process::keep_only(3, &[socket.as_fd()])?;
            worker::serve(self, &socket, uid);
            Ok(())
        })?;
        workers.insert(worker, uid);
        Ok(())
    }
}

/// Makes the daemon's directory, and takes it for this process.
fn claim(directory: &Path) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::io("Cannot listen for logins in", error).on_path(directory);
    if !directory.exists() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
    }
    let meta = directory.metadata().map_err(failed)?;
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        let why = format!("Cannot trust {}: others can write there", directory.display());
        return Err(Error::new(ErrorKind::Denied, why).advise("use a directory that is root's"));
    }
    let path = directory.join("lock");
    let lock = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
    let lock = OwnedFd::from(lock.map_err(failed)?);
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let error = Error::new(ErrorKind::InUse, "Another 'memdev logind' is there already, in");
            Err(error.on(directory.display()))
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// Listens for everybody. Whoever was there before has gone.
fn listen(path: &Path) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::io("Cannot listen at", error).on_path(path);
    let _ = std::fs::remove_file(path);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let made = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let socket = made.map_err(|error| failed(error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    rustix::net::bind(&socket, &address).map_err(|error| failed(error.into()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok(socket)
}
