//! Devices with checkpoints and forks, against as many byte arrays.

use super::tests::{overlay, pattern};
use super::*;
use crate::overlay::{OverflowFile, Pool, Snapshot};
use proptest::prelude::*;
use std::collections::HashSet;
use std::io::Write;

const BLOCK: u64 = 4096;
/// The last leaf has a few blocks only, the last block a few bytes.
const BLOCKS: u64 = 512 + 24;
const SIZE: usize = 535 * 4096 + 123;

/// A session and what it should hold.
struct World {
    device: Device,
    model: Vec<u8>,
    points: Vec<(Snapshot, Vec<u8>)>,
}

/// A reply on its way and what it should say.
struct Reply {
    world: usize,
    pieces: Vec<Piece>,
    expected: Vec<u8>,
}

struct Worlds {
    total: Arc<Budget>,
    pool: Arc<Pool>,
    magazine: Magazine,
    /// Those that have ended leave an empty place.
    all: Vec<Option<World>>,
    replies: Vec<Reply>,
    base: Vec<u8>,
    _file: tempfile::NamedTempFile,
}

#[derive(Clone, Debug)]
enum Op {
    Write(Range<u64>, u8),
    Zero(Range<u64>, bool),
    Trim(Range<u64>),
    /// A reply begins.
    Read(Range<u64>),
    /// A reply is sent.
    Sent(usize),
    Checkpoint,
    Rollback(usize),
    Drop(usize),
    Reset,
    Fork,
    ForkOf(usize),
    End,
    Tidy,
    /// What can goes to the file, if there is one.
    Out,
}

/// What is done, and to which of the sessions.
fn ops() -> impl Strategy<Value = Vec<(usize, Op)>> {
    // Few places, so that writes meet: around the borders of leaves and at the end.
    let start = prop_oneof![0..6 * BLOCK, 509 * BLOCK..515 * BLOCK, SIZE as u64 - 3 * BLOCK..SIZE as u64];
    let len = prop_oneof![Just(BLOCK), 1..3 * BLOCK, Just(512 * BLOCK), Just(SIZE as u64)];
    let range = (start, len, any::<bool>()).prop_map(|(start, len, whole)| {
        let start = if whole { start / BLOCK * BLOCK } else { start };
        start..(start + len).min(SIZE as u64)
    });
    let op = prop_oneof![
        8 => (range.clone(), 0..5_u8).prop_map(|(range, value)| Op::Write(range, value)),
        2 => (range.clone(), any::<bool>()).prop_map(|(range, allocate)| Op::Zero(range, allocate)),
        2 => range.clone().prop_map(Op::Trim),
        2 => range.prop_map(Op::Read),
        2 => any::<usize>().prop_map(Op::Sent),
        3 => Just(Op::Checkpoint),
        2 => any::<usize>().prop_map(Op::Rollback),
        2 => any::<usize>().prop_map(Op::Drop),
        1 => Just(Op::Reset),
        3 => Just(Op::Fork),
        1 => any::<usize>().prop_map(Op::ForkOf),
        1 => Just(Op::End),
        1 => Just(Op::Tidy),
        3 => Just(Op::Out),
    ];
    prop::collection::vec((any::<usize>(), op), 1..50)
}

fn span(range: &Range<u64>) -> Range<usize> {
    clamp(range.start)..clamp(range.end)
}

/// As a helper does for who needs it.
fn bring_in(device: &Device, range: &Range<u64>) {
    device.overlay().bring_in(None, device.blocks(range)).unwrap();
}

impl Worlds {
    fn new() -> Self {
        Self::of(false)
    }

    /// Whose sessions are sealed, or are not.
    fn of(sealed: bool) -> Self {
        let base = pattern(SIZE);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&base).unwrap();
        let image = Arc::new(Image::open(file.path()).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let away = sealed.then(|| OverflowFile::make(dir.path(), 64 << 20).unwrap());
        let pool = Pool::with_overflow(256 << 20, BlockSize::DEFAULT, away).unwrap();
        let total = Budget::total(256 << 20);
        let magazine = Magazine::new(Arc::clone(&pool));
        let budget = Budget::within(&total, 1 << 30).unwrap();
        let overlay = overlay(BLOCKS, &pool, budget, sealed);
        let first = World { device: Device::new(image, overlay), model: base.clone(), points: Vec::new() };
        Self { total, pool, magazine, all: vec![Some(first)], replies: Vec::new(), base, _file: file }
    }

