//! Sessions: fresh ones, named ones, who shares them, who may not, and when they end.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use support::server::{Serve, scratch};
use support::{
    Client, Image, KIB, MIB, Random, Request, Server, Stream, as_user, assert_bytes, nbd, wait_until,
};

const EXPORT: u64 = 4 * MIB;

fn serve() -> (tempfile::TempDir, Image, Server) {
    serve_with(&[])
}

fn serve_with(args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 5);
    let server = Serve::image(&image).tcp().args(args).start();
    (dir, image, server)
}

// Fresh sessions.

#[test]
fn every_connection_to_a_name_is_a_world_of_its_own() {
    let (_dir, image, server) = serve();
    let mut one = server.client("base");
    let mut two = server.client("base");
    let mut three = server.client("");
    one.write(4096, &[1; 8192]);
    two.write(4096, &[2; 8192]);
    assert_eq!(one.read(4096, 8192), [1; 8192]);
    assert_eq!(two.read(4096, 8192), [2; 8192]);
    assert_bytes(&three.read(0, EXPORT / 2), &image.bytes(0, EXPORT / 2), 0);
}

#[test]
fn a_fresh_session_ends_with_its_connection() {
    let (_dir, image, server) = serve();
    let mut client = server.client("base");
    client.write(0, &[1; 4096]);
    client.disconnect();
    let mut cut = server.client("base");
    cut.write(0, &[1; 4096]);
    cut.cut();
    assert_bytes(&server.client("base").read(0, 4096), &image.bytes(0, 4096), 0);
}

// Named sessions.

#[test]
fn a_named_session_is_shared_by_all_who_name_it() {
    let (_dir, image, server) = serve();
    let mut clients: Vec<Client> = (0..4).map(|_| server.client("base@shared")).collect();
    let mut outsider = server.client("base");
    for n in 0..4_u8 {
        clients[usize::from(n)].write(u64::from(n) * 1000, &[n + 1; 1000]);
    }
    for client in &mut clients {
        for n in 0..4_u8 {
            assert_eq!(client.read(u64::from(n) * 1000, 1000), [n + 1; 1000]);
        }
    }
    assert_bytes(&outsider.read(0, 4096), &image.bytes(0, 4096), 0);
}

/// Ten thousand connections to one session once kept their worker busy for half a second whenever one more attached.
#[test]
fn a_session_has_room_for_256_connections_and_others_do_not_wait_for_them() {
    let (_dir, image, server) = serve();
    let mut all: Vec<Client> = (0..256).map(|_| server.simple("base@crowded")).collect();
    let refusal = server.try_client("base@crowded").map(drop).expect_err("there is no room");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
    all[0].write(0, b"seen by all");
    assert_eq!(all[255].read(0, 11), b"seen by all");
    all.truncate(200);
    wait_until("there is room again", || server.try_client("base@crowded").is_ok());
    assert_bytes(&server.client("base@other").read(0, 4096), &image.bytes(0, 4096), 0);
}

#[test]
fn a_session_that_is_asked_for_only_if_it_is_there_is_not_made() {
    let (_dir, _image, server) = serve();
    let refusal = server.try_client("base@x?").map(drop).expect_err("there is none");
    assert_eq!(refusal.kind, nbd::REP_ERR_UNKNOWN);
    let mut one = server.client("base@x");
    one.write(4096, &[1; 8192]);
    let mut looker = server.client("base@x?");
    assert_eq!(looker.read(4096, 8192), [1; 8192]);
    let refusal = server.try_client("base@y?").map(drop).expect_err("there is none");
    assert_eq!(refusal.kind, nbd::REP_ERR_UNKNOWN);
}

#[test]
fn what_one_connection_was_acknowledged_every_other_sees() {
    let (_dir, _image, server) = serve_with(&["--workers", "2"]);
    let mut writer = server.client("base@flush");
    let mut readers: Vec<Client> = (0..3).map(|_| server.client("base@flush")).collect();
    for round in 1..=200_u64 {
        let offset = round * 6007 % (EXPORT - 8192);
        let data = Random::new(round).bytes(5000);
        match round % 3 {
            0 => writer.call(&Request::write(offset, &data).with(nbd::FUA)).ok(),
            1 => {
                writer.write(offset, &data);
                writer.call(&Request::flush()).ok()
            }
            _ => writer.call(&Request::write(offset, &data)).ok(),
        };
        for reader in &mut readers {
            assert_bytes(&reader.read(offset, 5000), &data, offset);
        }
    }
}

