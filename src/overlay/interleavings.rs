//! Connections that meet in one block, in every order that their steps can have.
//!
//! loom runs each model again and again, with another interleaving every time, and lets every load see every value that
//! the memory orderings allow. The code under test is the real one, from the device down to the arena: what stands in for
//! something is only the locks and atomics of [`crate::sync`], and beside each slot's bytes a cell by which loom sees who
//! touches them when (`src/sys/ledger.rs`): when they are borrowed, and once more when the handle is given back. Chunks of
//! the pool have two slots here, leaves 128 blocks.
//!
//! Left out: the tree's growth by several leaves at once, the helper that wipes and
//! gives back in the background ([`Pool::tend`] waits for time, which loom has not), the counters of data and map (relaxed
//! sums, by which nothing is published), and the kernel, which reads a reply's bytes when it is sent: here, whoever holds the
//! reply reads them. Models of two threads are run in all orders there are; that of three in those that take threads off
//! the processor in the middle of their work [`PREEMPTIONS`] times at most.
//!
//! Each model says which faults it was seen to catch: each was put into the code by hand, and the model failed.
//!
//! `tools/test` runs them; by hand:
//! `RUSTFLAGS='--cfg loom' cargo test --lib --target-dir target/loom interleavings`

use super::leaf::Leaf;
use super::{BlockSize, Budget, Content, Magazine, Overlay, Pool, Snapshot};
use crate::base::Image;
use crate::cow::{Device, Piece};
use crate::sys::Left;
use loom::sync::Arc;
use loom::thread;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// The same in memory.
const BYTES: usize = 4096;
/// What the base holds.
const BASE: u8 = 0xbb;
/// What somebody else wrote.
const SECRET: u8 = 0xee;
/// How often an order of three threads may take one off the processor.
const PREEMPTIONS: usize = 2;

fn model(run: impl Fn(&std::sync::Arc<Image>) + Send + Sync + 'static) {
    bounded_model(None, run);
}

fn bounded_model(preemptions: Option<usize>, run: impl Fn(&std::sync::Arc<Image>) + Send + Sync + 'static) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[BASE; 4 * BYTES]).unwrap();
    let image = std::sync::Arc::new(Image::open(file.path()).unwrap());
    let orders = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&orders);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        run(&image);
    });
    let orders = orders.load(Ordering::Relaxed);
    println!("{orders} orders of events");
    assert!(orders > 1, "nothing happened that has an order");
}

/// Block memory: chunks of two slots, and as many more as `extra` asks for.
fn pool(extra: u64) -> std::sync::Arc<Pool> {
    Pool::new(extra * 2 * BLOCK, BlockSize::DEFAULT).unwrap()
}

/// A session's device.
fn device(image: &std::sync::Arc<Image>, pool: &std::sync::Arc<Pool>) -> Device {
    let budget = Budget::within(&Budget::total(1 << 20), 1 << 20).unwrap();
    Device::new(std::sync::Arc::clone(image), Overlay::new(4, std::sync::Arc::clone(pool), budget))
}

/// A worker's magazine with a slot in it that still holds what somebody else wrote.
fn magazine(pool: &std::sync::Arc<Pool>) -> Magazine {
    let mut magazine = Magazine::new(std::sync::Arc::clone(pool));
    let mut slot = magazine.allocate().unwrap();
    pool.arena().bytes_mut(&mut slot).unwrap().fill(SECRET);
    assert!(magazine.release(slot));
    magazine
}

/// A reply on its way.
struct Reply<'a>(&'a Device, Vec<Piece>);

impl<'a> Reply<'a> {
    fn read(device: &'a Device, block: u64) -> Self {
        let mut pieces = Vec::new();
        device.read(block * BLOCK..(block + 1) * BLOCK, |piece| pieces.push(piece));
        Self(device, pieces)
    }