    fn bytes(&self, device: &Device, pieces: &[Piece]) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Base { offset, len } => {
                    out.extend_from_slice(&self.base[clamp(*offset)..clamp(*offset) + len]);
                }
                Piece::Blocks { run, first, at, len } => {
                    let start = out.len();
                    out.resize(start + len, 0);
                    device.copy(run, *first, *at, &mut out[start..]);
                }
                Piece::Zero { len } => out.resize(out.len() + len, 0),
            }
        }
        out
    }

    /// A reply is sent, and lets go.
    fn send(&mut self, reply: Reply) {
        let world = self.all[reply.world].as_ref().unwrap();
        assert!(self.bytes(&world.device, &reply.pieces) == reply.expected, "a reply has changed");
        for piece in reply.pieces {
            if let Piece::Blocks { run, .. } = piece {
                world.device.release(run, &mut self.magazine);
            }
        }
    }

    fn act(&mut self, which: usize, op: Op) {
        let here: Vec<usize> = (0..self.all.len()).filter(|&at| self.all[at].is_some()).collect();
        let Some(&at) = here.get(which % here.len().max(1)) else { return };
        let budget = || Budget::within(&self.total, 1 << 30).unwrap();
        let World { device, model, points } = self.all[at].as_mut().unwrap();
        let magazine = &mut self.magazine;
        match op {
            Op::Write(range, value) => {
                model[span(&range)].fill(value);
                while let Err(kind) = device.write(range.start, &model[span(&range)], magazine) {
                    assert_eq!(kind, ErrorKind::Away);
                    bring_in(device, &range);
                }
            }
            Op::Zero(range, allocate) => {
                model[span(&range)].fill(0);
                while let Err(kind) = device.write_zeroes(range.clone(), allocate, magazine) {
                    assert_eq!(kind, ErrorKind::Away);
                    bring_in(device, &range);
                }
            }
            Op::Trim(range) => {
                device.trim(&range, magazine);
                let whole = device.whole_blocks(&range);
                let end = clamp(whole.end * BLOCK).min(SIZE);
                model[clamp(whole.start * BLOCK).min(end)..end].fill(0);
            }
            Op::Read(range) => {
                let mut pieces = Vec::new();
                bring_in(device, &range);
                device.read(range.clone(), |piece| pieces.push(piece));
                self.replies.push(Reply { world: at, pieces, expected: model[span(&range)].to_vec() });
            }
            Op::Sent(which) => {
                if !self.replies.is_empty() {
                    let reply = self.replies.swap_remove(which % self.replies.len());
                    self.send(reply);
                }
            }
            Op::Checkpoint => points.push((device.overlay().snapshot().unwrap(), model.clone())),
            Op::Rollback(_) | Op::Drop(_) | Op::ForkOf(_) if points.is_empty() => {}
            Op::Rollback(which) => {
                let (snapshot, then) = &points[which % points.len()];
                device.overlay().return_to(Some(snapshot));
                model.clone_from(then);
            }
            Op::Drop(which) => {
                let (snapshot, _) = points.swap_remove(which % points.len());
                device.overlay().forget(snapshot);
            }
            Op::Reset => {
                device.overlay().return_to(None);
                model.clone_from(&self.base);
            }
            Op::Fork => {
                let fork = World { device: device.fork(budget()), model: model.clone(), points: Vec::new() };
                self.all.push(Some(fork));
            }
            Op::ForkOf(which) => {
                let (snapshot, then) = &points[which % points.len()];
                let overlay = Overlay::of(snapshot, budget());
                let device = Device::new(Arc::clone(device.image()), overlay);
                let fork = World { device, model: then.clone(), points: Vec::new() };
                self.all.push(Some(fork));
            }
            Op::End => {
                let (now, later) =
                    std::mem::take(&mut self.replies).into_iter().partition(|reply| reply.world == at);
                self.replies = later;
                let now: Vec<Reply> = now;
                now.into_iter().for_each(|reply| self.send(reply));
                self.all[at] = None;
            }
            Op::Tidy => device.overlay().tidy(),
            Op::Out => {
                // What was brought in and not used since stays, as long as the clock stands still.
                let mut next = Some(0);
                while let Some(block) = next {
                    next = device.overlay().move_out(block, 0).unwrap().next;
                }
            }
        }
    }

    /// Everything is what it should be.
    fn check(&mut self) {
        for at in 0..self.all.len() {
            let Some(World { device, model, points }) = &self.all[at] else { continue };
            let mut pieces = Vec::new();
            bring_in(device, &(0..SIZE as u64));
            device.read(0..SIZE as u64, |piece| pieces.push(piece));
            assert!(self.bytes(device, &pieces) == *model, "session {at}");
            for piece in pieces {
                if let Piece::Blocks { run, .. } = piece {
                    device.release(run, &mut self.magazine);
                }
            }
            device.extents(0..SIZE as u64, |_| true);
            for (snapshot, then) in points {
                snapshot.for_runs(0..BLOCKS, |blocks, content| {
                    let range = span(&device.bytes(&blocks, &(0..SIZE as u64)));
                    match content {
                        Content::Unallocated => assert!(then[range.clone()] == self.base[range]),
                        Content::Zero => assert!(then[range].iter().all(|byte| *byte == 0)),
                        Content::Allocated(slots) => {
                            for ((slot, block), number) in
                                slots.iter().zip(then[range].chunks(4096)).zip(blocks.start..)
                            {
                                if self.pool.arena().is_away(slot.number()) {
                                    // It is looked at when somebody goes back to it.
                                    continue;
                                }
                                let mut bytes = self.pool.arena().bytes(slot).to_vec();
                                if let Some(seal) = device.overlay().seal() {
                                    let sealed = bytes.clone();
                                    seal.read(number, &sealed, 0, &mut bytes);
                                }
                                assert!(bytes[..block.len()] == *block, "a checkpoint has changed");
                            }
                        }
                    }
                });
            }
        }
    }

    /// Each block is paid for once, by somebody.
    fn check_accounts(&self) {
        let mut held = HashSet::new();
        let mut see = |_: Range<u64>, content: Content<'_>| {
            if let Content::Allocated(slots) = content {
                held.extend(slots.iter().map(|slot| slot.number()));
            }
        };
        for World { device, points, .. } in self.all.iter().flatten() {
            device.overlay().tidy();
            device.overlay().for_runs(0..BLOCKS, &mut see);
            points.iter().for_each(|(snapshot, _)| snapshot.for_runs(0..BLOCKS, &mut see));
        }
        assert_eq!(self.total.data() + self.total.away(), held.len() as u64 * BLOCK);
        let away = held.iter().filter(|&&number| self.pool.arena().is_away(number)).count() as u64;
        assert_eq!(self.total.away(), away * BLOCK);
        assert_eq!(self.pool.overflow().map_or(0, |overflow| overflow.used()), away * BLOCK);
        // What is paid for by those that have ended is in no session's account, and in the total.
        let accounts = self.all.iter().flatten().map(|world| world.device.overlay().budget());
        let (data, map) = accounts.fold((0, 0), |(data, map), one| (data + one.data(), map + one.map()));
        let total = self.total.data() + self.total.away();
        assert!(data <= total && map <= self.total.map());
        if self.all.iter().all(Option::is_some) {
            assert_eq!(data, total);
            assert_eq!(map + self.all.len() as u64 * Budget::SESSION, self.total.map());
        }
    }

    /// All sessions end; nothing is left.
    fn end(mut self) {
        for reply in std::mem::take(&mut self.replies) {
            self.send(reply);
        }
        for world in self.all.iter().flatten() {
            assert_eq!(world.device.overlay().budget().pinned(), 0);
        }
        self.all.clear();
        self.magazine.flush();
        assert_eq!((self.total.data(), self.total.map(), self.total.pinned()), (0, 0, 0));
        assert_eq!((self.pool.slots_in_use(), self.total.away()), (0, 0));
        assert_eq!(self.pool.overflow().map_or(0, |overflow| overflow.used()), 0);
        assert_eq!(self.pool.accounts(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn sessions_checkpoints_and_forks_are_byte_arrays(ops in ops(), sealed in any::<bool>()) {
        let mut worlds = Worlds::of(sealed);
        for (count, (which, op)) in ops.into_iter().enumerate() {
            worlds.act(which, op);
            if count % 8 == 7 {
                worlds.check();
                worlds.check_accounts();
            }
        }
        worlds.check();
        worlds.check_accounts();
        worlds.end();
    }
}

/// A thousand forks of one session with a full leaf and a few bytes here and there: they share all of it.
#[test]
fn forks_that_write_nothing_take_no_memory() {
    let mut worlds = Worlds::new();
    worlds.act(0, Op::Write(0..520 * BLOCK, 7));
    let total = Arc::clone(&worlds.total);
    let (data, map) = (total.data(), total.map());
    let device = &worlds.all[0].as_ref().unwrap().device;
    let budget = || Budget::within(&total, 1 << 30).unwrap();
    let forks: Vec<Device> = (0..1000).map(|_| device.fork(budget())).collect();
    assert_eq!((total.data(), total.map()), (data, map + 1000 * Budget::SESSION));
    // One of them writes a byte: a block, and the leaf that it is in.
    for at in [7, 9] {
        forks[500].write(at, &[1], &mut worlds.magazine).unwrap();
        assert_eq!(total.data(), data + BLOCK);
    }
    let again = forks[500].fork(budget());
    drop(forks);
    assert_eq!(total.data(), data + BLOCK);
    drop(again);
    assert_eq!((total.data(), total.map()), (data, map));
    worlds.end();
}

/// The first session ends; what its fork still has of it stays paid for, by the server alone, until the fork lets it go.
#[test]
fn what_a_session_that_has_ended_leaves_to_its_fork_is_paid_for() {
    let mut worlds = Worlds::new();
    worlds.act(0, Op::Write(0..10 * BLOCK, 7));
    worlds.act(0, Op::Fork);
    worlds.act(1, Op::Write(0..2 * BLOCK, 8));
    let fork = |worlds: &Worlds| worlds.all[1].as_ref().unwrap().device.overlay().budget().data();
    assert_eq!((fork(&worlds), worlds.total.data()), (2 * BLOCK, 12 * BLOCK));
    worlds.act(0, Op::End);
    assert_eq!((fork(&worlds), worlds.total.data()), (2 * BLOCK, 10 * BLOCK));
    // It is the fork's alone now, but was not charged to it.
    worlds.act(0, Op::Write(2 * BLOCK..3 * BLOCK, 9));
    worlds.act(0, Op::Trim(3 * BLOCK..4 * BLOCK));
    assert_eq!(worlds.total.data(), 9 * BLOCK);
    worlds.check();
    worlds.check_accounts();
    worlds.end();
}

/// A session at its limit can overwrite what it alone has; what a checkpoint has, too, takes a block more.
#[test]
fn what_a_checkpoint_holds_takes_room() {
    let mut worlds = Worlds::new();
    let world = worlds.all[0].as_mut().unwrap();
    let (device, magazine) = (&world.device, &mut worlds.magazine);
    let overlay = device.overlay();
    overlay.budget().set_limit(4 * BLOCK);
    device.write(0, &[1; 4 * 4096], magazine).unwrap();
    device.write(0, &[2; 4 * 4096], magazine).unwrap();
    let snapshot = overlay.snapshot().unwrap();
    assert_eq!(device.write(0, &[3; 4096], magazine), Err(ErrorKind::OutOfSpace));
    assert_eq!(device.write(BLOCK + 5, &[3; 10], magazine), Err(ErrorKind::OutOfSpace));
    device.trim(&(2 * BLOCK..3 * BLOCK), magazine);
    assert_eq!(overlay.budget().data(), 4 * BLOCK, "the checkpoint still has it");
    // What was given up and has not been taken apart yet does not stand in the way.
    overlay.forget(snapshot);
    device.write(0, &[3; 3 * 4096], magazine).unwrap();
    device.write(3 * BLOCK, &[4; 4096], magazine).unwrap();
    assert_eq!(overlay.budget().data(), 4 * BLOCK);
    overlay.return_to(None);
    device.write(7 * BLOCK, &[5; 4 * 4096], magazine).unwrap();
    overlay.tidy();
    assert_eq!(overlay.budget().data(), 4 * BLOCK);
    world.model[7 * 4096..11 * 4096].fill(5);
    worlds.check();
    worlds.end();
}

/// A read that began before a rollback goes on with what it began with.
#[test]
fn a_long_read_sees_one_state() {
    let mut worlds = Worlds::new();
    worlds.act(0, Op::Write(0..4 * BLOCK, 7));
    let world = worlds.all[0].as_ref().unwrap();
    let overlay = world.device.overlay();
    let read = overlay.begin_long_read();
    let value = |read: Option<&LongRead>, block: u64| {
        let mut value = None;
        overlay.for_runs_in(read, block..block + 1, |_, content| {
            if let Content::Allocated(slots) = content {
                value = Some(worlds.pool.arena().bytes(&slots[0])[0]);
            }
        });
        value
    };
    assert_eq!(value(Some(&read), 0), Some(7));
    overlay.return_to(None);
    let late = overlay.begin_long_read();
    assert_eq!((value(Some(&read), 1), value(Some(&late), 1), value(None, 1)), (Some(7), None, None));
    overlay.return_to(None);
    assert_eq!((value(Some(&read), 1), value(Some(&late), 1)), (Some(7), None));
    overlay.tidy();
    assert_eq!(worlds.total.data(), 4 * BLOCK, "the read still needs it");
    drop(read);
    assert_eq!(worlds.total.data(), 0);
}
