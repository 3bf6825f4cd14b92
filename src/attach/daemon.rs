//! The daemon of one device: it answers the kernel by asking the session, and serves the session itself if it is one of an
//! image. It is this program once more, started by the command that attaches.
//!
//! It has a session of its own (`setsid`), no terminal, `/` for its directory, no inherited descriptor but its end of
//! `control`, and a mount namespace with nothing in it. It ends when the kernel has let go of the device; at once, and
//! without a word to the kernel, when its server has gone: the kernel fails every request then, and the device is free to
//! be taken away. (To go on with a server that was started anew would be to put another disk under a mounted file
//! system.)

use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;
use rustix::thread::LinkNameSpaceType;

use super::control::{self, Told};
use super::family::{self, Answers, Family, Member};
use super::isolation;
use super::record;
use super::serving::{File, Loss, Serving};
use crate::client;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::Knobs;
use crate::net::{Address, Listener};
use crate::overlay::BlockSize;
use crate::session::Caps;
use crate::sys;
use crate::worker::{Limits, LockMemory, Server, ServerConfig, default_budget};

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
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    // It leads a session already if somebody started it by setsid; that is as good.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    // What passes through it is what is on the device. Only root gets at the daemon's own root directory, by which forks of
    // its device are asked for, when the daemon is closed to its own user.
    crate::confine::empty_cores()?;
    crate::confine::forbid_dumps(!rustix::process::geteuid().is_root())?;
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let _ = rustix::thread::set_name(c"memdev-attach");
    Ok(control)
}

/// What the command wants to have served.
struct Order {
    id: String,
    state: String,
    /// The name of the file that the kernel will open; without one, the kernel has the sockets itself.
    file: Option<String>,
    /// `NAME@ID`, for an image.
    export: String,
    export_is_served_here: bool,
    connections: u32,
    memory: Option<u64>,
    read_only: bool,
    /// Whether the file is used as a file, and not as what is behind a device with a cache.
    cached: bool,
    die_with_parent: bool,
    told: Option<Told>,
    /// Held, and so locked, for as long as this process lives.
    record: OwnedFd,
    directory: OwnedFd,
    /// Where the kernel's requests come from.
    requests: Option<OwnedFd>,
    /// The user namespace to be in.
    ids: Option<OwnedFd>,
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
    let (record, directory) = (next()?, next()?);
    let file = value["file"].as_str().map(str::to_owned);
    let requests = file.is_some().then(&mut next).transpose()?;
    let ids = flag("ids")?.then(&mut next).transpose()?;
    let image = flag("image")?.then(&mut next).transpose()?;
    Ok(Order {
        id: text("id")?,
        state: text("state")?,
        file,
        export: text("export")?,
        export_is_served_here: image.is_some(),
        connections: value["connections"].as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(bad)?,
        memory: value["memory"].as_u64(),
        read_only: flag("read_only")?,
        cached: ids.is_some(),
        die_with_parent: flag("die_with_parent")?,
        told: Told::from_json(&value["told"]),
        record,
        directory,
        requests,
        ids,
        image,
        sockets: descriptors.collect(),
    })
}

