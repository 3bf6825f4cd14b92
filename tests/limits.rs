//! How much of a server its clients may have, and for how long they may keep it waiting: whoever goes beyond gets a clear
//! answer or is hung up on, and nobody else notices.

mod support;

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use support::peer::option_bytes;
use support::server::{Serve, scratch};
use support::{
    Checked, Client, Image, KIB, MIB, PATIENCE, Peer, Random, Request, Server, Stream, assert_bytes, nbd,
    wait_until,
};

const EXPORT: u64 = 8 * MIB;

fn serve(args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 71);
    let server = Serve::image(&image).tcp().args(args).start();
    (dir, image, server)
}

/// A connection from `host`, which is in 127.0.0.0/8: to the server each address there is a host of its own.
fn from_host(server: &Server, host: &str) -> Stream {
    let flags = SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).expect("a socket");
    let from: SocketAddr = format!("{host}:0").parse().expect("an address");
    rustix::net::bind(&socket, &from).expect("the whole of 127.0.0.0/8 is this machine's");
    let to: SocketAddr = server.tcp_address().parse().expect("an address");
    rustix::net::connect(&socket, &to).expect("it listens");
    Stream::Tcp(TcpStream::from(socket))
}

/// The connection, if the server greets it; `None` if it hangs up at once.
fn greeted(stream: Stream) -> Option<Peer> {
    let mut peer = Peer::new(stream);
    let mut greeting = [0; 18];
    match peer.try_fill(&mut greeting) {
        Ok(()) => {
            assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
            Some(peer)
        }
        Err(_) => None,
    }
}

/// As many connections as `connect` gets, which are fewer than `most`.
fn all_of(most: usize, mut connect: impl FnMut() -> Stream) -> Vec<Peer> {
    let peers: Vec<Peer> = (0..most).map_while(|_| greeted(connect())).collect();
    assert!(peers.len() < most, "it never refuses");
    peers
}

/// Waits until a connection is greeted again: places are given back a moment after a client has left.
fn greeted_in_the_end(mut connect: impl FnMut() -> Stream) -> Peer {
    let start = Instant::now();
    loop {
        if let Some(peer) = greeted(connect()) {
            return peer;
        }
        assert!(start.elapsed() < PATIENCE, "no place ever comes free");
        std::thread::sleep(Duration::from_millis(5));
    }
}

// Connections.

/// For tests in which connections stand in the handshake and take places, for as long as the test takes.
const PATIENT: &[&str] = &["--handshake-timeout", "off"];

#[test]
fn connections_beyond_the_most_are_hung_up_on_and_all_others_stay() {
    let (_dir, image, mut server) =
        serve(&[PATIENT, &["--max-connections", "5", "--max-connections-per-peer", "5"]].concat());
    let mut client = Checked::new(server.client("base"), &image);
    let mut crowd = all_of(100, || server.stream());
    assert_eq!(crowd.len(), 4);
    assert!(greeted(server.tcp_stream()).is_none(), "by whatever way");
    server.wait_for_line("all 5 are taken (--max-connections)", 1);
    let mut random = Random::new(1);
    for _ in 0..50 {
        client.random_step(&mut random, 50_000, true);
    }
    crowd.pop();
    let mut late = greeted_in_the_end(|| server.tcp_stream());
    assert!(greeted(server.stream()).is_none());
    late.send(&3_u32.to_be_bytes());
    late.assert_usable();
    client.read_all();
}

#[test]
fn one_peer_at_its_limit_keeps_no_other_out() {
    let (_dir, image, server) = serve(&[PATIENT, &["--max-connections-per-peer", "3"]].concat());
    let one = all_of(100, || from_host(&server, "127.0.0.1"));
    assert_eq!(one.len(), 3);
    // Over a unix socket the same process is a user, over TCP from another address another host.
    assert_eq!(all_of(100, || server.stream()).len(), 3);
    let mut other = Client::attach(from_host(&server, "127.0.0.2"), "base").expect("another host");
    assert_bytes(&other.read_all(), &image.all(), 0);
    drop(one);
    greeted_in_the_end(|| from_host(&server, "127.0.0.1"));
}

#[test]
fn by_default_whoever_takes_all_that_it_can_get_leaves_room_for_others() {
    let (_dir, image, server) = serve(&[PATIENT, &["--max-connections", "40"]].concat());
    let greedy = all_of(100, || from_host(&server, "127.0.0.1"));
    assert_eq!(greedy.len(), 30, "three quarters");
    let next = all_of(100, || from_host(&server, "127.0.0.2"));
    assert_eq!(next.len(), 8, "three quarters of the rest");
    let mut client = Client::attach(server.stream(), "base").expect("and still there is room");
    assert_bytes(&client.read_all(), &image.all(), 0);
}

