//! Clients that cut, stall, lie and flood: afterwards nothing is left of them, and meanwhile nobody else suffers.

mod support;

use std::io::{ErrorKind, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use support::peer::{context_data, info_data, option_bytes};
use support::server::{Serve, scratch};
use support::{
    Checked, Client, Image, KIB, MIB, Peer, Random, Request, Server, Stream, assert_bytes, nbd, wait_until,
};

const EXPORT: u64 = 8 * MIB;

fn serve(args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 51);
    let server = Serve::image(&image).tcp().args(args).start();
    (dir, image, server)
}

/// Everything a whole, polite conversation would send, for a client that will stop somewhere in it.
fn conversation(random: &mut Random) -> Vec<u8> {
    let name: &[u8] = [&b"base"[..], b"base@rude", b"nothing"][support::size(random.below(3))];
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option_bytes(nbd::OPT_LIST, &[]));
    bytes.extend(option_bytes(nbd::OPT_STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(nbd::OPT_SET_META_CONTEXT, &context_data(name, &["base:allocation"])));
    bytes.extend(option_bytes(nbd::OPT_GO, &info_data(name, &[nbd::INFO_BLOCK_SIZE])));
    for n in 0..20 {
        let data = random.bytes(random.clone().between(1, 20_000));
        bytes.extend(Request::write(random.below(EXPORT - 20_000), &data).bytes(n));
        bytes.extend(Request::read(random.below(EXPORT - 65_536), 65_536).bytes(1000 + n));
        bytes.extend(Request::zeroes(random.below(EXPORT - MIB), MIB).bytes(2000 + n));
    }
    bytes
}

/// One connection that behaves badly in a way that `random` decides, and is cut.
fn rude(stream: Stream, random: &mut Random) {
    let mut peer = Peer::new(stream);
    match random.below(10) {
        // Nothing at all; or the greeting is read in part.
        0 => {}
        1 => drop(peer.try_fill(&mut vec![0; support::size(random.between(1, 18))])),
        // Cut anywhere in the handshake.
        2 | 3 => {
            let whole = conversation(random);
            peer.shove(&whole[..support::size(random.below(200))]);
        }
        // Cut anywhere at all, replies unread.
        4 => {
            let whole = conversation(random);
            peer.shove(&whole[..support::size(random.below(whole.len() as u64))]);
        }
        // Garbage, at once or after the greeting.
        5 => {
            let garbage = random.bytes(random.clone().between(1, 3000));
            peer.shove(&[&3_u32.to_be_bytes()[..], &garbage].concat());
        }
        // 64 replies unread.
        6 => {
            if let Some(mut client) = attach(peer, "base") {
                let reads: Vec<u8> =
                    (0..64).flat_map(|n| Request::read(n * 100_000, 65_536).bytes(n)).collect();
                client.peer().shove(&reads);
                return end(client, random);
            }
            return;
        }
        // In a payload, in a header, after garbage in the transmission phase.
        7 => {
            if let Some(mut client) = attach(peer, "base") {
                let bytes = Request::write(random.below(MIB), &random.bytes(300_000)).bytes(1);
                client.peer().shove(&bytes[..support::size(random.below(bytes.len() as u64))]);
                return end(client, random);
            }
            return;
        }
        8 => {
            if let Some(mut client) = attach(peer, "base@rude") {
                client.call(&Request::write(random.below(MIB), &random.bytes(30_000)));
                client.peer().shove(&random.bytes(random.clone().between(1, 3000)));
                return end(client, random);
            }
            return;
        }
        // A soft disconnect with everything unread.
        _ => {
            if let Some(mut client) = attach(peer, "base") {
                for n in 0..20 {
                    client.send(&Request::read(n * 4096, 4096));
                }
                client.send_disconnect();
                return end(client, random);
            }
            return;
        }
    }
    cut(peer.stream(), random);
}

fn attach(mut peer: Peer, name: &str) -> Option<Client> {
    peer.start();
    let export = peer.go(name).ok()?;
    Some(Client::new(peer, export, false, None))
}

fn end(mut client: Client, random: &mut Random) {
    cut(client.peer().stream(), random);
}

/// Ends a connection: by closing, by shutting it down, or by a reset.
fn cut(stream: &Stream, random: &mut Random) {
    match random.below(3) {
        0 => {}
        1 => drop(stream.shutdown(Shutdown::Both)),
        _ => {
            if let Stream::Tcp(stream) = stream {
                let _ = set_socket_linger(stream, Some(Duration::ZERO));
            }
        }
    }
}

/// So many rude connections, four at a time, half of them over TCP.
fn crowd(server: &Server, count: u64, seed: u64) {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut random = Random::new(seed + thread);
                for _ in 0..count / 4 {
                    let tcp = random.below(2) == 0;
                    rude(if tcp { server.tcp_stream() } else { server.stream() }, &mut random);
                }
            });
        }
    });
}

