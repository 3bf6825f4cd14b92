//! Checkpoints, rollback, reset and forks of a session that has written 1 GiB: in one piece, and scattered over 16 GiB.

mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use memdev::base::Image;
use memdev::cow::Device;
use memdev::overlay::{BlockSize, Budget, Magazine, Overlay, Pool};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{BLOCK, scattered};

const GIB: u64 = 1 << 30;
const DIRTY: u64 = GIB / BLOCK;

struct World {
    total: Arc<Budget>,
    device: Device,
    magazine: Magazine,
}

/// A device of `size` bytes of which 1 GiB is written, a block in every `size` / 1 GiB.
fn world(size: u64) -> World {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(size).expect("room for a hole");
    let image = Arc::new(Image::open(file.path()).expect("an image"));
    let pool = Pool::new(2 * GIB, BlockSize::DEFAULT).expect("address space");
    let total = Budget::total(2 * GIB);
    let overlay = Overlay::new(size / BLOCK, Arc::clone(&pool), budget(&total));
    let mut world = World { total, device: Device::new(image, overlay), magazine: Magazine::new(pool) };
    (0..DIRTY).for_each(|at| world.write(at, size));
    world
}

fn budget(total: &Arc<Budget>) -> Budget {
    Budget::within(total, 2 * GIB).expect("room for a session")
}

impl World {
    fn write(&mut self, turn: u64, size: u64) {
        let block = scattered(turn, DIRTY) * (size / GIB);
        self.device.write(block * BLOCK, &[7; 4096], &mut self.magazine).expect("memory for a block");
    }
}

/// The time that `turns` calls of `act` take, without what it takes to prepare them and to drop what they made.
fn timed<P, T>(turns: u64, mut prepare: impl FnMut() -> P, mut act: impl FnMut(P) -> T) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..turns {
        let prepared = prepare();
        let start = Instant::now();
        let made = act(prepared);
        spent += start.elapsed();
        drop(made);
    }
    spent
}

fn points(c: &mut Criterion) {
    for (name, size) in [("1 GiB of 1 GiB written", GIB), ("1 GiB of 16 GiB written", 16 * GIB)] {
        let mut world = world(size);
        let mut group = c.benchmark_group(name);
        // One at a time: there is room for the maps of some thousands of them, and criterion would keep millions.
        group.bench_function("fork", |b| {
            b.iter_custom(|turns| timed(turns, || budget(&world.total), |budget| world.device.fork(budget)));
        });
        group.bench_function("checkpoint", |b| {
            b.iter_custom(|turns| {
                timed(turns, || (), |()| world.device.overlay().snapshot().expect("room for a map"))
            });
        });
        let snapshot = world.device.overlay().snapshot().expect("room for a map");
        let mut turn = 0;
        // The first write behind a checkpoint pays for a copy of what is in its way.
        group.bench_function("checkpoint and a write", |b| {
            b.iter_custom(|turns| {
                let mut spent = Duration::ZERO;
                for _ in 0..turns {
                    turn += 1;
                    let start = Instant::now();
                    let snapshot = world.device.overlay().snapshot().expect("room for a map");
                    world.write(turn, size);
                    spent += start.elapsed();
                    drop(snapshot);
                }
                spent
            });
        });
        for (name, to) in [("rollback", Some(&snapshot)), ("reset", None)] {
            group.bench_function(name, |b| {
                b.iter_custom(|turns| {
                    let mut spent = Duration::ZERO;
                    for turn in 0..turns {
                        world.device.overlay().return_to(Some(&snapshot));
                        world.device.overlay().tidy();
                        world.write(turn, size);
                        let start = Instant::now();
                        world.device.overlay().return_to(to);
                        spent += start.elapsed();
                    }
                    world.device.overlay().tidy();
                    spent
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, points);
criterion_main!(benches);
