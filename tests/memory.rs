//! Memory is a budget: what is over it fails, only there, and nothing is lost; what is given back comes back.

mod support;

use support::server::{Serve, scratch};
use support::{Checked, Client, GIB, Image, MIB, Random, Request, Server, Style, assert_bytes, nbd};

/// What a server may keep ready beyond what is in use, besides noise: its reserve of touched memory and its buffers.
const SLACK: u64 = 48 * MIB;

fn serve(size: u64, args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), size, 0..size.min(8 * MIB), 9);
    let server = Serve::image(&image).args(args).start();
    (dir, image, server)
}

/// Writes data block after block from `offset` on until the budget is used up; returns how many bytes were taken.
fn fill(client: &mut Client, offset: u64, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut taken = 0;
    loop {
        let data = random.bytes(64 << 10);
        let reply = client.call(&Request::write(offset + taken, &data));
        match reply.error {
            None => taken += 64 << 10,
            Some(error) => {
                assert_eq!(error, nbd::ENOSPC);
                return taken;
            }
        }
    }
}

/// What [`fill`] wrote must be there.
#[track_caller]
fn assert_filled(client: &mut Client, offset: u64, taken: u64, seed: u64) {
    let mut random = Random::new(seed);
    for at in (0..taken).step_by(64 << 10) {
        assert_bytes(&client.read(offset + at, 64 << 10), &random.bytes(64 << 10), offset + at);
    }
}

#[test]
fn a_session_over_its_budget_gets_enospc_and_loses_nothing() {
    let (_dir, _image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    for style in Style::ALL {
        let mut client = server.client_in(style, "base");
        let taken = fill(&mut client, MIB, 1);
        assert!((3 * MIB..=4 * MIB).contains(&taken), "a budget of 4 MiB takes {taken} bytes");
        assert_filled(&mut client, MIB, taken, 1);
        // Over and over: the session goes on, and what it holds can be written again in place.
        for n in 0..50 {
            client.call(&Request::write(32 * MIB + n * 4096, &[1; 4096])).fails(nbd::ENOSPC);
            client.write(MIB + n * 4096, &[2; 4096]);
        }
        assert!(client.read(MIB, 50 * 4096).iter().all(|&byte| byte == 2));
        client.disconnect();
    }
}

/// A limit is a limit to the byte, and of a request that goes beyond it, what fits is written.
#[test]
fn a_session_gets_enospc_at_the_right_byte() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "1M"]);
    let mut client = server.client("base");
    let data = Random::new(1).bytes(MIB + 4096);
    // Scattered, so that no two are neighbours.
    let place = |block: u64| block * 3 * 4096;
    for block in 0..256 {
        client.write(place(block) + 100, &data[..1000]);
    }
    for block in 256..300 {
        client.call(&Request::write(place(block), &data[..1])).fails(nbd::ENOSPC);
        assert_bytes(&client.read(place(block), 4096), &image.bytes(place(block), 4096), place(block));
    }
    client.trim(0, 64 * MIB);
    client.call(&Request::write(8192, &data)).fails(nbd::ENOSPC);
    assert_bytes(&client.read(8192, MIB), &data[..1 << 20], 8192);
    assert_eq!(client.read(8192 + MIB, 4096), [0; 4096], "as it was trimmed to");
    // To the block that is free again, and no further.
    client.trim(8192, 4096);
    client.write(32 * MIB, &data[..4096]);
    client.call(&Request::write(40 * MIB, &data[..1])).fails(nbd::ENOSPC);
}

#[test]
fn a_full_session_is_nobody_elses_trouble() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "2M"]);
    let mut full = server.client("base");
    fill(&mut full, 0, 1);
    let mut other = Checked::new(server.client("base"), &image);
    let mut random = Random::new(2);
    for n in 0..200 {
        full.call(&Request::write(40 * MIB, &[1; 4096])).fails(nbd::ENOSPC);
        let data = random.bytes(5000);
        other.write(n * 5000, &data);
        other.read(n * 5000, 5000);
    }
}

