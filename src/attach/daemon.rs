//! The daemon of one device: it answers the kernel by asking the session, and serves the session itself if it is one of an
//! image. It is this program once more, started by the command that attaches.
//!
//! It has a session of its own (`setsid`), no terminal, `/` for its directory, no inherited descriptor but its end of
//! `control`, and a mount namespace with nothing in it. It ends when the kernel has let go of the device; at once, and
//! without a word to the kernel, when its server has gone: the kernel fails every request then, and the device is free to
//! be taken away. (To go on with a server that was started anew would be to put another disk under a mounted file
//! system.)

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::control::{self, Told};
use super::fuse::disk::{Asked, Disk};
use super::isolation;
use super::record;
use crate::client;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::Knobs;
use crate::net::{Address, Listener};
use crate::overlay::BlockSize;
use crate::sys;
use crate::worker::{Limits, Server, ServerConfig, default_budget};

/// The hidden subcommand that starts it.
pub const SUBCOMMAND: &str = "attach-daemon";

/// Where the daemon's own server listens, in a root that nobody else sees.
const SOCKET: &str = "/session.sock";

/// Makes this process a daemon, serves the device that it is told of, and returns when it is gone. To be called first in
/// a process that [`super::attach`] has started, before it opens anything.
#[must_use]
pub fn run() -> ExitCode {
    if let Err(error) = sys::process::close_inherited(3) {
        tracing::info!(%error, "Cannot close what this process inherited");
    }
    let Ok(control) = become_daemon() else { return ExitCode::FAILURE };
    let order = take_order(&control);
    let mut control = Some(control);
    match order.and_then(|order| order.serve(&mut control)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            if let Some(control) = control {
                // The command may have gone: then nobody wants to know.
                let _ = control::send(control.as_fd(), &control::error_to_json(&error), &[]);
            }
            ExitCode::FAILURE
        }
    }
}

