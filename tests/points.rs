//! Checkpoints, rollback, reset and forks of sessions that are being written to: each is of one moment, for all of the
//! session's connections, and what requests see of it is before or behind it.
//!
//! The server runs in this process, so that what is done to its sessions does not go through anything else.

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memdev::handshake::Knobs;
use memdev::net::{Address, Listener};
use memdev::overlay::BlockSize;
use memdev::session::{Caps, Heir, Registry};
use memdev::worker::{Limits, LockMemory, Server, ServerConfig};
use tempfile::TempDir;

use support::server::scratch;
use support::{Client, Image, MIB, Request, Stream, Style, nbd, size, wait_until};

/// A server in this process.
struct House {
    server: Option<Server>,
    registry: Arc<Registry>,
    dir: TempDir,
}

fn house(image: &Image, dir: TempDir, memory: u64) -> House {
    house_that(image, dir, memory, false)
}

/// With which kinds of sessions things are tried: those that are not sealed, and those that are.
const KINDS: [bool; 2] = [false, true];

/// Whose sessions are sealed, or are not.
fn house_that(image: &Image, dir: TempDir, memory: u64, seal: bool) -> House {
    let socket = dir.path().join("socket");
    let server = Server::start(ServerConfig {
        images: vec![("root".into(), image.path.clone())],
        listeners: vec![Listener::bind(&Address::unix(&socket).unwrap()).unwrap()],
        connections: Vec::new(),
        workers: 2,
        memory: Some(memory),
        lock_memory: LockMemory::default(),
        seal,
        overflow: None,
        session_memory: None,
        session_caps: Caps::default(),
        block_size: BlockSize::DEFAULT,
        linger: Duration::from_secs(600),
        knobs: Knobs::default(),
        limits: Limits::default(),
        tls: None,
        control: None,
    })
    .unwrap();
    House { registry: Arc::clone(server.registry()), server: Some(server), dir }
}

impl House {
    fn attach(&self, name: &str) -> Client {
        Client::attach_simple(Stream::unix(&self.dir.path().join("socket")).unwrap(), name).unwrap()
    }

    /// Bytes that the session pays for.
    fn data(&self, session: &str) -> u64 {
        self.registry.find(session).unwrap().device().overlay().budget().data()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop().unwrap();
        }
    }
}

/// Bytes of a record: two blocks, so that half of one can be seen.
const RECORD: u64 = 8192;
/// Connections of the session that is written to, and what each has in flight.
const CONNECTIONS: usize = 4;
const DEPTH: usize = 8;

/// What is written: numbered records, each in its place, all of which were acknowledged that it says.
#[derive(Default)]
struct Log {
    next: u64,
    acknowledged: BTreeSet<u64>,
    /// All below are acknowledged.
    watermark: u64,
}

impl Log {
    fn take(&mut self, most: u64) -> Vec<(u64, u64)> {
        let end = (self.next + DEPTH as u64).min(most);
        let taken = (self.next..end).map(|number| (number, self.watermark)).collect();
        self.next = end;
        taken
    }

    fn acknowledge(&mut self, number: u64) {
        self.acknowledged.insert(number);
        while self.acknowledged.remove(&self.watermark) {
            self.watermark += 1;
        }
    }
}

fn record(number: u64, watermark: u64) -> Vec<u8> {
    let words = [number + 1, watermark];
    words.map(u64::to_be_bytes).concat().repeat(size(RECORD) / 16)
}

/// The records that a device holds, each of which must be whole; with the watermark of each.
fn records(client: &mut Client) -> Vec<(u64, u64)> {
    let (mut found, nothing) = (Vec::new(), vec![0; size(RECORD)]);
    for (number, bytes) in (0..).zip(client.read_all().chunks(size(RECORD))) {
        let word = |at: usize| u64::from_be_bytes(bytes[at * 8..(at + 1) * 8].try_into().unwrap());
        if *bytes != nothing {
            assert_eq!(word(0), number + 1, "a record in a wrong place");
            assert!(bytes == record(number, word(1)), "half of record {number}");
            found.push((number, word(1)));
        }
    }
    found
}

/// If a record is there, all are that were acknowledged before it was sent.
fn check_cut(records: &[(u64, u64)]) -> u64 {
    let here: BTreeSet<u64> = records.iter().map(|(number, _)| *number).collect();
    let watermark = records.iter().map(|(_, watermark)| *watermark).max().unwrap_or(0);
    let missing = (0..watermark).find(|number| !here.contains(number));
    assert_eq!(missing, None, "of records up to {watermark}, all acknowledged before another that is there");
    watermark
}

/// Writes the log by several connections until it is full, or told to stop.
fn write_log(house: &House, session: &str, log: &Mutex<Log>, most: u64, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            let mut client = house.attach(session);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let records = log.lock().unwrap().take(most);
                    if records.is_empty() {
                        return;
                    }
                    let write = |&(number, watermark): &(u64, u64)| {
                        Request::write(number * RECORD, &record(number, watermark))
                    };
                    let cookies = client.send_all(&records.iter().map(write).collect::<Vec<_>>());
                    for (cookie, (number, _)) in cookies.into_iter().zip(records) {
                        assert_eq!(client.wait(cookie).error, None);
                        log.lock().unwrap().acknowledge(number);
                    }
                }
            });
        }
    });
}

