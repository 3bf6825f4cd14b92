//! `memdev save` of sessions that are being used: each file is of one moment, and what it took to get it is gone.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::support::{Stream, wait_until};
use super::{Client, House, MIB, scratch};
use rustix::process::{Pid, Signal, kill_process};

const BLOCK: usize = 4096;
/// Blocks of the log.
const LOG: usize = 16;

fn qemu_img(args: &[&str], files: &[&Path]) {
    let out = Command::new("qemu-img").args(args).args(files).output();
    let out = out.expect("qemu-img, which tools/setup installs");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Writes entry `number` of a log that begins anew at its end, and waits until it is there.
fn log(client: &mut Client, number: u64) {
    client.write(number % LOG as u64 * BLOCK as u64, &number.to_be_bytes().repeat(BLOCK / 8));
}

/// The last entry of the log in an image, which must have all that came before it, and no other.
fn last_entry(image: &[u8]) -> u64 {
    let entries = image.chunks(BLOCK).take(LOG).map(|block| {
        let entry = &block[..8];
        assert!(block.chunks(8).all(|word| word == entry), "a torn entry");
        u64::from_be_bytes(entry.try_into().expect("eight bytes"))
    });
    let entries: Vec<u64> = entries.collect();
    let last = *entries.iter().max().expect("entries");
    for (place, entry) in (0..).zip(entries) {
        let expected = last - (last - place) % LOG as u64;
        assert_eq!(entry, expected, "the log ends with {last}, and at {place} is what is not of then");
    }
    last
}

#[test]
fn a_live_session_is_saved_as_of_one_moment() {
    let house = House::new();
    let dir = scratch();
    let (raw, qcow2) = (dir.path().join("saved.img"), dir.path().join("saved.qcow2"));
    let mut client = house.server.client("base@x");
    (0..LOG as u64).for_each(|number| log(&mut client, number));
    let over = AtomicBool::new(false);
    let base = house.image.path.to_str().expect("text");
    let total = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let going = (LOG as u64..).take_while(|_| !over.load(Ordering::Relaxed));
            going.inspect(|number| log(&mut client, *number)).last().expect("something was written")
        });
        let mut before = 0;
        for _ in 0..10 {
            house.run(&["save", "base@x", raw.to_str().expect("text"), "--format", "raw"]);
            let last = last_entry(&fs::read(&raw).expect("the file"));
            assert!(last >= before, "it was {before} before, and is {last} later");
            before = last;
            house.run(&["save", "base@x", qcow2.to_str().expect("text"), "--base", base]);
            qemu_img(&["check", "-f", "qcow2"], &[&qcow2]);
            qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&qcow2, &raw]);
            let last = last_entry(&fs::read(&raw).expect("the file"));
            assert!(last >= before, "it was {before} before, and is {last} later");
            before = last;
        }
        over.store(true, Ordering::Relaxed);
        writer.join().expect("the writer")
    });
    // The session went on, and is what it was.
    assert_eq!(last_entry(&client.read_all()), total);
    assert_eq!(house.names(), ["base@x"]);
    house.run(&["save", "base@x", qcow2.to_str().expect("text")]);
    fs::write(&raw, client.read_all()).expect("a file");
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&raw, &qcow2]);
    assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 2, "nothing else is left");
}

#[test]
fn whoever_controls_the_server_saves_the_sessions_of_others() {
    let house = House::with(&["--tcp", "127.0.0.1:0"]);
    let dir = scratch();
    // Over TCP it belongs to who knows its name, whom nobody on the unix socket is.
    let stream = Stream::tcp(house.server.tcp_address()).expect("connecting");
    let mut client = Client::attach(stream, "base@x").expect("a session");
    client.write(5, b"mine");
    let file = dir.path().join("saved");
    house.run(&["save", "base@x", file.to_str().expect("text"), "--format", "raw"]);
    assert_eq!(fs::read(&file).expect("the file"), client.read_all());
    assert_eq!(house.names(), ["base@x"]);
}

#[test]
fn an_interrupted_save_leaves_neither_file_nor_fork() {
    let dir = scratch();
    // Slow enough not to be over before it is interrupted, whenever that can be done.
    let house = House::of(64 * MIB, &["--session-bandwidth", "4M"]);
    house.create(r#"{"id":"x"}"#);
    for signal in [Signal::INT, Signal::TERM] {
        let mut command =
            house.command(&["save", "base@x", dir.path().join("saved").to_str().expect("text")]);
        let mut saving = command.stderr(Stdio::piped()).spawn().expect("it starts");
        wait_until("it has made a fork", || {
            assert!(
                saving.try_wait().expect("its status").is_none(),
                "it was over before it was interrupted"
            );
            house.names().len() == 2
        });
        kill_process(Pid::from_child(&saving), signal).expect("a signal");
        assert_eq!(saving.wait().expect("its end").signal(), Some(signal.as_raw()));
        // The server ends the fork when it sees that whoever held it is gone.
        wait_until("there is no fork", || house.names() == ["base@x"]);
        assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 0);
    }
}

#[test]
fn what_cannot_be_saved_leaves_no_fork() {
    let house = House::new();
    let dir = scratch();
    let file = dir.path().join("saved");
    let name = file.to_str().expect("text");
    house.create(r#"{"id":"x"}"#);
    assert!(house.fail(&["save", "base@y", name]).starts_with("No such session: base@y"));
    let nowhere = dir.path().join("no/such");
    assert!(house.fail(&["save", "base@x", nowhere.to_str().expect("text")]).starts_with("Cannot write"));
    let line = house.fail(&["save", "base@x", name, "--base", name]);
    assert!(line.contains("saved"), "{line}");
    assert_eq!(house.names(), ["base@x"]);
    assert_eq!(fs::metadata(&file).expect_err("nothing was saved").kind(), ErrorKind::NotFound);
}