#[test]
fn nothing_is_left_of_two_thousand_connections_cut_at_random_moments() {
    let (_dir, image, server) = serve(&["--linger", "0s"]);
    // Warmed up: what the server keeps for later (arenas, pools) is there before the count begins.
    let idle = server.usage();
    crowd(&server, 400, 1);
    wait_until("the first crowd is gone", || server.usage().descriptors <= idle.descriptors);
    let baseline = server.usage();
    assert_eq!(baseline.descriptors, idle.descriptors);
    assert_eq!(baseline.threads, idle.threads);

    let mut bystander = Checked::new(server.client("base"), &image);
    std::thread::scope(|scope| {
        let rudeness = scope.spawn(|| crowd(&server, 2000, 100));
        let mut random = Random::new(7);
        while !rudeness.is_finished() {
            bystander.random_step(&mut random, 20_000, true);
        }
    });
    bystander.read_all();
    bystander.client.disconnect();
    // 4 KiB a connection is the slack; a leaked session, buffer or stack is far more.
    server.settles_at(baseline, 2000 * 4 * KIB);
    let mut late = Checked::new(server.client("base"), &image);
    late.read_all();
    drop(late);
    server.stop();
}

#[test]
fn no_memory_of_the_budget_is_lost_to_rude_clients() {
    let (_dir, _image, server) = serve(&["--linger", "0s", "--memory", "6M"]);
    let data = Random::new(9).bytes(16 * KIB);
    // How much of the export one session can hold when nobody else is there.
    let room = || {
        // While the crowd's sessions are being taken down there may be no room for another at all.
        let Ok(mut client) = server.try_client("base") else { return 0 };
        let fits = |&n: &u64| client.call(&Request::write(n * 16 * KIB, &data)).error.is_none();
        (0..EXPORT / (16 * KIB)).take_while(fits).count()
    };
    let before = room();
    assert!((1..512).contains(&before), "the budget is used up by {before} writes");
    crowd(&server, 400, 300);
    wait_until("all of the budget is there", || room() == before);
}

#[test]
fn a_client_that_never_reads_its_replies_delays_nobody_and_costs_little() {
    let (_dir, image, server) = serve(&["--workers", "1"]);
    let mut greedy = server.simple("base");
    let mut other = Checked::new(server.client("base"), &image);
    let before = server.usage().private;
    let reads: Vec<Request> = (0..400).map(|n| Request::read(n % 8 * MIB, MIB)).collect();
    let cookies = greedy.send_all(&reads);
    let mut random = Random::new(1);
    for _ in 0..500 {
        other.random_step(&mut random, 50_000, true);
    }
    assert!(server.usage().private <= before + 48 * MIB, "400 MiB of unread replies are not held in memory");
    // It was only slow: everything comes in the end.
    for (n, cookie) in cookies.into_iter().enumerate() {
        let reply = greedy.wait(cookie).ok();
        let offset = n as u64 % 8 * MIB;
        assert_bytes(&reply.data, &image.bytes(offset, MIB), offset);
    }
    other.read_all();
}