    /// What is sent.
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &self.1 {
            match piece {
                Piece::Base { len, .. } => out.resize(out.len() + len, BASE),
                Piece::Zero { len } => out.resize(out.len() + len, 0),
                Piece::Blocks { run, at, len, .. } => {
                    out.extend_from_slice(&self.0.overlay().pool().arena().run_bytes(run)[*at..at + len]);
                }
            }
        }
        out
    }

    /// It is sent; what was.
    fn take(self, magazine: &mut Magazine) -> Vec<u8> {
        let bytes = self.bytes();
        self.release(magazine);
        bytes
    }

    fn release(self, magazine: &mut Magazine) {
        for piece in self.1 {
            if let Piece::Blocks { run, .. } = piece {
                self.0.release(run, magazine);
            }
        }
        // Also between two threads that let go: not for a moment less than nothing.
        assert!(self.0.overlay().budget().pinned_exactly() <= 1 << 20);
    }
}

/// When nothing is on its way, nothing is pinned.
fn check_unpinned(device: &Device) {
    assert_eq!(device.overlay().budget().pinned_exactly(), 0);
}

/// The byte that all of these are.
fn one_value(bytes: &[u8]) -> u8 {
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a block that is half of this and half of that");
    bytes[0]
}

/// A leaf by itself, without the lock on the tree, which loom lets order even those who only read: one thread puts a slot
/// into it while another looks, without the leaf's lock as long as it finds the block's bit clear.
///
/// Caught: the slot filled only when it is in the leaf. Not caught, because there is nothing to catch: relaxed orderings of
/// the `present` plane. Who sees the bit takes the lock, and that publishes the block; Release and Acquire say it again.
#[test]
fn a_leaf_publishes_what_its_slot_holds() {
    model(|_| {
        let pool = pool(1);
        let leaf = Arc::new(Leaf::default());
        let mut writing = magazine(&pool);
        let writer = thread::spawn({
            let (leaf, pool) = (Arc::clone(&leaf), std::sync::Arc::clone(&pool));
            move || {
                let mut slot = writing.allocate_to_overwrite().unwrap();
                pool.arena().bytes_mut(&mut slot).unwrap().fill(1);
                assert!(leaf.lock().set_allocated(70, slot).is_none());
                writing
            }
        });
        let look = || {
            let mut seen = BASE;
            leaf.for_runs(70..71, |_, content| {
                if let Content::Allocated(slots) = content {
                    seen = one_value(pool.arena().bytes(&slots[0]));
                }
            });
            seen
        };
        let (first, second) = (look(), look());
        assert!([(BASE, BASE), (BASE, 1), (1, 1)].contains(&(first, second)));
        drop(writer.join().unwrap());
        assert_eq!(look(), 1);
    });
}

/// One connection writes a block for the first time while another reads it, without the lock as long as it finds the
/// block's bit clear. It gets the base or the whole of what was written, never what the memory held before, and once it
/// has seen what was written, it sees that again.
///
/// Caught: in `write_part`, the slot filled when the lock was let go behind `put_slot`; in `Arena::share`, a handle without
/// a count.
#[test]
fn a_block_is_seen_whole_or_not_at_all() {
    model(|image| {
        let pool = pool(1);
        let device = Arc::new(device(image, &pool));
        let (mut writing, mut reading) = (magazine(&pool), Magazine::new(std::sync::Arc::clone(&pool)));
        let writer = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.write(BLOCK, &[1; BYTES], &mut writing).unwrap();
                writing
            }
        });
        let mut before = BASE;
        for _ in 0..2 {
            let reply = Reply::read(&device, 1);
            let seen = one_value(&reply.bytes());
            reply.release(&mut reading);
            assert!(seen == 1 || (seen, before) == (BASE, BASE), "{seen:#x} behind {before:#x}");
            before = seen;
        }
        drop(writer.join().unwrap());
        let reply = Reply::read(&device, 1);
        assert_eq!(one_value(&reply.bytes()), 1);
        reply.release(&mut reading);
    });
}

/// Two connections write to parts of one block for the first time: both parts survive, and the base around them.
///
/// Caught: in `write_part`, the lock let go and taken again before `put_slot`; in `with_leaf`, a new leaf put in the place of
/// one that another connection has just made; in `Arena::share`, a handle without a count.
#[test]
fn first_writes_to_parts_of_one_block_both_survive() {
    model(|image| {
        let pool = pool(1);
        let device = Arc::new(device(image, &pool));
        let mut one = magazine(&pool);
        let other = part_writer(&device, &pool, 1024, 2);
        device.write(BLOCK, &[1; 512], &mut one).unwrap();
        drop(other.join().unwrap());
        check_parts(&Reply::read(&device, 1).take(&mut one), false);
    });
}

