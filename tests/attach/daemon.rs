//! The process behind a device: what it has, and what it has left.

use std::fs;
use std::path::Path;

use memdev::attach::{self, Backend, Options, Source};

use super::machine::{Mount, State, wait_for_end};
use crate::support::{Image, MIB};

#[test]
fn the_daemon_is_on_its_own_and_nothing_of_it_is_to_be_seen() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("the mounts of this process");
    let own = |text: &str| text.lines().filter(|line| !line.contains("/memdev-mount-")).count();
    let state = State::new();
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let log = state.path("log");
    let before = mounts();
    let disk = state.attach(image.path.to_str().expect("text"), &["--log", log.to_str().expect("text")]);
    let after = mounts();
    assert!(!after.contains("fuse") || before.contains("fuse"), "no FUSE file system is mounted: {after}");
    assert!(own(&after) <= own(&before), "nothing is mounted: {after}");

    let proc = format!("/proc/{}", disk.daemon());
    let read = |name: &str| fs::read_to_string(format!("{proc}/{name}")).expect("the daemon lives");
    let link = |name: &str| fs::read_link(format!("{proc}/{name}")).expect("the daemon lives");
    // An empty root and /proc, in a namespace of its own.
    let points: Vec<_> =
        read("mountinfo").lines().map(|l| l.split(' ').nth(4).expect("a mount point").to_owned()).collect();
    assert_eq!(points, ["/", "/proc"]);
    assert_ne!(link("ns/mnt"), fs::read_link("/proc/self/ns/mnt").expect("a namespace"));
    assert_eq!(
        fs::read_dir(format!("{proc}/root")).expect("its root").count(),
        2,
        "/proc and its own socket"
    );
    assert_eq!(link("cwd"), Path::new("/"));
    // A session of its own, without a terminal.
    let stat = read("stat");
    let fields: Vec<_> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    assert_eq!((fields[3], fields[4]), (disk.daemon().to_string().as_str(), "0"), "session and terminal");
    // Locked memory, as far as it is not a session's.
    let locked = read("status").lines().find_map(|line| line.strip_prefix("VmLck:").map(str::to_owned));
    let locked: u64 = locked.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse().ok()).expect("a number");
    assert!(locked > 1024, "{locked} KiB are locked");
    // No core file, and nothing in one that is made all the same.
    let limit = read("limits").lines().find(|line| line.starts_with("Max core file size")).map(str::to_owned);
    let limit: Vec<_> = limit.iter().flat_map(|line| line.split_whitespace()).skip(4).take(2).collect();
    assert_eq!((limit, read("coredump_filter").trim()), (vec!["0", "0"], "00000000"));
    // Nobody's files but its own; the log is standard error.
    assert_eq!((link("fd/0"), link("fd/1")), ("/dev/null".into(), "/dev/null".into()));
    assert_eq!(link("fd/2"), log);
    for fd in fs::read_dir(format!("{proc}/fd")).expect("its descriptors").flatten() {
        // What it had for a moment may be closed by now.
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        let own = ["/dev/null", "/dev/fuse", "socket:", "anon_inode:"]
            .iter()
            .any(|known| target.starts_with(known));
        assert!(own || target.starts_with(state.path("").to_str().expect("text")), "{target}");
        assert!(!target.starts_with("/dev/loop"), "it never has its own device open");
    }
    disk.detach();
    assert_eq!(fs::read_to_string(log).expect("the log"), "", "nothing to complain about");
    assert_eq!(own(&mounts()), own(&before));
}

#[test]
fn descriptors_that_the_command_inherited_are_not_kept() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let memdev = env!("CARGO_BIN_EXE_memdev");
    // As in a script that holds a lock by descriptor 9: whoever inherits it would hold it for ever.
    let lock = state.path("lock");
    let script = format!(
        "exec 9>{}; {memdev} attach --backend fuse --state {} {}",
        lock.display(),
        state.directory().display(),
        image.path.display()
    );
    let device = crate::interop_support::run("sh", ["-c", &script]);
    let listed = state.list();
    let fds = fs::read_dir(format!("/proc/{}/fd", listed[0]["pid"])).expect("its descriptors");
    for fd in fds.flatten() {
        assert_ne!(fs::read_link(fd.path()).unwrap_or_default(), lock);
    }
    assert!(state.output("detach", &[device.trim()]).status.success());
    state.assert_empty();
}

/// What a program asks for that uses the library.
fn options(state: &State, image: &Image) -> Options {
    Options {
        source: Source::Image { name: "disk".to_owned(), path: image.path.clone() },
        device: None,
        connections: 1,
        memory: None,
        read_only: false,
        backend: Backend::Fuse,
        state: state.directory(),
        log: None,
        program: env!("CARGO_BIN_EXE_memdev").into(),
        die_with_parent: false,
        while_used: false,
        root: None,
        warn: |_| {},
    }
}

#[test]
fn a_device_that_nobody_keeps_is_gone() {
    for while_used in [false, true] {
        let state = State::new();
        let image = Image::random(state.path("disk.img"), MIB, 1);
        let options = Options { while_used, ..options(&state, &image) };
        let attached = attach::attach(&options).expect("attaching");
        let pid = attached.record().pid.into();
        assert_eq!(state.list().len(), 1);
        drop(attached);
        state.assert_empty();
        wait_for_end(&pid);
    }
}

#[test]
fn a_device_that_is_kept_while_it_is_used_goes_with_its_last_user() {
    for while_used in [false, true] {
        let state = State::new();
        let image = Image::empty(state.path("disk.img"), 32 * MIB);
        crate::interop_support::run("mkfs.ext4", ["-q", "-F", image.path.to_str().expect("text")]);
        let options = Options { while_used, ..options(&state, &image) };
        let attached = attach::attach(&options).expect("attaching");
        let path = attached.device().path();
        let (open, keeper) = attached.keep_while_used().expect("keeping");
        let mount = Mount::new(&path, "ext4");
        drop(open);
        fs::write(mount.path("file"), "here").expect("writing a file");
        assert_eq!(state.list().len(), 1);
        mount.unmount();
        assert!(keeper.wait().expect("the daemon's status"), "it has ended in order");
        state.assert_empty();
    }
}

#[test]
fn a_daemon_that_shall_not_outlive_its_parent_does_not() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let options = Options { die_with_parent: true, ..options(&state, &image) };
    let (mut daemon, alive) = std::thread::scope(|scope| {
        let launcher = scope.spawn(|| {
            let attached = attach::attach(&options).expect("attaching");
            (attached.keep().expect("keeping"), state.list()[0]["alive"].clone())
        });
        launcher.join().expect("the launcher's thread ends")
    });
    assert_eq!(alive, true);
    assert!(!daemon.wait().expect("the daemon's status").success(), "it was killed");
    let listed = state.list();
    assert_eq!(listed[0]["alive"], false);
    assert!(state.output("detach", &[listed[0]["device"].as_str().expect("a device")]).status.success());
    state.assert_empty();
}
