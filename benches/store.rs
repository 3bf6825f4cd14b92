//! The device without the network: finding runs, first writes, overwrites, reads of mixed runs, trims.

mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::{Duration, Instant};
use support::{BLOCK, BLOCKS, SIZE, Store, scattered};

fn find_runs(c: &mut Criterion) {
    let mut store = Store::new();
    let mut group = c.benchmark_group("find runs of 128 MiB");
    group.throughput(Throughput::Elements(BLOCKS));
    let data = vec![7; usize::try_from(BLOCK).expect("a block")];
    let count = |store: &Store| {
        let mut runs = 0;
        store.device.overlay().for_runs(black_box(0..BLOCKS), |_, _| runs += 1);
        runs
    };
    group.bench_function("untouched", |b| b.iter(|| count(&store)));
    (0..BLOCKS).step_by(2).for_each(|block| store.write(block * BLOCK, &data));
    group.bench_function("every other block written", |b| b.iter(|| count(&store)));
    (1..BLOCKS).step_by(2).for_each(|block| store.write(block * BLOCK, &data));
    group.bench_function("all written", |b| b.iter(|| count(&store)));
    group.finish();
}

/// Writes of `data`, each to a place of its own until all places were written; `first`: onto a device that is new then,
/// for which the clock stands still.
fn writes(store: &mut Store, data: &[u8], first: bool, turns: u64) -> Duration {
    let stride = (data.len() as u64).max(BLOCK);
    let places = SIZE / stride;
    let (mut spent, mut turn) = (Duration::ZERO, 0);
    while turn < turns {
        if first {
            store.renew();
        }
        let end = turns.min(turn + places);
        let start = Instant::now();
        for turn in turn..end {
            store.write(scattered(turn, places) * stride, data);
        }
        spent += start.elapsed();
        turn = end;
    }
    spent
}

fn write(c: &mut Criterion) {
    let mut store = Store::new();
    for (name, first) in [("first write", true), ("overwrite", false)] {
        let mut group = c.benchmark_group(name);
        for length in [512, 4096, 128 << 10] {
            let data = vec![7; length];
            group.throughput(Throughput::Bytes(length as u64));
            group.bench_function(BenchmarkId::from_parameter(length), |b| {
                b.iter_custom(|turns| writes(&mut store, &data, first, turns));
            });
        }
        group.bench_function("4096 zeroes", |b| {
            b.iter_custom(|turns| writes(&mut store, &[0; 4096], first, turns));
        });
        group.finish();
        // What is overwritten next must have been written: every block, none of it zero.
        let data = vec![7; 1 << 20];
        (0..SIZE >> 20).for_each(|at| store.write(at << 20, &data));
    }
}

fn read(c: &mut Criterion) {
    let mut store = Store::new();
    let data = vec![7; usize::try_from(BLOCK).expect("a block")];
    let mut group = c.benchmark_group("read");
    for (state, length) in [("of base", BLOCK), ("of base", 128 << 10)] {
        group.throughput(Throughput::Bytes(length));
        group.bench_function(BenchmarkId::new(state, length), |b| {
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                store.read(scattered(turn, SIZE / length) * length, length)
            });
        });
    }
    // One block in four stays the base's, one is zero, two neighbours are written.
    for block in 0..BLOCKS {
        match block % 4 {
            0 => {}
            1 => store.write(block * BLOCK, &[0; 4096]),
            _ => store.write(block * BLOCK, &data),
        }
    }
    group.bench_function(BenchmarkId::new("of mixed runs", 128 << 10), |b| {
        let mut turn = 0;
        b.iter(|| {
            turn += 1;
            store.read(scattered(turn, SIZE >> 17) << 17, 128 << 10)
        });
    });
    (0..BLOCKS).for_each(|block| store.write(block * BLOCK, &data));
    for length in [BLOCK, 128 << 10] {
        group.throughput(Throughput::Bytes(length));
        group.bench_function(BenchmarkId::new("of written blocks", length), |b| {
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                store.read(scattered(turn, SIZE / length) * length, length)
            });
        });
    }
    group.finish();
}

fn trim(c: &mut Criterion) {
    let mut store = Store::new();
    let data = vec![7; 2 << 20];
    let mut group = c.benchmark_group("trim");
    group.throughput(Throughput::Bytes(2 << 20));
    group.bench_function("2 MiB", |b| {
        b.iter_custom(|turns| {
            (0..turns)
                .map(|_| {
                    store.write(0, &data);
                    let start = Instant::now();
                    store.device.trim(&(0..2 << 20), &mut store.magazine);
                    start.elapsed()
                })
                .sum()
        });
    });
    group.finish();
}

criterion_group!(benches, find_runs, write, read, trim);
criterion_main!(benches);