#[test]
fn checkpoints_and_forks_under_load_are_of_one_moment() {
    KINDS.into_iter().for_each(try_that_checkpoints_and_forks_under_load_are_of_one_moment);
}

fn try_that_checkpoints_and_forks_under_load_are_of_one_moment(seal: bool) {
    let dir = scratch();
    let image = Image::empty(dir.path().join("root.img"), 32 * MIB);
    let house = house_that(&image, dir, 512 * MIB, seal);
    let log = Mutex::new(Log::default());
    let most = image.size / RECORD;
    let done = AtomicBool::new(false);
    let mut watermarks = Vec::new();
    std::thread::scope(|scope| {
        let (house, log, done) = (&house, &log, &done);
        let mut first = house.attach("root@log");
        scope.spawn(move || {
            write_log(house, "root@log", log, most, &AtomicBool::new(false));
            done.store(true, Ordering::Relaxed);
        });
        wait_until("something is written", || log.lock().unwrap().watermark > 10);
        for turn in 0..20 {
            let before = log.lock().unwrap().watermark;
            if turn % 2 == 0 {
                house.registry.checkpoint("root@log", &format!("c{turn}")).unwrap();
            } else {
                house.registry.fork("root@log", &format!("root@f{turn}"), Heir::Owner).unwrap();
            }
            let behind = log.lock().unwrap().next;
            watermarks.push((turn, before, behind));
            // Until some more is written.
            wait_until("more is written", || {
                done.load(Ordering::Relaxed) || log.lock().unwrap().watermark > before + 100
            });
            assert_eq!(first.read(0, RECORD), record(0, 0));
        }
    });
    assert_eq!(records(&mut house.attach("root@log")).len() as u64, most);
    let mut seen = 0;
    for (turn, before, behind) in watermarks {
        let name = if turn % 2 == 0 {
            house.registry.rollback("root@log", &format!("c{turn}")).unwrap();
            "root@log".to_owned()
        } else {
            format!("root@f{turn}")
        };
        let records = records(&mut house.attach(&name));
        let watermark = check_cut(&records);
        let here: BTreeSet<u64> = records.iter().map(|(number, _)| *number).collect();
        assert!((0..before).all(|number| here.contains(&number)), "what was acknowledged is in it");
        assert!(here.iter().all(|number| *number < behind), "what was sent later is not");
        seen = seen.max(watermark);
    }
    assert!(seen > 100, "snapshots of nothing");
}

#[test]
fn a_rollback_under_load_takes_back_all_or_nothing_of_a_record() {
    KINDS.into_iter().for_each(try_that_a_rollback_under_load_takes_back_all_or_nothing_of_a_record);
}