#[test]
fn who_knocks_again_and_again_does_not_fill_the_log() {
    let (_dir, _image, server) = serve(&[PATIENT, &["--max-connections-per-peer", "2"]].concat());
    let _two = all_of(100, || server.stream());
    for _ in 0..500 {
        assert!(greeted(server.stream()).is_none());
    }
    let lines = server.log().iter().filter(|line| line.contains("connection refused")).count();
    assert!((1..20).contains(&lines), "{lines} lines for 500 refusals");
}

#[test]
fn more_connections_than_open_files_allow_are_refused_at_the_start() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let socket = dir.path().join("s");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 300; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_memdev"), "serve"]);
    let output = command.arg(&image.path).args(["--max-connections", "300", "--unix"]).arg(&socket).output();
    let output = output.expect("sh can be run");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("memdev: Cannot have 300 connections: the limit of open files has room for 2"),
        "{said}"
    );
    assert!(said.ends_with("; raise it (ulimit -n, LimitNOFILE=) or lower --max-connections\n"), "{said}");
}

/// As many connections as it may have, and it is not out of descriptors: an image that is replaced can still be opened.
#[test]
fn the_default_leaves_descriptors_for_the_server_itself() {
    let folder = scratch();
    let image = Image::random(folder.path().join("base.img"), MIB, 1);
    let socket = folder.path().join("nbd.sock");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 256; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_memdev"), "serve"]);
    command.arg(&image.path).args(["--max-connections-per-peer", "1000"]).args(PATIENT);
    command.arg("--unix").arg(&socket);
    let mut server = Server::by(command, folder);
    server.wait_for_line("listening on", 1);
    let mut crowd = all_of(256, || server.stream());
    assert!(crowd.len() > 100, "{} connections of 256 descriptors", crowd.len());
    let newer = Image::random(image.path.with_extension("new"), MIB, 2);
    std::fs::rename(&newer.path, &image.path).expect("replacing the image");
    let mut last = crowd.pop().expect("one of them");
    last.send(&3_u32.to_be_bytes());
    let export = last.go("base").expect("the new image can be opened");
    assert_bytes(&Client::new(last, export, false, None).read_all(), &newer.all(), 0);
    let log = server.log();
    assert!(!log.iter().any(|line| line.contains("cannot accept")), "{log:#?}");
}

// Sessions.

#[track_caller]
fn policy(refusal: Option<support::OptionReply>, words: &str) {
    let refusal = refusal.expect("there are as many as there may be");
    assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
    let message = String::from_utf8(refusal.data).expect("text");
    assert!(message.contains(words), "{message}");
}

#[test]
fn sessions_beyond_the_most_are_refused_with_a_reason_and_the_client_may_go_on() {
    let (_dir, image, server) = serve(&["--max-sessions", "3", "--max-sessions-per-owner", "3"]);
    let mut fresh = Checked::new(server.client("base"), &image);
    let mut named = server.client("base@one");
    let last = server.client("base");
    policy(server.try_client("base").err(), "Too many sessions: all 3 are taken; try again");
    policy(server.try_client("base@two").err(), "Too many sessions: all 3 are taken; try again");

    // What makes no session can be had: the list, information, and a session that is there.
    let mut peer = server.peer();
    peer.start();
    policy(peer.go("base").err(), "Too many sessions");
    assert_eq!(peer.list().len(), 1);
    assert_eq!(peer.info("base", &[]).expect("information").size, EXPORT);
    let export = peer.go("base@one").expect("it is there");
    let mut shared = Client::new(peer, export, false, None);
    named.write(0, &[5; 4096]);
    assert_eq!(shared.read(0, 4096), [5; 4096]);

    // An EXPORT_NAME cannot be refused but by hanging up.
    let mut peer = server.peer();
    peer.start();
    peer.send_option(nbd::OPT_EXPORT_NAME, b"base");
    peer.expect_end();

    last.disconnect();
    wait_until("its session has ended", || server.try_client("base").is_ok());
    fresh.read_all();
}

