//! The overlay as a whole, against what it should hold.

use super::tree::{BRANCH_COST, Node};
use super::*;
use crate::sys::SlotRun;

fn overlay(blocks: u64, limit: u64) -> (Overlay, Magazine) {
    let pool = Pool::new(64 << 20, BlockSize::DEFAULT).unwrap();
    let magazine = Magazine::new(Arc::clone(&pool));
    let total = Budget::total(64 << 20);
    (Overlay::new(blocks, pool, Budget::within(&total, limit).unwrap()), magazine)
}

/// The contents of a block, with 0xbb where the base would show through.
fn contents(overlay: &Overlay, block: u64) -> Vec<u8> {
    let mut out = Vec::new();
    overlay.for_runs(block..block + 1, |_, content| {
        out = match content {
            Content::Unallocated => vec![0xbb; 4096],
            Content::Zero => vec![0; 4096],
            Content::Allocated(slots) => overlay.pool().arena().bytes(&slots[0]).to_vec(),
        }
    });
    out
}

fn base(memory: &mut [u8]) -> Outcome<()> {
    memory.fill(0xbb);
    Ok(())
}

#[test]
fn block_sizes_are_powers_of_two_within_limits() {
    assert_eq!(BlockSize::new(4096), Some(BlockSize::DEFAULT));
    assert!([0, 512, 4097, 6144, 2 << 20].iter().all(|&bytes| BlockSize::new(bytes).is_none()));
    let size = BlockSize::new(65536).unwrap();
    assert_eq!(
        (size.index_of(131_071), size.offset_within(131_071), size.blocks_for(65_537)),
        (1, 65_535, 2)
    );
}

#[test]
fn the_least_memory_is_what_one_block_of_one_session_takes() {
    for block in [BlockSize::DEFAULT, BlockSize::new(1 << 20).unwrap()] {
        let least = least_memory(block);
        for (limit, expected) in [(least, Ok(())), (least - 1, Err(ErrorKind::OutOfSpace))] {
            let pool = Pool::new(64 << 20, block).unwrap();
            let mut magazine = Magazine::new(Arc::clone(&pool));
            let budget = Budget::within(&Budget::total(limit), limit).unwrap();
            let overlay = Overlay::new(100_000, pool, budget);
            assert_eq!(
                overlay.write(70_000, &vec![7; block.in_memory()], &mut magazine),
                expected,
                "{limit}"
            );
        }
    }
}

#[test]
fn ranges_are_split_at_leaves() {
    let split: Vec<_> = per_leaf(510..1030).collect();
    assert_eq!(split, [(0, 510..512), (1, 0..512), (2, 0..6)]);
    assert_eq!(per_leaf(5..5).count(), 0);
}

#[test]
fn what_is_written_is_read_and_neighbours_are_the_base() {
    let (overlay, mut magazine) = overlay(2000, 1 << 30);
    overlay.write(700, &[7; 8192], &mut magazine).unwrap();
    assert_eq!(contents(&overlay, 701), [7; 4096]);
    assert_eq!((overlay.state(699), overlay.state(702)), (State::Unallocated, State::Unallocated));
    assert_eq!(overlay.budget().data(), 8192);
}

#[test]
fn states_are_those_of_the_blocks_and_stretches_without_leaves_are_one_run() {
    const LEAF: u64 = LEAF_BLOCKS as u64;
    let blocks = 1000 * LEAF + 5;
    let (overlay, mut magazine) = overlay(blocks, 1 << 30);
    // More leaves in a row than are looked at at once: written ones, all zero ones, and gaps.
    for leaf in (0..600).filter(|leaf| leaf % 7 != 0) {
        if leaf % 2 == 0 {
            overlay.set_zero(leaf * LEAF..(leaf + 1) * LEAF, &mut magazine).unwrap();
        } else {
            overlay.write(leaf * LEAF + leaf % LEAF, &[7; 4096], &mut magazine).unwrap();
        }
    }
    overlay.set_zero(blocks - 1..blocks, &mut magazine).unwrap();
    let states = |range: Range<u64>| {
        let mut runs = Vec::new();
        overlay.for_states(range, |run, state| {
            runs.push((run, state));
            true
        });
        runs
    };
    let ranges =
        [0..blocks, 1..1, 700..701, 3 * LEAF + 3..599 * LEAF, 600 * LEAF..900 * LEAF, blocks - 2..blocks];
    for range in ranges {
        let mut at = range.start;
        for (run, state) in states(range.clone()) {
            assert_eq!(run.start, at);
            for block in run.clone().step_by(97).chain([run.end - 1]) {
                assert_eq!(overlay.state(block), state, "block {block}");
            }
            at = run.end;
        }
        assert_eq!(at, range.end);
    }
    assert_eq!(
        states(600 * LEAF - 1..blocks),
        [
            (600 * LEAF - 1..600 * LEAF, State::Unallocated),
            (600 * LEAF..1000 * LEAF, State::Unallocated),
            (1000 * LEAF..blocks - 1, State::Unallocated),
            (blocks - 1..blocks, State::Zero)
        ]
    );
    let mut looks = 0;
    overlay.for_states(0..blocks, |_, _| {
        looks += 1;
        looks < 4
    });
    assert_eq!(looks, 4);
}