fn try_that_a_rollback_under_load_takes_back_all_or_nothing_of_a_record(seal: bool) {
    let dir = scratch();
    let image = Image::empty(dir.path().join("root.img"), 64 * MIB);
    let house = house_that(&image, dir, 512 * MIB, seal);
    let (log, stop) = (Mutex::new(Log::default()), AtomicBool::new(false));
    let most = image.size / RECORD;
    let mut reader = house.attach("root@log");
    house.registry.checkpoint("root@log", "empty").unwrap();
    let mut behind = 0;
    std::thread::scope(|scope| {
        let (house, log, stop) = (&house, &log, &stop);
        scope.spawn(move || write_log(house, "root@log", log, most, stop));
        for turn in 0..12 {
            let mark = log.lock().unwrap().watermark;
            wait_until("more is written", || {
                let log = log.lock().unwrap();
                log.watermark > mark + 50 || log.next == most
            });
            let acknowledged = log.lock().unwrap().watermark;
            if turn % 2 == 0 {
                house.registry.rollback("root@log", "empty").unwrap();
            } else {
                house.registry.reset("root@log").unwrap();
            }
            behind = log.lock().unwrap().next;
            // Of one moment, which what is being written to is not for a reader.
            house.registry.fork("root@log", &format!("root@f{turn}"), Heir::Owner).unwrap();
            let records = records(&mut house.attach(&format!("root@f{turn}")));
            assert!(records.iter().all(|(number, _)| *number >= acknowledged), "what was there is gone");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(behind > 50);
    // All that were sent behind the last rollback are there.
    let here: BTreeSet<u64> = records(&mut reader).into_iter().map(|(number, _)| number).collect();
    let missing = (behind..log.lock().unwrap().next).find(|number| !here.contains(number));
    assert_eq!(missing, None, "lost behind the last rollback, {behind}");
    house.registry.reset("root@log").unwrap();
    house.registry.drop_checkpoint("root@log", "empty").unwrap();
    for turn in 0..12 {
        house.registry.reset(&format!("root@f{turn}")).unwrap();
    }
    wait_until("all memory is back", || house.registry.total().data() == 0);
}

#[test]
fn a_long_read_that_has_begun_is_of_before_the_rollback() {
    KINDS.into_iter().for_each(try_that_a_long_read_that_has_begun_is_of_before_the_rollback);
}

fn try_that_a_long_read_that_has_begun_is_of_before_the_rollback(seal: bool) {
    const LENGTH: u64 = 32 * MIB;
    let dir = scratch();
    let image = Image::random(dir.path().join("root.img"), LENGTH, 1);
    let house = house_that(&image, dir, 512 * MIB, seal);
    let mut client = house.attach("root@x");
    for at in 0..LENGTH / MIB {
        client.write(at * MIB, &[7; 1 << 20]);
    }
    let request = Request::read(0, LENGTH).bytes_in(Style::Simple, 1);
    client.peer().send(&request);
    // The magic number, the error, the cookie, and the beginning of the data.
    let header = client.peer().receive_vec(16 + 4096);
    assert_eq!((&header[4..8], header[16]), (&[0; 4][..], 7));
    house.registry.reset("root@x").unwrap();
    let rest = client.peer().receive_vec(size(LENGTH) - 4096);
    assert!(rest.iter().all(|byte| *byte == 7), "a read of two states");
    assert_eq!(client.read(MIB, 4096), image.bytes(MIB, 4096));
    wait_until("all memory is back", || house.data("root@x") == 0);
}

#[test]
fn a_write_of_which_a_part_is_lost_fails() {
    KINDS.into_iter().for_each(try_that_a_write_of_which_a_part_is_lost_fails);
}

fn try_that_a_write_of_which_a_part_is_lost_fails(seal: bool) {
    let dir = scratch();
    let image = Image::random(dir.path().join("root.img"), 8 * MIB, 1);
    let house = house_that(&image, dir, 64 * MIB, seal);
    let mut client = house.attach("root@x");
    let request = Request::write(0, &vec![7; size(MIB)]).bytes_in(Style::Simple, 5);
    let (now, later) = request.split_at(request.len() / 2 + 64);
    client.peer().send(now);
    wait_until("a part is published", || house.data("root@x") > 0);
    house.registry.reset("root@x").unwrap();
    client.peer().send(later);
    let reply = client.peer().receive_vec(16);
    assert_eq!((&reply[4..8], &reply[8..]), (&nbd::EIO.to_be_bytes()[..], &5_u64.to_be_bytes()[..]));
    client.write(0, &vec![8; size(MIB)]);
    assert_eq!(client.read(0, MIB), vec![8; size(MIB)]);
}

#[test]
fn zeroing_that_was_begun_before_a_rollback_zeroes_all() {
    let dir = scratch();
    let image = Image::random(dir.path().join("root.img"), 64 * MIB, 1);
    let house = house(&image, dir, 256 * MIB);
    let mut client = house.attach("root@x");
    for _ in 0..20 {
        // Given memory, it is done in many turns.
        let cookie = client.send(&Request::zeroes(0, 64 * MIB).with(nbd::NO_HOLE));
        wait_until("it has begun", || house.data("root@x") > 0);
        house.registry.reset("root@x").unwrap();
        assert_eq!(client.wait(cookie).error, None);
        let found = client.read(0, MIB);
        // Either it was over before, and is gone altogether, or all of it is there.
        let end = client.read(63 * MIB, MIB);
        let zeroes = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        assert_eq!(zeroes(&found), zeroes(&end));
        assert!(zeroes(&found) || found == image.bytes(0, MIB));
        house.registry.reset("root@x").unwrap();
        wait_until("all memory is back", || house.data("root@x") == 0);
    }
}

/// A thousand forks of a session that has written much take hardly any memory, and all memory comes back.
#[test]
fn forks_share_what_they_have_in_common() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("root.img"), 256 * MIB);
    let house = house(&image, dir, 512 * MIB);
    let mut client = house.attach("root@x");
    for at in 0..128 {
        client.write(2 * at * MIB, &[7; 1 << 20]);
    }
    let used = || house.registry.total().data() + house.registry.total().map();
    let before = used();
    for fork in 0..1000 {
        house.registry.fork("root@x", &format!("root@f{fork}"), Heir::Owner).unwrap();
    }
    assert!(used() - before < 4 * MIB, "{}", used() - before);
    let mut fork = house.attach("root@f500");
    assert_eq!(fork.read(254 * MIB, 4096), [7; 4096]);
    fork.write(0, &[8; 4096]);
    assert_eq!((house.data("root@f500"), house.data("root@x")), (4096, 128 * MIB));
    assert_eq!(client.read(0, 4096), [7; 4096]);
    // What they share stays as long as one of them has it.
    house.registry.reset("root@x").unwrap();
    client.write(0, &[9; 4096]);
    assert_eq!((fork.read(4096, 1), house.attach("root@f7").read(0, 1)), (vec![7], vec![7]));
}
