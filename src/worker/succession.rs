//! A server that takes another's place, or gives way to one: see [`crate::takeover`].

use super::mailbox::{Message, least_loaded};
use super::{Server, Shared};
use crate::control::House;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::{Agreed, Handshake};
use crate::net::{Listener, Party, Stream};
use crate::takeover::{Bridge, Offer, Taken, cannot};
use crossbeam::channel::Sender;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, Weak};

/// The server as its control thread sees it, which must not keep it.
#[derive(Debug)]
pub(super) struct Doors {
    pub(super) shared: Weak<Shared>,
    pub(super) over: Sender<()>,
}

impl House for Doors {
    fn offer(&self) -> Result<(Offer, Vec<OwnedFd>)> {
        let shared = self.shared.upgrade().ok_or_else(ending)?;
        let listeners = shared.listeners();
        if listeners.is_empty() {
            return Err(cannot("it listens nowhere"));
        }
        let failed = |error| Error::io("Cannot share a socket", error);
        let copies = listeners.iter().map(|listener| listener.as_fd().try_clone_to_owned().map_err(failed));
        let sockets = copies.collect::<Result<Vec<_>>>()?;
        let files = listeners.iter().map(Listener::file_offer).collect();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok((Offer { version, pid: std::process::id(), files }, sockets))
    }

    fn stop_listening(&self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut listeners = shared.listeners.write().unwrap_or_else(PoisonError::into_inner);
        // Their files are the other server's from now on.
        listeners.iter_mut().for_each(Listener::disown);
        drop(listeners);
        shared.listening.store(shared.mailboxes.len(), Ordering::Release);
        shared.mailboxes.iter().for_each(|mailbox| mailbox.send(Message::StopListening));
    }

    fn take_in(&self, socket: OwnedFd, agreed: Agreed, input: Vec<u8>) -> Result<()> {
        let shared = self.shared.upgrade().ok_or_else(ending)?;
        let handshake = Handshake::resumed(shared.knobs, agreed).ok_or_else(|| {
            let why = "What a client has agreed on with the other server is not offered here";
            Error::new(ErrorKind::Unsupported, why)
        })?;
        let mut stream = Stream::passed(socket)?;
        let full = |full| Error::new(ErrorKind::OutOfSpace, format!("No room for a connection: {full}"));
        stream.keep(shared.connections.enter(Party::of(stream.peer())).map_err(full)?);
        let worker = least_loaded(&shared.mailboxes, 0);
        shared.mailboxes[worker].send(Message::Resumed(stream, Box::new(handshake), input));
        Ok(())
    }

    fn is_done(&self) {
        // It was told before.
        let _ = self.over.try_send(());
    }
}

fn ending() -> Error {
    Error::new(ErrorKind::Shutdown, "Server is shutting down")
}

impl Shared {
    /// A worker has let go of the listeners; with the last one they are closed.
    pub(super) fn one_gives_way(&self) {
        if self.listening.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.stop_listening();
        }
    }
}

impl Server {
    /// Takes another server's place, which has said what it still has, and is at the other end of the bridge. To be called
    /// before the first client is served.
    pub fn succeed(&self, taken: Taken, bridge: Bridge) {
        let Taken { sessions, memory } = taken;
        let shared = &self.shared;
        shared.registry.set_before(sessions);
        let mut listeners = shared.listeners.write().unwrap_or_else(PoisonError::into_inner);
        listeners.iter_mut().for_each(Listener::own);
        drop(listeners);
        let total = shared.registry.total();
        let own = total.limit();
        total.set_limit(own.saturating_sub(memory));
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = Some((bridge, own));
    }
}
