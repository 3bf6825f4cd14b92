//! Whoever may wait for a disk: threads that bring base pages into memory, and one that sees which have gone.

use super::Shared;
use super::mailbox::{Done, Mailbox, Message};
use crate::base::Source;
use crate::error::{ErrorKind, Result};
use crate::sys;
use crate::transmission::{Need, Warm};
use crossbeam::channel::{Receiver, RecvTimeoutError};
use std::io;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// An order to the warmers, or the movers.
#[derive(Debug)]
pub(super) enum Order {
    /// Bring into memory what connection `token` of `worker` needs, and tell it.
    Warm { worker: usize, token: u64, warms: Vec<Warm> },
    /// End.
    Stop,
}

/// Bytes of an order that are brought in before it is somebody else's turn.
const SLICE: u64 = 1 << 20;
/// The most parts that are one order, together no longer than a slice. To wake a thread for each of them takes more time than to read
/// them, where the disk is quick.
const TOGETHER: usize = 8;

/// How many of these, from the first on, go together as one order: one at least.
pub(super) fn fit_together(warms: &[Warm]) -> usize {
    count_together(warms.iter().map(|warm| match warm.need {
        Need::Base => warm.range.end - warm.range.start,
        Need::Blocks(_) | Need::Room => u64::MAX,
    }))
}

fn count_together(lengths: impl Iterator<Item = u64>) -> usize {
    lengths.take(TOGETHER).take_while(|&length| length <= SLICE / TOGETHER as u64).count().max(1)
}

/// A warmer's life.
pub(super) fn warm(orders: &Receiver<Order>, shared: &Shared) {
    while let Ok(Order::Warm { worker, token, warms }) = orders.recv() {
        let mut asked = Asked { worker, token, shared, done: Vec::with_capacity(warms.len()) };
        if let [_, _, ..] = warms[..] {
            asked.bring_together(warms);
        } else {
            warms.into_iter().for_each(|warm| asked.bring(warm));
        }
        asked.tell();
    }
}

/// An order that somebody sees to.
struct Asked<'a> {
    worker: usize,
    token: u64,
    shared: &'a Shared,
    /// What the worker has not been told of yet, as every time costs it a turn.
    done: Vec<Done>,
}

impl Asked<'_> {
    /// Sees to what is short, first to what needs no waiting. The kernel begins to read all the rest before the first of it is waited for.
    fn bring_together(&mut self, warms: Vec<Warm>) {
        let shared = self.shared;
        let mut missing = Vec::new();
        for warm in warms.into_iter().filter(|warm| !is_vain(warm, shared)) {
            match warm.session.device().image().warm_at_once(warm.range.clone()) {
                Ok(true) => self.done.push(Done { ticket: warm.ticket, is_readable: true }),
                // The file system can only wait: all at once by many.
                Err(error) if error.kind() == io::ErrorKind::Unsupported && !missing.is_empty() => {
                    self.pass_on(warm);
                }
                // If it fails, it does so again.
                Ok(false) | Err(_) => missing.push(warm),
            }
        }
        self.tell();
        for warm in missing {
            if !self.done.is_empty()
                && !matches!(warm.session.device().image().warm_at_once(warm.range.clone()), Ok(true))
            {
                self.tell();
            }
            self.bring(warm);
        }
    }

    /// Waits for the disk, as long as somebody waits for that.
    fn bring(&mut self, mut warm: Warm) {
        if is_vain(&warm, self.shared) {
            return;
        }
        let range = warm.range.start..warm.range.end.min(warm.range.start + SLICE);
        let is_readable = match warm.session.device().image().warm(range.clone()) {
            Ok(()) if range.end < warm.range.end => {
                // A long order goes to the end of the line, so that short ones do not wait for all of it.
                warm.range.start = range.end;
                return self.pass_on(warm);
            }
            Ok(()) => true,
            Err(error) => {
                self.shared
                    .lines
                    .unreadable
                    .say(|omitted| tracing::warn!(?range, %error, omitted, "base image cannot be read"));
                false
            }
        };
        self.done.push(Done { ticket: warm.ticket, is_readable });
    }

    fn pass_on(&self, warm: Warm) {
        let order = Order::Warm { worker: self.worker, token: self.token, warms: vec![warm] };
        // The receivers live as long as the warmers do.
        let _ = self.shared.cold.send(order);
    }

    fn tell(&mut self) {
        if !self.done.is_empty() {
            let done = std::mem::take(&mut self.done);
            self.shared.mailboxes[self.worker].send(Message::Warmed { token: self.token, done });
        }
    }
}

