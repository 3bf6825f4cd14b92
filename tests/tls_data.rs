//! The transmission phase over TLS: the same promises, kept by another way for bytes.

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;

use rustls::ClientConfig;
use support::peer::{info_data, option_bytes};
use support::server::{Serve, Usage, scratch};
use support::tls::{self, Age, Authority, Raw, Role};
use support::{
    Checked, Client, Image, KIB, MIB, Random, Request, Server, Stream, assert_bytes, nbd, wait_until,
};

const EXPORT: u64 = 8 * MIB;

/// A server that demands TLS, and a client's configuration for it.
struct Setting {
    _dir: tempfile::TempDir,
    image: Image,
    config: Arc<ClientConfig>,
    server: Server,
}

fn serve(args: &[&str]) -> Setting {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 7);
    let authority = Authority::new("The CA");
    let pki = dir.path().join("pki");
    authority.equip_server(&pki, &authority.sign(Role::Server, Age::Good));
    let certificates = ["--tls-certificates".as_ref(), pki.as_os_str()];
    let server = Serve::image(&image).tcp().args(certificates).args(args).start();
    Setting { _dir: dir, image, config: authority.client(None), server }
}

impl Setting {
    fn over(&self, stream: Stream) -> Stream {
        tls::bridge(stream, &self.config).expect("TLS works")
    }

    fn client(&self, name: &str) -> Client {
        Client::attach(self.over(self.server.tcp_stream()), name).expect("offered")
    }

    fn simple(&self, name: &str) -> Client {
        Client::attach_simple(self.over(self.server.tcp_stream()), name).expect("offered")
    }

    fn checked(&self) -> Checked {
        Checked::new(self.client("base"), &self.image)
    }

    /// A raw connection in the transmission phase.
    fn raw(&self, name: &str) -> Raw {
        let mut raw = tls::raw(self.server.tcp_stream(), &self.config).expect("TLS works");
        raw.write_all(&option_bytes(nbd::OPT_GO, &info_data(name.as_bytes(), &[]))).expect("sending");
        loop {
            let mut header = [0; 20];
            raw.read_exact(&mut header).expect("a reply");
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
            raw.read_exact(&mut vec![0; support::size(u64::from(word(16)))]).expect("a reply");
            if word(12) == nbd::REP_ACK {
                return raw;
            }
            assert_eq!(word(12), nbd::REP_INFO, "the export is offered");
        }
    }
}

/// Seals `bytes` as one client's next records, without sending them.
fn sealed(raw: &mut Raw, bytes: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    for part in bytes.chunks(60_000) {
        raw.conn.writer().write_all(part).expect("room");
        while raw.conn.wants_write() {
            raw.conn.write_tls(&mut records).expect("sealing");
        }
    }
    records
}

#[test]
fn the_device_is_an_array_of_bytes_over_tls_too() {
    let setting = serve(&["--workers", "2"]);
    thread::scope(|scope| {
        for seed in 0..4 {
            let setting = &setting;
            scope.spawn(move || {
                let mut random = Random::new(seed);
                let structured = seed % 2 == 0;
                let stream = match seed {
                    0 | 1 => setting.server.tcp_stream(),
                    _ => setting.server.stream(),
                };
                let client = match structured {
                    true => Client::attach(setting.over(stream), "base"),
                    false => Client::attach_simple(setting.over(stream), "base"),
                };
                let mut checked = Checked::new(client.expect("offered"), &setting.image);
                for _ in 0..300 {
                    checked.random_step(&mut random, 400_000, structured);
                }
                checked.read_all();
                checked.client.disconnect();
            });
        }
    });
    setting.server.stop();
}

