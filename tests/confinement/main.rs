//! The server confines itself: what its threads have left, what they can no longer do, and that it serves all the same.
//!
//! That it serves is what every other test shows, too: their servers are confined, and killed for any system call that
//! is not on the list.

mod attempts;
mod gate;
mod kernels;
#[path = "../support/mod.rs"]
mod support;
mod users;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use rustix::process::Signal;
use support::server::{Serve, scratch};
use support::{Image, KIB, MIB, Server, assert_bytes, wait_until};

/// The fields of a thread's status, as the kernel has them.
type Status = BTreeMap<String, String>;

fn status(path: &Path) -> Status {
    let text = fs::read_to_string(path).expect("the thread lives");
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(field, value)| (field.to_owned(), value.trim().to_owned())).collect()
}

/// The status of every thread of the server.
fn threads(server: &Server) -> Vec<Status> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server lives");
    tasks.map(|task| status(&task.expect("a thread").path().join("status"))).collect()
}

fn own() -> Status {
    status(Path::new("/proc/thread-self/status"))
}

fn capabilities(thread: &Status) -> Vec<(&str, &str)> {
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    sets.into_iter().map(|set| (set, thread[set].trim_start_matches('0'))).collect()
}

#[test]
fn every_thread_is_confined_and_has_no_rights_left() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server =
        Serve::image(&image).tcp().args(["--workers", "3", "-v"]).confine(["--confine=auto"]).start();
    assert_bytes(&server.client("base").read(0, MIB), &image.all(), 0);

    // A thread takes its name when it first runs, and until then has the one of the thread that started it.
    for name in ["memdev", "signals", "worker-0", "worker-2", "warmer", "housekeeper", "tender", "watcher"] {
        let has_name = |thread: &Status| thread["Name"] == name;
        wait_until(&format!("a thread is called {name}"), || threads(&server).iter().any(has_name));
    }
    for thread in &threads(&server) {
        let name = &thread["Name"];
        assert_eq!((thread["NoNewPrivs"].as_str(), thread["Seccomp"].as_str()), ("1", "2"), "{name}");
        let mut expected = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| (set, "")).to_vec();
        if !rustix::process::geteuid().is_root() {
            // What nobody but root could take away, and no use to a process that cannot gain anything.
            expected[3].1 = capabilities(thread)[3].1;
        }
        assert_eq!(capabilities(thread), expected, "{name}");
    }
    let line = server.log().into_iter().find(|line| line.contains("Confined to")).expect("it says so");
    let version = line.split("landlock ABI ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
    let version: u32 = version.parse().expect("a number");
    assert_eq!(version < 6, server.log().iter().any(|line| line.contains("Not fully confined")), "{line}");
}

#[test]
fn it_keeps_everything_with_confine_off() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).args(["-v"]).confine(["--confine=off"]).start();
    let own = own();
    for thread in threads(&server) {
        for field in ["NoNewPrivs", "Seccomp", "CapEff", "CapBnd", "Uid", "Groups"] {
            assert_eq!(thread[field], own[field], "{field} of {}", thread["Name"]);
        }
    }
    assert!(server.log().iter().any(|line| line.contains("Confined to nothing")), "{:?}", server.log());
}

#[test]
fn it_starts_with_require_where_the_kernel_can_do_it_all() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).start();
    let incomplete = server.log().iter().any(|line| line.contains("Not fully confined"));
    if !incomplete {
        let server = Serve::image(&image).confine(["--confine=require"]).start();
        assert_bytes(&server.client("base").read(0, MIB), &image.all(), 0);
        server.stop();
    }
}

/// What a server with an unlimited core size leaves in its directory when it is made to crash.
fn crash(confine: &str) -> (bool, usize) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let socket = dir.path().join("nbd.sock");
    let mut server = std::process::Command::new("sh")
        .args(["-c", "ulimit -c unlimited && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_memdev"), "serve"])
        .arg(&image.path)
        .arg("--unix")
        .arg(&socket)
        .arg(confine)
        .current_dir(dir.path())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the server listens", || {
        support::Stream::unix(&socket).is_ok_and(|stream| support::Peer::new(stream).try_u64().is_ok())
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), Signal::ABORT).unwrap();
    let status = server.wait().unwrap();
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()));
    let left = fs::read_dir(dir.path()).unwrap().count() - ["base.img", "nbd.sock"].len();
    (status.core_dumped(), left)
}

