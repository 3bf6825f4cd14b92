//! The devices of one daemon whose makers look after them: the first, and its forks, which are forks of its session.
//!
//! ```text
//!   launcher ── its channel ──┐
//!   launcher ── its channel ──┼── daemon ── one server, a session a device ── blocks that they share
//!   who forks ── /fork.sock ──┘
//! ```
//!
//! Each device has somebody who made it, known by a channel. When that is closed before the device has gone, nobody looks
//! after it any more: everything that is asked of it fails from then on, so that it goes with those who use it. The daemon
//! ends with its last device; until it has been forked it is killed when the first one's maker ends, since one that
//! is stopped would not notice.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt,
};
use serde_json::{Value, json};

use super::control::{self, Told};
use super::record;
use super::serving::{File, Loss, Serving};
use crate::client;
use crate::error::{Error, ErrorKind, Result};
use crate::net::Address;
use crate::session::Heir;
use crate::sys;
use crate::worker::Server;

/// Where who forks comes in: a path from the daemon's root, which nobody gets at who may not look into the daemon.
const DOOR: &str = "/fork.sock";

/// How long somebody who has come in may keep everybody else waiting.
const PATIENCE: Duration = Duration::from_secs(5);

/// What answers the kernel.
pub(super) enum Answers {
    /// This process, for a file.
    Here(Serving),
    /// The kernel asks the session itself, over these sockets.
    Kernel(Vec<OwnedFd>),
}

/// One device.
pub(super) struct Member {
    pub(super) id: String,
    pub(super) export: String,
    /// Held, and so locked, for as long as it is served and looked after.
    pub(super) record: Option<OwnedFd>,
    pub(super) directory: OwnedFd,
    /// Whoever made it, and whether they have left.
    pub(super) maker: OwnedFd,
    pub(super) left: bool,
    pub(super) answers: Answers,
}