#[test]
fn part_of_a_block_is_merged_with_what_was_there() {
    let (overlay, mut magazine) = overlay(10, 1 << 30);
    overlay.write_part(1, 100, &[1; 50], &mut magazine, base).unwrap();
    overlay.write_part(1, 120, &[2; 10], &mut magazine, base).unwrap();
    let block = contents(&overlay, 1);
    assert_eq!(
        (block[99], block[100], block[119], block[120], block[130], block[150]),
        (0xbb, 1, 1, 2, 1, 0xbb)
    );
    overlay.set_zero(1..2, &mut magazine).unwrap();
    overlay.write_part(1, 0, &[3], &mut magazine, base).unwrap();
    assert_eq!(contents(&overlay, 1)[..2], [3, 0]);
}

#[test]
fn a_failing_base_leaves_nothing_behind() {
    let (overlay, mut magazine) = overlay(10, 1 << 30);
    let failing = |_: &mut [u8]| Err(ErrorKind::Io);
    assert_eq!(overlay.write_part(1, 0, &[1], &mut magazine, failing), Err(ErrorKind::Io));
    assert_eq!((overlay.state(1), overlay.budget().data()), (State::Unallocated, 0));
}

#[test]
fn zeroes_take_no_memory_and_free_it() {
    let (overlay, mut magazine) = overlay(2000, 1 << 30);
    overlay.write(0, &[0; 4096 * 600], &mut magazine).unwrap();
    assert_eq!((overlay.budget().data(), overlay.state(599)), (0, State::Zero));
    overlay.write(0, &[1; 4096 * 600], &mut magazine).unwrap();
    assert_eq!(overlay.budget().data(), 4096 * 600);
    overlay.set_zero(1..2000, &mut magazine).unwrap();
    assert_eq!((overlay.budget().data(), overlay.state(1999)), (4096, State::Zero));
    assert_eq!(overlay.budget().map(), BRANCH_COST + Leaf::COST + 4 * Node::COST);
    overlay.write(1999, &[1; 4096], &mut magazine).unwrap();
    assert_eq!((overlay.state(1998), contents(&overlay, 1998)), (State::Zero, vec![0; 4096]));
}

#[test]
fn a_full_budget_refuses_and_loses_nothing() {
    let (overlay, mut magazine) = overlay(100, 8192);
    overlay.write(0, &[1; 8192], &mut magazine).unwrap();
    assert_eq!(overlay.write(2, &[2; 4096], &mut magazine), Err(ErrorKind::OutOfSpace));
    assert_eq!((contents(&overlay, 1), overlay.state(2)), (vec![1; 4096], State::Unallocated));
    overlay.write(1, &[3; 4096], &mut magazine).unwrap();
    overlay.set_zero(0..1, &mut magazine).unwrap();
    overlay.write(2, &[2; 4096], &mut magazine).unwrap();
    assert_eq!((contents(&overlay, 1), contents(&overlay, 2)), (vec![3; 4096], vec![2; 4096]));
}

