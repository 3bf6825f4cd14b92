//! What other threads tell a worker, and how they wake it.

use crate::error::{Error, Result};
use crate::handshake::Handshake;
use crate::net::Stream;
use crossbeam::channel::{Receiver, Sender, unbounded};
use crossbeam::utils::CachePadded;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Something for a worker.
#[derive(Debug)]
pub(super) enum Message {
    /// A connection to look after.
    Connection(Stream),
    /// A connection that another server has begun its handshake with, and what it has sent since.
    Resumed(Stream, Box<Handshake>, Vec<u8>),
    /// Another server accepts from now on.
    StopListening,
    /// What connection `token` had ordered under these tickets is here, or cannot be read.
    Warmed { token: u64, done: Vec<Done> },
    /// A session's caps were changed.
    CapsChanged,
}

/// An order that is done.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) ticket: u64,
    pub(super) is_readable: bool,
}

/// The sending end, known to all threads.
#[derive(Debug)]
pub(super) struct Mailbox {
    sender: Sender<Message>,
    bell: Arc<OwnedFd>,
    load: CachePadded<AtomicUsize>,
    left: CachePadded<AtomicUsize>,
}

/// The receiving end, the worker's own.
#[derive(Debug)]
pub(super) struct Inbox {
    receiver: Receiver<Message>,
    bell: Arc<OwnedFd>,
}

/// A new mailbox.
pub(super) fn open() -> Result<(Mailbox, Inbox)> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| Error::io("Cannot make an eventfd", error).advise("raise ulimit -n"))?;
    let bell = Arc::new(bell);
    let (sender, receiver) = unbounded();
    let mailbox = Mailbox {
        sender,
        bell: Arc::clone(&bell),
        load: CachePadded::default(),
        left: CachePadded::default(),
    };
    Ok((mailbox, Inbox { receiver, bell }))
}

impl Mailbox {
    /// Sends, and wakes the worker. After the worker's end it goes nowhere.
    pub(super) fn send(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            self.wake();
        }
    }

    /// Makes the worker look around.
    pub(super) fn wake(&self) {
        #[allow(clippy::disallowed_methods, reason = "an eventfd counts in the host's byte order")]
        let one = 1_u64.to_ne_bytes();
        // It fails only when the counter is full: then the worker is awake anyway.
        let _ = rustix::io::write(&*self.bell, &one);
    }

    /// Connections that the worker has, or is about to have.
    pub(super) fn load(&self) -> &AtomicUsize {
        &self.load
    }

    /// Connections that the worker had so far, and has no more.
    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// Counts a connection out.
    pub(super) fn count_one_less(&self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
        self.left.fetch_add(1, Ordering::Relaxed);
    }
}

impl Inbox {
    /// What becomes readable when there is mail.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The next message. When there is none, the bell is silent until somebody rings again.
    pub(super) fn next(&self) -> Option<Message> {
        self.receiver.try_recv().ok()
    }

    /// Silences the bell: call it before reading the mail.
    pub(super) fn silence(&self) {
        let _ = rustix::io::read(&*self.bell, &mut [0_u8; 8]);
    }
}

/// The index of the mailbox with the fewest connections, `own` where that is as few; counts one more for it.
pub(super) fn least_loaded(mailboxes: &[Mailbox], own: usize) -> usize {
    let load = |index: usize| mailboxes[index].load.load(Ordering::Relaxed);
    let best = (0..mailboxes.len()).min_by_key(|&index| (load(index), index != own)).unwrap_or(own);
    mailboxes[best].load.fetch_add(1, Ordering::Relaxed);
    best
}