#[test]
fn large_and_many_requests_in_one_stream_are_all_answered() {
    let setting = serve(&[]);
    let mut client = setting.client("base");
    let data = Random::new(3).bytes(6 * MIB + 77);
    client.write(1001, &data);
    assert_bytes(&client.read(1001, 6 * MIB + 77), &data, 1001);
    let mut random = Random::new(4);
    let requests: Vec<Request> = (0..2000)
        .map(|n| match n % 3 {
            0 => Request::write(7 * MIB + random.below(4096), &random.bytes(3000)),
            1 => Request::read(random.below(1001 - 512), 512),
            _ => Request::read(2 * MIB + random.below(MIB), 40_000),
        })
        .collect();
    for (request, reply) in requests.iter().zip(client.pipeline(&requests)) {
        let reply = reply.ok();
        if request.command == nbd::CMD_READ && request.offset >= 2 * MIB {
            let at = support::size(request.offset - 1001);
            assert_bytes(&reply.data, &data[at..at + 40_000], request.offset);
        }
    }
    let whole = client.call(&Request::read(0, EXPORT).with(nbd::DF)).ok();
    assert_eq!(whole.content_chunks(), 1);
    client.call(&Request::read(EXPORT, 1)).fails(nbd::EINVAL);
    client.call(&Request::write(EXPORT - 1, &[1; 2])).fails(nbd::ENOSPC);
    assert_eq!(client.read(1001, 5), data[..5], "the stream is in step");
}

#[test]
fn however_the_records_are_cut_the_requests_are_the_same() {
    let setting = serve(&["--workers", "1"]);
    let mut raw = setting.raw("base@cut");
    let mut random = Random::new(5);
    for round in 0..40_u8 {
        // Requests in one stream of records, that goes out in pieces which end anywhere.
        let length = [100, 5000, 70_000][usize::from(round % 3)];
        let mut bytes = Request::write(u64::from(round) * 1000, &vec![round; length]).bytes(1);
        bytes.extend(Request::flush().bytes(2));
        let records = sealed(&mut raw, &bytes);
        let mut rest = &records[..];
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(support::size(random.between(1, 20_000)).min(rest.len()));
            raw.sock.write_all(piece).expect("sending");
            thread::yield_now();
            rest = behind;
        }
        let mut replies = [0; 32];
        raw.read_exact(&mut replies).expect("two replies");
        assert_eq!((replies[4..8].to_vec(), replies[15], replies[31]), (vec![0; 4], 1, 2));
    }
    // Byte by byte.
    for byte in sealed(&mut raw, &Request::read(1000, 4).bytes(3)) {
        raw.sock.write_all(&[byte]).expect("sending");
    }
    let mut reply = [0; 20];
    raw.read_exact(&mut reply).expect("a reply");
    assert_eq!(reply[16..], [1; 4]);
}

#[test]
fn a_base_that_lost_its_end_gives_eio() {
    let mut setting = serve(&[]);
    let mut client = setting.client("base");
    let mut simple = setting.simple("base");
    let file = std::fs::OpenOptions::new().write(true).open(&setting.image.path).expect("the image");
    file.set_len(4 * MIB + 4096).expect("truncating");
    for client in [&mut client, &mut simple] {
        client.call(&Request::read(6 * MIB, 100_000)).fails(nbd::EIO);
        client.call(&Request::read(4 * MIB, 100_000)).fails(nbd::EIO);
        assert_bytes(&client.read(4 * MIB, 4096), &setting.image.bytes(4 * MIB, 4096), 4 * MIB);
        client.write(7 * MIB, &[1; 8192]);
        assert_eq!(client.read(7 * MIB, 8192), [1; 8192]);
    }
    setting.server.assert_alive();
}

#[test]
fn a_base_that_loses_its_end_under_load_never_gives_wrong_bytes() {
    // Replies are sealed while the file shrinks: each is right, or an error, or the connection ends in the middle of it.
    for round in 0..5 {
        let mut setting = serve(&["--workers", "2"]);
        let keep = 3 * MIB + round * 5000;
        thread::scope(|scope| {
            for seed in 0..2 {
                let setting = &setting;
                scope.spawn(move || {
                    let mut client = setting.client("base");
                    let mut random = Random::new(seed);
                    for _ in 0..40 {
                        let requests: Vec<Request> =
                            (0..16).map(|_| Request::read(random.below(EXPORT - 200_000), 200_000)).collect();
                        let mut hung_up = false;
                        for (request, reply) in requests.iter().zip(client.try_pipeline(&requests, &[])) {
                            let Ok(reply) = reply else {
                                hung_up = true;
                                continue;
                            };
                            match reply.error {
                                None => {
                                    let expected = setting.image.bytes(request.offset, 200_000);
                                    assert_bytes(&reply.data, &expected, request.offset);
                                }
                                Some(error) => {
                                    assert_eq!(error, nbd::EIO);
                                    assert!(request.offset + 200_000 > keep, "these bytes are there");
                                }
                            }
                        }
                        if hung_up {
                            client = setting.client("base");
                        }
                    }
                });
            }
            thread::sleep(std::time::Duration::from_millis(30 + round * 20));
            let file = std::fs::OpenOptions::new().write(true).open(&setting.image.path).expect("the image");
            file.set_len(keep).expect("truncating");
        });
        setting.server.assert_alive();
    }
}