#[test]
fn ids_name_different_sessions_by_every_character() {
    let (_dir, image, server) = serve();
    let mut clients: Vec<Client> =
        ["base@a", "base@A", "base@a.", "base@aa"].iter().map(|name| server.client(name)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
        client.write(0, &[u8::try_from(n).expect("few"); 4096]);
    }
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read(0, 4096), [u8::try_from(n).expect("few"); 4096]);
    }
}

#[test]
fn one_id_on_two_images_is_two_sessions() {
    let dir = scratch();
    let first = Image::random(dir.path().join("first.img"), EXPORT, 1);
    let second = Image::random(dir.path().join("second.img"), EXPORT, 2);
    let server = Serve::image(&first).and(&second).start();
    let mut one = server.client("first@same");
    let mut two = server.client("second@same");
    one.write(0, &[1; 4096]);
    assert_bytes(&two.read(0, 8192), &second.bytes(0, 8192), 0);
    two.write(4096, &[2; 4096]);
    assert_bytes(&one.read(4096, 4096), &first.bytes(4096, 4096), 4096);
}

#[test]
fn only_named_sessions_allow_several_connections() {
    let (_dir, _image, server) = serve();
    assert_eq!(server.client("base").export.flags & nbd::CAN_MULTI_CONN, 0);
    assert_eq!(server.client("").export.flags & nbd::CAN_MULTI_CONN, 0);
    assert_ne!(server.client("base@x").export.flags & nbd::CAN_MULTI_CONN, 0);
    let mut peer = server.peer();
    peer.start();
    assert_eq!(peer.export_name("base", false).flags & nbd::CAN_MULTI_CONN, 0);
    let mut peer = server.peer();
    peer.start();
    assert_ne!(peer.export_name("base@x", false).flags & nbd::CAN_MULTI_CONN, 0);
}

// Linger.

#[test]
fn a_named_session_outlives_its_connections_for_a_while() {
    let (_dir, _image, server) = serve();
    let mut client = server.client("base@kept");
    client.write(100, b"kept");
    client.disconnect();
    let mut again = server.client("base@kept");
    assert_eq!(again.read(100, 4), b"kept");
    again.cut();
    assert_eq!(server.client("base@kept").read(100, 4), b"kept");
}

#[test]
fn a_named_session_ends_when_it_lingered_long_enough() {
    let (_dir, image, server) = serve_with(&["--linger", "200ms"]);
    let mut client = server.client("base@brief");
    client.write(0, &[1; 4096]);
    client.disconnect();
    // Each look prolongs the session's life, so look ever more rarely.
    let mut pause = Duration::from_millis(250);
    loop {
        std::thread::sleep(pause);
        let mut look = server.client("base@brief");
        let seen = look.read(0, 4096);
        look.disconnect();
        if seen == image.bytes(0, 4096) {
            break;
        }
        assert_eq!(seen, [1; 4096]);
        assert!(pause < Duration::from_secs(30), "the session never ends");
        pause *= 2;
    }
}

#[test]
fn a_named_session_does_not_end_while_it_is_connected() {
    let (_dir, _image, server) = serve_with(&["--linger", "100ms"]);
    let mut first = server.client("base@busy");
    first.write(0, &[1; 4096]);
    let mut second = server.client("base@busy");
    first.disconnect();
    // Longer than the linger: that nothing happens cannot be polled for.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(second.read(0, 4096), [1; 4096]);
    let mut third = server.client("base@busy");
    assert_eq!(third.read(0, 4096), [1; 4096]);
}