#[test]
fn a_named_session_counts_as_long_as_it_lingers() {
    let args = ["--max-sessions", "2", "--max-sessions-per-owner", "2"];
    let (_dir, _image, server) = serve(&[&args[..], &["--linger", "1h"]].concat());
    server.client("base@one").disconnect();
    server.client("base@two").disconnect();
    policy(server.try_client("base@three").err(), "all 2 are taken");
    assert!(server.try_client("base@two").is_ok());

    let (_dir, _image, server) = serve(&[&args[..], &["--linger", "0s"]].concat());
    server.client("base@one").disconnect();
    server.client("base@two").disconnect();
    wait_until("both have ended", || server.try_client("base@three").is_ok());
}

#[test]
fn one_owner_at_its_limit_keeps_no_other_out() {
    let (_dir, image, server) = serve(&["--max-sessions-per-owner", "2"]);
    let from = |host: &str, name: &str| Client::attach_simple(from_host(&server, host), name);
    let _one = from("127.0.0.1", "base").expect("the first");
    let _two = from("127.0.0.1", "base@named").expect("the second");
    policy(from("127.0.0.1", "base").err(), "Too many sessions: host 127.0.0.1 has 2 already; end one");
    let mut other = from("127.0.0.2", "base").expect("another host");
    assert_bytes(&other.read_all(), &image.all(), 0);
    // Who enters a session that somebody else made has not made one.
    let _guest = from("127.0.0.2", "base@named").expect("it knows the name");
    let _more = from("127.0.0.2", "base").expect("its second");
    policy(from("127.0.0.2", "base").err(), "host 127.0.0.2 has 2 already");
}

// Time.

#[test]
fn a_handshake_that_takes_too_long_is_hung_up_on_and_nothing_else_is() {
    // Long enough for those who do make haste, on a machine that is busy.
    let (_dir, image, server) = serve(&["--handshake-timeout", "4s"]);
    let mut client = Checked::new(server.client("base"), &image);
    let mut silent = server.peer();
    silent.greeting();
    let mut haggling = server.peer();
    haggling.start();
    let mut half = server.peer();
    half.start();
    half.send(&option_bytes(nbd::OPT_LIST, &[])[..7]);
    half.expect_end();
    silent.expect_end();
    // To say something from time to time does not help.
    let start = Instant::now();
    while haggling.try_send(&option_bytes(nbd::OPT_LIST, &[])).is_ok()
        && haggling.try_fill(&mut [0; 20]).is_ok()
    {
        assert!(start.elapsed() < PATIENCE, "it may haggle for ever");
        std::thread::sleep(Duration::from_millis(10));
    }
    client.read_all();
    let mut random = Random::new(2);
    client.random_step(&mut random, 50_000, true);
}

#[test]
fn without_a_limit_a_handshake_may_take_its_time() {
    let (_dir, _image, server) = serve(&["--handshake-timeout", "off"]);
    let mut peer = server.peer();
    peer.greeting();
    std::thread::sleep(Duration::from_millis(500));
    peer.send(&3_u32.to_be_bytes());
    peer.assert_usable();
}

/// Asks for more than sockets hold, and reads nothing of it.
fn ask_for_much(client: &mut Client) -> Vec<u64> {
    let reads: Vec<Request> = (0..200).map(|n| Request::read(n % 8 * MIB, MIB)).collect();
    client.send_all(&reads)
}

/// Reads what is still there of a connection, until its end.
fn drain(mut client: Client) -> usize {
    let mut stream = client.peer().stream().try_clone().expect("a second handle");
    let (mut buffer, mut sum) = (vec![0; 1 << 20], 0);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return sum,
            Ok(count) => sum += count,
        }
    }
}

/// One who reads nothing, one who reads on but never catches up, and one who has nothing to read.
fn only_who_reads_nothing_is_hung_up_on(connect: impl Fn(&Server) -> Stream) {
    // Far longer than who reads on may be kept from it by a machine that is busy.
    let (_dir, image, mut server) = serve(&["--reply-timeout", "8s", "--linger", "0s"]);
    let attach = |server: &Server| Client::attach_simple(connect(server), "base").expect("offered");
    let (mut idle, mut unread, mut steady) = (attach(&server), attach(&server), attach(&server));
    ask_for_much(&mut unread);
    let cookies = ask_for_much(&mut steady);
    for (n, cookie) in cookies.into_iter().enumerate() {
        let offset = n as u64 % 8 * MIB;
        assert_bytes(&steady.wait(cookie).ok().data, &image.bytes(offset, MIB), offset);
        std::thread::sleep(Duration::from_millis(60));
    }
    server.wait_for_line("client left replies unread for too long: hung up", 1);
    assert!(drain(unread) < 200 << 20, "not all of it came");
    assert_bytes(&idle.read(0, 64 * KIB), &image.bytes(0, 64 * KIB), 0);
    assert_bytes(&steady.read(0, 64 * KIB), &image.bytes(0, 64 * KIB), 0);
}