#[test]
fn a_client_that_stops_in_the_middle_of_anything_delays_nobody() {
    let setting = serve(&["--workers", "1"]);
    // In the handshake of TLS: after STARTTLS, and in the middle of its hello.
    let mut stalled = Vec::new();
    for part in [0, 1, 5, 100] {
        let mut stream = setting.server.tcp_stream();
        tls::start_tls(&mut stream).expect("it is acknowledged");
        let mut hello = Vec::new();
        tls::beginning(&setting.config).write_tls(&mut hello).expect("a hello");
        stream.write_all(&hello[..part]).expect("sending");
        stalled.push(stream);
    }
    // In a record.
    let mut halves: Vec<(Raw, Vec<u8>)> = Vec::new();
    for cut in [1, 5, 6, 4000] {
        let mut raw = setting.raw("base");
        let records = sealed(&mut raw, &Request::write(0, &[9; 100_000]).bytes(5));
        raw.sock.write_all(&records[..cut]).expect("sending");
        halves.push((raw, records[cut..].to_vec()));
    }
    let mut other = setting.checked();
    let mut random = Random::new(1);
    for _ in 0..300 {
        other.random_step(&mut random, 50_000, true);
    }
    for (mut raw, rest) in halves {
        raw.sock.write_all(&rest).expect("sending");
        let mut reply = [0; 16];
        raw.read_exact(&mut reply).expect("it is completed later");
        assert_eq!((&reply[4..8], reply[15]), (&[0; 4][..], 5));
    }
    drop(stalled);
    setting.server.stop();
}

#[test]
fn a_tls_handshake_that_does_not_end_is_ended() {
    let setting = serve(&[]);
    let mut stream = setting.server.tcp_stream();
    stream.be_patient().expect("a limit");
    let port = stream.local_port().expect("TCP");
    tls::start_tls(&mut stream).expect("it is acknowledged");
    let mut hello = Vec::new();
    tls::beginning(&setting.config).write_tls(&mut hello).expect("a hello");
    stream.write_all(&hello[..50]).expect("sending");
    assert_eq!(stream.read(&mut [0]).expect("the server hangs up"), 0);
    let about = format!("127.0.0.1:{port}");
    wait_until("it is in the log", || {
        setting
            .server
            .log()
            .iter()
            .any(|line| line.contains(&about) && line.contains("did not finish the TLS handshake"))
    });
}

#[test]
fn damaged_records_end_the_connection_and_nothing_of_them_is_done() {
    let setting = serve(&[]);
    for at in [0, 1, 4, 5, 50, 4000] {
        let mut raw = setting.raw("base@damaged");
        let mut records = sealed(&mut raw, &Request::write(0, &[0xdd; 8000]).bytes(5));
        records[at] ^= 0x55;
        raw.sock.write_all(&records).expect("sending");
        // A length that was damaged makes the server wait for more.
        raw.sock.shutdown(std::net::Shutdown::Write).expect("shutting down");
        raw.sock.be_patient().expect("a limit");
        let mut reply = [0; 16];
        raw.read_exact(&mut reply).expect_err("there is no reply");
        let mut other = setting.client("base@damaged");
        assert_bytes(&other.read(0, 8000), &setting.image.bytes(0, 8000), 0);
    }
    // The same record twice is damage, too.
    let mut raw = setting.raw("base@damaged");
    let records = sealed(&mut raw, &Request::read(0, 1).bytes(5));
    raw.sock.write_all(&records).expect("sending");
    raw.read_exact(&mut [0; 17]).expect("a reply");
    raw.sock.write_all(&records).expect("sending");
    raw.read_exact(&mut [0; 17]).expect_err("it was played back");
}

