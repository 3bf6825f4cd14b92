//! Ten thousand clients that misbehave, in every way there is, while others work; a client killed a thousand times in
//! the middle of its reads; writes of which only half ever came. Afterwards nothing is left of any of them, and nobody
//! else has noticed. The crowds are made by `tools/hostile`, which also measures (in `tools/compare`) what they cost a
//! well-behaved client; here nothing depends on time.

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use memdev_hostile::{Crowd, Kind, Place, Progress, Report, raise_descriptor_limit, run};
use support::server::{Serve, scratch};
use support::{
    Checked, Client, Image, KIB, MIB, PATIENCE, Random, Request, Server, Stream, Usage, assert_bytes,
    wait_until,
};

const EXPORT: u64 = 8 * MIB;

/// A server on a unix socket and TCP that may have as many descriptors as the system lets it.
fn serve(args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    // The server inherits it.
    assert!(raise_descriptor_limit() >= 1000, "too few open files are allowed for a crowd");
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 51);
    let server = Serve::image(&image).tcp().args(args).start();
    (dir, image, server)
}

/// A crowd of `clients`, half of it over the unix socket and half over TCP, at the same time. Each half has named
/// sessions of its own, since a session does not belong to both a user and the network.
fn crowd(server: &Server, kinds: &[Kind], clients: usize, seed: u64) -> Report {
    let tcp = server.tcp_address().parse().expect("a TCP address");
    let halves = [(Place::Unix(server.socket().to_owned()), "rude"), (Place::Tcp(tcp), "rude-tcp")];
    let mut sum = Report::default();
    std::thread::scope(|scope| {
        let halves: Vec<_> = (seed..)
            .zip(halves)
            .map(|(seed, (place, session))| {
                let crowd = Crowd {
                    session: session.to_owned(),
                    kinds: kinds.to_vec(),
                    clients: clients / 2,
                    // Few are enough of those who never pause.
                    at_once: if kinds.contains(&Kind::Flood) { 25 } else { 400 },
                    hold: Duration::from_millis(400),
                    gap: Duration::from_millis(50),
                    seed,
                    ..Crowd::new(place, "base")
                };
                scope.spawn(move || run(&crowd, &Progress::default()).expect("the crowd comes to the server"))
            })
            .collect();
        for half in halves {
            let report = half.join().expect("a crowd does not panic");
            sum.ended += report.ended;
            sum.hung_up += report.hung_up;
            sum.refused += report.refused;
            sum.most_at_once += report.most_at_once;
        }
    });
    sum
}

/// Works, and checks all that it is told, until nobody misbehaves any more.
fn bystander(client: Client, image: &Image, structured: bool, seed: u64, over: &AtomicBool) {
    let mut checked = Checked::new(client, image);
    let mut random = Random::new(seed);
    while !over.load(Ordering::Relaxed) {
        checked.random_step(&mut random, 30_000, structured);
    }
    checked.read_all();
    checked.client.disconnect();
}

/// The server when it has served a little of everything: what it keeps for later is there then.
fn warmed_up(server: &Server) -> Usage {
    let idle = server.usage();
    for seed in 0..2 {
        crowd(server, &Kind::ALL, 220, 1000 + seed);
    }
    wait_until("the first crowd is gone", || server.usage().descriptors <= idle.descriptors);
    let baseline = server.usage();
    assert_eq!((baseline.descriptors, baseline.threads), (idle.descriptors, idle.threads));
    baseline
}