/// Whether nobody waits for it any more.
fn is_vain(warm: &Warm, shared: &Shared) -> bool {
    warm.cancelled.load(Ordering::Relaxed) || shared.stopping.load(Ordering::Acquire)
}

/// The life of a warmer that is alone until there is something to do: then it has `others` started, and sees to their end.
pub(super) fn warm_with_help(
    orders: &Receiver<Order>,
    shared: &Shared,
    start_others: impl FnOnce(&mut Vec<JoinHandle<()>>) -> Result<()>,
) {
    let Ok(order @ Order::Warm { .. }) = orders.recv() else { return };
    // The receivers live as long as the warmers do.
    let _ = shared.cold.send(order);
    let mut others = Vec::new();
    if let Err(error) = start_others(&mut others) {
        tracing::warn!(%error, threads = others.len() + 1, "Cold pages are read by few threads");
    }
    warm(orders, shared);
    for other in others {
        if let Err(panic) = other.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Threads that move blocks to the file of `--overflow` and back, of which there are none without: few, as what they wait for is one disk.
pub(super) const MOVERS: usize = 4;
/// Blocks that are brought in before room is made for more.
const BLOCKS_AT_ONCE: usize = 64;
/// How long one of them waits for an order before it looks what of the file is not needed any more.
const TIDY: Duration = Duration::from_secs(1);
/// How often it is tried in as long a time to find memory for what somebody waits for.
const PATIENCE: u32 = 20;

/// A mover's life.
pub(super) fn move_blocks(orders: &Receiver<Order>, shared: &Shared) {
    let registry = &shared.registry;
    loop {
        let (worker, token, warms) = match orders.recv_timeout(TIDY) {
            Ok(Order::Warm { worker, token, warms }) => (worker, token, warms),
            Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                registry.pool().overflow().into_iter().for_each(|overflow| while overflow.tidy() {});
                continue;
            }
        };
        warms.iter().for_each(|warm| move_block(worker, token, warm, shared));
    }
}

fn move_block(worker: usize, token: u64, warm: &Warm, shared: &Shared) {
    let registry = &shared.registry;
    if is_vain(warm, shared) {
        return;
    }
    if let Err(error) = registry.make_room() {
        let left = registry.total().away();
        shared.lines.unreadable.say(|omitted| {
            tracing::warn!(%error, away = left, omitted, "--overflow takes no more");
        });
    }
    let is_readable = match &warm.need {
        Need::Room | Need::Base => true,
        Need::Blocks(view) => {
            let overlay = warm.session.device().overlay();
            let size = overlay.block_size();
            let blocks = size.index_of(warm.range.start)..size.blocks_for(warm.range.end);
            // Little by little, and what was not used lately goes out for what comes in: also where the file is full.
            let mut parts = blocks
                .clone()
                .step_by(BLOCKS_AT_ONCE)
                .map(|at| at..blocks.end.min(at + BLOCKS_AT_ONCE as u64));
            let brought = parts.try_for_each(|part| {
                let mut brought = overlay.bring_in(view.as_deref(), part.clone());
                // All slots are taken by what others wait for, who are served in a moment.
                for _ in 0..PATIENCE {
                    if brought != Err(ErrorKind::OutOfSpace) {
                        break;
                    }
                    std::thread::sleep(TIDY / PATIENCE);
                    let _ = registry.make_room();
                    brought = overlay.bring_in(view.as_deref(), part.clone());
                }
                let _ = registry.make_room();
                brought
            });
            if let Err(kind) = brought {
                shared.lines.unreadable.say(|omitted| {
                    tracing::warn!(?kind, omitted, "blocks cannot be brought back from --overflow");
                });
            }
            brought.is_ok()
        }
    };
    let done = vec![Done { ticket: warm.ticket, is_readable }];
    shared.mailboxes[worker].send(Message::Warmed { token, done });
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
            let sources = shared.registry.sources().iter();
            sources.flat_map(Source::all).for_each(|image| image.recheck_residency());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_goes_together_and_no_more_than_a_slice_of_it() {
        let together = |lengths: &[u64]| count_together(lengths.iter().copied());
        assert_eq!(together(&[4096]), 1);
        assert_eq!(together(&[4096; 3]), 3);
        assert_eq!(together(&[128 << 10; 20]), TOGETHER);
        assert_eq!(together(&[4096, 4096, (128 << 10) + 1, 4096]), 2);
        assert_eq!(together(&[u64::MAX, 4096]), 1);
        const { assert!(TOGETHER as u64 * (128 << 10) <= SLICE) };
    }
}