#[test]
fn a_client_that_never_reads_its_replies_delays_nobody_and_costs_little() {
    let setting = serve(&["--workers", "1"]);
    let mut greedy = setting.raw("base");
    let mut other = setting.checked();
    let before = setting.server.usage().private;
    let reads: Vec<u8> = (0..400).flat_map(|n| Request::read(n % 7 * MIB, MIB).bytes(n)).collect();
    let records = sealed(&mut greedy, &reads);
    greedy.sock.write_all(&records).expect("sending");
    let mut random = Random::new(1);
    for _ in 0..300 {
        other.random_step(&mut random, 50_000, true);
    }
    let after = setting.server.usage().private;
    assert!(after <= before + 48 * MIB, "400 MiB of unread replies are not held in memory");
    // It was only slow: everything comes in the end.
    let mut reply = vec![0; 16 + (1 << 20)];
    for n in 0..400 {
        greedy.read_exact(&mut reply).expect("a reply");
        assert_bytes(&reply[16..], &setting.image.bytes(n % 7 * MIB, MIB), n % 7 * MIB);
    }
    other.read_all();
}

#[test]
fn a_client_that_sends_forever_and_reads_nothing_is_held_back() {
    let setting = serve(&["--workers", "1"]);
    let mut flood = setting.raw("base");
    let mut other = setting.checked();
    let before = setting.server.usage().private;
    let Stream::Tcp(socket) = flood.sock.try_clone().expect("a second handle") else {
        unreachable!("it is a TCP socket")
    };
    socket.set_write_timeout(Some(std::time::Duration::from_millis(300))).expect("setting a timeout");
    let burst = Request::read(0, 32 * KIB).bytes(1).repeat(1000);
    let mut sent = 0;
    'held_back: loop {
        let records = sealed(&mut flood, &burst);
        let mut rest = &records[..];
        while !rest.is_empty() {
            match (&socket).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(_) => break 'held_back,
            }
        }
        sent += records.len();
        assert!(sent < 256 << 20, "the server takes requests without end while no reply is read");
    }
    let mut random = Random::new(2);
    for _ in 0..200 {
        other.random_step(&mut random, 50_000, true);
    }
    assert!(setting.server.usage().private <= before + 48 * MIB);
    drop(flood);
    other.read_all();
}

#[test]
fn a_client_that_leaves_sealed_replies_unread_is_hung_up_on_in_time() {
    let setting = serve(&["--reply-timeout", "1s"]);
    let mut lazy = setting.raw("base");
    // One by one, so that every reply is sealed at once and it is records that the socket does not take in the end.
    for n in 0..4000 {
        let records = sealed(&mut lazy, &Request::read(n % 400 * 16 * KIB, 16 * KIB).bytes(n));
        if lazy.sock.write_all(&records).is_err() {
            break;
        }
        thread::yield_now();
    }
    wait_until("it is hung up on", || {
        setting.server.log().iter().any(|line| line.contains("left replies unread for too long"))
    });
    let mut other = setting.checked();
    other.read(0, 100_000);
}

#[test]
fn many_handshakes_at_once_all_come_to_their_end() {
    // Each of them takes a while, and those behind it wait.
    let setting = serve(&["--workers", "1", "--handshake-timeout", "off"]);
    let hellos: Vec<_> = (0..60)
        .map(|_| {
            let mut stream = setting.server.tcp_stream();
            stream.be_patient().expect("a limit");
            tls::start_tls(&mut stream).expect("it is acknowledged");
            let mut connection = tls::beginning(&setting.config);
            let mut hello = Vec::new();
            connection.write_tls(&mut hello).expect("a hello");
            (stream, connection, hello)
        })
        .collect();
    let mut waiting = Vec::new();
    for (mut stream, connection, hello) in hellos {
        stream.write_all(&hello).expect("sending");
        waiting.push((stream, connection));
    }
    for (stream, connection) in waiting {
        let mut raw = tls::finish(stream, connection).expect("TLS begins");
        raw.write_all(&option_bytes(nbd::OPT_ABORT, &[])).expect("sending");
        raw.read_exact(&mut [0; 20]).expect("an acknowledgement");
    }
}