#[test]
fn without_linger_a_named_session_ends_with_its_last_connection() {
    let (_dir, image, server) = serve_with(&["--linger", "0s"]);
    let mut first = server.client("base@last");
    let mut second = server.client("base@last");
    first.write(0, &[1; 4096]);
    first.disconnect();
    assert_eq!(second.read(0, 4096), [1; 4096]);
    second.disconnect();
    wait_until("the session has ended", || {
        let mut look = server.client("base@last");
        let fresh = look.read(0, 4096) == image.bytes(0, 4096);
        look.disconnect();
        fresh
    });
}

// Owners.

/// Lets every user reach the server's unix socket.
fn open_to_all(server: &Server) {
    fs::set_permissions(server.dir(), Permissions::from_mode(0o755)).expect("opening the directory");
    fs::set_permissions(server.socket(), Permissions::from_mode(0o666)).expect("opening the socket");
}

#[test]
fn a_named_session_belongs_to_the_user_who_made_it() {
    let (_dir, image, server) = serve();
    open_to_all(&server);
    let connect = |uid: u32| as_user(uid, || server.stream());
    let Some(owner) = connect(60_001) else {
        eprintln!("skipped: only root can be several users");
        return;
    };
    let stream = |uid| connect(uid).expect("it worked before");
    let mut owner = Client::attach(owner, "base@mine").expect("the first to name it makes it");
    owner.write(0, &[1; 4096]);

    let refusal = Client::attach(stream(60_002), "base@mine").err().expect("it is somebody else's");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
    let refusal = Client::attach_simple(stream(60_002), "base@mine").err().expect("it is somebody else's");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
    let mut peer = support::Peer::new(stream(60_002));
    peer.start();
    peer.send_option(nbd::OPT_EXPORT_NAME, b"base@mine");
    peer.expect_end();
    // A refused GO leaves the connection usable for what is one's own.
    let mut peer = support::Peer::new(stream(60_002));
    peer.start();
    peer.go("base@mine").expect_err("it is somebody else's");
    let export = peer.go("base@other").expect("it is one's own");
    let mut stranger = Client::new(peer, export, false, None);
    assert_bytes(&stranger.read(0, 4096), &image.bytes(0, 4096), 0);

    // The owner is not disturbed, and gets it back after its connections were gone.
    assert_eq!(owner.read(0, 4096), [1; 4096]);
    owner.disconnect();
    Client::attach(stream(60_002), "base@mine").err().expect("it lingers for its owner only");
    let mut again = Client::attach(stream(60_001), "base@mine").expect("it is one's own");
    assert_eq!(again.read(0, 4096), [1; 4096]);
}

#[test]
fn a_session_made_by_a_user_is_not_for_the_network() {
    let (_dir, _image, server) = serve();
    let mut owner = server.client("base@local");
    owner.write(0, &[1; 4096]);
    let refusal = Client::attach(server.tcp_stream(), "base@local").err().expect("TCP has no user");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
    assert_eq!(owner.read(0, 4096), [1; 4096]);
}

#[test]
fn over_tcp_the_name_is_what_protects_a_session() {
    let (_dir, _image, server) = serve();
    let mut one = Client::attach(server.tcp_stream(), "base@0123456789abcdef").expect("offered");
    one.write(0, &[1; 4096]);
    let mut two = Client::attach(server.tcp_stream(), "base@0123456789abcdef").expect("offered");
    assert_eq!(two.read(0, 4096), [1; 4096]);
}

// The dead client's writes.

/// What a connection sends before it dies: whole writes over the region, then half of one.
fn last_words(random: &mut Random, whole: u64, length: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for n in 0..=whole {
        let data = vec![0xdd; support::size(length)];
        bytes.extend(Request::write(random.below(8) * length, &data).bytes(n));
    }
    let cut = random.between(1, 27 + length);
    bytes.truncate(bytes.len() - support::size(cut));
    bytes
}

