//! Everybody may die at any moment: the daemon, the server, the command. What is left is freed by the next attach or
//! detach, and nothing of anybody else's is touched.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;

use super::machine::{Mount, State, backing_file, kill, wait_for_end};
use crate::interop_support::{run, uri};
use crate::support::{Image, MIB, Random, Server, wait_until};

/// A loop device that memdev has nothing to do with. Taken away when dropped.
struct Foreign {
    device: String,
    file: std::path::PathBuf,
}

impl Foreign {
    fn new(state: &State) -> Self {
        let file = state.path("memdev:foreign.img");
        fs::write(&file, vec![9; 1 << 20]).expect("creating a file");
        let device =
            run("losetup", ["--find".as_ref(), "--show".as_ref(), file.as_os_str()]).trim().to_owned();
        Self { device, file }
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let file = backing_file(&self.device).expect("it is set up");
        assert_eq!(file.trim_end(), self.file.to_str().expect("text"));
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[test]
fn a_device_whose_daemon_died_is_freed_by_detach() {
    let state = State::new();
    let foreign = Foreign::new(&state);
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let disk = state.attach(image.path.to_str().expect("text"), &[]);
    let pid = disk.daemon();
    kill(&pid, Signal::KILL);
    wait_for_end(&pid);
    assert_eq!(disk.listed()["alive"], false);
    let read = fs::File::open(&disk.path)
        .and_then(|file| std::os::unix::fs::FileExt::read_at(&file, &mut [0; 4096], MIB / 2));
    assert!(read.is_err(), "reads fail, and do not hang");
    disk.detach();
    state.assert_empty();
    foreign.assert_untouched();
}

#[test]
fn devices_whose_server_died_are_freed_by_the_next_attach() {
    let state = State::new();
    let foreign = Foreign::new(&state);
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let mut server = Server::of(&image);
    let dead = [(); 3].map(|()| state.attach(&uri(&server, "disk"), &[]));
    let alive = state.attach(image.path.to_str().expect("text"), &[]);
    let daemons: Vec<_> = dead.iter().map(|disk| disk.daemon()).collect();
    server.signal(Signal::KILL);
    server.wait();
    daemons.iter().for_each(wait_for_end);
    assert!(dead.iter().all(|disk| disk.listed()["alive"] == false));

    let next = state.attach(image.path.to_str().expect("text"), &[]);
    assert_eq!(state.list().len(), 2, "the dead ones are gone");
    assert!(alive.read(0, 1 << 20) == image.all(), "and nobody else");
    alive.detach();
    next.detach();
    state.assert_empty();
    foreign.assert_untouched();
}

#[test]
fn a_mounted_device_whose_daemon_died_is_freed_once_it_is_unmounted() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), 32 * MIB);
    run("mkfs.ext4", ["-q", "-F", image.path.to_str().expect("text")]);
    let image = image.path.to_str().expect("text");
    let disk = state.attach(image, &[]);
    let mount = Mount::new(&disk.path, "ext4");
    fs::write(mount.path("file"), Random::new(1).bytes(MIB)).expect("writing a file");
    let pid = disk.daemon();
    kill(&pid, Signal::KILL);
    wait_for_end(&pid);
    let synced = fs::File::create(mount.path("more")).and_then(|file| file.sync_all());
    assert!(synced.is_err(), "the file system has lost its disk");

    // It is in use: neither is it taken for somebody else, nor does anybody wait for it.
    let output = state.output("detach", &[disk.text()]);
    assert!(super::machine::failure(&output).contains("it is mounted on"));
    let other = state.attach(image, &[]);
    assert_ne!(other.path, disk.path);
    other.detach();
    assert!(disk.is_there());
    mount.unmount();
    let other = state.attach(image, &[]);
    assert_eq!(state.list().len(), 1, "the dead one is gone");
    other.detach();
    state.assert_empty();
}

#[test]
fn a_server_that_stops_answering_blocks_nobody_once_it_is_killed() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 8 * MIB, 1);
    let mut server = Server::of(&image);
    let disk = state.attach(&uri(&server, "disk@one"), &[]);
    let pid = disk.daemon();
    server.signal(Signal::STOP);
    // Past the device's cache: somebody who looks through all devices may have read this block before.
    let mut reader = std::process::Command::new("dd")
        .args([&format!("if={}", disk.path.display()), "of=/dev/null", "bs=4096", "skip=1024", "count=1"])
        .args(["iflag=direct", "status=none"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("dd can be run");
    wait_until("a request waits", || {
        fs::read_to_string(format!("/sys/block/{}/inflight", disk.name()))
            .is_ok_and(|text| text.split_whitespace().any(|number| number != "0"))
    });
    server.signal(Signal::KILL);
    server.wait();
    assert!(!reader.wait().expect("the reader ends").success());
    wait_for_end(&pid);
    disk.detach();
    state.assert_empty();
}

/// Kills the command at a moment that differs each time; then the next attach and detach leave nothing.
#[test]
fn a_command_that_is_killed_halfway_leaves_nothing_that_stays() {
    let state = State::new();
    let foreign = Foreign::new(&state);
    let image = Image::random(state.path("disk.img"), MIB, 1);
    let server = Server::of(&image);
    let mut random = Random::new(11);
    let sources = [image.path.to_str().expect("text").to_owned(), uri(&server, "disk@one")];
    // How long one takes here, at this moment.
    let start = std::time::Instant::now();
    state.attach(&sources[0], &[]).detach();
    let longest = u64::try_from(start.elapsed().as_micros()).expect("not that long");
    for round in 0..40 {
        let source = &sources[round % 2];
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_memdev"))
            .args(["attach", "--backend", "fuse", source, "--state"])
            .arg(state.directory())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("memdev can be run");
        std::thread::sleep(Duration::from_micros(random.below(longest)));
        child.kill().expect("killing the command");
        let said = child.wait_with_output().expect("its output").stdout;
        // Either it has said the device's name, or nobody knows of the device, and then it is without a daemon before
        // long.
        if !said.ends_with(b"\n") {
            wait_until("the daemon notices", || state.list().iter().all(|listed| listed["alive"] == false));
        }
        for listed in state.list() {
            let device = listed["device"].as_str().expect("a device");
            if listed["alive"] == true {
                let output = state.output("detach", &[device]);
                // It may just be about to notice.
                let alive = || state.list().iter().any(|listed| listed["alive"] == true);
                assert!(output.status.success() || !alive(), "{}", crate::interop_support::said(&output));
            }
        }
    }
    state.attach(&sources[0], &[]).detach();
    state.assert_empty();
    foreign.assert_untouched();
    server.stop();
}

/// The same for the daemon, under load.
#[test]
fn daemons_that_are_killed_at_random_moments_leave_nothing_that_stays() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 16 * MIB, 1);
    let source = image.path.to_str().expect("text");
    let mut random = Random::new(12);
    for _ in 0..10 {
        let disk = state.attach(source, &[]);
        let pid = disk.daemon();
        let path = disk.path.clone();
        let writer = std::thread::spawn(move || {
            let file = fs::File::options().write(true).open(path).expect("opening the device");
            (0..).map(|n| n % 16).try_for_each(|at| {
                std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 1 << 20], at * MIB)?;
                file.sync_data()
            })
        });
        std::thread::sleep(Duration::from_millis(random.below(100)));
        kill(&pid, Signal::KILL);
        assert!(writer.join().expect("the writer ends").is_err());
        disk.detach();
    }
    state.assert_empty();
}