#[test]
fn ten_thousand_clients_that_misbehave_harm_nobody_and_leave_nothing() {
    let (_dir, image, server) = serve(&["--workers", "2", "--memory", "256M", "--linger", "0s"]);
    let baseline = warmed_up(&server);
    let over = AtomicBool::new(false);
    let each = 10_000_usize.div_ceil(Kind::ALL.len()).next_multiple_of(2);
    std::thread::scope(|scope| {
        let (image, over) = (&image, &over);
        let local = server.client("base");
        let remote = Client::attach_simple(server.tcp_stream(), "base").expect("the export is offered");
        let good = [
            scope.spawn(move || bystander(local, image, true, 1, over)),
            scope.spawn(move || bystander(remote, image, false, 2, over)),
        ];
        let with_two = baseline.descriptors + 2;
        let mut met = 0;
        for (kind, seed) in Kind::ALL.into_iter().zip((0..).step_by(10)) {
            let report = crowd(&server, &[kind], each, seed);
            met += report.clients();
            assert_eq!(report.refused, 0, "{kind}: everybody is let in, at least as far as the greeting");
            // None of them stays because another one has.
            if !good.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                wait_until(kind.name(), || server.usage().descriptors <= with_two);
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(met >= 10_000, "{met} clients misbehaved");
    });
    // The sessions that the crowd shared are over, with all that was written to them.
    for n in 0..8 {
        let mut local = server.client(&format!("base@rude-{n}"));
        let remote = Client::attach(server.tcp_stream(), &format!("base@rude-tcp-{n}"));
        let mut remote = remote.expect("the export is offered");
        for client in [&mut local, &mut remote] {
            assert_bytes(&client.read(0, 2 * MIB), &image.bytes(0, 2 * MIB), 0);
        }
    }
    // 4 KiB a client is the slack; a leaked session, buffer or stack is far more.
    server.settles_at(baseline, 10_000 * 4 * KIB);
    server.stop();
}

#[test]
fn who_never_finishes_the_handshake_is_let_go() {
    let (_dir, image, server) = serve(&[]);
    drop(server.client("base"));
    let before = server.usage();
    // Some say nothing, some as far as the flags, some a byte every half second; none of them ever leaves by itself.
    let mut silent: Vec<_> = (0..100).map(|_| server.peer()).collect();
    silent.iter_mut().step_by(2).for_each(support::Peer::start);
    let slow = Crowd {
        kinds: vec![Kind::SlowHandshake],
        clients: 400,
        at_once: 400,
        hold: PATIENCE,
        gap: Duration::from_millis(500),
        ..Crowd::new(Place::Unix(server.socket().to_owned()), "base")
    };
    let report = run(&slow, &Progress::default()).expect("the crowd comes to the server");
    assert_eq!(report.hung_up, 400, "nobody stayed until it was tired of it: {report:?}");
    for (n, peer) in silent.iter_mut().enumerate() {
        if n % 2 == 1 {
            peer.greeting();
        }
        peer.expect_end();
    }
    server.settles_at(before, 16 * MIB);
    assert_bytes(&server.client("base").read_all(), &image.all(), 0);
}

/// Where a client that is going to be killed finds its server: this test's own program, started again, is that client.
const VICTIM: &str = "MEMDEV_TEST_VICTIM";
/// What it says when it has its requests in flight.
const DEEP: &str = "64 deep";

/// Has 64 reads in flight until it is killed.
fn victim(place: &str) {
    let words: Vec<&str> = place.split(' ').collect();
    let [address, name, manner] = words[..] else { panic!("{place:?} is no place for a victim") };
    let stream = if address.starts_with('/') { Stream::unix(address.as_ref()) } else { Stream::tcp(address) };
    let mut client = Client::attach_simple(stream.expect("connecting"), name).expect("the export is offered");
    let mut cookies: Vec<u64> =
        client.send_all(&(0..64).map(|n| Request::read(n * 65_536, 65_536)).collect::<Vec<_>>());
    // Past the test runner, which keeps what tests print.
    let mut out = std::io::stdout();
    writeln!(out, "{DEEP}").and_then(|()| out.flush()).expect("telling so");
    for n in 0.. {
        if manner == "waiting" {
            std::thread::sleep(PATIENCE);
        }
        let Ok(reply) = client.try_wait(cookies.remove(0)) else { return };
        reply.ok();
        cookies.push(client.send(&Request::read(n % 64 * 65_536, 65_536)));
    }
}

/// Starts it, waits until it is deep in its reads, and kills it.
fn kill_one(place: &str, delay: Duration) {
    let mut child = Command::new(std::env::current_exe().expect("this test's program"))
        .args(["a_client_killed_amid_64_deep_reads_a_thousand_times_leaves_nothing", "--exact"])
        .env(VICTIM, place)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starting a client");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let deep = lines.any(|line| line.is_ok_and(|line| line.contains(DEEP)));
    std::thread::sleep(delay);
    child.kill().expect("killing the client");
    let status = child.wait().expect("the client ends");
    assert!(deep && status.code().is_none(), "the client was killed amid its reads ({status})");
}

/// nbdkit 1.32 aborts on this ("Assertion `sock >= 0' failed"): a client that has a deep queue and is gone at once.
#[test]
fn a_client_killed_amid_64_deep_reads_a_thousand_times_leaves_nothing() {
    if let Ok(place) = std::env::var(VICTIM) {
        return victim(&place);
    }
    let (_dir, image, mut server) = serve(&["--workers", "2", "--linger", "0s"]);
    let unix = server.socket().to_str().expect("a path").to_owned();
    let tcp = server.tcp_address().to_owned();
    // Sessions of their own and some that they share; replies that are read on and replies that lie unread.
    let place = |n: u64| {
        let (address, shared) = if n % 4 == 3 { (&tcp, "base@tcp") } else { (&unix, "base@unix") };
        let name = if (n / 4).is_multiple_of(2) { "base" } else { shared };
        let manner = if (n / 8).is_multiple_of(2) { "reading" } else { "waiting" };
        format!("{address} {name} {manner}")
    };
    let before = server.usage().descriptors;
    (0..16).for_each(|n| kill_one(&place(n), Duration::ZERO));
    wait_until("the first victims are gone", || server.usage().descriptors <= before);
    let baseline = server.usage();
    let mut bystander = Checked::new(server.client("base"), &image);
    std::thread::scope(|scope| {
        let killers: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn(move || {
                    let mut random = Random::new(thread);
                    for n in 0..250 {
                        kill_one(&place(4 * n + thread), Duration::from_micros(random.below(2000)));
                    }
                })
            })
            .collect();
        let mut random = Random::new(9);
        while !killers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            bystander.random_step(&mut random, 30_000, true);
        }
    });
    server.assert_alive();
    bystander.read_all();
    bystander.client.disconnect();
    server.settles_at(baseline, 1000 * 4 * KIB);
    for name in ["base", "base@unix"] {
        assert_bytes(&server.client(name).read_all(), &image.all(), 0);
    }
    server.stop();
}