#[test]
fn the_servers_budget_holds_for_all_sessions_together() {
    let (_dir, _image, server) = serve(64 * MIB, &["--memory", "16M"]);
    let mut first = server.client("base");
    let mut second = server.client("base");
    second.write(0, &[7; 65_536]);
    let taken = fill(&mut first, 0, 1);
    assert!((10 * MIB..=16 * MIB).contains(&taken), "a budget of 16 MiB takes {taken} bytes");
    assert_filled(&mut first, 0, taken, 1);
    assert_eq!(second.read(0, 65_536), [7; 65_536]);

    // The first gives half of it back: the second has room again.
    first.trim(0, taken / 2);
    let more = fill(&mut second, MIB, 2);
    assert!(more >= taken / 4, "{more} bytes fit after {} were given back", taken / 2);
    assert_filled(&mut second, MIB, more, 2);
    assert_eq!(second.read(0, 65_536), [7; 65_536]);
    assert!(first.read(0, MIB).iter().all(|&byte| byte == 0));

    // A session that ends gives back everything.
    first.disconnect();
    let mut third = server.client("base");
    support::wait_until("the ended session's memory is free", || {
        let reply = third.call(&Request::write(0, &[9; 65_536]));
        reply.error.is_none()
    });
    assert_filled(&mut second, MIB, more, 2);
}

/// As long as nobody else wants any, one session may have everything; when it is short, whoever has the most is refused
/// first, and nobody loses what was acknowledged.
#[test]
fn when_memory_is_short_the_largest_is_refused_first_and_nothing_is_lost() {
    const TOTAL: u64 = 64 * MIB;
    let (_dir, image, server) = serve(128 * MIB, &["--memory", "64M"]);
    let before = server.usage();
    let mut hog = server.client("base@hog");
    let mut small: Vec<_> = (0..8).map(|_| Checked::new(server.client("base"), &image)).collect();
    for client in &mut small {
        client.write(0, &Random::new(1).bytes(4096));
    }
    let taken = fill(&mut hog, 0, 1);
    assert!((58 * MIB..=60 * MIB).contains(&taken), "it leaves a sixteenth: {taken}");
    // The others do not notice: they write into the reserve, anywhere and in any way.
    let mut random = Random::new(2);
    for turn in 0..100 {
        let client = &mut small[turn % 8];
        let offset = random.below(8 * MIB);
        let length = 1 + random.below(8000);
        client.write(offset, &random.bytes(length));
        client.read(offset.saturating_sub(5000), 20_000);
    }
    hog.call(&Request::write(120 * MIB, &[1; 4096])).fails(nbd::ENOSPC);
    // It can write what it has, and trim what it likes.
    hog.write(0, &Random::new(1).bytes(64 << 10));
    hog.call(&Request::trim(taken - 60_000, 3000)).ok();

    // Newcomers are welcome, until what is left is what those who are there may need.
    let mut more = Vec::new();
    let refusal = loop {
        match server.try_client("base") {
            Ok(mut client) => {
                client.write(0, &Random::new(3).bytes(256 << 10));
                more.push(client);
            }
            Err(refusal) => break refusal,
        }
        assert!(more.len() < 64, "there is no end to newcomers");
    };
    assert!(!more.is_empty(), "the largest keeps nobody out");
    let why = String::from_utf8(refusal.data).expect("text");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY, "{why}");
    assert!(
        why.starts_with("Nearly all of the server's memory is used, so there are no new sessions"),
        "{why}"
    );
    assert!(server.try_client("base@hog").is_ok(), "who is there can be entered");
    small[0].write(40 * MIB, &random.bytes(300_000));

    // What is acknowledged is there, and what is in memory is within the budget.
    let resident = server.usage().private - before.private;
    assert!(resident <= TOTAL + TOTAL / 20 + SLACK, "{resident} bytes are in memory");
    assert_filled(&mut hog, 0, taken - (64 << 10), 1);
    for (index, client) in small.iter_mut().enumerate() {
        client.read(0, 9 * MIB);
        if index == 0 {
            client.read(40 * MIB, 300_000);
        }
    }
    for client in &mut more {
        assert_bytes(&client.read(0, 256 << 10), &Random::new(3).bytes(256 << 10), 0);
    }
    hog.trim(0, 8 * MIB);
    server.client("base").write(0, &[1; 4096]);
    hog.write(120 * MIB, &[1; 4096]);
}

#[test]
fn trim_gives_memory_back_and_the_session_goes_on() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    let mut client = server.client("base");
    let first = fill(&mut client, 0, 1);
    for round in 0..10 {
        client.trim(0, image.size);
        let taken = fill(&mut client, round * MIB, round);
        assert_eq!(taken, first, "round {round} takes what the first took");
        assert_filled(&mut client, round * MIB, taken, round);
    }
}

