//! Whoever may wait for a disk: threads that bring base pages into memory, and one that sees which have gone.

use super::Shared;
use super::mailbox::{Mailbox, Message};
use crate::sys;
use crate::transmission::Warm;
use crossbeam::channel::Receiver;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// An order to the warmers.
#[derive(Debug)]
pub(super) enum Order {
    /// Bring pages into memory, and tell connection `token` of `worker`.
    Warm { worker: usize, token: u64, warm: Warm },
    /// End.
    Stop,
}

/// Bytes of an order that are brought in before it is somebody else's turn.
const SLICE: u64 = 1 << 20;

/// A warmer's life.
pub(super) fn warm(orders: &Receiver<Order>, shared: &Shared) {
    while let Ok(Order::Warm { worker, token, mut warm }) = orders.recv() {
        if warm.cancelled.load(Ordering::Relaxed) || shared.stopping.load(Ordering::Acquire) {
            continue;
        }
        let range = warm.range.start..warm.range.end.min(warm.range.start + SLICE);
        let readable = match warm.session.device().image().warm(range.clone()) {
            Ok(()) if range.end < warm.range.end => {
                // A long order goes to the end of the line, so that short ones do not wait for all of it.
                warm.range.start = range.end;
                // The receivers live as long as the warmers do.
                let _ = shared.cold.send(Order::Warm { worker, token, warm });
                continue;
            }
            Ok(()) => true,
            Err(error) => {
                shared
                    .lines
                    .unreadable
                    .say(|omitted| tracing::warn!(?range, %error, omitted, "base image cannot be read"));
                false
            }
        };
        shared.mailboxes[worker].send(Message::Warmed { token, ticket: warm.ticket, readable });
    }
}

/// Seconds without anybody coming, leaving or being taken apart, after which the allocator gives back what it held for those
/// who have left: once soon, and once more for what was freed behind their backs.
const QUIET: [u32; 2] = [2, 10];

/// The watcher's life: as long as somebody is connected, looks which pages of the images the kernel has dropped; when
/// somebody has left, and it is quiet, gives back what the allocator held.
pub(super) fn watch(shared: &Shared) {
    let (mut last, mut quiet, mut freed) = ((0, 0, 0), 0_u32, false);
    while !shared.stopping.load(Ordering::Acquire) {
        std::thread::park_timeout(Duration::from_secs(1));
        let connections: usize =
            shared.mailboxes.iter().map(|mailbox| mailbox.load().load(Ordering::Relaxed)).sum();
        if connections > 0 {
            shared.registry.sources().iter().for_each(|source| source.latest().recheck_residency());
        }
        let left: usize = shared.mailboxes.iter().map(Mailbox::left).sum();
        let now = (connections, left, shared.registry.total().map());
        freed |= now.1 != last.1 || now.2 < last.2;
        // Not while they come and go: it takes a while, and others who allocate wait for it. Nor while sessions are being
        // taken apart, which goes on behind their connections' ends: what they hold is not free yet.
        quiet = if now == last { quiet.saturating_add(1) } else { 0 };
        last = now;
        if freed && QUIET.contains(&quiet) {
            sys::heap::trim();
            freed = QUIET.last() != Some(&quiet);
        }
    }
}