/// What docs/design.md promises of a write whose payload is cut: its whole blocks may stand, from its beginning on, as
/// far as they came; nothing else of it does, and nothing at all of one that fits into a window.
#[test]
fn of_a_write_cut_in_its_payload_whole_blocks_from_its_beginning_may_stand() {
    const BLOCK: u64 = 4096;
    const WINDOW: u64 = 256 * KIB;
    let (_dir, image, server) = serve(&["--workers", "2"]);
    let base = image.all();
    let mut random = Random::new(77);
    let mut in_part = 0;
    for round in 0..60_u64 {
        let tcp = round % 2 == 1;
        let connect = || if tcp { server.tcp_stream() } else { server.stream() };
        let name = format!("base@half-dead-{round}");
        let length = random.between(1, [WINDOW, 3 * MIB][support::size(round / 2 % 2)]);
        let start = random.below(EXPORT - length + 1);
        let sent = random.below(length);
        let mut dead = Client::attach_simple(connect(), &name).expect("the export is offered");
        let data = random.bytes(length);
        dead.peer().send(&Request::write(start, &data).bytes(1)[..28 + support::size(sent)]);
        match round % 3 {
            0 => dead.cut(),
            1 => drop(dead),
            // It still waits for a reply, which cannot come.
            _ => {
                dead.peer().stream().shutdown(Shutdown::Write).expect("shutting one direction down");
                dead.peer().expect_end();
            }
        }
        let mut alive = Client::attach_simple(connect(), &name).expect("the export is offered");
        let seen = alive.read_all();
        // As far as the write stands: behind the last block that is not the base's.
        let blocks = seen.chunks(4096).zip(base.chunks(4096));
        let end = blocks.enumerate().rfind(|(_, (seen, base))| seen != base);
        let Some((last, _)) = end else { continue };
        in_part += 1;
        let (first, end) = (start.next_multiple_of(BLOCK), (last as u64 + 1) * BLOCK);
        assert!(end <= start + sent, "no byte stands that was not sent: {end} of {start} and {sent}");
        assert!(length > WINDOW, "a write of {length} bytes is done whole or not at all");
        let (before, after) = (support::size(first), support::size(end));
        assert_bytes(&seen[..before], &base[..before], 0);
        assert_bytes(
            &seen[before..after],
            &data[support::size(first - start)..support::size(end - start)],
            first,
        );
    }
    assert!(in_part > 0, "some of the long writes got as far as a window");
}

/// What a client does wrong is of interest to who looks for it, with `-vv`. Otherwise ten thousand of them would bury
/// what the administrator has to know, and fill the disk.
#[test]
fn no_client_can_fill_the_log() {
    let (_dir, image, server) = serve(&["--linger", "0s"]);
    crowd(&server, &Kind::ALL, 660, 5);
    assert_eq!(server.log().len(), 2, "only where it listens: {:#?}", server.log());
    // Requests for what the image has lost are the administrator's business, but one line says it all.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image.path)
        .and_then(|file| file.set_len(MIB))
        .expect("truncating the image");
    let mut client = server.client("base");
    for round in 0..20 {
        let requests: Vec<Request> = (0..100)
            .flat_map(|n| {
                let offset = MIB + (n * 16 + round) * 4096;
                [
                    Request::write(offset + 10, b"part"),
                    Request::read(offset, 4096),
                    Request::cache(offset, 4096),
                ]
            })
            .collect();
        drop(client.pipeline(&requests));
    }
    assert_bytes(&client.read(0, MIB), &image.bytes(0, MIB), 0);
    // Nor is it each client's to hear of an image that was replaced by none.
    std::fs::remove_file(&image.path).expect("removing the image");
    std::fs::create_dir(&image.path).expect("putting something else in its place");
    (0..100).for_each(|_| drop(server.simple("base")));
    let log = server.log();
    assert!(log.len() < 20, "{} lines, such as {:#?}", log.len(), &log[..20]);
}