/// The same, while a third connection reads the block: it sees each part whole or not at all, and the base around them.
///
/// Caught: all that the model before catches; the slot filled when the lock was let go; in `Arena::is_unique`, a relaxed
/// load, or no look at the count at all; in `Arena::release`, a relaxed count.
#[test]
fn first_writes_to_parts_of_one_block_are_seen_whole() {
    bounded_model(Some(PREEMPTIONS), |image| {
        let pool = pool(1);
        let device = Arc::new(device(image, &pool));
        let writers = [(0, 1), (1024, 2)].map(|(at, value)| part_writer(&device, &pool, at, value));
        let mut reading = Magazine::new(std::sync::Arc::clone(&pool));
        check_parts(&Reply::read(&device, 1).take(&mut reading), true);
        drop(writers.map(|writer| writer.join().unwrap()));
        check_parts(&Reply::read(&device, 1).take(&mut reading), false);
    });
}

/// A connection that writes a part of block 1.
fn part_writer(
    device: &Arc<Device>,
    pool: &std::sync::Arc<Pool>,
    at: u64,
    value: u8,
) -> thread::JoinHandle<Magazine> {
    let (device, mut magazine) = (Arc::clone(device), magazine(pool));
    thread::spawn(move || {
        device.write(BLOCK + at, &[value; 512], &mut magazine).unwrap();
        magazine
    })
}

/// What the block holds when both parts were written, or, `meanwhile`, when either may have been.
fn check_parts(bytes: &[u8], meanwhile: bool) {
    for (part, expected) in bytes.chunks(512).zip([1, BASE, 2, BASE, BASE, BASE, BASE, BASE]) {
        let found = one_value(part);
        assert!(found == expected || (meanwhile && found == BASE), "{found:#x} instead of {expected:#x}");
    }
}

/// A block is overwritten while a reply that sends it is on its way: the reply sends what was read.
///
/// Caught: in `Arena::is_unique`, a relaxed load, or no look at the count at all; in `Arena::share`, a handle without a
/// count; in `Arena::release`, a relaxed count, or a load and a store instead of a subtraction; in `Account::release`, what
/// was not pinned given back as if it had been, or pinned only when it was given back.
#[test]
fn a_reply_in_flight_sends_what_was_read() {
    model(|image| {
        let pool = pool(1);
        let device = Arc::new(device(image, &pool));
        let (mut writing, mut reading) = (magazine(&pool), Magazine::new(std::sync::Arc::clone(&pool)));
        device.write(BLOCK, &[1; BYTES], &mut writing).unwrap();
        let reader = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                let reply = Reply::read(&device, 1);
                let seen = reply.bytes();
                assert_eq!(reply.bytes(), seen);
                reply.release(&mut reading);
                (reading, seen)
            }
        });
        device.write(BLOCK, &[2; 512], &mut writing).unwrap();
        let (_reading, seen) = reader.join().unwrap();
        check_unpinned(&device);
        assert_eq!(one_value(&seen[512..]), 1);
        assert!(matches!(one_value(&seen[..512]), 1 | 2));
    });
}

/// A block is trimmed while a reply that sends it is on its way, and whoever trimmed it uses the memory that came free
/// for somebody else: the reply never sends that.
///
/// Caught: in `Overlay::free`, slots given to the magazine although somebody holds them; in `Arena::share`, a handle without
/// a count; in `Arena::release`, a relaxed count, or a load and a store; in `Account::release`, as above.
#[test]
fn a_reply_in_flight_outlives_the_trim_of_its_block() {
    model(|image| {
        let pool = pool(1);
        let (mine, theirs) = (Arc::new(device(image, &pool)), device(image, &pool));
        let (mut writing, mut reading) = (magazine(&pool), Magazine::new(std::sync::Arc::clone(&pool)));
        mine.write(BLOCK, &[1; BYTES], &mut writing).unwrap();
        let reader = thread::spawn({
            let mine = Arc::clone(&mine);
            move || {
                let reply = Reply::read(&mine, 1);
                assert!(matches!(one_value(&reply.bytes()), 0 | 1), "what was read, or that it was trimmed");
                reply.release(&mut reading);
                reading
            }
        });
        mine.trim(&(BLOCK..2 * BLOCK), &mut writing);
        theirs.write(0, &[SECRET; BYTES], &mut writing).unwrap();
        drop(reader.join().unwrap());
        check_unpinned(&mine);
    });
}

