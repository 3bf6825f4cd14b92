//! No byte that one session wrote is ever seen by another, and the base never changes.

mod support;

use support::server::{Serve, scratch};
use support::{Checked, Client, Image, MIB, Random, Request, Server, assert_bytes, nbd, wait_until};

#[test]
fn two_clients_write_the_same_offsets_and_a_third_sees_the_base() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 4 * MIB, 7);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let mut one = Checked::new(server.client("base"), &image);
    let mut two = Checked::new(server.simple("base"), &image);
    let mut third = Checked::new(server.client("base"), &image);
    let mut random = Random::new(31);
    for _ in 0..300 {
        let (offset, length) = support::model::random_range(&mut random, image.size, 20_000);
        let (ones, twos) = (random.bytes(length), random.bytes(length));
        one.write(offset, &ones);
        two.write(offset, &twos);
        one.read(offset, length);
        two.read(offset, length);
        third.read(offset, length);
    }
    one.read_all();
    two.read_all();
    third.read_all();
    server.stop();
    assert_eq!(image.fingerprint(), before);
}

#[test]
fn eight_connections_of_ten_thousand_random_operations_each_keep_to_themselves() {
    let dir = scratch();
    let size = 4 * MIB + 1234;
    let image = Image::sparse(dir.path().join("base.img"), size, &[0..MIB, 2 * MIB..size], 7);
    let before = image.fingerprint();
    let server = Serve::image(&image).args(["--workers", "2"]).start();
    std::thread::scope(|scope| {
        for n in 0..8_u64 {
            let (server, image) = (&server, &image);
            scope.spawn(move || {
                let client = if n % 2 == 0 { server.client("base") } else { server.simple("base") };
                let structured = n % 2 == 0;
                let mut checked = Checked::new(client, image);
                let mut random = Random::new(100 + n);
                for step in 0..10_000 {
                    checked.random_step(&mut random, 16_384, structured);
                    if step % 2500 == 0 {
                        checked.read_all();
                    }
                }
                checked.read_all();
                checked.client.disconnect();
            });
        }
    });
    assert_bytes(&server.client("base").read_all(), &image.all(), 0);
    server.stop();
    assert_eq!(image.fingerprint(), before);
}

/// Writes, again and again while there is no room: sessions that ended give theirs back a moment later.
fn insist(client: &mut Client, request: &Request) {
    wait_until("there is room for a write", || match client.call(request).error {
        None => true,
        Some(error) => {
            assert_eq!(error, nbd::ENOSPC);
            false
        }
    });
}

/// Fills a session with a marker, ends it, and looks for the marker in the next.
fn leave_a_mark(server: &Server, image: &Image, end: impl Fn(&mut Client)) {
    let mut marker = server.client("base");
    let data = vec![0xc7; 1 << 20];
    for offset in (0..image.size).step_by(1 << 20) {
        let length = support::size((image.size - offset).min(MIB));
        insist(&mut marker, &Request::write(offset, &data[..length]));
    }
    end(&mut marker);
    marker.disconnect();
}

/// A session that writes a little of every block sees the base or its own bytes around it, never anything else.
fn look_for_marks(server: &Server, image: &Image, structured: bool, seed: u64) {
    let client = if structured { server.client("base") } else { server.simple("base") };
    let mut checked = Checked::new(client, image);
    let mut random = Random::new(seed);
    let mut requests = Vec::new();
    for block in 0..image.size / 4096 {
        let offset = block * 4096 + random.below(4000);
        let data = random.bytes(random.clone().between(1, 90));
        checked.model.write(offset, &data);
        requests.push(Request::write(offset, &data));
    }
    for batch in requests.chunks(256) {
        for (reply, request) in checked.client.pipeline(batch).into_iter().zip(batch) {
            if reply.error.is_some() {
                insist(&mut checked.client, request);
            }
        }
    }
    checked.read_all();
    // Zeroed in part, trimmed in part, written again: still nothing of anybody else.
    for block in (0..image.size / 4096).step_by(7) {
        checked.zeroes(block * 4096 + 100, 1000, nbd::NO_HOLE);
        checked.trim(block * 4096, 4096);
        checked.write(block * 4096 + 4000, &[1; 50]);
    }
    checked.read_all();
    checked.client.disconnect();
}

#[test]
fn recycled_blocks_never_show_what_an_ended_session_wrote() {
    let dir = scratch();
    let size = 8 * MIB + 100;
    let image = Image::sparse(dir.path().join("base.img"), size, &[0..2 * MIB, 4 * MIB..5 * MIB], 7);
    // A small budget, so that blocks are reused soon.
    let server = Serve::image(&image).args(["--memory", "12M", "--workers", "1"]).start();
    for round in 0..6 {
        leave_a_mark(&server, &image, |_| {});
        look_for_marks(&server, &image, round % 2 == 0, round);
    }
}

#[test]
fn recycled_blocks_never_show_what_a_session_trimmed() {
    let dir = scratch();
    let image = Image::sparse(dir.path().join("base.img"), 8 * MIB, &[0..2 * MIB, 4 * MIB..5 * MIB], 7);
    let server = Serve::image(&image).args(["--memory", "24M"]).start();
    for round in 0..4 {
        leave_a_mark(&server, &image, |marker| marker.trim(0, image.size));
        leave_a_mark(&server, &image, |marker| marker.zeroes(0, image.size));
        look_for_marks(&server, &image, round % 2 == 0, round);
    }
}

#[test]
fn blocks_of_a_session_cut_amid_its_writes_are_clean_for_the_next() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), 8 * MIB, 0..MIB, 7);
    let server = Serve::image(&image).args(["--memory", "12M"]).start();
    for round in 0..6 {
        let mut dying = server.client("base");
        let data = vec![0xc7; 1 << 20];
        for n in 0..5 {
            dying.send(&Request::write(n * MIB, &data));
        }
        let half = Request::write(6 * MIB, &data).bytes(99);
        dying.peer().send(&half[..500_000 + support::size(round) * 7777]);
        dying.cut();
        look_for_marks(&server, &image, true, round);
    }
}

#[test]
fn error_replies_carry_nothing_of_another_session() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 4 * MIB, 7);
    let server = Serve::image(&image).args(["--session-memory", "1M"]).start();
    let mut secret = server.client("base");
    for n in 0..200 {
        secret.write(n * 4096, &[0xc7; 4096]);
    }
    let mut other = Checked::new(server.client("base"), &image);
    // Refusals of every kind, then everything is read: bytes of replies and of blocks are the other's own.
    for n in 0..400 {
        let data = vec![0x11; 4096];
        let reply = other.client.call(&Request::write(n * 4096, &data));
        match reply.error {
            None => other.model.write(n * 4096, &data),
            Some(error) => assert_eq!(error, nbd::ENOSPC),
        }
        other.client.call(&Request::read(image.size - 10, 20)).fails(nbd::EINVAL);
        other.client.call(&Request::new(99, n, 10)).fails(nbd::EINVAL);
    }
    other.read_all();
    assert!(!other.client.read_all().windows(64).any(|window| window == [0xc7; 64]));
}
