//! Properties: whatever sequence of operations, on whatever image, the device is an array of bytes.

mod support;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use support::server::{Serve, scratch};
use support::{Checked, Client, Image, KIB, Model, Random, Request, Server, Style, assert_bytes, nbd};

/// What one step does; positions are fractions of the device, so that they fit every image.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read,
    Write(u64),
    WriteZeroBytes,
    Zeroes(u16),
    Trim,
    Flush,
    Status,
    /// Disconnects and attaches again.
    Attach,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    connection: usize,
    step: Step,
    position: u32,
    length: u32,
    /// 0: as it is; 1: offset at a block; 2: whole blocks.
    alignment: u8,
}

impl Operation {
    fn range(&self, size: u64) -> (u64, u64) {
        let length = u64::from(self.length).clamp(1, size);
        let offset = (u64::from(self.position) * (size - length + 1)) >> 32;
        match self.alignment {
            0 => (offset, length),
            1 => (offset / 4096 * 4096, length),
            _ => {
                let start = offset / 4096 * 4096;
                (start, length.next_multiple_of(4096).min(size - start))
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Read),
        8 => any::<u64>().prop_map(Step::Write),
        1 => Just(Step::WriteZeroBytes),
        3 => prop::sample::select(vec![0, nbd::FUA, nbd::NO_HOLE]).prop_map(Step::Zeroes),
        3 => Just(Step::Trim),
        1 => Just(Step::Flush),
        2 => Just(Step::Status),
        1 => Just(Step::Attach),
    ]
}

fn operation(connections: usize) -> impl Strategy<Value = Operation> {
    let length = prop_oneof![1..600_u32, 500..530_u32, 4000..4200_u32, 1..40_000_u32, 60_000..300_000_u32];
    (0..connections, step(), any::<u32>(), length, 0..3_u8).prop_map(
        |(connection, step, position, length, alignment)| Operation {
            connection,
            step,
            position,
            length,
            alignment,
        },
    )
}

/// Images of awkward sizes and shapes, all served by one server under their index.
fn images(dir: &std::path::Path) -> Vec<Image> {
    let path = |index: usize| dir.join(format!("{index}.img"));
    vec![
        Image::random(path(0), 1, 0),
        Image::random(path(1), 513, 1),
        Image::random(path(2), 4097, 2),
        Image::random(path(3), 70_000, 3),
        Image::sparse(path(4), 256 * KIB, &[4096..8192, 64 * KIB..65 * KIB + 1, 200 * KIB..256 * KIB], 4),
        Image::sparse(path(5), 3_000_001, &[0..1_000_000, 2_500_000..3_000_001], 5),
        Image::sparse(path(6), 2_097_152 + 4096, &[], 6),
    ]
}

/// What is tried with every kind of server: blocks lie open in memory, or are sealed.
const KINDS: [&[&str]; 2] = [&[], &["--seal"]];

fn serve(images: &[Image], args: &[&str]) -> Server {
    let serve = Serve::image(&images[0]).args(["--workers", "2", "--linger", "60s"]).args(args);
    images[1..].iter().fold(serve, Serve::and).start()
}

fn run<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value)) {
    // `PROPTEST_CASES` asks for a longer hunt.
    let asked = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { cases };
    let config = Config { cases, max_shrink_iters: 300, failure_persistence: None, ..asked };
    TestRunner::new(config)
        .run(strategy, |value| {
            test(value);
            Ok::<(), TestCaseError>(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// A name that no earlier case used.
fn fresh_name(image: usize, counter: &std::cell::Cell<u32>) -> String {
    counter.set(counter.get() + 1);
    format!("{image}@case-{}", counter.get())
}

/// A client that knows all there is to know with these headers.
fn attach(server: &Server, style: Style, name: &str) -> Client {
    if style.has_chunks() { server.client_with_contexts(style, name) } else { server.simple(name) }
}

/// Does one step on `client`, whose session must hold `model`, and checks what it sees.
fn apply(checked: &mut Checked, operation: &Operation) {
    let (offset, length) = operation.range(checked.model.size());
    match operation.step {
        Step::Write(seed) => {
            let data = Random::new(seed).bytes(length);
            checked.write(offset, &data);
        }
        Step::WriteZeroBytes => checked.write(offset, &vec![0; support::size(length)]),
        Step::Zeroes(flags) => checked.zeroes(offset, length, flags),
        Step::Trim => checked.trim(offset, length),
        Step::Flush => checked.client.flush(),
        Step::Status if checked.client.style.has_chunks() => checked.status(offset, length),
        Step::Read | Step::Status | Step::Attach => checked.read(offset, length),
    }
}

#[test]
fn a_session_is_an_array_of_bytes() {
    let dir = scratch();
    let images = images(dir.path());
    let servers = KINDS.map(|args| serve(&images, args));
    let styles = prop::sample::select(&Style::ALL[..]);
    let strategy = (0..images.len(), styles, vec(operation(1), 1..60), 0..KINDS.len());
    run(300, &strategy, |(index, style, operations, kind)| {
        let client = attach(&servers[kind], style, &index.to_string());
        let mut checked = Checked::new(client, &images[index]);
        for operation in &operations {
            apply(&mut checked, operation);
        }
        checked.read_all();
        checked.client.disconnect();
    });
}

#[test]
fn several_connections_of_a_session_are_one_array_of_bytes() {
    let dir = scratch();
    let images = images(dir.path());
    let servers = KINDS.map(|args| serve(&images, args));
    let counter = std::cell::Cell::new(0);
    let strategy = (0..images.len(), vec(operation(3), 1..80), 0..KINDS.len());
    run(180, &strategy, |(index, operations, kind)| {
        let name = fresh_name(index, &counter);
        // Each has headers of another style.
        let attach = |n: usize| attach(&servers[kind], Style::ALL[n], &name);
        let mut clients: Vec<Option<Client>> = (0..3).map(|n| Some(attach(n))).collect();
        let mut model = Model::of(&images[index]);
        for operation in &operations {
            let slot = &mut clients[operation.connection];
            let client = slot.take().expect("every slot is filled between steps");
            let client = if matches!(operation.step, Step::Attach) {
                client.disconnect();
                attach(operation.connection)
            } else {
                client
            };
            let mut checked = Checked { client, model };
            apply(&mut checked, operation);
            *slot = Some(checked.client);
            model = checked.model;
        }
        for client in clients.iter_mut().flatten() {
            assert_bytes(&client.read_all(), model.read(0, model.size()), 0);
        }
    });
}

#[test]
fn concurrent_neighbours_on_one_session_never_lose_a_byte() {
    let dir = scratch();
    let image = Image::sparse(dir.path().join("0.img"), 300_001, &[0..100_000, 200_000..300_001], 3);
    let servers = KINDS.map(|args| serve(std::slice::from_ref(&image), args));
    let counter = std::cell::Cell::new(0);
    // The device is cut into pieces at any byte; each belongs to one of four connections, which work all at once.
    let pieces = vec((1..9000_u32, 0..4_usize, step(), 0..4_usize), 20..120);
    let pieces = (pieces, 0..KINDS.len());
    run(150, &pieces, |(pieces, kind)| {
        let name = fresh_name(0, &counter);
        let mut model = Model::of(&image);
        let mut lists: Vec<Vec<Request>> = vec![Vec::new(); 4];
        let mut offset = 0;
        for (length, connection, step, again) in pieces {
            let length = u64::from(length).min(image.size - offset);
            if length == 0 {
                break;
            }
            let request = match step {
                Step::Write(seed) => {
                    let data = Random::new(seed).bytes(length);
                    model.write(offset, &data);
                    Request::write(offset, &data)
                }
                Step::Zeroes(flags) => {
                    model.zero(offset, length);
                    Request::zeroes(offset, length).with(flags)
                }
                Step::WriteZeroBytes => {
                    model.zero(offset, length);
                    Request::write(offset, &vec![0; support::size(length)])
                }
                _ => Request::read(offset, length),
            };
            // Some pieces several times: overwriting in place, zeroing what is zero.
            for _ in 0..=again {
                lists[connection].push(request.clone());
            }
            offset += length;
        }
        let styles = Style::ALL.into_iter().chain([Style::Extended]);
        let mut clients: Vec<Client> = styles.map(|style| servers[kind].client_in(style, &name)).collect();
        std::thread::scope(|scope| {
            for (client, list) in clients.iter_mut().zip(&lists) {
                let image = &image;
                scope.spawn(move || {
                    for (reply, request) in client.pipeline(list).into_iter().zip(list) {
                        let reply = reply.ok();
                        if request.command == nbd::CMD_READ {
                            // Nobody else writes these bytes.
                            let base = image.bytes(request.offset, request.length);
                            assert_bytes(&reply.data, &base, request.offset);
                        }
                    }
                });
            }
        });
        for client in &mut clients {
            assert_bytes(&client.read_all(), model.read(0, model.size()), 0);
        }
    });
}

#[test]
fn a_full_session_still_is_an_array_of_bytes() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("0.img"), 3_000_001, 0..1_500_000, 3);
    let server = Serve::image(&image).args(["--session-memory", "1M"]).start();
    let strategy = vec(operation(1), 1..100);
    run(60, &strategy, |operations| {
        let mut client = server.client("0");
        let mut model = Model::of(&image);
        for operation in &operations {
            let (offset, length) = operation.range(model.size());
            let (request, after) = match operation.step {
                Step::Write(seed) => {
                    let data = Random::new(seed).bytes(length);
                    (Request::write(offset, &data), data)
                }
                Step::Zeroes(flags) => {
                    (Request::zeroes(offset, length).with(flags), vec![0; support::size(length)])
                }
                Step::Trim => {
                    client.trim(offset, length);
                    for edge in model.trim(offset, length) {
                        let got = client.read(edge.start, edge.end - edge.start);
                        model.adopt(edge.start, &got);
                    }
                    continue;
                }
                _ => {
                    assert_bytes(&client.read(offset, length), model.read(offset, length), offset);
                    continue;
                }
            };
            match client.call(&request).error {
                None => model.write(offset, &after),
                Some(error) => {
                    assert_eq!(error, nbd::ENOSPC);
                    // A write that failed may have happened in part: each byte is the old one or the new one.
                    let seen = client.read(offset, length);
                    for (at, &byte) in seen.iter().enumerate() {
                        let old = model.read(offset, length)[at];
                        assert!(byte == old || byte == after[at], "byte {at} of a failed write");
                    }
                    model.write(offset, &seen);
                }
            }
        }
        assert_bytes(&client.read_all(), model.read(0, model.size()), 0);
        client.disconnect();
    });
}