/// A session ends while a reply of it is on its way, and the next session takes all memory there is: what the reply holds
/// is not recycled before it lets go, whoever of both is the last to leave, and is wiped then.
///
/// Caught: in `Pool::take` and `Magazine::flush`, slots handed on unwiped; in `Arena::share`, a handle without a count; in
/// `Arena::release`, a relaxed count.
#[test]
fn a_reply_in_flight_outlives_its_session() {
    model(|image| {
        let pool = pool(0);
        let ended = Arc::new(device(image, &pool));
        let mut sending = Magazine::new(std::sync::Arc::clone(&pool));
        ended.write(BLOCK, &[1; BYTES], &mut sending).unwrap();
        let Reply(_, pieces) = Reply::read(&ended, 1);
        let next = thread::spawn({
            let (ended, pool) = (Arc::clone(&ended), std::sync::Arc::clone(&pool));
            move || {
                drop(ended);
                take_all(&pool);
            }
        });
        // A server has no reply without its session; here it goes first, which leaves the slots alone to be held.
        drop(ended);
        for piece in pieces {
            let Piece::Blocks { run, .. } = piece else { continue };
            assert_eq!(one_value(pool.arena().run_bytes(&run)), 1);
            for loan in run.into_loans() {
                let _ = sending.give_back(loan);
            }
        }
        sending.flush();
        next.join().unwrap();
        take_all(&pool);
    });
}

/// Another session, that fills all memory which is free.
fn take_all(pool: &std::sync::Arc<Pool>) {
    let mut magazine = Magazine::new(std::sync::Arc::clone(pool));
    let mut taken = Vec::new();
    while let Ok(mut slot) = magazine.allocate() {
        let bytes = pool.arena().bytes_mut(&mut slot).unwrap();
        assert_eq!(one_value(bytes), 0, "slots come zeroed");
        bytes.fill(SECRET);
        taken.push(slot);
    }
    for slot in taken {
        let _ = magazine.release(slot);
    }
}

/// Two holders of one slot let go at the same time: one of them, and only one, is told that it was the last, and may
/// wipe what both have used.
///
/// Caught: in `Arena::release`, a relaxed count, or a load and a store; in `Arena::share`, no count. Not caught: no fence in
/// `Arena::release`, as whoever wipes or writes looks at the count once more, and acquires by that.
#[test]
fn the_last_of_two_holders_gets_the_slot() {
    model(|_| {
        let pool = pool(0);
        let arena = pool.arena();
        let mut magazine = Magazine::new(std::sync::Arc::clone(&pool));
        let slot = magazine.allocate().unwrap();
        let other = arena.share(&slot);
        let let_go = |slot, pool: &Pool| {
            assert_eq!(pool.arena().bytes(&slot)[0], 0);
            let number = slot.number();
            let last = pool.arena().release(slot) == Left::Nobody;
            if last {
                pool.arena().wipe(number, 1);
            }
            last
        };
        let thread = thread::spawn({
            let pool = std::sync::Arc::clone(&pool);
            move || let_go(other, &pool)
        });
        let last = let_go(slot, &pool);
        let other = thread.join().unwrap();
        assert!(last != other, "one is the last");
    });
}

/// What the first blocks of a snapshot begin with.
fn first_bytes(snapshot: &Snapshot, pool: &Pool) -> [u8; 2] {
    let mut bytes = [BASE; 2];
    snapshot.for_runs(0..2, |run, content| {
        if let Content::Allocated(slots) = content {
            for (slot, block) in slots.iter().zip(run) {
                bytes[usize::try_from(block).unwrap()] = pool.arena().bytes(slot)[0];
            }
        }
    });
    bytes
}

