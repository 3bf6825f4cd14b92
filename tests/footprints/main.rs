//! Nothing of a session is left behind: a marker that a client has written is looked for in the server's memory, in its core
//! files and in files. That it would be found where it is, each test shows first. (`tests/swap.rs` looks through swap.)

#[path = "../support/mod.rs"]
mod support;

mod memory;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use memory::{in_file, in_files, in_memory};
use rustix::process::Signal;
use support::server::{Serve, scratch};
use support::{Client, Image, MIB, Random, Request, Server, wait_until};
use tempfile::TempDir;

/// What clients write. Put together when the test runs, so that it is in no program's file.
fn marker() -> [u8; 32] {
    let mut marker = *b"thesectionsofthistextareswapped!";
    marker.rotate_left(13);
    marker
}

/// Another one, that a server gets as a variable of its environment.
const CONTROL: &str = "this-is-in-memory-that-is-dumped";

fn image(dir: &Path) -> Image {
    Image::partly(dir.join("base.img"), 64 * MIB, 0..MIB, 1)
}

/// Random bytes with the marker in every KiB.
fn marked(length: u64) -> Vec<u8> {
    let mut bytes = Random::new(7).bytes(length);
    for kib in bytes.chunks_mut(1024) {
        kib[500..532].copy_from_slice(&marker());
    }
    bytes
}

/// Writes the marker in every way in which payload gets to its place, and reads it.
fn plant(client: &mut Client) {
    client.write(MIB, &marked(4096));
    client.write(2 * MIB, &marked(3 * MIB));
    for part in 0..20 {
        client.write(8 * MIB + part * 5000 + 1, &marker());
    }
    // Over the base, and over what is there.
    client.write(100, &marker());
    client.write(8 * MIB + 7, &marked(300_000));
    let many: Vec<_> =
        (0..64).map(|block| Request::write((16 << 20) + block * 4096, &marked(4096))).collect();
    client.pipeline(&many);
    assert_eq!(client.read(2 * MIB, MIB), marked(3 * MIB)[..support::size(MIB)]);
    client.pipeline(&(0..64).map(|block| Request::read((16 << 20) + block * 4096, 4096)).collect::<Vec<_>>());
}

/// Begins a write and leaves in the middle of its payload.
fn leave_in_the_middle(server: &Server) {
    let mut client = server.client("base");
    let data = marked(MIB);
    let request = Request::write(MIB, &data).bytes(1);
    client.peer().send(&request[..request.len() / 2]);
    wait_until("it has come", || in_memory(server.pid(), &marker()) > 0);
    client.cut();
}

fn wait_until_gone(server: &Server, what: &str) {
    wait_until(&format!("nothing is left of {what}"), || in_memory(server.pid(), &marker()) == 0);
}

#[test]
fn nothing_is_left_in_memory_when_a_session_has_ended() {
    let dir = scratch();
    let image = image(dir.path());
    for args in [&["--workers", "1"][..], &["--block-size", "64K"], &["--lock-memory", "off"]] {
        let server = Serve::image(&image).args(["--memory", "64M", "--linger", "0s"]).args(args).start();
        let pid = server.pid();
        assert_eq!(in_memory(pid, &marker()), 0, "it is not there by itself");
        for export in ["base", "base@named"] {
            let mut client = server.client(export);
            plant(&mut client);
            assert!(in_memory(pid, &marker()) > 3000, "it is there as long as the session is");
            client.disconnect();
            wait_until_gone(&server, export);
        }
        leave_in_the_middle(&server);
        wait_until_gone(&server, "a payload that came in part");
        // One that stays does not keep what passed through on behalf of one that has left.
        let mut other = server.client("base");
        other.write(0, &[1; 4096]);
        let mut client = server.client("base");
        plant(&mut client);
        client.cut();
        wait_until_gone(&server, "who was not alone");
        assert_eq!(other.read(0, 4096), [1; 4096]);
        other.disconnect();
        server.stop();
    }
}