#[test]
fn write_zeroes_gives_memory_back_too() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    let mut client = server.client("base");
    let first = fill(&mut client, 0, 1);
    for round in 0..3 {
        client.zeroes(0, image.size);
        assert!(client.read(0, 8 * MIB).iter().all(|&byte| byte == 0));
        assert_eq!(fill(&mut client, 0, round), first);
    }
}

#[test]
fn zeroes_take_no_memory_however_they_are_written() {
    let (_dir, _image, server) = serve(64 * MIB, &["--session-memory", "1M"]);
    let before = server.usage();
    let mut client = server.client("base");
    let zeroes = vec![0; 1 << 20];
    for n in 0..64 {
        client.write(n * MIB, &zeroes);
    }
    for n in 0..64 {
        client.zeroes(n * MIB, MIB);
    }
    assert!(client.read(0, 16 * MIB).iter().all(|&byte| byte == 0));
    assert!(server.usage().private <= before.private + SLACK);
    // All of the budget is still there.
    assert!(fill(&mut client, 0, 1) >= MIB * 3 / 4);
}

#[test]
fn a_full_session_can_overwrite_what_it_holds_by_requests_of_any_size() {
    let (_dir, _image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    for style in Style::ALL {
        let client = server.client_in(style, "base");
        let mut client = client;
        let taken = fill(&mut client, 0, 1);
        let mut expected = client.read(0, taken);
        for (seed, length) in [(1, taken), (2, 300_001), (3, MIB), (4, 4096), (5, 100), (6, 70_000)] {
            let data = Random::new(seed).bytes(length);
            for offset in [0, 13, 4096, 8191].into_iter().filter(|offset| offset + length <= taken) {
                client.write(offset, &data);
                let start = support::size(offset);
                expected[start..start + data.len()].copy_from_slice(&data);
                assert_bytes(&client.read(0, taken), &expected, 0);
            }
        }
        client.disconnect();
    }
}

#[test]
fn no_hole_zeroes_keep_room_for_later_writes() {
    let (_dir, _image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    let mut client = server.client("base");
    client.call(&Request::zeroes(0, MIB).with(nbd::NO_HOLE)).ok();
    fill(&mut client, 8 * MIB, 1);
    client.call(&Request::write(60 * MIB, &[1; 4096])).fails(nbd::ENOSPC);
    // The client was promised that a write there does not fail for lack of space.
    let data = Random::new(3).bytes(MIB);
    client.write(0, &data);
    assert_bytes(&client.read(0, MIB), &data, 0);
    client.call(&Request::zeroes(0, MIB).with(nbd::NO_HOLE)).ok();
    assert!(client.read(0, MIB).iter().all(|&byte| byte == 0));
    client.call(&Request::zeroes(16 * MIB, 8 * MIB).with(nbd::NO_HOLE)).fails(nbd::ENOSPC);
}

#[test]
fn a_write_that_does_not_fit_leaves_old_or_new_bytes_and_nothing_else() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "2M"]);
    let mut client = server.client("base");
    let taken = fill(&mut client, 0, 1);
    // Half over blocks that are there, half over new ones.
    let data = vec![0x77; 1 << 20];
    let at = taken - MIB / 2;
    let mut before = client.read(at, MIB);
    client.call(&Request::write(at, &data)).fails(nbd::ENOSPC);
    let after = client.read(at, MIB);
    for ((offset, old), new) in (at..).zip(&mut before).zip(after) {
        assert!(new == *old || new == 0x77, "byte {offset} was {old:#x} and reads {new:#x}");
    }
    assert_bytes(&client.read(32 * MIB, 4096), &image.bytes(32 * MIB, 4096), 32 * MIB);
}

#[test]
fn memory_returns_after_a_session_ends() {
    let (_dir, _image, server) = serve(512 * MIB, &[]);
    server.client("base").disconnect();
    let before = server.usage();
    for end in 0..3 {
        let mut client = server.client("base");
        let data = Random::new(end).bytes(MIB);
        let writes: Vec<Request> = (0..160).map(|n| Request::write(n * MIB, &data)).collect();
        for batch in writes.chunks(16) {
            client.pipeline(batch).into_iter().for_each(|reply| drop(reply.ok()));
        }
        // Some of it may have been kept ready before.
        assert!(server.usage().private >= before.private + 120 * MIB, "what is written is in memory");
        match end {
            0 => client.disconnect(),
            1 => client.cut(),
            _ => {
                client.trim(0, 160 * MIB);
                server.settles_at(support::Usage { descriptors: before.descriptors + 1, ..before }, SLACK);
                client.disconnect();
            }
        }
        server.settles_at(before, SLACK);
    }
}