#[test]
fn who_leaves_replies_unread_for_too_long_is_hung_up_on() {
    only_who_reads_nothing_is_hung_up_on(Server::stream);
}

#[test]
fn who_leaves_replies_unread_for_too_long_over_tcp_is_hung_up_on() {
    only_who_reads_nothing_is_hung_up_on(Server::tcp_stream);
}

#[test]
fn without_a_limit_replies_wait_for_ever() {
    let (_dir, image, server) = serve(&["--reply-timeout", "off"]);
    let mut client = server.simple("base");
    let cookies = ask_for_much(&mut client);
    std::thread::sleep(Duration::from_millis(800));
    for (n, cookie) in cookies.into_iter().enumerate() {
        let offset = n as u64 % 8 * MIB;
        assert_bytes(&client.wait(cookie).ok().data, &image.bytes(offset, MIB), offset);
    }
}

/// A TCP client that is stopped (Ctrl-Z) for a while with its receive window full. To the kernel's own timeout such a
/// host is as silent as one that vanished: it hung up after that time on clients that were only slow.
#[test]
fn a_live_host_whose_program_stands_still_is_not_taken_for_gone() {
    let (_dir, image, server) = serve(&["--host-timeout", "3s"]);
    let mut stopped = Client::attach_simple(server.tcp_stream(), "base").expect("offered");
    // One whose replies all fit between the server's output and its own window: nothing waits in the server itself.
    let mut buffered = Client::attach_simple(server.tcp_stream(), "base").expect("offered");
    let many = ask_for_much(&mut stopped);
    let few: Vec<u64> = (0..4).map(|n| buffered.send(&Request::read(n * MIB, MIB))).collect();
    std::thread::sleep(Duration::from_secs(9));
    for (client, cookies) in [(&mut stopped, many), (&mut buffered, few)] {
        for (n, cookie) in cookies.into_iter().enumerate() {
            let offset = n as u64 % 8 * MIB;
            assert_bytes(&client.wait(cookie).ok().data, &image.bytes(offset, MIB), offset);
        }
        // What was told to the kernel is taken back, and it still serves.
        client.read(0, 4096);
    }
}

// In flight. That unread replies and requests sent ahead are bounded is in `rude_clients.rs`.

/// Requests for pages that are not in memory wait for the disk, a few of each connection at a time. However many one
/// client has sent, all are answered, and another client has its turn meanwhile.
#[test]
fn requests_beyond_those_that_may_wait_for_the_disk_are_done_in_their_turn() {
    let (_dir, image, server) = serve(&["--workers", "1"]);
    let file = std::fs::File::open(&image.path).expect("the image");
    file.sync_all().expect("only what is on the disk can be dropped from memory");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
        .expect("dropping the image from memory");
    let mut many = server.simple("base");
    let mut other = Checked::new(server.client("base"), &image);
    let mut random = Random::new(8);
    let places: Vec<u64> = (0..2000).map(|_| random.below(EXPORT / (4 * KIB)) * 4 * KIB).collect();
    let reads: Vec<Request> = places.iter().map(|&offset| Request::read(offset, 4 * KIB)).collect();
    let cookies = many.send_all(&reads);
    for _ in 0..50 {
        other.random_step(&mut random, 50_000, true);
    }
    for (offset, cookie) in places.into_iter().zip(cookies) {
        assert_bytes(&many.wait(cookie).ok().data, &image.bytes(offset, 4 * KIB), offset);
    }
}

#[test]
fn limits_that_are_none_are_usage_errors() {
    for (flag, value, why) in [
        ("--max-connections", "0", "not in 1.."),
        ("--max-connections-per-peer", "many", "invalid digit"),
        ("--max-sessions", "1.5", "invalid digit"),
        ("--max-sessions-per-owner", "0", "not in 1.."),
        ("--handshake-timeout", "never", "or off"),
        ("--reply-timeout", "5 minutes", "or off"),
        ("--host-timeout", "1s", "the shortest is 3s"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let output = command.args(["serve", "x.img", flag, value]).output().expect("memdev runs");
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(flag) && said.contains(why), "{said}");
    }
}