/// A connection dies amid its writes; its session is attached again and written to. Nothing of the dead may follow.
fn nothing_lands_after_reattaching(server: &Server, connect: impl Fn() -> Stream) {
    let mut random = Random::new(23);
    let idle = server.usage().descriptors;
    for round in 0..150 {
        let length = [600, 4096, 10_000, 65_536][support::size(random.below(4))];
        let mut dead = Client::attach(connect(), "base@victim").expect("offered");
        let whole = random.below(40);
        let words = last_words(&mut random, whole, length);
        dead.peer().send(&words);
        if round % 2 == 0 {
            dead.cut();
        } else {
            drop(dead);
        }

        let mut alive = Client::attach(connect(), "base@victim").expect("offered");
        let mut writes: Vec<Request> =
            (0..8).map(|n| Request::write(n * length, &vec![0x11; support::size(length)])).collect();
        writes.push(Request::flush());
        alive.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
        let intact = |alive: &mut Client| {
            let seen = alive.read(0, 8 * length);
            let dead = seen.iter().filter(|&&byte| byte == 0xdd).count();
            assert_eq!(dead, 0, "{dead} bytes of a dead connection landed in round {round}");
            assert!(seen.iter().all(|&byte| byte == 0x11));
        };
        intact(&mut alive);
        wait_until("the dead connection is gone", || server.usage().descriptors <= idle + 1);
        intact(&mut alive);
        alive.disconnect();
        wait_until("the connection is gone", || server.usage().descriptors <= idle);
    }
}

#[test]
fn a_dead_clients_writes_never_land_after_its_session_was_attached_again() {
    let (_dir, _image, server) = serve_with(&["--workers", "2"]);
    // One connection first: the server may open things of its own at the first.
    server.client("base").disconnect();
    wait_until("the connection is gone", || server.usage().descriptors > 0);
    nothing_lands_after_reattaching(&server, || server.stream());
}

#[test]
fn a_dead_clients_writes_over_tcp_never_land_after_its_session_was_attached_again() {
    let (_dir, _image, server) = serve_with(&["--workers", "2"]);
    nothing_lands_after_reattaching(&server, || server.tcp_stream());
}

#[test]
fn a_client_that_said_goodbye_is_answered_though_its_session_is_attached_again() {
    // It has sent its last request, shut its sending half down, and waits for its replies: it is not dead.
    let (_dir, _image, server) = serve_with(&["--workers", "2"]);
    for round in 1..=100_u8 {
        let mut leaving = server.client("base@leaving");
        let requests: Vec<Request> = (0..64).map(|n| Request::write(n * 8192, &[round; 8192])).collect();
        let cookies = leaving.send_all(&requests);
        leaving.send_disconnect();
        let peer = leaving.peer();
        peer.stream().shutdown(std::net::Shutdown::Write).expect("shutting one direction down");
        let mut next = server.client("base@leaving");
        for cookie in cookies {
            leaving.wait(cookie).ok();
        }
        leaving.peer().expect_end();
        assert!(next.read(0, 64 * 8192).iter().all(|&byte| byte == round));
        next.disconnect();
    }
}

#[test]
fn connections_that_come_and_go_do_not_cost_a_live_one_its_writes() {
    // Whoever attaches makes the server wonder about those who are in the session already: these are alive.
    let (_dir, _image, server) = serve_with(&["--workers", "2"]);
    for tcp in [true, false] {
        let connect = || if tcp { server.tcp_stream() } else { server.stream() };
        let name = if tcp { "base@live-tcp" } else { "base@live-unix" };
        let mut busy: Vec<Client> =
            (0..2).map(|_| Client::attach(connect(), name).expect("offered")).collect();
        // One of them is in the middle of a request all the time.
        let mut slow = Client::attach(connect(), name).expect("offered");
        let late = Request::write(3 * MIB, &[0x77; 10_000]);
        let cookie = slow.expect(&late);
        let bytes = late.bytes(cookie);
        slow.peer().send(&bytes[..5000]);
        std::thread::scope(|scope| {
            for (n, client) in busy.iter_mut().enumerate() {
                scope.spawn(move || {
                    for round in 0..40_u8 {
                        let writes: Vec<Request> = (0..32)
                            .map(|k| Request::write(n as u64 * MIB + k * 30_000, &[round; 30_000]))
                            .collect();
                        client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
                        assert_eq!(client.read(n as u64 * MIB, 960_000), vec![round; 960_000]);
                    }
                });
            }
            for n in 0..30 {
                let mut visitor = Client::attach(connect(), name).expect("offered");
                visitor.read(0, 4096);
                if n % 2 == 0 { visitor.disconnect() } else { visitor.cut() }
            }
        });
        slow.peer().send(&bytes[5000..]);
        slow.wait(cookie).ok();
        assert_eq!(busy[0].read(3 * MIB, 10_000), [0x77; 10_000]);
    }
}