impl Member {
    /// Something from its maker, of whom nothing is expected but to leave.
    fn hear(&mut self) {
        if matches!(control::receive(self.maker.as_fd()), Ok(Some(_))) {
            return;
        }
        tracing::info!(id = self.id, "Nobody looks after the device any more");
        self.left = true;
        // Whoever attaches or detaches next frees the device, if it was made and not used yet.
        self.record = None;
        match &self.answers {
            Answers::Here(serving) => serving.give_up(),
            Answers::Kernel(sockets) => {
                for socket in sockets {
                    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        match &self.answers {
            Answers::Here(serving) => serving.is_over(),
            Answers::Kernel(sockets) => sockets.is_empty(),
        }
    }
}

/// All devices of a daemon.
pub(super) struct Family {
    /// With the address at which it is to be reached from here; the sessions of others cannot be forked.
    server: Option<(Server, Address)>,
    door: Option<OwnedFd>,
    members: Vec<Member>,
}

impl Family {
    /// With a first device.
    pub(super) fn new(server: Option<(Server, Address)>, door: Option<OwnedFd>, first: Member) -> Self {
        Self { server, door, members: vec![first] }
    }

    /// Looks after the devices until the last has gone. Gives the server, to be stopped.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn live(mut self) -> Result<Option<Server>> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot watch the devices", error);
        let (never, _never) =
            control::pair().map_err(|error| Error::io("Cannot watch the devices", error))?;
        while !self.members.is_empty() {
            let mut fds = Vec::new();
            fds.extend(self.door.iter().map(|door| PollFd::new(door, PollFlags::IN)));
            let of_members = fds.len();
            for member in &self.members {
                // What has ended would be found so again and again.
                let wanted = if member.left { PollFlags::empty() } else { PollFlags::IN };
                fds.push(PollFd::new(if member.left { &never } else { &member.maker }, wanted));
                match &member.answers {
                    Answers::Here(serving) => {
                        fds.push(PollFd::from_borrowed_fd(serving.over(), PollFlags::IN));
                    }
                    Answers::Kernel(sockets) => {
                        fds.extend(sockets.iter().map(|socket| PollFd::new(socket, PollFlags::RDHUP)));
                    }
                }
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let mut of_members = ready[of_members..].iter().copied();
            for member in &mut self.members {
                if of_members.next() == Some(true) && !member.left {
                    member.hear();
                }
                if let Answers::Kernel(sockets) = &mut member.answers {
                    sockets.retain(|_| of_members.next() != Some(true));
                } else {
                    of_members.next();
                }
            }
            self.bury();
            if !self.members.is_empty() && self.is_left() {
                // All that waits for this process fails at once.
                std::process::exit(1);
            }
            if self.door.is_some() && ready[0] {
                self.open_door();
            }
        }
        Ok(self.server.map(|(server, _)| server))
    }

    /// Whether there is nobody any more who looks after a device.
    fn is_left(&self) -> bool {
        self.members.iter().all(|member| member.left)
    }

    /// Takes leave of the devices that have gone, and tells their makers.
    fn bury(&mut self) {
        while let Some(n) = self.members.iter().position(Member::is_over) {
            let Member { id, export, record, directory, maker, answers, .. } = self.members.swap_remove(n);
            if let Answers::Here(serving) = answers {
                if let Err(error) = serving.join() {
                    // That is one device's fault; the others go on.
                    tracing::error!(id, export, "{error}");
                }
                record::remove(directory.as_fd(), &id);
            }
            // Whether the kernel has let go of its own device, or only lost its server, cannot be told from here: that its
            // record is not locked any more says that it is free to be looked at.
            drop(record);
            tracing::debug!(id, export, "The device has gone");
            // They may have gone as well.
            let _ = control::send(maker.as_fd(), &json!({ "last": self.is_left() }), &[]);
        }
    }

    /// Somebody comes in, to have a fork of one of the devices.
    fn open_door(&mut self) {
        let Some(door) = &self.door else { return };
        let Ok(client) = accept_with(door, SocketFlags::CLOEXEC) else { return };
        let answer = match self.fork(&client) {
            Ok(told) => told,
            Err(error) => {
                tracing::warn!(%error, "Cannot fork a device");
                control::error_to_json(&error)
            }
        };
        // Who does not take it has left, which is seen from their end of the channel.
        let _ = control::send(client.as_fd(), &answer, &[]);
    }

    fn fork(&mut self, client: &OwnedFd) -> Result<Value> {
        let failed = |error: std::io::Error| Error::io("Cannot hear who wants a fork", error);
        let maker = client.try_clone().map_err(failed)?;
        let bad = || Error::new(ErrorKind::Invalid, "The daemon does not understand its order");
        let peer = sys::peer::credentials(client.as_fd()).map_err(failed)?;
        if peer.uid != rustix::process::geteuid().as_raw() {
            return Err(Error::new(ErrorKind::Denied, "A device is forked by its owner only"));
        }
        sockopt::set_socket_timeout(client, sockopt::Timeout::Recv, Some(PATIENCE))
            .map_err(|error| failed(error.into()))?;
        let (order, descriptors) = control::receive(client.as_fd()).map_err(failed)?.ok_or_else(bad)?;
        sockopt::set_socket_timeout(client, sockopt::Timeout::Recv, None)
            .map_err(|error| failed(error.into()))?;
        let text = |key: &str| order[key].as_str().map(str::to_owned).ok_or_else(bad);
        let (of, id, export, name) = (text("fork")?, text("id")?, text("export")?, text("file")?);
        let Ok([record, directory, requests]) = <[OwnedFd; 3]>::try_from(descriptors) else {
            return Err(bad());
        };
        let gone = || Error::new(ErrorKind::NotFound, "The device has just gone");
        let parent = self.members.iter().find(|member| member.id == of).ok_or_else(gone)?;
        let (server, address) = self.server.as_ref().ok_or_else(bad)?;

        server.registry().fork(&parent.export, &export, Heir::Owner)?;
        let made = (|| {
            let (socket, offered) = client::open_simple(address, &export)?;
            let told = Told::of_export(&offered);
            let file = File { name, requests, told, read_only: false, cached: false };
            Ok((Serving::start(file, vec![socket], Loss::Stay)?, told))
        })();
        let (serving, told) = match made {
            Ok(made) => made,
            Err(error) => {
                // Nobody would ever be in it.
                let _ = server.registry().end(&export);
                return Err(error);
            }
        };
        // From now on it is nobody's alone.
        let _ = rustix::process::set_parent_process_death_signal(None);
        let answers = Answers::Here(serving);
        let record = Some(record);
        self.members.push(Member { id, export, record, directory, maker, left: false, answers });
        Ok(told.to_json())
    }
}

/// Makes the door, in the root that this process has to itself.
///
/// # Errors
/// What the system says.
pub(super) fn make_door() -> Result<OwnedFd> {
    let failed = |error: rustix::io::Errno| Error::io("Cannot make the daemon's door", error);
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let door = socket_with(family, kind, SocketFlags::CLOEXEC, None).map_err(failed)?;
    bind(&door, &SocketAddrUnix::new(DOOR).map_err(failed)?).map_err(failed)?;
    listen(&door, 8).map_err(failed)?;
    Ok(door)
}

/// Knocks at the door of the daemon `pid`, which is this user's.
///
/// # Errors
/// `NotFound` if there is none, or another user's.
pub(super) fn knock(pid: u32) -> Result<OwnedFd> {
    let failed = |error: rustix::io::Errno| Error::io("Cannot reach the daemon of the device", error);
    let gone = || Error::new(ErrorKind::NotFound, "The daemon of the device has just ended");
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None).map_err(failed)?;
    let address = SocketAddrUnix::new(format!("/proc/{pid}/root{DOOR}")).map_err(failed)?;
    connect(&socket, &address).map_err(failed)?;
    // Its number may be somebody else's by now, who would get descriptors from here.
    let peer =
        sys::peer::credentials(socket.as_fd()).map_err(|error| Error::io("Cannot see the daemon", error))?;
    if peer.uid != rustix::process::geteuid().as_raw() {
        return Err(gone());
    }
    Ok(socket)
}