#[test]
fn a_client_that_sends_forever_and_reads_nothing_is_held_back() {
    let (_dir, image, server) = serve(&["--workers", "1"]);
    let mut flood = server.simple("base");
    let mut other = Checked::new(server.client("base"), &image);
    let before = server.usage().private;
    let Stream::Unix(socket) = flood.peer().stream().try_clone().expect("a second handle") else {
        unreachable!("it is a unix socket")
    };
    // Reads of 32 KiB as fast as they go: at some point the server must stop taking requests.
    socket.set_write_timeout(Some(Duration::from_millis(300))).expect("setting a timeout");
    let burst = Request::read(0, 32 * KIB).bytes(1).repeat(1000);
    let mut sent = 0;
    let held_back = loop {
        match (&socket).write(&burst) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
        assert!(sent < 256 << 20, "the server takes requests without end while no reply is read");
    };
    assert!(matches!(held_back.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{held_back}");
    let mut random = Random::new(2);
    for _ in 0..300 {
        other.random_step(&mut random, 50_000, true);
    }
    assert!(server.usage().private <= before + 48 * MIB);
    flood.cut();
    other.read_all();
}

#[test]
fn unread_replies_keep_their_bytes_while_the_session_changes() {
    // The replies wait in the server while another connection writes, zeroes and trims what they hold.
    let (_dir, _image, server) = serve(&["--workers", "2"]);
    let mut reader = server.simple("base@slow");
    let mut writer = server.client("base@slow");
    let mut thief = server.client("base");
    writer.write(0, &vec![0x11; 4 << 20]);
    let reads: Vec<Request> = (0..64).map(|n| Request::read(n % 4 * MIB, MIB)).collect();
    let cookies = reader.send_all(&reads);
    let mut first = [0; 16];
    reader.peer().fill(&mut first[..1]);
    writer.trim(0, 4 * MIB);
    writer.write(0, &vec![0x22; 4 << 20]);
    writer.trim(0, 4 * MIB);
    for n in 0..16 {
        thief.write(n % 8 * MIB, &vec![0xc7; 1 << 20]);
    }
    // One byte of the first reply has been read already: take up the stream by hand.
    assert_eq!(first[0].to_be_bytes(), nbd::SIMPLE_REPLY_MAGIC.to_be_bytes()[..1]);
    reader.peer().fill(&mut first[1..16]);
    let mut seen = vec![0; 1 << 20];
    for n in 0..cookies.len() {
        if n > 0 {
            reader.peer().fill(&mut first[..16]);
        }
        assert_eq!(first[4..8], [0; 4], "reply {n} is no error");
        reader.peer().fill(&mut seen);
        let whole = seen.iter().all(|&byte| [0x11, 0x22, 0].contains(&byte));
        assert!(whole, "reply {n} holds bytes that its session never held");
    }
}

#[test]
fn half_sent_requests_wait_alone_and_are_completed_later() {
    let (_dir, image, server) = serve(&["--workers", "1"]);
    let mut random = Random::new(3);
    let base = image.all();
    let mut halves: Vec<(Client, Vec<u8>, u64, Request)> = (0..60)
        .map(|_| {
            let mut client = server.client("base");
            let data = random.bytes(200_000);
            let request = Request::write(random.below(EXPORT - 200_000), &data);
            let cookie = client.expect(&request);
            let mut bytes = request.bytes(cookie);
            let rest = bytes.split_off(support::size(random.below(bytes.len() as u64)));
            client.peer().send(&bytes);
            (client, rest, cookie, request)
        })
        .collect();
    let mut other = Checked::new(server.client("base"), &image);
    for _ in 0..300 {
        other.random_step(&mut random, 50_000, true);
    }
    other.read_all();
    for (client, rest, cookie, request) in &mut halves {
        client.peer().send(rest);
        client.wait(*cookie).ok();
        let mut expected = base.clone();
        let start = support::size(request.offset);
        expected[start..start + request.payload.len()].copy_from_slice(&request.payload);
        assert_bytes(&client.read_all(), &expected, 0);
    }
}

#[test]
fn thousands_of_idle_connections_leave_room_for_one_more() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum.map(|most| most.min(20_000)), ..limit };
    // The server inherits it; without the right to raise it fewer connections have to do.
    let _ = setrlimit(Resource::Nofile, raised);
    let most = getrlimit(Resource::Nofile).current.unwrap_or(20_000);
    let count = support::size((most - 200).min(3000));
    let (_dir, image, server) = serve(&[]);
    drop(server.client("base"));
    let before = server.usage();
    let mut idle = Vec::new();
    for n in 0..count {
        let mut peer = server.peer();
        if n % 2 == 0 {
            peer.start();
        }
        idle.push(peer);
    }
    let mut client = Checked::new(server.client("base"), &image);
    let mut random = Random::new(4);
    for _ in 0..200 {
        client.random_step(&mut random, 50_000, true);
    }
    assert_eq!(server.usage().threads, before.threads);
    drop(client);
    drop(idle);
    server.settles_at(before, 16 * MIB);
}

#[test]
fn a_server_out_of_descriptors_serves_whom_it_has_and_recovers() {
    let (_dir, image, mut server) = serve(&["--linger", "0s"]);
    let mut client = Checked::new(server.client("base"), &image);
    client.read(0, 4096);
    let used = server.usage().descriptors as u64;
    let pid = Pid::from_raw(i32::try_from(server.pid()).expect("a process id")).expect("a process id");
    let few = Some(used + 20);
    prlimit(Some(pid), Resource::Nofile, Rlimit { current: few, maximum: few }).expect("lowering its limit");
    // More than it can take; connecting itself succeeds as long as the backlog has room.
    let crowd: Vec<Stream> = (0..60).map(|_| server.stream()).collect();
    let mut random = Random::new(5);
    for _ in 0..300 {
        client.random_step(&mut random, 20_000, true);
    }
    drop(crowd);
    let mut late = Checked::new(server.client("base"), &image);
    late.read_all();
    client.read_all();
    server.assert_alive();
}

#[test]
fn a_session_ended_amid_its_replies_is_gone() {
    let (_dir, _image, server) = serve(&["--linger", "0s"]);
    drop(server.client("base"));
    let before = server.usage();
    for round in 0..20 {
        let mut clients: Vec<Client> = (0..4).map(|_| server.simple("base@mid")).collect();
        clients[0].write(0, &vec![0x33; 2 << 20]);
        for client in &mut clients {
            let reads: Vec<Request> = (0..32).map(|n| Request::read(n % 2 * MIB, MIB)).collect();
            client.send_all(&reads);
        }
        for client in clients {
            if round % 2 == 0 { client.cut() } else { drop(client) }
        }
    }
    server.settles_at(before, 48 * MIB);
}
