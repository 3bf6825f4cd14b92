//! One file of the daemon's: the threads that answer the kernel for it, out of a session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::control::Told;
use super::fuse::disk::{Asked, Disk};
use rustix::event::{EventfdFlags, eventfd};

use crate::client;
use crate::error::{Error, ErrorKind, Result};

/// What is served.
pub(super) struct File {
    /// What the file is called.
    pub(super) name: String,
    /// Where the kernel's requests come from.
    pub(super) requests: OwnedFd,
    pub(super) told: Told,
    pub(super) read_only: bool,
    /// Whether it is used as a file, and not as what is behind a device with a cache.
    pub(super) cached: bool,
}

/// What is to be done when the session's server is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// The process ends, and everything that waits for the kernel fails with it.
    End,
    /// The file stays, and everything that is asked of it fails.
    Stay,
}

/// The end of a thread, which somebody waits for.
struct End(Arc<OwnedFd>);

impl Drop for End {
    fn drop(&mut self) {
        // It is the only one that is ever written.
        let _ = rustix::io::write(&*self.0, &[1; 8]);
    }
}

/// A file that is served until nobody has its file system any more.
pub(super) struct Serving {
    /// Counts to one when it is over.
    over: Arc<OwnedFd>,
    thread: JoinHandle<io::Result<()>>,
    /// The connections to the session.
    sockets: Vec<OwnedFd>,
}

impl Serving {
    /// Starts to answer the kernel by asking the session over `sockets`.
    ///
    /// # Errors
    /// The system has no more threads or descriptors.
    pub(super) fn start(file: File, sockets: Vec<OwnedFd>, loss: Loss) -> Result<Self> {
        let failed = |error| Error::io("Cannot serve the file to the kernel", error);
        let ending = Arc::new(AtomicBool::new(false));
        let mut lanes = Vec::new();
        for socket in &sockets {
            let socket = socket.try_clone().map_err(failed)?;
            let (submitter, receiver) = client::pipeline::<Asked>(socket).map_err(failed)?;
            lanes.push(submitter);
            let ending = Arc::clone(&ending);
            spawn("replies", move || {
                let error = receiver.run(Asked::answer);
                if !ending.load(Ordering::Acquire) {
                    tracing::error!("The device has lost its server: {error}");
                    if loss == Loss::End {
                        std::process::exit(1);
                    }
                }
            })?;
        }
        let mut config = fuser::Config::default();
        config.n_threads = Some(lanes.len());
        let disk = Disk::new(file.name, file.told, (file.read_only, file.cached), lanes, ending);
        let session =
            fuser::Session::from_fd(disk, file.requests, fuser::SessionACL::All, config).map_err(failed)?;
        let over = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let over = Arc::new(over);
        let end = End(Arc::clone(&over));
        let thread = spawn("requests", move || {
            // Told when it has ended, in whichever way.
            let _end = end;
            match session.run() {
                // What the kernel says where others find ENODEV, if it lets go of the file system just when it hands over a
                // request.
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
                result => result,
            }
        })?;
        Ok(Self { over, thread, sockets })
    }

    /// Readable when it is over.
    pub(super) fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    /// Whether it is over.
    pub(super) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// From now on everything that is asked of it fails.
    pub(super) fn give_up(&self) {
        for socket in &self.sockets {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    /// Waits until it is over.
    ///
    /// # Errors
    /// That it has not ended in order.
    pub(super) fn join(self) -> Result<()> {
        match self.thread.join() {
            Ok(result) => result.map_err(|error| Error::io("Cannot serve the file to the kernel", error)),
            Err(_) => Err(Error::new(ErrorKind::Io, "A thread of the daemon had failed")),
        }
    }
}

fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(body).map_err(|error| Error::io("Cannot start a thread", error).on(name))
}