#[test]
fn what_was_trimmed_zeroed_or_overwritten_is_gone_too() {
    let dir = scratch();
    let image = image(dir.path());
    let server = Serve::image(&image).args(["--memory", "96M"]).start();
    let mut client = server.client("base");
    for forget in [
        |client: &mut Client| client.trim(0, 64 * MIB),
        |client: &mut Client| client.zeroes(0, 64 * MIB),
        |client: &mut Client| {
            for at in (0..64).step_by(4) {
                client.write(at * MIB, &vec![3; support::size(4 * MIB)]);
            }
        },
    ] {
        plant(&mut client);
        assert!(in_memory(server.pid(), &marker()) > 3000);
        forget(&mut client);
        wait_until_gone(&server, "what was forgotten");
    }
    client.disconnect();
    server.stop();
}

#[test]
fn a_sealed_session_is_not_in_memory_even_while_it_lives() {
    let dir = scratch();
    let image = image(dir.path());
    for args in [&["--workers", "1"][..], &["--block-size", "64K"], &["--lock-memory", "off"]] {
        let server = Serve::image(&image).args(["--memory", "64M", "--seal"]).args(args).start();
        for export in ["base", "base@named"] {
            let mut client = server.client(export);
            plant(&mut client);
            // As soon as its worker has nothing to do: it has no more than what passed through its buffers.
            wait_until_gone(&server, "what is sealed");
            assert_eq!(client.read(8 * MIB + 7, 300_000), marked(300_000));
            assert_eq!(client.read(100, 32), marker());
            assert_eq!(client.read(MIB, 4096), marked(4096));
            wait_until_gone(&server, "what was read again");
            client.disconnect();
        }
        leave_in_the_middle(&server);
        wait_until_gone(&server, "a payload that came in part");
        server.stop();
    }
}

#[test]
fn one_session_is_sealed_where_others_are_not() {
    let dir = scratch();
    let image = image(dir.path());
    let control = dir.path().join("control.sock");
    let server = Serve::image(&image).args(["--memory", "64M", "--control"]).args([&control]).start();
    let memdev = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let output = command.args(args).arg("--control").arg(&control).output().expect("it can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    memdev(&["new", "base", "--id", "noise", "--seal"]);
    memdev(&["new", "base", "--id", "open"]);
    let mut sealed = server.client("base@noise");
    plant(&mut sealed);
    wait_until_gone(&server, "what is sealed");
    // What is made of it has its key.
    memdev(&["fork", "base@noise", "--id", "fork"]);
    memdev(&["checkpoint", "base@noise", "then"]);
    let mut fork = server.client("base@fork");
    fork.write(MIB + 4096, &marked(4096));
    sealed.trim(0, 64 * MIB);
    memdev(&["end", "base@fork"]);
    drop(fork);
    memdev(&["rollback", "base@noise", "then"]);
    assert_eq!(sealed.read(8 * MIB + 7, 300_000), marked(300_000));
    wait_until_gone(&server, "forks and checkpoints of it");
    assert!(memdev(&["stat", "base@noise"]).contains("\n    sealed\n"));
    assert!(!memdev(&["stat", "base@open"]).contains("sealed"));
    let mut open = server.client("base@open");
    plant(&mut open);
    assert!(in_memory(server.pid(), &marker()) > 3000);
    open.disconnect();
    sealed.disconnect();
}

/// A server in a directory of its own that may make core files if nothing but its own steps keep it from that.
fn that_may_dump(dir: &TempDir, image: &Image, args: &[&str]) -> Server {
    let home = scratch();
    let mut command = Command::new("prlimit");
    command.args(["--core=unlimited:unlimited", env!("CARGO_BIN_EXE_memdev"), "serve"]).arg(&image.path);
    command.arg("--unix").arg(home.path().join("nbd.sock")).args(["--memory", "64M"]).args(args);
    command.current_dir(dir.path()).env("MEMDEV_TEST_CONTROL", CONTROL);
    let mut server = Server::by(command, home);
    server.wait_for_line("listening on", 1);
    server
}

/// The core files in a directory.
fn cores(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("it is there").map(|entry| entry.expect("an entry").path());
    entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("core")))
        .collect()
}

