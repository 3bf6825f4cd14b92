//! Sealed sessions grow beyond memory into a file (`--overflow`), and nobody notices but by the time it takes: until the file is
//! full, and then only who wants more.

#[path = "../support/mod.rs"]
mod support;

mod many;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use support::model::random_range;
use support::server::{Serve, scratch};
use support::{Checked, Client, Image, MIB, Model, Random, Request, Server, assert_bytes, nbd, wait_until};
use tempfile::TempDir;

/// A small file system of its own.
struct Small(TempDir);

impl Small {
    fn new(bytes: u64) -> Self {
        let dir = scratch();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "none"])
            .arg(dir.path())
            .status()
            .expect("mount can be run");
        assert!(mounted.success(), "this test needs root");
        Self(dir)
    }

    /// Bytes that are used.
    fn used(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.0.path()).expect("it is mounted");
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn serve(image: &Image, memory: &str, dir: &Path, args: &[&str]) -> Server {
    let server = Serve::image(image).args(["--seal", "--memory", memory, "--workers", "2", "--overflow"]);
    server.args([dir]).args(args).start()
}

/// The file that a server has, by way of its descriptor.
fn file(server: &Server, dir: &Path) -> PathBuf {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it lives, and this is root");
    let mut paths = fds.map(|entry| entry.expect("an entry").path());
    let is_it = |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.starts_with(dir));
    paths.find(is_it).expect("it has a file there")
}

/// Whether a file has `needle` anywhere, and how many bytes it takes.
fn look(path: &Path, needle: &[u8]) -> (bool, u64) {
    let file = File::open(path).expect("opening it");
    let bytes = file.metadata().expect("its metadata").blocks() * 512;
    let (mut piece, mut at, mut found) = (vec![0; 1 << 20], 0, false);
    while let Ok(count @ 1..) = file.read_at(&mut piece, at) {
        let is_hole = piece[..count].iter().all(|&byte| byte == 0);
        found |= !is_hole
            && piece[..count].chunks(1024).any(|kib| kib.windows(needle.len()).any(|it| it == needle));
        at += count as u64;
    }
    (found, bytes)
}

const MARKER: [u8; 32] = *b"what was written to a full house";

/// Bytes for a place, with the marker in every KiB.
fn marked(seed: u64, length: u64) -> Vec<u8> {
    let mut bytes = Random::new(seed).bytes(length);
    bytes.chunks_exact_mut(1024).for_each(|kib| kib[64..96].copy_from_slice(&MARKER));
    bytes
}

#[test]
fn a_session_several_times_as_large_as_memory_is_an_array_of_bytes() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), 256 * MIB, 0..8 * MIB, 1);
    let away = Small::new(512 * MIB);
    let server = serve(&image, "32M", away.0.path(), &[]);
    let mut checked = Checked::new(server.client("base@x"), &image);
    for at in (0..160).step_by(2) {
        checked.write(at * MIB, &marked(at, MIB + 12_345));
    }
    let path = file(&server, away.0.path());
    let (found, bytes) = look(&path, &MARKER);
    assert!(bytes > 32 * MIB, "much of it went there: {bytes}");
    assert!(!found, "it is noise");
    assert_eq!(fs::read_dir(away.0.path()).expect("it is there").count(), 0, "the file has no name");
    // Two connections, of which one looks at what the other does.
    let mut other = server.client("base@x");
    let mut random = Random::new(5);
    for step in 0..400 {
        let (offset, length) = random_range(&mut random, image.size, 300_000);
        match step % 8 {
            0 => checked.trim(offset, length),
            1 => checked.zeroes(offset, length, if step % 16 == 1 { nbd::NO_HOLE } else { 0 }),
            2 | 3 => checked.write(offset, &random.bytes(length)),
            4 => checked.write(offset, &random.bytes(length.min(700))),
            5 => assert_bytes(&other.read(offset, length), checked.model.read(offset, length), offset),
            _ => checked.read(offset, length),
        }
    }
    checked.read_all();
    let Checked { client, model } = checked;
    client.disconnect();
    for (reply, at) in other
        .pipeline(&(0..64).map(|at| Request::read(at * 4 * MIB, MIB)).collect::<Vec<_>>())
        .into_iter()
        .zip(0..)
    {
        assert_bytes(&reply.ok().data, model.read(at * 4 * MIB, MIB), at * 4 * MIB);
    }
    let private = server.usage().private;
    // Slots beyond the budget, and everything that is no block.
    assert!(private < 160 * MIB, "{private} bytes are in memory");
    // All of it goes.
    other.trim(0, image.size);
    other.disconnect();
    wait_until("the file is empty", || look(&path, &MARKER).1 == 0);
    server.stop();
}