#[test]
fn idle_sessions_are_small() {
    let (_dir, _image, server) = serve(10 * GIB, &[]);
    drop(server.client("base"));
    let before = server.usage();
    let mut sessions: Vec<Client> = Vec::new();
    // What the server touches once, at whatever time, is in one of the two at most.
    let mut grow = || {
        let before = server.usage();
        let mut more: Vec<Client> = (0..400).map(|_| server.client("base")).collect();
        for client in &mut more {
            client.read(4 * MIB, 4096);
        }
        sessions.append(&mut more);
        let now = server.usage();
        assert_eq!(now.threads, before.threads, "no thread of its own");
        now.private.saturating_sub(before.private) / 400
    };
    let each = [grow(), grow()];
    assert!(each[0].min(each[1]) <= 8 << 10, "an idle session takes {each:?} bytes");
    drop(sessions);
    server.settles_at(before, 400 * (8 << 10));
}

#[test]
fn scattered_bytes_cost_a_block_each_and_not_much_more() {
    let (_dir, _image, server) = serve(10 * GIB, &["--session-memory", "5M"]);
    let mut client = server.client("base");
    // What is kept ready from the beginning on.
    support::wait_until("a first chunk is there", || server.usage().private >= 2 * MIB);
    let before = server.usage();
    let writes: Vec<Request> = (0..1000).map(|n| Request::write(n * 10 * MIB + 5000, b"x")).collect();
    client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
    for n in 0..1000 {
        assert_eq!(client.read(n * 10 * MIB + 5000, 1), b"x");
    }
    server.settles_at(before, 8 * MIB);
}

#[test]
fn several_connections_of_one_session_share_its_budget() {
    let (_dir, _image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    let mut one = server.client("base@shared");
    let mut two = server.client("base@shared");
    let taken = fill(&mut one, 0, 1);
    two.call(&Request::write(32 * MIB, &[1; 4096])).fails(nbd::ENOSPC);
    two.trim(0, taken / 2);
    one.write(32 * MIB, &[1; 65_536]);
    assert_eq!(two.read(32 * MIB, 65_536), [1; 65_536]);
}

// Nothing of a budget is lost.

#[test]
fn a_budget_is_whole_again_after_connections_fought_over_it() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "4M", "--workers", "2"]);
    let mut clients: Vec<Client> = (0..4).map(|_| server.client("base@fought")).collect();
    let first = fill(&mut clients[0], 0, 1);
    clients[0].trim(0, image.size);
    std::thread::scope(|scope| {
        for (n, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                let mut random = Random::new(n as u64);
                for _ in 0..60 {
                    let requests: Vec<Request> = (0..32)
                        .map(|_| {
                            // Overlapping, so that connections meet in the same blocks.
                            let offset = random.below(8 * MIB);
                            match random.below(8) {
                                0 => Request::trim(offset, 2 * MIB),
                                1 => Request::zeroes(offset, MIB),
                                2 => Request::zeroes(offset, 100_000).with(nbd::NO_HOLE),
                                3 => Request::write(offset, &[0; 50_000]),
                                4 => Request::read(offset, 100_000),
                                5 => Request::write(offset, &[1; 600]),
                                _ => Request::write(offset, &[2; 100_000]),
                            }
                        })
                        .collect();
                    for reply in client.pipeline(&requests) {
                        assert!(matches!(reply.error, None | Some(nbd::ENOSPC)), "{:?}", reply.error);
                    }
                }
            });
        }
    });
    clients[0].trim(0, image.size);
    assert_eq!(fill(&mut clients[1], 0, 2), first, "all of the budget is there");
}

#[test]
fn a_budget_is_whole_again_after_connections_were_cut_amid_their_writes() {
    let (_dir, image, server) = serve(64 * MIB, &["--session-memory", "4M"]);
    let mut keeper = server.client("base@cut");
    let first = fill(&mut keeper, 0, 1);
    keeper.trim(0, image.size);
    let mut random = Random::new(3);
    for _ in 0..150 {
        let mut dying = server.client("base@cut");
        let bytes = Request::write(random.below(MIB), &random.bytes(900_000)).bytes(1);
        dying.peer().shove(&bytes[..support::size(random.below(bytes.len() as u64))]);
        dying.cut();
    }
    support::wait_until("all of the budget is there", || {
        keeper.trim(0, image.size);
        let taken = fill(&mut keeper, 0, 2);
        assert!(taken <= first);
        taken == first
    });
}