#[test]
fn half_of_a_write_is_no_write() {
    let (_dir, image, server) = serve();
    let mut random = Random::new(29);
    for length in [1000, 4096, 20_000, 300_000] {
        for round in 1..=10_u8 {
            let mut dead = server.client("base@half");
            let bytes = Request::write(0, &vec![round; support::size(length)]).bytes(1);
            let sent = support::size(random.between(1, 27 + length - 1));
            dead.peer().send(&bytes[..sent]);
            dead.cut();
            let mut alive = server.client("base@half");
            let seen = alive.read(0, length);
            // What arrived may have been put in place block by block, but never half a block.
            for (block, base) in seen.chunks(4096).zip(image.bytes(0, length).chunks(4096)) {
                let whole = block[0] <= round && block.iter().all(|&byte| byte == block[0]);
                assert!(block == base || whole, "a block was torn");
            }
            alive.disconnect();
        }
    }
}

#[test]
fn a_block_is_seen_whole_or_not_at_all() {
    // Two writers put whole blocks of one byte each in the same places while others read them: no reply mixes two.
    let (_dir, image, server) = serve_with(&["--workers", "2"]);
    let mut writers: Vec<Client> = (0..2).map(|_| server.client("base@whole")).collect();
    let mut readers: Vec<Client> = (0..2).map(|_| server.client("base@whole")).collect();
    std::thread::scope(|scope| {
        for (n, writer) in writers.iter_mut().enumerate() {
            scope.spawn(move || {
                for round in 0..100_u8 {
                    let mark = 1 + round * 2 + u8::try_from(n).expect("two writers");
                    // Small ones are written in place, large ones received into place.
                    let mut writes: Vec<Request> =
                        (0..16).map(|block| Request::write(block * 4096, &[mark; 4096])).collect();
                    writes.push(Request::write(64 * KIB, &vec![mark; 128 << 10]));
                    if round % 8 == 7 {
                        writes.push(Request::trim(0, 192 * KIB));
                    }
                    writer.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
                }
            });
        }
        for reader in &mut readers {
            let image = &image;
            scope.spawn(move || {
                let base = image.bytes(0, 192 * KIB);
                for _ in 0..60 {
                    let reads: Vec<Request> = (0..8).map(|_| Request::read(0, 192 * KIB)).collect();
                    for reply in reader.pipeline(&reads) {
                        for (seen, base) in reply.ok().data.chunks(4096).zip(base.chunks(4096)) {
                            assert!(seen == base || seen == [seen[0]; 4096], "a block is torn");
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn connections_of_one_session_write_neighbours_in_the_same_block() {
    let (_dir, image, server) = serve_with(&["--workers", "2"]);
    // Eight connections interleave 64-byte writes over fresh blocks: a lost first write shows as base bytes.
    let total = 256 * KIB;
    let mut clients: Vec<Client> = (0..8).map(|_| server.client("base@neighbours")).collect();
    std::thread::scope(|scope| {
        for (n, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                let mine = u8::try_from(n).expect("few") + 1;
                let writes: Vec<Request> = (0..total / 512)
                    .map(|slot| Request::write(slot * 512 + n as u64 * 64, &[mine; 64]))
                    .collect();
                for batch in writes.chunks(64) {
                    client.pipeline(batch).into_iter().for_each(|reply| drop(reply.ok()));
                }
            });
        }
    });
    let seen = clients[0].read(0, total);
    for (at, piece) in seen.chunks(64).enumerate() {
        let writer = u8::try_from(at % 8).expect("few") + 1;
        assert_eq!(piece, [writer; 64], "at {}", at * 64);
    }
    assert_bytes(&clients[7].read(total, 4096), &image.bytes(total, 4096), total);
}