#[test]
fn checkpoints_and_forks_go_out_and_come_back() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), 128 * MIB);
    let away = Small::new(512 * MIB);
    let control = dir.path().join("control.sock");
    let server = serve(&image, "32M", away.0.path(), &["--control", control.to_str().expect("text")]);
    let memdev = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let output = command.args(args).arg("--control").arg(&control).output().expect("it can be run");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let mut client = server.client("base@x");
    let mut then = Model::of(&image);
    for at in 0..48 {
        let data = marked(at, MIB);
        client.write(at * MIB, &data);
        then.write(at * MIB, &data);
    }
    memdev(&["checkpoint", "base@x", "then"]);
    memdev(&["fork", "base@x", "--id", "fork"]);
    let mut fork = server.client("base@fork");
    let (mut now, mut forked) = (Model::of(&image), Model::of(&image));
    for model in [&mut now, &mut forked] {
        model.write(0, then.read(0, 48 * MIB));
    }
    let mut random = Random::new(9);
    for _ in 0..200 {
        for (client, model) in [(&mut client, &mut now), (&mut fork, &mut forked)] {
            let (offset, length) = random_range(&mut random, 64 * MIB, 40_000);
            let data = random.bytes(length);
            client.write(offset, &data);
            model.write(offset, &data);
        }
    }
    assert!(memdev(&["stat", "base@x"]).contains("in --overflow"));
    let table = memdev(&["ps"]);
    let column = |name: &str| {
        let mut rows = table
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>());
        let at = rows.next().and_then(|head| head.iter().position(|&cell| cell == name)).expect("a head");
        rows.find(|row| row[0] == "base@x").expect("a row")[at].to_owned()
    };
    let listed: serde_json::Value = serde_json::from_str(&memdev(&["ps", "--json"])).expect("JSON");
    let listed = listed.as_array().and_then(|all| all.iter().find(|it| it["name"] == "base@x"));
    assert!(listed.expect("it is there")["memory"]["overflow"].as_u64().expect("a number") > MIB);
    assert!(column("AWAY").ends_with("MiB"), "{table}");
    assert!(column("HELD").ends_with("MiB"), "{table}");
    let all = |client: &mut Client, model: &Model| {
        for at in (0..64).step_by(2) {
            assert_bytes(&client.read(at * MIB, 2 * MIB), model.read(at * MIB, 2 * MIB), at * MIB);
        }
    };
    all(&mut client, &now);
    all(&mut fork, &forked);
    memdev(&["rollback", "base@x", "then"]);
    all(&mut client, &then);
    all(&mut fork, &forked);
    client.disconnect();
    fork.disconnect();
    memdev(&["end", "base@x"]);
    memdev(&["end", "base@fork"]);
    let path = file(&server, away.0.path());
    wait_until("the file is empty", || look(&path, &MARKER).1 == 0);
    server.stop();
}

#[test]
fn a_full_disk_is_enospc_to_who_wants_more_and_to_nobody_else() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), 256 * MIB);
    let away = Small::new(16 * MIB);
    let mut server = serve(&image, "64M", away.0.path(), &["--overflow-size", "1G"]);
    let mut small = server.client("base");
    small.write(0, &marked(1, MIB));
    let mut hog = server.client("base");
    let mut written = 0;
    let mut model = Model::of(&image);
    let refused = loop {
        assert!(written < 200, "there is an end to it");
        let data = marked(100 + written, MIB);
        let reply = hog.call(&Request::write(written * MIB, &data));
        if reply.error.is_some() {
            break reply;
        }
        model.write(written * MIB, &data);
        written += 1;
    };
    assert_eq!(refused.error, Some(nbd::ENOSPC));
    assert!(written >= 64, "memory and file were used: {written} MiB");
    server.wait_for_line("--overflow takes no more", 1);
    // Others go on: with what they have, and with more.
    assert_eq!(small.read(0, MIB), marked(1, MIB));
    small.write(MIB, &marked(2, MIB));
    let mut newcomer = server.client("base");
    newcomer.write(5, &MARKER);
    // And it has all that was acknowledged, and goes on when it gives some back.
    for at in 0..written {
        assert_bytes(&hog.read(at * MIB, MIB), model.read(at * MIB, MIB), at * MIB);
    }
    hog.trim(0, 24 * MIB);
    wait_until("there is room again", || hog.call(&Request::write(0, &marked(7, MIB))).error.is_none());
    assert_eq!(small.read(MIB, MIB), marked(2, MIB));
    server.assert_alive();
}

#[test]
fn a_server_that_is_killed_leaves_nothing() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), 128 * MIB);
    let away = Small::new(512 * MIB);
    let empty = away.used();
    let mut random = Random::new(3);
    // `docs/footprints.md` has the command for a hundred.
    let kills = std::env::var("MEMDEV_TEST_OVERFLOW_KILLS").map_or(4, |text| text.parse().expect("a number"));
    for _ in 0..kills {
        let mut server = serve(&image, "16M", away.0.path(), &[]);
        let mut client = server.client("base");
        for at in 0..24 {
            client.write(at * MIB, &marked(at, MIB));
        }
        assert!(away.used() > empty + MIB, "some of it is there");
        let requests: Vec<_> = (24..64).map(|at| Request::write(at * MIB, &marked(at, MIB))).collect();
        client.send_all(&requests[..8]);
        std::thread::sleep(Duration::from_millis(random.below(300)));
        server.signal(Signal::KILL);
        let _ = server.wait();
        client.cut();
        assert_eq!(fs::read_dir(away.0.path()).expect("it is there").count(), 0);
        wait_until("the file system has it back", || away.used() == empty);
    }
}

#[test]
fn it_is_refused_without_seal_and_where_there_can_be_no_file() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), MIB);
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_memdev"))
            .arg("serve")
            .arg(&image.path)
            .arg("--unix")
            .arg(dir.path().join("socket"))
            .args(args)
            .output()
            .expect("it can be run");
        (output.status.code(), String::from_utf8(output.stderr).expect("text"))
    };
    let (status, said) = run(&["--overflow", "/tmp"]);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("--seal"), "{said}");
    let (status, said) = run(&["--seal", "--overflow", "/no/such/directory"]);
    assert_eq!(status, Some(1));
    assert_eq!(
        said,
        "memdev: Cannot make a file for --overflow in /no/such/directory: no such file or directory; give a directory that \
         this user may write to\n"
    );
}