#[test]
fn a_crash_leaves_no_core_file() {
    let hard_limit = rustix::process::getrlimit(rustix::process::Resource::Core).maximum;
    assert_eq!(hard_limit, None, "the test needs a machine where core files are allowed");
    assert_eq!(crash("--confine=auto"), (false, 0));
    // Where the machine writes core files at all, it would have been this one that wrote it.
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.trim() == "core" {
        assert_eq!(crash("--confine=off"), (true, 1), "the control");
    }
}

/// Writes an image beside `path` and renames it over it.
fn replace(path: &Path, seed: u64) -> Image {
    let beside = path.with_file_name("new.img");
    let image = Image::random(&beside, 64 * KIB, seed);
    fs::rename(&beside, path).unwrap();
    image
}

#[track_caller]
fn assert_serves(server: &Server, image: &Image) {
    let name = "base";
    assert_bytes(&server.client(name).read(0, 64 * KIB), &image.bytes(0, 64 * KIB), 0);
}

#[test]
fn an_image_that_is_replaced_is_found() {
    let dir = scratch();
    let path = dir.path().join("base.img");
    let first = Image::random(&path, 64 * KIB, 1);
    let server = Server::of(&first);
    let mut old = server.client("base");
    for seed in 2..5 {
        let image = replace(&path, seed);
        assert_serves(&server, &image);
    }
    assert_bytes(&old.read(0, 64 * KIB), &first.all(), 0);
    assert!(server.log().iter().all(|line| !line.contains("keeping the image")), "{:?}", server.log());
    server.stop();
}

#[test]
fn an_image_behind_links_is_found_when_files_or_links_are_replaced() {
    let dir = scratch();
    let top = dir.path();
    for directory in ["links", "files", "srv/releases/1", "srv/releases/2"] {
        fs::create_dir_all(top.join(directory)).unwrap();
    }
    let mut image = Image::random(top.join("files/v1.img"), 64 * KIB, 1);
    symlink("../files/v1.img", top.join("links/base.img")).unwrap();
    image.path = top.join("links/base.img");
    let server = Server::of(&image);
    assert_serves(&server, &image);
    // The file behind the link; another file beside it, by another link; a file instead of the link.
    assert_serves(&server, &replace(&top.join("files/v1.img"), 2));
    let v2 = Image::random(top.join("files/v2.img"), 64 * KIB, 3);
    symlink("../files/v2.img", top.join("links/new")).unwrap();
    fs::rename(top.join("links/new"), top.join("links/base.img")).unwrap();
    assert_serves(&server, &v2);
    assert_serves(&server, &replace(&top.join("links/base.img"), 4));

    // A directory that is a link, pointed at a sibling.
    let mut image = Image::random(top.join("srv/releases/1/base.img"), 64 * KIB, 5);
    let next = Image::random(top.join("srv/releases/2/base.img"), 64 * KIB, 6);
    symlink("releases/1", top.join("srv/current")).unwrap();
    image.path = top.join("srv/current/base.img");
    let server = Server::of(&image);
    assert_serves(&server, &image);
    symlink("releases/2", top.join("srv/next")).unwrap();
    fs::rename(top.join("srv/next"), top.join("srv/current")).unwrap();
    assert_serves(&server, &next);
}

/// What lies outside of what the server was given stays outside, and the server says that it goes on with what it has.
#[test]
fn an_image_that_comes_to_lie_elsewhere_is_not_found() {
    let (dir, elsewhere) = (scratch(), scratch());
    let path = dir.path().join("base.img");
    let image = Image::random(&path, 64 * KIB, 1);
    let server = Server::of(&image);
    Image::random(elsewhere.path().join("base.img"), 64 * KIB, 2);
    symlink(elsewhere.path().join("base.img"), dir.path().join("new")).unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    assert_serves(&server, &image);
    let kept =
        |line: &String| line.contains("keeping the image as it was") && line.contains("ermission denied");
    wait_until("the log says so", || server.log().iter().any(kept));
}

#[test]
fn all_socket_files_are_removed_in_the_end() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    let others = [scratch(), scratch()];
    let mut serve = Serve::image(&image);
    for other in &others {
        serve = serve.args(["--unix".as_ref(), other.path().join("socket").as_os_str()]);
    }
    let server = serve.start();
    assert_serves(&server, &image);
    server.stop();
    for other in &others {
        assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
    }
}