#[test]
fn idle_connections_cost_little_and_leave_nothing() {
    const MANY: u64 = 500;
    let setting = serve(&["--workers", "2"]);
    drop(setting.raw("base"));
    wait_until("the connection is gone", || setting.server.usage().descriptors > 0);
    let before = setting.server.usage();
    let mut idle: Vec<Raw> = Vec::new();
    for n in 0..MANY {
        let mut raw = setting.raw("base");
        // Each has read and written something.
        raw.write_all(&Request::read(n * 4096, 100_000).bytes(1)).expect("sending");
        raw.read_exact(&mut vec![0; 16 + 100_000]).expect("a reply");
        idle.push(raw);
    }
    let each = setting.server.usage().private.saturating_sub(before.private) / MANY;
    assert!(each <= 24 * KIB, "an idle connection over TLS costs {each} bytes");
    drop(idle);
    setting.server.settles_at(Usage { private: u64::MAX / 2, ..before }, 0);
}

#[test]
fn a_dead_clients_writes_never_land_after_its_session_was_attached_again() {
    let setting = serve(&["--workers", "2"]);
    let mut random = Random::new(23);
    for round in 0..100 {
        let length = [600, 4096, 10_000, 65_536][support::size(random.below(4))];
        let mut dead = setting.raw("base@victim");
        let whole = random.below(40);
        let mut words = Vec::new();
        for n in 0..=whole {
            let data = vec![0xdd; support::size(length)];
            words.extend(Request::write(random.below(8) * length, &data).bytes(n));
        }
        let mut words = sealed(&mut dead, &words);
        // Cut anywhere, in a record or between two; now and then it says goodbye to TLS first.
        words.truncate(words.len() - support::size(random.below(length)));
        if round % 4 == 0 {
            dead.conn.send_close_notify();
            words.extend(sealed(&mut dead, &[]));
            while dead.conn.wants_write() {
                dead.conn.write_tls(&mut words).expect("sealing");
            }
        }
        dead.sock.write_all(&words).expect("sending");
        drop(dead);
        let mut alive = setting.client("base@victim");
        let mut writes: Vec<Request> =
            (0..8).map(|n| Request::write(n * length, &vec![0x11; support::size(length)])).collect();
        writes.push(Request::flush());
        alive.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
        for _ in 0..3 {
            let seen = alive.read(0, 8 * length);
            assert!(
                seen.iter().all(|&byte| byte == 0x11),
                "a dead connection's bytes landed in round {round}"
            );
            thread::sleep(std::time::Duration::from_millis(5));
        }
        alive.disconnect();
    }
}

#[test]
fn connections_that_come_and_go_do_not_cost_a_live_one_its_writes() {
    // Whoever attaches makes the server wonder about those who are in the session already: these are alive.
    let setting = serve(&["--workers", "2"]);
    let mut busy: Vec<Client> = (0..2).map(|_| setting.client("base@live")).collect();
    // One of them is in the middle of a record all the time.
    let mut slow = setting.raw("base@live");
    let records = sealed(&mut slow, &Request::write(3 * MIB, &[0x77; 10_000]).bytes(9));
    slow.sock.write_all(&records[..5000]).expect("sending");
    thread::scope(|scope| {
        for (n, client) in busy.iter_mut().enumerate() {
            scope.spawn(move || {
                for round in 0..30_u8 {
                    let writes: Vec<Request> = (0..32)
                        .map(|k| Request::write(n as u64 * MIB + k * 30_000, &[round; 30_000]))
                        .collect();
                    client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
                    assert_eq!(client.read(n as u64 * MIB, 960_000), vec![round; 960_000]);
                }
            });
        }
        for n in 0..20 {
            let mut visitor = setting.client("base@live");
            visitor.read(0, 4096);
            if n % 2 == 0 { visitor.disconnect() } else { visitor.cut() }
        }
    });
    slow.sock.write_all(&records[5000..]).expect("sending");
    let mut reply = [0; 16];
    slow.read_exact(&mut reply).expect("a reply");
    assert_eq!((&reply[4..8], reply[15]), (&[0; 4][..], 9));
    assert_eq!(busy[0].read(3 * MIB, 10_000), [0x77; 10_000]);
}