/// Has `gdb` write the memory of a process to a file.
fn gcore(pid: u32, file: &Path, settings: &[&str]) {
    let mut gdb = Command::new("gdb");
    gdb.args(["--batch", "-nx", "-iex", "set auto-load off", "-iex", "set debuginfod enabled off"]);
    for setting in settings {
        gdb.args(["-ex", setting]);
    }
    gdb.args(["-p", &pid.to_string(), "-ex"])
        .arg(format!("gcore {}", file.display()))
        .args(["-ex", "detach"]);
    let output = gdb.output().expect("gdb can be run: see tools/setup");
    assert!(file.exists(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_core_by_gcore_has_nothing_of_a_session_even_while_it_lives() {
    let dir = scratch();
    let image = image(dir.path());
    for confine in ["off", "auto"] {
        let server = that_may_dump(&dir, &image, &["--confine", confine]);
        let mut client = server.client("base");
        plant(&mut client);
        let all = dir.path().join("all");
        gcore(server.pid(), &all, &["set use-coredump-filter off", "set dump-excluded-mappings on"]);
        assert!(in_file(&all, &marker()) > 3000, "who is told to take it takes it");
        let usual = dir.path().join("usual");
        // As soon as its worker has nothing to do for a moment, and has wiped what it received into.
        wait_until(&format!("nothing is in the core, confine {confine}"), || {
            gcore(server.pid(), &usual, &[]);
            in_file(&usual, &marker()) == 0
        });
        // Unconfined, everything else is in it.
        assert_eq!(in_file(&usual, CONTROL.as_bytes()) > 0, confine == "off");
        for file in [&all, &usual] {
            fs::remove_file(file).expect("removing it");
        }
        client.disconnect();
    }
}

#[test]
fn a_server_that_crashes_leaves_no_core_and_unconfined_one_without_its_sessions() {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("procfs");
    assert!(
        pattern.starts_with("core"),
        "this test needs core files where the process is: sysctl -w kernel.core_pattern=core"
    );
    for (confine, expected) in [("off", 1), ("auto", 0)] {
        let dir = scratch();
        let image = image(dir.path());
        let mut server = that_may_dump(&dir, &image, &["--confine", confine]);
        let mut client = server.client("base");
        plant(&mut client);
        // As above; there is no second look.
        std::thread::sleep(std::time::Duration::from_secs(2));
        server.signal(Signal::ABORT);
        let status = server.wait();
        assert_eq!((status.signal(), status.core_dumped()), (Some(6), expected == 1), "confine {confine}");
        let cores = cores(dir.path());
        assert_eq!(cores.len(), expected, "confine {confine}");
        for core in cores {
            assert!(in_file(&core, CONTROL.as_bytes()) > 0, "it is the server's memory");
            assert_eq!(in_file(&core, &marker()), 0);
        }
        client.cut();
    }
}

#[test]
fn nothing_is_left_in_files() {
    let dir = scratch();
    let image = image(dir.path());
    let home = scratch();
    let path = home.path().to_owned();
    let mut server = Serve::image(&image).dir(home).args(["--memory", "64M"]).start();
    let mut client = server.client("base");
    plant(&mut client);
    let planted = path.join("planted");
    fs::write(&planted, marked(1024)).expect("writing");
    assert_eq!(in_files(&path, &marker()), 1, "it would be found");
    fs::remove_file(&planted).expect("removing");
    server.signal(Signal::KILL);
    let _ = server.wait();
    client.cut();
    for place in [&path, dir.path(), Path::new("/dev/shm"), Path::new("/run/memdev-attach")] {
        if place.exists() {
            assert_eq!(in_files(place, &marker()), 0, "{}", place.display());
        }
    }
}