impl Order {
    /// Serves the device until it is gone. `control` is closed when the command has kept it.
    fn serve(mut self, control: &mut Option<OwnedFd>) -> Result<()> {
        let ordinary = self.ids.is_some();
        if let Some(ids) = self.ids.take() {
            // There it may have a mount namespace of its own.
            rustix::thread::move_into_link_name_space(ids.as_fd(), Some(LinkNameSpaceType::User))
                .map_err(|error| Error::io("Cannot enter the user namespace", error))?;
        }
        if self.die_with_parent {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(|error| Error::io("Cannot watch for the parent's end", error))?;
        }
        // All of this is inherited by threads, and so comes before there are any. The budget is read from files that are
        // not to be seen any more afterwards.
        let memory = self.memory.unwrap_or_else(default_budget);
        isolation::lock_memory(ordinary);
        isolation::leave_mounts(Path::new(&self.state))?;

        let server = match self.image.take() {
            Some(image) => Some(self.start_server(&image, memory)?),
            None => None,
        };
        let told = self.told.ok_or_else(|| Error::new(ErrorKind::Invalid, "Nobody told what is served"))?;
        let outcome = match self.file.take().zip(self.requests.take()) {
            Some((file, requests)) => self.answer_kernel(file, requests, told, control)?,
            None => self.watch_kernel(told, control)?,
        };
        let server = match outcome {
            Outcome::Gone => {
                record::remove(self.directory.as_fd(), &self.id);
                server
            }
            Outcome::Unknown => server,
            Outcome::Family(maker, answers) => {
                // Only sessions of its own can be forked, and only where nobody else gets at its door.
                let door = (server.is_some() && !ordinary).then(family::make_door).transpose()?;
                let address = Address::unix(SOCKET)?;
                let server = server.map(|server| (server, address));
                let Self { id, export, record, directory, .. } = self;
                let record = Some(record);
                let first = Member { id, export, record, directory, maker, left: false, answers };
                Family::new(server, door, first).live()?
            }
        };
        // Wipes what the sessions held.
        server.map_or(Ok(()), Server::stop)
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
            lock_memory: LockMemory::default(),
            seal: false,
            overflow: None,
            session_memory: None,
            session_caps: Caps::default(),
            block_size: BlockSize::DEFAULT,
            // It is the only one, and its name is known to nobody.
            linger: Duration::ZERO,
            knobs: Knobs::default(),
            // Its only client is in the same process: it may be stopped for a while, but then so is the server.
            limits: Limits { handshake: None, unread_reply: None, silent_host: None, ..Limits::default() },
            tls: None,
            control: None,
        };
        let server = Server::start(config)?;
        for _ in 0..connections {
            let (socket, export) = client::open_simple(&address, &self.export)?;
            self.told = Some(Told::of_export(&export));
            self.sockets.push(socket);
        }
        Ok(server)
    }

    /// Answers the kernel until it wants nothing any more, which means that the device is gone.
    fn answer_kernel(
        &mut self,
        name: String,
        requests: OwnedFd,
        told: Told,
        control: &mut Option<OwnedFd>,
    ) -> Result<Outcome> {
        let file = File { name, requests, told, read_only: self.read_only, cached: self.cached };
        let sockets = std::mem::take(&mut self.sockets);
        let serving = Serving::start(file, sockets, Loss::End)?;
        let kept = keep(control, told, &[])?;
        if matches!(kept, Kept::No) && !serving.is_over() {
            // What the command has made, if it came to that, is without a server now, and whoever attaches or detaches
            // next frees it.
            std::process::exit(1);
        }
        if let Kept::WithMaker(maker) = kept {
            return Ok(Outcome::Family(maker, Answers::Here(serving)));
        }
        serving.join()?;
        Ok(Outcome::Gone)
    }

    /// Lets the kernel have the sockets, and waits until all of them have come to their end: the server's, or that of the
    /// device. Which of the two it was cannot be told from here.
    fn watch_kernel(&mut self, told: Told, control: &mut Option<OwnedFd>) -> Result<Outcome> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot watch the connections", error);
        // To a server of its own the daemon has connected, else the command.
        let made = if self.export_is_served_here { &self.sockets[..] } else { &[] };
        let kept = keep(control, told, made)?;
        if matches!(kept, Kept::No) {
            for socket in &self.sockets {
                // The kernel may have them already: then its device fails every request from now on.
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            }
            std::process::exit(1);
        }
        if let Kept::WithMaker(maker) = kept {
            return Ok(Outcome::Family(maker, Answers::Kernel(std::mem::take(&mut self.sockets))));
        }
        while !self.sockets.is_empty() {
            let watched = PollFlags::RDHUP;
            let mut all: Vec<_> = self.sockets.iter().map(|socket| PollFd::new(socket, watched)).collect();
            match rustix::event::poll(&mut all, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
            let ended: Vec<_> = all.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut ended = ended.into_iter();
            self.sockets.retain(|_| !ended.next().unwrap_or(false));
        }
        Ok(Outcome::Unknown)
    }
}

/// What became of a device.
enum Outcome {
    /// The kernel has let go of it.
    Gone,
    /// It has lost its server, or it is gone.
    Unknown,
    /// Its maker looks after it, from now on.
    Family(OwnedFd, Answers),
}

/// Whether the device stays.
enum Kept {
    No,
    /// On its own.
    Alone,
    /// As long as its maker looks after it, who is known by this channel.
    WithMaker(OwnedFd),
}

/// Tells the command what is served, with the sockets that it does not have, and waits for its word that the device is
/// kept. If it ends without that, there is nobody who knows of the device.
fn keep(control: &mut Option<OwnedFd>, told: Told, sockets: &[OwnedFd]) -> Result<Kept> {
    let failed = |error| Error::io("Cannot talk to the command", error);
    let Some(command) = control.take() else { return Err(failed(std::io::ErrorKind::NotConnected.into())) };
    let sockets: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
    control::send(command.as_fd(), &told.to_json(), &sockets).map_err(failed)?;
    let word = control::receive(command.as_fd()).map_err(failed)?;
    let Some((word, _)) = word.filter(|(word, _)| word["kept"] == true) else {
        tracing::info!("Nobody keeps the device");
        return Ok(Kept::No);
    };
    Ok(if word["maker"] == true { Kept::WithMaker(command) } else { Kept::Alone })
}