#[test]
fn what_a_reader_holds_stays_as_it_was() {
    let (overlay, mut magazine) = overlay(10, 1 << 30);
    overlay.write(3, &[1; 4096], &mut magazine).unwrap();
    let mut held = None;
    overlay.for_runs(3..4, |_, content| {
        let Content::Allocated(slots) = content else { panic!("not allocated") };
        held = Some(overlay.pool().arena().lend(&slots[0]));
    });
    let held = SlotRun::new(held.unwrap());
    overlay.write_part(3, 5, &[2; 10], &mut magazine, base).unwrap();
    assert_eq!(contents(&overlay, 3)[4..16], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
    overlay.set_zero(0..10, &mut magazine).unwrap();
    assert_eq!(overlay.pool().arena().run_bytes(&held), [1; 4096]);
    assert_eq!((overlay.budget().data(), overlay.budget().pinned()), (0, 4096));
    held.into_loans().for_each(|loan| overlay.release(loan, &mut magazine));
    assert_eq!(overlay.budget().pinned(), 0);
}

#[test]
fn what_readers_hold_of_a_trimmed_device_is_pinned_until_they_let_go() {
    let (overlay, mut magazine) = overlay(600, 1 << 30);
    overlay.write(0, &[1; 4096 * 600], &mut magazine).unwrap();
    let mut held = Vec::new();
    for _ in 0..2 {
        overlay.for_runs(510..514, |_, content| {
            let Content::Allocated(slots) = content else { panic!("not allocated") };
            held.extend(slots.iter().map(|slot| overlay.pool().arena().lend(slot)));
        });
    }
    // The first leaf altogether, the second in part.
    overlay.set_zero(0..513, &mut magazine).unwrap();
    assert_eq!((overlay.budget().data(), overlay.budget().pinned()), (87 * 4096, 3 * 4096));
    held.into_iter().for_each(|loan| overlay.release(loan, &mut magazine));
    assert_eq!((overlay.budget().data(), overlay.budget().pinned()), (87 * 4096, 0));
}

#[test]
fn an_installed_slot_replaces_the_old_one() {
    let (overlay, mut magazine) = overlay(10, 1 << 30);
    for value in [5, 6] {
        let mut slot = magazine.allocate().unwrap();
        overlay.pool().arena().bytes_mut(&mut slot).unwrap().fill(value);
        overlay.install(9, slot, &mut magazine).unwrap();
    }
    assert_eq!((contents(&overlay, 9), overlay.budget().data()), (vec![6; 4096], 4096));
}

#[test]
fn a_full_session_can_still_overwrite() {
    let (overlay, mut magazine) = overlay(10, 8192);
    overlay.write(0, &[1; 8192], &mut magazine).unwrap();
    let slot = magazine.allocate().unwrap();
    overlay.install(1, slot, &mut magazine).unwrap();
    let slot = magazine.allocate().unwrap();
    assert_eq!(overlay.install(2, slot, &mut magazine), Err(ErrorKind::OutOfSpace));
    assert_eq!((contents(&overlay, 1), overlay.state(2)), (vec![0; 4096], State::Unallocated));
    assert_eq!(overlay.budget().data(), 8192);
}

/// The base's bytes were fetched for a partial write, and meanwhile somebody else zeroed the block: what was fetched is
/// not needed any more, and must not be lost to the pool.
#[test]
fn a_write_that_is_overtaken_while_it_reads_the_base_loses_no_memory() {
    let (overlay, mut magazine) = overlay(10, 1 << 30);
    let overtaken = |memory: &mut [u8]| {
        let mut other = Magazine::new(Arc::clone(overlay.pool()));
        overlay.set_zero(1..2, &mut other)?;
        base(memory)
    };
    overlay.write_part(1, 5, &[7; 10], &mut magazine, overtaken).unwrap();
    assert_eq!(contents(&overlay, 1)[3..17], [0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
    magazine.flush();
    overlay.set_zero(1..2, &mut magazine).unwrap();
    magazine.flush();
    assert_eq!(overlay.pool().slots_in_use(), 0);
}

#[test]
fn zeroing_gives_back_even_where_there_is_no_memory_to_note_it() {
    let pool = Pool::new(4 << 20, BlockSize::DEFAULT).unwrap();
    let mut magazine = Magazine::new(Arc::clone(&pool));
    let total = Budget::total(8192 + BRANCH_COST + Node::COST + Leaf::COST + Budget::SESSION);
    let overlay = Overlay::new(4096, pool, Budget::within(&total, 1 << 20).unwrap());
    overlay.write(1024, &[1; 8192], &mut magazine).unwrap();
    // The first leaf cannot be noted, the third can be emptied.
    assert_eq!(overlay.set_zero(0..4096, &mut magazine), Err(ErrorKind::OutOfSpace));
    assert_eq!((overlay.budget().data(), overlay.state(1024)), (0, State::Zero));
}

#[test]
fn an_overlay_that_ends_gives_everything_back() {
    let (overlay, mut magazine) = overlay(2000, 1 << 30);
    overlay.write(5, &[1; 4096 * 1000], &mut magazine).unwrap();
    let pool = Arc::clone(overlay.pool());
    drop(overlay);
    assert!(!pool.is_wiped());
}

/// First writes to parts of one block from several threads at once: nbd-server's copy-on-write loses some of them.
#[test]
fn first_writes_to_one_block_from_many_threads_all_land() {
    const THREADS: usize = 4;
    let (overlay, _) = overlay(512, 1 << 30);
    for block in 0..256 {
        let barrier = std::sync::Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (overlay, barrier) = (&overlay, &barrier);
                scope.spawn(move || {
                    let mut magazine = Magazine::new(Arc::clone(overlay.pool()));
                    let value = u8::try_from(thread + 1).unwrap();
                    barrier.wait();
                    overlay.write_part(block, thread * 1024, &[value; 512], &mut magazine, base).unwrap();
                });
            }
        });
        let got = contents(&overlay, block);
        for thread in 0..THREADS {
            let at = thread * 1024;
            assert!(got[at..at + 512].iter().all(|&byte| usize::from(byte) == thread + 1), "block {block}");
            assert!(got[at + 512..at + 1024].iter().all(|&byte| byte == 0xbb), "block {block}");
        }
    }
    assert_eq!(overlay.budget().data(), 256 * 4096);
}
