//! `memdev serve --takeover`: another server takes the place of one that is used, and nobody notices.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
};
use rustix::process::Signal;
use serde_json::Value;
use support::server::scratch;
use support::{Checked, Client, Image, MIB, Random, Request, Server, Stream, assert_bytes, nbd, wait_until};
use tempfile::TempDir;

/// Sockets, and an image, that one server after the other has.
struct Place {
    dir: TempDir,
    image: Image,
}

impl Place {
    fn new() -> Self {
        let dir = scratch();
        fs::create_dir(dir.path().join("images")).expect("a directory");
        let image = Image::random(dir.path().join("images/base.img"), 16 * MIB, 1);
        Self { dir, image }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg("serve").arg(&self.image.path).arg("--confine-strict");
        if !rustix::process::geteuid().is_root() {
            command.arg("--confine-traceable");
        }
        command.arg("--control").arg(self.path("control")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// The first server, on a unix socket and on TCP.
    fn first(&self, args: &[&str]) -> Server {
        let mut command = self.command(args);
        command.arg("--unix").arg(self.path("nbd")).args(["--tcp", "127.0.0.1:0"]);
        started(command)
    }

    /// One that takes its place.
    fn next(&self, args: &[&str]) -> Server {
        started(self.command(&[&["--takeover"], args].concat()))
    }

    fn client(&self, name: &str) -> Client {
        Client::attach(Stream::unix(&self.path("nbd")).expect("somebody listens"), name)
            .expect("the export is offered")
    }

    /// A command that needs no control socket.
    fn memdev_alone(&self, args: &[&str]) {
        let output = Command::new(env!("CARGO_BIN_EXE_memdev")).args(args).output().expect("it runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn memdev(&self, args: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let output = command.args(args).arg("--control").arg(self.path("control")).output().expect("it runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.memdev(&[args, &["--json"]].concat())).expect("JSON")
    }

    /// The process that answers at the control socket.
    fn pid(&self) -> u64 {
        self.json(&["stat"])["pid"].as_u64().expect("a number")
    }
}

fn started(command: Command) -> Server {
    let mut server = Server::by(command, scratch());
    server.wait_for_line("control socket at", 1);
    server
}

fn tcp_of(server: &Server) -> String {
    let line = server.log().into_iter().find(|line| line.contains("nbd://")).expect("it listens on TCP");
    line.rsplit("nbd://").next().expect("an address").trim_end_matches('/').to_owned()
}

fn names(sessions: &Value) -> Vec<&str> {
    sessions
        .as_array()
        .expect("a list")
        .iter()
        .map(|session| session["name"].as_str().expect("a name"))
        .collect()
}

#[test]
fn nobody_notices_that_another_server_takes_the_place_of_one_under_load() {
    let place = Place::new();
    let mut first = place.first(&["--linger", "0s"]);
    let tcp = tcp_of(&first);
    let (over, switched) = (AtomicBool::new(false), AtomicBool::new(false));
    let (comings, turns) = (AtomicU64::new(0), AtomicU64::new(0));
    let second = thread::scope(|scope| {
        // Whoever is there keeps the connection, and every byte.
        for number in 0..4_u64 {
            let (place, tcp, over, turns) = (&place, &tcp, &over, &turns);
            scope.spawn(move || {
                let stream =
                    if number % 2 == 0 { Stream::unix(&place.path("nbd")) } else { Stream::tcp(tcp) };
                let name = if number < 2 { "base".to_owned() } else { format!("base@worker{number}") };
                let client = Client::attach(stream.expect("a server"), &name).expect("a session");
                let mut client = Checked::new(client, &place.image);
                let mut random = Random::new(number);
                while !over.load(Ordering::Relaxed) {
                    let offset = random.below(15 * MIB);
                    let length = 1 + random.below(100_000);
                    client.write(offset, &random.bytes(length));
                    client.read(random.below(15 * MIB), 100_000);
                    turns.fetch_add(1, Ordering::Relaxed);
                }
                client.read_all();
            });
        }
        // Whoever comes is let in, all the time: from the connection to the first reply.
        for number in 0..2 {
            let (place, tcp, over, comings) = (&place, &tcp, &over, &comings);
            scope.spawn(move || {
                let mut turn = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    let stream =
                        if number == 0 { Stream::unix(&place.path("nbd")) } else { Stream::tcp(tcp) };
                    let name = if turn.is_multiple_of(2) {
                        "base".to_owned()
                    } else {
                        format!("base@visit{number}-{turn}")
                    };
                    let mut client =
                        Client::attach(stream.expect("somebody listens"), &name).expect("it is let in");
                    client.write(5000, &turn.to_be_bytes());
                    assert_eq!(client.read(5000, 8), turn.to_be_bytes());
                    assert_bytes(&client.read(9000, 4096), &place.image.bytes(9000, 4096), 9000);
                    client.disconnect();
                    turn += 1;
                    comings.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let more = |what: &str, counter: &AtomicU64| {
            let before = counter.load(Ordering::Relaxed);
            wait_until(what, || counter.load(Ordering::Relaxed) > before + 20);
        };
        more("there is some traffic", &turns);
        more("some have come and gone", &comings);
        let second = place.next(&["--linger", "0s"]);
        switched.store(true, Ordering::Relaxed);
        more("the old ones go on", &turns);
        more("new ones come", &comings);
        assert_eq!(place.pid(), u64::from(second.pid()));
        first.assert_alive();
        over.store(true, Ordering::Relaxed);
        second
    });
    // All have left: the first one ends by itself, and the second goes on where it was.
    assert!(first.wait().success(), "{:#?}", first.log());
    let mut client = place.client("base");
    assert_bytes(&client.read(0, MIB), &place.image.bytes(0, MIB), 0);
    assert!(Stream::tcp(&tcp).is_ok());
    wait_until("the second knows", || place.json(&["stat"])["before"].is_null());
    second.signal(Signal::TERM);
    let mut second = second;
    assert!(second.wait().success());
    assert!(!place.path("nbd").exists() && !place.path("control").exists(), "the sockets are the last one's");
}

#[test]
fn who_comes_back_finds_the_session_wherever_it_is() {
    let place = Place::new();
    let mut first = place.first(&["--linger", "0s"]);
    let mut old = place.client("base@old");
    old.write(0, &[1; 8192]);
    let mut second = place.next(&["--linger", "0s"]);

    // A second connection to the first server's session, with and without what can be agreed on before.
    for style in support::Style::ALL {
        let contexts: &[&str] = if style.has_chunks() { &["base:allocation"] } else { &[] };
        let stream = Stream::unix(&place.path("nbd")).unwrap();
        let mut again = Client::attach_as(stream, "base@old", style, contexts).expect("it is let in");
        assert_eq!(again.read(0, 8192), [1; 8192]);
        again.write(8192, &[2; 4096]);
    }
    assert_eq!(old.read(8192, 4096), [2; 4096]);
    // By the oldest way to name an export, and as one that is only looked for.
    let mut peer = support::Peer::new(Stream::unix(&place.path("nbd")).unwrap());
    peer.start();
    assert_eq!(peer.export_name("base@old", false).size, 16 * MIB);
    assert!(Client::attach(Stream::unix(&place.path("nbd")).unwrap(), "base@old?").is_ok());
    let none = Client::attach(Stream::unix(&place.path("nbd")).unwrap(), "base@none?").map(drop);
    assert_eq!(none.expect_err("it is nowhere").kind, nbd::REP_ERR_UNKNOWN);

    // One is with the one, one with the other; both can be seen and handled.
    let mut new = place.client("base@new");
    new.write(0, &[3; 4096]);
    let all = place.json(&["ps"]);
    assert_eq!(names(&all), ["base@new", "base@old"]);
    assert_eq!(place.json(&["stat", "base@old"])["memory"]["data"], 12288);
    place.memdev(&["checkpoint", "base@old", "point"]);
    old.write(0, &[9; 4096]);
    place.memdev(&["rollback", "base@old", "point"]);
    assert_eq!(old.read(0, 4096), [1; 4096]);
    let control = place.path("control");
    let refused = Command::new(env!("CARGO_BIN_EXE_memdev"))
        .args(["fork", "base@old", "--control"])
        .arg(&control)
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("is being replaced, and makes nothing new"), "{said}");
    assert!(said.contains("cannot be forked, renamed, or saved while it is used"), "{said}");
    let (file, uri) =
        (place.path("saved"), format!("nbd+unix:///base@old?socket={}", place.path("nbd").display()));
    place.memdev_alone(&["save", &uri, file.to_str().unwrap(), "--format", "raw"]);
    assert!(fs::read(&file).unwrap() == old.read_all());
    let server = place.json(&["stat"]);
    assert_eq!(server["pid"], second.pid());
    wait_until("the first one tells of itself", || {
        let before = &place.json(&["stat"])["before"];
        before["pid"] == first.pid() && before["sessions"] == 1
    });

    // A third one, while the first still has somebody.
    let third = place.next(&["--linger", "0s"]);
    assert_eq!(place.pid(), u64::from(third.pid()));
    let mut from_first = place.client("base@old");
    assert_eq!(from_first.read(0, 8192), [1; 8192]);
    let mut from_second = place.client("base@new");
    assert_eq!(from_second.read(0, 4096), [3; 4096]);
    assert_eq!(names(&place.json(&["ps"])), ["base@new", "base@old"]);

    // With its last client a session ends wherever it is, and its name is free for a new one.
    drop((old, from_first, peer));
    assert!(first.wait().success(), "{:#?}", first.log());
    wait_until("the name is free", || {
        let mut fresh = place.client("base@old");
        fresh.read(0, 4096) == place.image.bytes(0, 4096)
    });
    assert_eq!(new.read(0, 4096), [3; 4096]);
    // Ended by command.
    place.memdev(&["end", "base@new"]);
    assert!(second.wait().success(), "{:#?}", second.log());
    assert!(new.try_pipeline(&[Request::read(0, 1)], &[])[0].is_err());
    let mut fresh = place.client("base@new");
    assert_bytes(&fresh.read(0, 4096), &place.image.bytes(0, 4096), 0);
    drop(third);
}

#[test]
fn what_cannot_take_over_leaves_the_other_as_it_was() {
    let place = Place::new();
    let fail = |args: &[&str], image: Option<&Path>| {
        let mut command = place.command(args);
        if let Some(image) = image {
            command = Command::new(env!("CARGO_BIN_EXE_memdev"));
            command.arg("serve").arg(image).arg("--control").arg(place.path("control")).args(args);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{said}");
        said
    };
    let said = fail(&["--takeover"], None);
    assert!(said.contains("Cannot reach the control socket"), "{said}");
    let first = place.first(&[]);
    let mut client = place.client("base@x");
    client.write(0, &[1; 4096]);
    let said = fail(&["--takeover"], Some(&place.path("none.img")));
    assert!(said.contains("none.img"), "{said}");
    let said = fail(&["--takeover", "--unix", "/no/such/dir/socket"], None);
    assert!(said.contains("/no/such/dir/socket"), "{said}");
    // Nothing has happened.
    assert_eq!(place.pid(), u64::from(first.pid()));
    assert_eq!(place.client("base@x").read(0, 4096), [1; 4096]);
    assert!(Stream::tcp(&tcp_of(&first)).is_ok());
    drop(client);
    first.signal(Signal::TERM);
    let mut first = first;
    assert!(first.wait().success());
    assert!(!place.path("nbd").exists());
}

#[test]
fn addresses_can_be_others_from_then_on() {
    let place = Place::new();
    let mut first = place.first(&[]);
    let old_tcp = tcp_of(&first);
    let (nbd, more) = (place.path("nbd"), place.path("more"));
    let mut second = place.next(&["--unix", nbd.to_str().unwrap(), "--unix", more.to_str().unwrap()]);
    assert!(first.wait().success(), "nobody was there");
    assert!(Stream::tcp(&old_tcp).is_err(), "it is not wanted any more");
    assert_bytes(&place.client("base").read(0, 4096), &place.image.bytes(0, 4096), 0);
    assert!(Client::attach(Stream::unix(&more).unwrap(), "base").is_ok());
    let third = place.next(&["--unix", more.to_str().unwrap()]);
    assert!(second.wait().success());
    assert!(!nbd.exists() && more.exists(), "the file of what is not wanted is removed");
    drop(third);
}

#[test]
fn those_who_stay_are_hung_up_on_in_the_end() {
    let place = Place::new();
    let mut first = place.first(&[]);
    let mut old = place.client("base@old");
    old.write(0, &[1; 4096]);
    let second = place.next(&["--drain-timeout", "1s"]);
    assert!(first.wait().success());
    assert!(old.try_pipeline(&[Request::read(0, 1)], &[])[0].is_err());
    // Whoever comes back finds a new one, and the server that is there.
    wait_until("the second one knows", || place.json(&["stat"])["before"].is_null());
    assert_bytes(&place.client("base@old").read(0, 4096), &place.image.bytes(0, 4096), 0);
    drop(second);
}

#[test]
fn both_together_keep_to_the_memory_that_one_may_have() {
    let place = Place::new();
    let first = place.first(&["--memory", "8M"]);
    let mut old = place.client("base@old");
    old.write(0, &Random::new(1).bytes(2 * MIB));
    let _second = place.next(&["--memory", "8M"]);
    let mut new = place.client("base@new");
    let fill = |client: &mut Client| {
        let mut taken = 0;
        while client.call(&Request::write(4 * MIB + taken, &Random::new(2).bytes(64 << 10))).error.is_none() {
            taken += 64 << 10;
        }
        taken
    };
    let (more, fresh) = (fill(&mut old), fill(&mut new));
    // Half of what was free is for each.
    assert!((2 * MIB..=3 * MIB).contains(&more) && (2 * MIB..=3 * MIB).contains(&fresh), "{more}, {fresh}");
    // What the first one gives up, the second one gets.
    drop(old);
    place.memdev(&["end", "base@old"]);
    drop(first);
    wait_until("there is room for all", || {
        new.trim(4 * MIB, 8 * MIB);
        fill(&mut new) >= 7 * MIB
    });
}

#[test]
fn a_service_manager_is_told_which_process_it_is_now() {
    let place = Place::new();
    let socket = place.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let hear = || {
        let mut buffer = [0; 200];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let mut command = place.command(&[]);
    command.arg("--unix").arg(place.path("nbd")).env("NOTIFY_SOCKET", &socket);
    let mut first = started(command);
    assert_eq!(hear(), "READY=1");
    let mut command = place.command(&["--takeover"]);
    command.env("NOTIFY_SOCKET", &socket);
    let mut second = started(command);
    assert_eq!(hear(), format!("MAINPID={}\nREADY=1", second.pid()));
    // The first one's end is not the service's.
    assert!(first.wait().success());
    second.signal(Signal::TERM);
    assert!(second.wait().success());
    assert_eq!(hear(), "STOPPING=1");
}

/// A connection that is in the midst of its handshake when the place is taken is let in by whoever has to.
#[test]
fn a_handshake_goes_on_with_the_other_server() {
    let place = Place::new();
    // However long it takes to start the other one.
    let args = ["--linger", "0s", "--handshake-timeout", "off"];
    let mut first = place.first(&args);
    let mut old = place.client("base@old");
    old.write(0, &[1; 4096]);
    let begin = || {
        let mut peer = support::Peer::new(Stream::unix(&place.path("nbd")).unwrap());
        peer.start();
        peer.structured();
        peer
    };
    let (mut to_new, mut to_old, mut listing) = (begin(), begin(), begin());
    let contexts =
        to_new.contexts(nbd::OPT_SET_META_CONTEXT, "base", &["base:allocation"]).expect("it has this");
    let _second = place.next(&args);
    assert_eq!(listing.list()[0].0, "base");
    let export = to_new.go("base").expect("by the second one");
    to_old.go("base@old").expect("by the first one");
    assert!(listing.info("base@other", &[]).is_ok());
    listing.go("base@other").expect("by the second one");
    let listed = place.json(&["ps"]);
    assert!(names(&listed).contains(&"base@other") && names(&listed).contains(&"base@old"), "{listed}");
    assert_eq!(place.json(&["stat", "base@old"])["connections"], 2);
    // The contexts that were selected before count.
    let mut client = Client::in_style(to_new, export, support::Style::Structured, contexts);
    assert!(!client.status(0, MIB).is_empty());
    drop((old, to_old));
    assert!(first.wait().success(), "{:#?}", first.log());
}

/// An old server that nobody could reach any more once stayed for ever, for a session that nobody had entered yet.
#[test]
fn who_is_left_behind_by_two_servers_ends_with_its_last_client() {
    let place = Place::new();
    let mut first = place.first(&["--linger", "1h"]);
    place.memdev(&["new", "base", "--id", "awaited"]);
    drop(place.client("base@left"));
    let mut old = place.client("base@old");
    old.write(0, &[1; 4096]);
    let mut second = place.next(&["--linger", "1h"]);
    let mut newer = place.client("base@newer");
    let mut third = place.next(&["--linger", "1h"]);
    wait_until("all are where they were", || names(&place.json(&["ps"])).len() == 4);
    third.signal(Signal::TERM);
    assert!(third.wait().success());
    assert!(!place.path("nbd").exists() && !place.path("control").exists());
    for server in [&mut first, &mut second] {
        let line = format!(
            "any more: it ends when the last who is connected has left, or by 'kill {}'",
            server.pid()
        );
        server.wait_for_line(&line, 1);
    }
    // Who is there stays, also when nobody can come in any more.
    thread::sleep(Duration::from_millis(11_500));
    assert_eq!(old.read(0, 4096), [1; 4096]);
    newer.write(0, &[2; 4096]);
    drop(newer);
    assert!(second.wait().success(), "{:#?}", second.log());
    first.assert_alive();
    assert_eq!(old.read(0, 4096), [1; 4096]);
    drop(old);
    assert!(first.wait().success(), "{:#?}", first.log());
}

/// The raw way, as a program of another make would go it.
#[test]
fn the_api_says_what_it_does_not_take() {
    let place = Place::new();
    let first = place.first(&[]);
    let ask = |path: &str, body: &str| {
        let mut stream = UnixStream::connect(place.path("control")).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("/v1/takeover", "");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"files\":[{"), "{answer}");
    for body in ["", r#"{"drain_seconds":-1}"#, r#"{"more":1}"#] {
        let answer = ask("/v1/takeover/commit", body);
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    assert_eq!(place.pid(), u64::from(first.pid()));
    thread::sleep(Duration::from_millis(10));
    assert_bytes(&place.client("base").read(0, 4096), &place.image.bytes(0, 4096), 0);
}

/// `@ID` is on the first image of the server that a client came to. It was once looked for by each server among its own images,
/// so that where these were in another order, two servers handed one connection to and fro for ever.
#[test]
fn the_first_image_may_be_another_one_from_then_on() {
    let place = Place::new();
    let other = Image::random(place.path("images/other.img"), MIB, 2);
    let start = |images: [&Image; 2], args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg("serve").args(images.map(|image| &image.path)).args(args);
        // Some stand in the handshake while the other one starts, however long that takes.
        command.args(["--linger", "0s", "--handshake-timeout", "off"]);
        command.arg("--control").arg(place.path("control")).stdin(Stdio::null());
        started(command)
    };
    let nbd = place.path("nbd");
    let mut first = start([&other, &place.image], &["--unix", nbd.to_str().unwrap()]);
    let (mut on_base, mut on_other) = (place.client("base@x"), place.client("@x"));
    on_base.write(0, &[1; 4096]);
    on_other.write(0, &[2; 4096]);
    let begin = || {
        let mut peer = support::Peer::new(Stream::unix(&nbd).unwrap());
        peer.start();
        peer
    };
    let (mut to_old, mut to_new) = (begin(), begin());
    let _second = start([&place.image, &other], &["--takeover"]);

    for style in support::Style::ALL {
        let contexts: &[&str] = if style.has_chunks() { &["base:allocation"] } else { &[] };
        let mut client =
            Client::attach_as(Stream::unix(&nbd).unwrap(), "@x", style, contexts).expect("it is let in");
        assert_eq!(client.read(0, 4096), [1; 4096], "the second one's first image is the base");
    }
    assert_eq!(place.json(&["stat", "@x"])["name"], "base@x");
    // Who came in before that means what was the first image then, wherever the session is.
    assert_eq!(to_old.go("@x").expect("by the first one").size, MIB);
    assert_eq!(to_new.go("@y").expect("by the second one").size, MIB);
    assert_eq!(place.json(&["stat", "other@y"])["connections"], 1);
    place.memdev(&["end", "@x"]);
    assert!(on_base.try_pipeline(&[Request::read(0, 1)], &[])[0].is_err());
    assert_eq!(on_other.read(0, 4096), [2; 4096]);
    drop((on_other, to_old));
    assert!(first.wait().success(), "{:#?}", first.log());
}

/// A server that gives way ends when it has said that nothing is left. A connection that the other one had handed to it just before
/// that was once closed with it, unheard.
#[test]
fn who_is_handed_over_at_the_last_moment_comes_back() {
    let place = Place::new();
    let mut first = place.first(&[]);
    place.memdev(&["new", "base", "--id", "x"]);
    let mut control = memdev::control::Client::connect(&place.path("control")).unwrap();
    control.take_over().unwrap();
    let (bridge, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &bridge,
        rustix::net::sockopt::Timeout::Recv,
        Some(support::PATIENCE),
    )
    .unwrap();
    assert_eq!(control.commit_takeover(theirs, None).unwrap().sessions, ["base@x"]);
    // The next message that `is_it`.
    let hear = |is_it: &dyn Fn(&Value) -> bool| loop {
        let mut buffer = vec![0; 96 << 10];
        let length = rustix::io::read(&bridge, &mut buffer).unwrap();
        assert!(length > 0, "it has ended without waiting for an answer");
        let message: Value = serde_json::from_slice(&buffer[..length]).unwrap();
        if is_it(&message) {
            break message;
        }
    };
    control.end("base@x").unwrap();
    hear(&|message| message["gone"]["sessions"][0] == "base@x");
    hear(&|message| message["state"]["connections"] == 0 && message["state"]["sessions"] == 0);

    // GO, by a client that the other server has let in.
    let (ours, client) = UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    let go = [&b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x06"[..], b"base@x", b"\0\0"].concat();
    let input: String = go.iter().map(|byte| format!("{byte:02x}")).collect();
    let agreed = r#"{"flags":3,"structured_replies":false,"extended_headers":false,"selected_for":null,"contexts":[]}"#;
    let message = format!(r#"{{"client":{{"agreed":{agreed},"input":"{input}"}}}}"#);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets = [client.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&sockets)));
    let slices = [std::io::IoSlice::new(message.as_bytes())];
    rustix::net::sendmsg(&bridge, &slices, &mut ancillary, SendFlags::empty()).unwrap();
    let back = hear(&|message| message["client"].is_object());
    assert_eq!(back["client"]["input"], Value::from(input));
    first.assert_alive();
    // As a server does: it says so each time that it hears that nothing is left, of which it is told once a second.
    loop {
        let mut buffer = vec![0; 96 << 10];
        let Ok(length @ 1..) = rustix::io::read(&bridge, &mut buffer) else { break };
        let message: Value = serde_json::from_slice(&buffer[..length]).unwrap();
        if message["state"]["connections"] == 0 && message["state"]["sessions"] == 0 {
            let _ = rustix::net::send(&bridge, br#""released""#, SendFlags::NOSIGNAL);
        }
    }
    assert!(first.wait().success(), "{:#?}", first.log());
    drop(ours);
}