fn become_daemon() -> std::io::Result<OwnedFd> {
    let control = rustix::stdio::stdin();
    if control.is_terminal() {
        // Typed by a person.
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let control = rustix::io::fcntl_dupfd_cloexec(control, 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    // It leads a session already if somebody started it by setsid; that is as good.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let _ = rustix::thread::set_name(c"memdev-attach");
    Ok(control)
}

/// What the command wants to have served.
struct Order {
    id: String,
    state: String,
    /// The name of the file that the kernel will open.
    file: String,
    /// `NAME@ID`, for an image.
    export: String,
    connections: u32,
    read_only: bool,
    die_with_parent: bool,
    told: Option<Told>,
    /// Held, and so locked, for as long as this process lives.
    _record: OwnedFd,
    directory: OwnedFd,
    /// Where the kernel's requests come from.
    requests: Option<OwnedFd>,
    image: Option<OwnedFd>,
    sockets: Vec<OwnedFd>,
}

fn take_order(control: &OwnedFd) -> Result<Order> {
    let bad = || Error::new(ErrorKind::Invalid, "The daemon does not understand its order");
    let failed = |error| Error::io("Cannot receive the daemon's order", error);
    let (value, descriptors) = control::receive(control.as_fd()).map_err(failed)?.ok_or_else(bad)?;
    let text = |key: &str| value[key].as_str().map(str::to_owned).ok_or_else(bad);
    let flag = |key: &str| value[key].as_bool().ok_or_else(bad);
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().ok_or_else(bad);
    let (record, directory, requests) = (next()?, next()?, next()?);
    let image = flag("image")?.then(&mut next).transpose()?;
    Ok(Order {
        id: text("id")?,
        state: text("state")?,
        file: text("file")?,
        export: text("export")?,
        connections: value["connections"].as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(bad)?,
        read_only: flag("read_only")?,
        die_with_parent: flag("die_with_parent")?,
        told: Told::from_json(&value["told"]),
        _record: record,
        directory,
        requests: Some(requests),
        image,
        sockets: descriptors.collect(),
    })
}

impl Order {
    /// Serves the device until it is gone. `control` is closed when the command has kept it.
    fn serve(mut self, control: &mut Option<OwnedFd>) -> Result<()> {
        if self.die_with_parent {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(|error| Error::io("Cannot watch for the parent's end", error))?;
        }
        // All of this is inherited by threads, and so comes before there are any. The budget is read from files that are
        // not to be seen any more afterwards.
        let memory = default_budget();
        isolation::lock_memory();
        isolation::leave_mounts(Path::new(&self.state))?;

        let server = match self.image.take() {
            Some(image) => Some(self.start_server(&image, memory)?),
            None => None,
        };
        let told = self.told.ok_or_else(|| Error::new(ErrorKind::Invalid, "Nobody told what is served"))?;
        self.answer_kernel(told, control)?;
        if let Some(server) = server {
            // Wipes what the session held.
            server.stop()?;
        }
        record::remove(self.directory.as_fd(), &self.id);
        Ok(())
    }

    /// Serves the image, and connects to it as the session's only client.
    fn start_server(&mut self, image: &OwnedFd, memory: u64) -> Result<Server> {
        let (name, _) = self.export.split_once('@').unwrap_or((&self.export, ""));
        let address = Address::unix(SOCKET)?;
        let connections = usize::try_from(self.connections).unwrap_or(1);
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let config = ServerConfig {
            images: vec![(name.to_owned(), format!("/proc/self/fd/{}", image.as_raw_fd()).into())],
            listeners: vec![Listener::bind(&address)?],
            connections: Vec::new(),
            workers: connections.min(cpus),
            memory: Some(memory),
            session_memory: None,
            block_size: BlockSize::DEFAULT,
            // It is the only one, and its name is known to nobody.
            linger: Duration::ZERO,
            knobs: Knobs::default(),
            // Its only client is in the same process: it may be stopped for a while, but then so is the server.
            limits: Limits { handshake: None, unread_reply: None, silent_host: None, ..Limits::default() },
        };
        let server = Server::start(config)?;
        for _ in 0..connections {
            let (socket, export) = client::open_simple(&address, &self.export)?;
            self.told = Some(Told::of_export(&export));
            self.sockets.push(socket);
        }
        Ok(server)
    }

    /// Answers the kernel until it wants nothing any more. If the command ends before it has kept the device, this process
    /// ends at once.
    fn answer_kernel(&mut self, told: Told, control: &mut Option<OwnedFd>) -> Result<()> {
        let failed = |error| Error::io("Cannot serve the file to the kernel", error);
        let ending = Arc::new(AtomicBool::new(false));
        let mut lanes = Vec::new();
        for socket in self.sockets.drain(..) {
            let (submitter, receiver) = client::pipeline::<Asked>(socket).map_err(failed)?;
            lanes.push(submitter);
            let ending = Arc::clone(&ending);
            spawn("replies", move || {
                let error = receiver.run(Asked::answer);
                if !ending.load(Ordering::Acquire) {
                    tracing::error!("The device has lost its server: {error}");
                    std::process::exit(1);
                }
            })?;
        }
        let threads = lanes.len();
        let disk = Disk::new(self.file.clone(), told, self.read_only, lanes, Arc::clone(&ending));
        let mut config = fuser::Config::default();
        config.n_threads = Some(threads);
        config.clone_fd = false;
        let requests = self
            .requests
            .take()
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "There is no file to serve"))?;
        let session =
            fuser::Session::from_fd(disk, requests, fuser::SessionACL::All, config).map_err(failed)?;
        let session = spawn("requests", move || session.run())?;

        let Some(command) = control.take() else {
            return Err(failed(std::io::ErrorKind::NotConnected.into()));
        };
        control::send(command.as_fd(), &told.to_json(), &[]).map_err(failed)?;
        let kept = control::receive(command.as_fd()).map_err(failed)?;
        drop(command);
        if kept.is_none_or(|(value, _): (Value, _)| value["kept"] != true) && !session.is_finished() {
            // The command is gone. What it has made, if it came to that, is without a server now, and whoever attaches
            // or detaches next frees it.
            tracing::info!("Nobody keeps the device");
            std::process::exit(1);
        }
        match session.join() {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(Error::new(ErrorKind::Io, "A thread of the daemon had failed")),
        }
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(body).map_err(|error| Error::io("Cannot start a thread", error).on(name))
}