/// A checkpoint is taken while a connection writes one block, and when that is acknowledged, another, and then the first
/// again: it holds what was written up to some moment, and holds that still when everything is written.
///
/// Caught: in `Tree::snapshot`, the era left as it was; in `Tree::own_leaf`, a leaf of any era; in `Arena::is_unique`, no look
/// at the holders.
#[test]
fn a_checkpoint_is_of_one_moment_and_stays() {
    bounded_model(Some(PREEMPTIONS), |image| {
        let pool = pool(4);
        let device = Arc::new(device(image, &pool));
        let mut writing = magazine(&pool);
        let writer = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.write(0, &[1; BYTES], &mut writing).unwrap();
                device.write(BLOCK, &[2; BYTES], &mut writing).unwrap();
                device.write(0, &[3; 512], &mut writing).unwrap();
                device.write(512, &[3; BYTES - 512], &mut writing).unwrap();
                writing
            }
        });
        let snapshot = device.overlay().snapshot().unwrap();
        let first = first_bytes(&snapshot, &pool);
        assert!([[BASE, BASE], [1, BASE], [1, 2], [3, 2]].contains(&first), "{first:x?}");
        drop(writer.join().unwrap());
        assert_eq!(first_bytes(&snapshot, &pool), first);
    });
}

/// A session and its fork both write to parts of a block that they share, and to the block as a whole: neither sees what
/// the other wrote, a checkpoint of before sees neither, and when all have ended every block has been given back once.
///
/// Caught: as by the model before.
#[test]
fn forks_that_write_to_one_block_are_apart() {
    bounded_model(Some(PREEMPTIONS), |image| {
        let pool = pool(4);
        let total = Budget::total(1 << 20);
        let budget = || Budget::within(&total, 1 << 20).unwrap();
        let overlay = Overlay::new(4, std::sync::Arc::clone(&pool), budget());
        let parent = Device::new(std::sync::Arc::clone(image), overlay);
        let mut writing = magazine(&pool);
        parent.write(0, &[1; BYTES], &mut writing).unwrap();
        let snapshot = parent.overlay().snapshot().unwrap();
        let fork = parent.fork(budget());
        let other = thread::spawn({
            let mut writing = magazine(&pool);
            move || {
                fork.write(0, &[2; 512], &mut writing).unwrap();
                let bytes = Reply::read(&fork, 0).take(&mut writing);
                assert_eq!((one_value(&bytes[..512]), one_value(&bytes[512..])), (2, 1));
                drop(fork);
                writing
            }
        });
        parent.write(512, &[3; 512], &mut writing).unwrap();
        let bytes = Reply::read(&parent, 0).take(&mut writing);
        assert_eq!((one_value(&bytes[..512]), one_value(&bytes[512..1024]), bytes[1024]), (1, 3, 1));
        assert_eq!(first_bytes(&snapshot, &pool), [1, BASE]);
        drop((parent, snapshot));
        drop((writing, other.join().unwrap()));
        assert_eq!((total.data(), total.map(), total.pinned(), pool.slots_in_use()), (0, 0, 0, 0));
    });
}

/// A session is rolled back while a connection reads a block and writes it: what is read is of before or of behind, and what
/// was given up is wiped only when the reply is sent.
///
/// Caught: as by the model of a checkpoint.
#[test]
fn a_rollback_is_before_a_write_or_behind_it() {
    bounded_model(Some(PREEMPTIONS), |image| {
        let pool = pool(4);
        let device = Arc::new(device(image, &pool));
        let mut writing = magazine(&pool);
        device.write(0, &[1; BYTES], &mut writing).unwrap();
        let snapshot = device.overlay().snapshot().unwrap();
        device.write(0, &[2; BYTES], &mut writing).unwrap();
        let other = thread::spawn({
            let (device, mut writing) = (Arc::clone(&device), Magazine::new(std::sync::Arc::clone(&pool)));
            move || {
                let seen = one_value(&Reply::read(&device, 0).take(&mut writing));
                assert!(matches!(seen, 1 | 2));
                device.write(0, &[3; 512], &mut writing).unwrap();
                writing
            }
        });
        device.overlay().return_to(Some(&snapshot));
        device.overlay().tidy();
        drop(other.join().unwrap());
        let bytes = Reply::read(&device, 0).take(&mut writing);
        assert!(matches!((one_value(&bytes[..512]), one_value(&bytes[512..])), (1 | 3, 1)));
        check_unpinned(&device);
        device.overlay().tidy();
        let blocks = if bytes[0] == 3 { 2 } else { 1 };
        assert_eq!(device.overlay().budget().data(), blocks * BLOCK);
    });
}
