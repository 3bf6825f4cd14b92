//! A session that holds eight times as much as there is memory for, on a disk, written to and read at random by several
//! connections.
//!
//! How much that is, `MEMDEV_TEST_OVERFLOW` says (a size as `8G`; 256 MiB without). `docs/footprints.md` has the command for
//! 8 GiB on a budget of one.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::serve;
use crate::support::server::scratch;
use crate::support::{Client, Image, MIB, Random, Server, assert_bytes};

/// How much is written for each byte of memory.
const TIMES: u64 = 8;
/// What is written and read at a time, and has one version.
const PIECE: u64 = 64 << 10;
/// Connections at once, each with a part of the device of its own.
const CLIENTS: u64 = 4;
/// What a server may have in memory beside what it has at first and what it counts: up to 32 MiB that are kept ready
/// (as much as that when the thread that sees to it is late); blocks that are counted as away before they are given up;
/// free blocks that threads have for themselves; payloads on their way and their buffers. The same for every budget.
const BESIDE: u64 = 48 * MIB;

/// Bytes that are dirty in the end.
fn bytes() -> u64 {
    let Ok(text) = std::env::var("MEMDEV_TEST_OVERFLOW") else { return 256 * MIB };
    let number = text.strip_suffix('G').and_then(|number| number.parse::<u64>().ok());
    number.expect("MEMDEV_TEST_OVERFLOW is a number of GiB, as 8G") << 30
}

/// What must be at a place: pieces, each with the number of its last write, from which its bytes follow; 0 is zeroes.
struct Pieces {
    first: u64,
    versions: Vec<u64>,
}

impl Pieces {
    fn data(&self, piece: usize) -> Vec<u8> {
        match self.versions[piece] {
            0 => vec![0; usize::try_from(PIECE).expect("it is small")],
            version => Random::new((self.first + piece as u64) << 32 | version).bytes(PIECE),
        }
    }

    fn at(&self, piece: usize) -> u64 {
        (self.first + piece as u64) * PIECE
    }

    fn write(&mut self, client: &mut Client, piece: usize) {
        self.versions[piece] += 1;
        client.write(self.at(piece), &self.data(piece));
    }

    fn check(&self, client: &mut Client, pieces: Range<usize>) {
        for piece in pieces {
            assert_bytes(&client.read(self.at(piece), PIECE), &self.data(piece), self.at(piece));
        }
    }
}

/// The most that a server has had at any time.
#[derive(Default)]
struct Most {
    /// Memory of its own.
    private: AtomicU64,
    /// What it counts against its budget.
    counted: AtomicU64,
}

/// Looks again and again.
fn watch(server: &Server, control: &Path, most: &Most, over: &AtomicBool) {
    let mut control = memdev::control::Client::connect(control).expect("it has a control socket");
    while !over.load(Ordering::Relaxed) {
        let memory = control.server().expect("it answers").memory;
        most.counted.fetch_max(memory.data + memory.map, Ordering::Relaxed);
        most.private.fetch_max(server.usage().private, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One connection's part: all of it written, a quarter of it again at random with reads between, some given back, and all read.
fn use_part(server: &Server, first: u64, count: u64) {
    let mut client = server.client("base@x");
    let count = usize::try_from(count).expect("it is small");
    let mut pieces = Pieces { first, versions: vec![0; count] };
    for piece in 0..count {
        pieces.write(&mut client, piece);
    }
    let mut random = Random::new(first);
    let mut any = || usize::try_from(random.below(count as u64)).expect("it is small");
    for step in 0..count / 4 {
        let piece = any();
        match step % 8 {
            0 => {
                client.zeroes(pieces.at(piece), PIECE);
                pieces.versions[piece] = 0;
                pieces.write(&mut client, piece);
            }
            1..4 => pieces.check(&mut client, piece..piece + 1),
            _ => pieces.write(&mut client, piece),
        }
    }
    pieces.check(&mut client, 0..count);
    client.disconnect();
}

#[test]
fn eight_times_the_budget_is_what_a_model_says_within_the_budget() {
    let dir = scratch();
    let bytes = bytes();
    let memory = bytes / TIMES;
    let image = Image::empty(dir.path().join("base.img"), bytes);
    let control = dir.path().join("control.sock");
    let args = ["--control", control.to_str().expect("text")];
    let server = serve(&image, &memory.to_string(), dir.path(), &args);
    let before = server.usage().private;
    let (most, over) = (Most::default(), AtomicBool::new(false));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| watch(&server, &control, &most, &over));
        let share = bytes / PIECE / CLIENTS;
        let parts = (0..CLIENTS).map(|part| {
            scope.spawn({
                let server = &server;
                move || use_part(server, part * share, share)
            })
        });
        let ended: Vec<_> = parts.collect::<Vec<_>>().into_iter().map(|part| part.join()).collect();
        over.store(true, Ordering::Relaxed);
        ended.into_iter().for_each(|part| part.expect("a part is what it must be"));
    });
    let seconds = begun.elapsed().as_secs_f64();
    let (most, counted) = (most.private.into_inner(), most.counted.into_inner());
    // Written once, a quarter of it used again, and read.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let rate = bytes as f64 * 2.25 / seconds / MIB as f64;
    println!(
        "{bytes} bytes on {memory}: {seconds:.1} s, {rate:.0} MiB/s, at most {most} bytes in memory \
         ({before} at first), {counted} counted"
    );
    assert!(counted > memory / 2, "memory is used: {counted}");
    assert!(counted <= memory, "{counted} bytes are counted, of {memory}");
    // A twentieth, where that is more than the same sum for all.
    let room = memory + (memory / 20).max(BESIDE);
    assert!(most.saturating_sub(before) <= room, "{most} bytes in memory, {before} at first, of {memory}");
    server.stop();
}
