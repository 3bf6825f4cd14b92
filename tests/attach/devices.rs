//! What a person sees of `attach` and `detach`: devices that are ready, and gone; who is in the way; what went wrong.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{CWD, FallocateFlags};

use super::machine::{Mount, State, failure};
use crate::interop_support::{attempt, run, said, uri};
use crate::support::server::Serve;
use crate::support::{Image, MIB, Random, Server, wait_until};

fn text(path: &std::path::Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn an_image_is_a_writable_device_until_it_is_detached() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 8 * MIB, 1);
    let before = image.fingerprint();

    let disk = state.attach(text(&image.path), &[]);
    assert_eq!(disk.size(), 8 * MIB);
    assert!(disk.read(0, 8 << 20) == image.all(), "it begins as a copy of the image");
    let data = Random::new(7).bytes(MIB);
    disk.write(3 * MIB, &data);
    assert!(disk.read(3 * MIB, 1 << 20) == data);

    let listed = disk.listed();
    assert_eq!(listed["size"], 8 * MIB);
    assert_eq!(
        (&listed["backend"], &listed["read_only"], &listed["alive"]),
        (&"fuse".into(), &false.into(), &true.into())
    );
    assert_eq!((&listed["source"], &listed["connections"]), (&text(&image.path).into(), &1.into()));
    let export = listed["export"].as_str().expect("an export");
    let id = export.strip_prefix("disk@").expect("a session of its own");
    assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "a name of 128 random bits: {id}");
    let output = state.output("attach", &["--list"]);
    assert!(said(&output).starts_with(&format!("{}: {export} ({})", disk.text(), image.path.display())));

    // Another one is another copy.
    let other = state.attach(text(&image.path), &[]);
    assert!(other.read(3 * MIB, 1 << 20) == image.bytes(3 * MIB, MIB));
    assert_ne!(other.path, disk.path);
    other.detach();
    disk.detach();
    state.assert_empty();
    assert_eq!(image.fingerprint(), before);
}

#[test]
fn a_named_session_is_found_again() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 4 * MIB, 2);
    let server = Serve::image(&image).tcp().start();
    let data = Random::new(3).bytes(MIB);

    let disk = state.attach(&uri(&server, "disk@kept"), &[]);
    disk.write(MIB, &data);
    disk.detach();
    // Again, over TCP by the same user: a session belongs to who made it over the unix socket, so by that way again.
    let disk = state.attach(&uri(&server, "disk@kept"), &["--connections", "4"]);
    assert!(disk.read(MIB, 1 << 20) == data);
    assert_eq!(disk.listed()["connections"], 4);
    disk.write(2 * MIB, &data);
    disk.detach();
    let disk = state.attach(&format!("nbd://{}/disk", server.tcp_address()), &[]);
    assert!(disk.read(0, 4 << 20) == image.all(), "a session of its own");
    disk.detach();
    let mut client = server.client("disk@kept");
    assert!(client.read(2 * MIB, MIB) == data);
    state.assert_empty();
    drop(client);
    server.stop();
}

/// The copy of an image is a named session of the daemon's, which may be used by several connections as any other.
#[test]
fn an_image_is_served_over_as_many_connections_as_are_asked_for() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 4 * MIB, 2);
    let disk = state.attach(text(&image.path), &["--connections", "3"]);
    assert_eq!(disk.listed()["connections"], 3);
    let threads = fs::read_dir(format!("/proc/{}/task", disk.daemon())).expect("the daemon runs").flatten();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    assert_eq!(names.filter(|name| name.trim_end() == "replies").count(), 3);
    let data = Random::new(4).bytes(MIB);
    disk.write(MIB, &data);
    assert!(disk.read(MIB, 1 << 20) == data);
    disk.detach();
    state.assert_empty();
}

/// Mounted twice a file system breaks, and said nothing until it had.
#[test]
fn who_attaches_a_session_a_second_time_is_warned() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let server = Server::of(&image);
    let session = uri(&server, "disk@m");
    let again = |what: &str, args: &[&str]| {
        let mut command = state.command("attach");
        let output =
            command.args(["--backend", "fuse", what]).args(args).output().expect("memdev can be run");
        assert!(output.status.success(), "{}", said(&output));
        let device = String::from_utf8(output.stdout).expect("text");
        assert!(state.output("detach", &[device.trim_end()]).status.success());
        String::from_utf8(output.stderr).expect("text")
    };
    assert_eq!(again(&session, &[]), "", "nobody else has it");
    let disk = state.attach(&session, &[]);
    let line = format!(
        "memdev: {session} has {} already, and a file system that more than one of them writes to breaks; attach the others \
         with --read-only, or a fork of the session ('memdev fork disk@m')\n",
        disk.text()
    );
    assert_eq!(again(&session, &[]), line);
    assert_eq!(again(&session, &["--read-only"]), "", "it only looks");
    for other in ["disk@n", "disk"] {
        assert_eq!(again(&uri(&server, other), &[]), "", "{other} is another disk");
    }
    disk.detach();
    let disk = state.attach(&session, &["--read-only"]);
    assert_eq!(again(&session, &[]), "", "the other one only looks");
    disk.detach();
    state.assert_empty();
    server.stop();
}

#[test]
fn a_read_only_device_refuses_writes() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), MIB, 2);
    let disk = state.attach(text(&image.path), &["--read-only"]);
    assert_eq!(disk.listed()["read_only"], true);
    assert_eq!(run("blockdev", ["--getro", disk.text()]), "1\n");
    let file = File::options().write(true).open(&disk.path);
    let refused = file.and_then(|file| file.write_all_at(&[1; 512], 0).and_then(|()| file.sync_all()));
    assert!(refused.is_err());
    assert!(disk.read(0, 1 << 20) == image.all());
    disk.detach();
    state.assert_empty();
}

#[test]
fn a_device_in_use_stays_and_the_error_says_who_uses_it() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), 32 * MIB);
    run("mkfs.ext4", ["-q", "-F", text(&image.path)]);
    let disk = state.attach(text(&image.path), &[]);
    let refused = || failure(&state.output("detach", &[disk.text()]));

    let mount = Mount::new(&disk.path, "ext4");
    let line = refused();
    assert!(line.contains(&format!("it is mounted on {}", mount.root().display())), "{line}");
    assert!(line.contains("unmount it"), "says what to do: {line}");
    fs::write(mount.path("still"), "works").expect("writing to the file system");
    let users = disk.listed()["users"].clone();
    assert!(users[0].as_str().is_some_and(|user| user.contains("mounted")), "{users}");
    mount.unmount();

    let file = File::open(&disk.path).expect("opening the device");
    let line = refused();
    assert!(
        line.contains(&format!("process {} (", std::process::id())) && line.contains("has it open"),
        "{line}"
    );
    drop(file);

    // By another node, as in a root that somebody has made for a container: the device is the same.
    let node = state.path("disk");
    let number = fs::metadata(&disk.path).map(|metadata| metadata.rdev()).expect("the device is there");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, &node, rustix::fs::FileType::BlockDevice, mode, number).expect("making a node");
    let file = File::open(&node).expect("opening the device");
    let line = refused();
    assert!(
        line.contains(&format!("process {} (", std::process::id())) && line.contains("has it open"),
        "{line}"
    );
    drop(file);

    // A mount in a namespace that only another process is in.
    let mut hidden = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount \"$0\" /mnt && echo mounted && read -r _"])
        .arg(&disk.path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("unshare can be run");
    let mut said = [0; 8];
    std::io::Read::read_exact(hidden.stdout.as_mut().expect("a pipe"), &mut said).expect("it mounts");
    let line = refused();
    assert!(line.contains("it is mounted on /mnt for process"), "{line}");
    drop(hidden.stdin.take());
    hidden.wait().expect("it ends");

    // A loop device made of it.
    let upper = run("losetup", ["--find", "--show", disk.text()]);
    let line = refused();
    run("losetup", ["--detach", upper.trim()]);
    assert!(line.contains(&format!("{} is made of it", upper.trim())), "{line}");
    disk.detach();
    state.assert_empty();
}

#[test]
fn a_device_is_taken_only_if_it_is_free() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let disk = state.attach(text(&image.path), &[]);
    let line = state.attach_failure(&[text(&image.path), "--device", disk.text()]);
    assert!(line.contains("is in use: it has a file already"), "{line}");
    assert_eq!(disk.size(), MIB);
    let freed = disk.text().to_owned();
    disk.detach();
    // Other tests attach, too: the device that is free now may be taken by the time it is asked for.
    let output = state.output("attach", &[text(&image.path), "--device", &freed]);
    if output.status.success() {
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{freed}\n"));
        assert!(state.output("detach", &[&freed]).status.success());
    } else {
        assert!(failure(&output).contains("is in use"), "{}", said(&output));
    }
    for (device, why) in [("/dev/null", "no block device"), ("/dev/nosuch", "no such file")] {
        let line = state.attach_failure(&[text(&image.path), "--device", device]);
        assert!(line.contains(why), "{line}");
    }
    let line =
        failure(&state.output("attach", &[text(&image.path), "--device", "/dev/loop0", "--backend", "nbd"]));
    assert!(line.contains("/dev/loop0 is no device for --backend nbd; leave out one of the two"), "{line}");
    state.assert_empty();
}

#[test]
fn what_cannot_be_attached_is_one_line_and_leaves_nothing() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let tiny = Image::empty(state.path("tiny.img"), 100);
    let server = Server::of(&image);
    let none = format!("nbd+unix:///disk?socket={}", state.path("none").display());
    let missing = text(&state.path("missing.img")).to_owned();
    // Nobody has named an export here.
    let too_small = format!("Image {} has less than one sector of 512 bytes", tiny.path.display());
    let too_small = too_small + "; give the path of a raw disk image";
    for (args, why) in [
        (vec![missing.as_str()], "no such file or directory; give the path of a readable raw disk image"),
        (vec!["/dev/null"], "neither a regular file nor a block device"),
        (vec![text(&tiny.path)], too_small.as_str()),
        (vec![none.as_str()], "check that a server is running there"),
        (vec![&uri(&server, "nosuch")], "there is no such export"),
        (vec![&uri(&server, "disk"), "--connections", "2"], "name a session, as NAME@ID"),
        (vec!["nbds://localhost/disk"], "No TLS for block devices, as nbds://localhost"),
    ] {
        let line = state.attach_failure(&args);
        assert!(line.contains(why), "{args:?}: {line}");
        state.assert_empty();
    }
    if !std::path::Path::new("/sys/module/nbd").exists() {
        let line = failure(&state.output("attach", &[text(&image.path), "--backend", "nbd"]));
        assert!(line.contains("load it with 'modprobe nbd', or use --backend fuse"), "{line}");
        state.assert_empty();
    }
    let line = failure(&state.output("detach", &["/dev/loop0"]));
    assert!(line.contains("/dev/loop0: memdev has not attached it"), "{line}");
    for args in
        [&["--list", "x.img"][..], &[], &["x.img", "--connections", "0"], &["x.img", "--backend", "smb"]]
    {
        assert_eq!(state.output("attach", args).status.code(), Some(2), "{args:?}");
    }
    server.stop();
}

#[test]
fn a_file_that_is_called_like_a_device_is_none() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let disk = state.attach(text(&image.path), &[]);
    let file = state.path(disk.name());
    let line = failure(&state.output("detach", &[text(&file)]));
    assert!(line.contains("there is no such device; list what there is"), "{line}");
    fs::write(&file, "no device").expect("creating a file");
    let line = failure(&state.output("detach", &[text(&file)]));
    assert!(line.contains("no block device"), "{line}");
    assert!(disk.is_there());
    // Whereas a link to the device is the device.
    fs::remove_file(&file).expect("removing a file");
    std::os::unix::fs::symlink(&disk.path, &file).expect("making a link");
    assert!(state.output("detach", &[text(&file)]).status.success());
    assert!(!disk.is_there());
    state.assert_empty();
}

#[test]
fn an_export_that_takes_only_large_requests_is_refused() {
    let state = State::new();
    let attach = format!(
        "{} attach --backend fuse --state {} \"$uri\"",
        env!("CARGO_BIN_EXE_memdev"),
        state.directory().display()
    );
    let words = ["--unix=-", "--filter=blocksize-policy", "memory", "1M"];
    let sizes = ["blocksize-minimum=65536", "blocksize-preferred=65536", "--run", &attach];
    let line = failure(&attempt("nbdkit", words.iter().chain(&sizes)));
    assert!(line.contains("takes no requests of less than 65536 bytes"), "{line}");
    state.assert_empty();
}

#[test]
fn sizes_are_whole_sectors() {
    let state = State::new();
    let image = Image::random(state.path("odd.img"), MIB + 700, 4);
    let disk = state.attach(text(&image.path), &[]);
    assert_eq!(disk.size(), MIB + 512);
    assert_eq!(disk.listed()["size"], MIB + 512);
    assert!(disk.read(0, (1 << 20) + 512) == image.bytes(0, MIB + 512));
    disk.detach();
    let large = Image::partly(state.path("large.img"), 1 << 40, 0..MIB, 5);
    let disk = state.attach(text(&large.path), &[]);
    assert_eq!(disk.size(), 1 << 40);
    disk.write((1 << 40) - 4096, &[7; 4096]);
    assert_eq!(disk.read((1 << 40) - 4096, 4096), [7; 4096]);
    disk.detach();
}

#[test]
fn discards_and_zeroes_arrive_and_memory_comes_back() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 64 * MIB, 6);
    let server = Server::of(&image);
    let disk = state.attach(&uri(&server, "disk@one"), &[]);
    let before = server.usage();
    let file = disk.direct();
    for at in 0..48 {
        // Anonymous memory of its own is aligned as O_DIRECT wants it.
        disk.write(at * MIB, &Random::new(at).bytes(MIB));
    }
    let full = server.usage();
    assert!(full.private >= before.private + 40 * MIB, "{full:?}");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file.as_fd(), punch, 0, 24 * MIB).expect("zeroing with holes");
    run(
        "blkdiscard",
        ["--offset", &(24 * MIB).to_string(), "--length", &(24 * MIB).to_string(), disk.text()],
    );
    drop(file);
    run("blockdev", ["--flushbufs", disk.text()]);
    for at in [0, 10 * MIB, 24 * MIB, 48 * MIB - 4096] {
        assert_eq!(disk.read(at, 4096), [0; 4096], "at {at}");
    }
    assert!(disk.read(48 * MIB, 1 << 20) == image.bytes(48 * MIB, MIB), "what lies behind stays");
    wait_until("the server has given the memory back", || server.usage().private < full.private - 30 * MIB);
    // Zeroes that must keep their place.
    let file = File::options().write(true).open(&disk.path).expect("opening the device");
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file.as_fd(), zero, 50 * MIB, MIB).expect("zeroing in place");
    drop(file);
    assert_eq!(disk.read(50 * MIB, 1 << 20), vec![0; 1 << 20]);
    disk.detach();
    state.assert_empty();
    server.stop();
}

#[test]
fn a_full_session_is_an_error_and_the_device_lives_on() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), 32 * MIB, 6);
    let server = Serve::image(&image).args(["--session-memory", "4M"]).start();
    let disk = state.attach(&uri(&server, "disk@one"), &[]);
    let file = File::options().write(true).open(&disk.path).expect("opening the device");
    let mut result = Ok(());
    for at in 0..32 {
        let data = Random::new(at).bytes(MIB);
        result = result.and_then(|()| file.write_all_at(&data, at * MIB).and_then(|()| file.sync_all()));
    }
    assert!(result.is_err(), "there is no room");
    drop(file);
    run("blkdiscard", [disk.text()]);
    disk.write(0, &[3; 4096]);
    assert_eq!(disk.read(0, 4096), [3; 4096]);
    disk.detach();
    server.stop();

    // The daemon's own server has a budget, too.
    let disk = state.attach(text(&image.path), &["--memory", "8M"]);
    let file = File::options().write(true).open(&disk.path).expect("opening the device");
    let write =
        |at: u64| file.write_all_at(&Random::new(at).bytes(MIB), at * MIB).and_then(|()| file.sync_all());
    assert!((0..32).try_for_each(write).is_err(), "there is no room");
    drop(file);
    disk.detach();
    state.assert_empty();
}

#[test]
fn a_device_whose_name_nobody_hears_is_not_made() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = state.command("attach");
    let output = command.args(["--backend", "fuse", text(&image.path)]).stdout(writer).output();
    assert!(failure(&output.expect("memdev can be run")).contains("Cannot write the device's name"));
    state.assert_empty();
}

#[test]
fn many_at_once_get_a_device_each() {
    let state = State::new();
    let image = Image::random(state.path("disk.img"), MIB, 8);
    let disks: Vec<_> = std::thread::scope(|scope| {
        let attach = || state.attach(text(&image.path), &[]);
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(attach)).collect();
        threads.into_iter().map(|thread| thread.join().expect("attaching")).collect()
    });
    for (number, disk) in (0_u8..).zip(&disks) {
        disk.write(4096, &[number; 4096]);
    }
    for (number, disk) in (0_u8..).zip(&disks) {
        assert_eq!(disk.read(4096, 4096), [number; 4096]);
    }
    let names: Vec<_> = disks.iter().map(|disk| disk.name().to_owned()).collect();
    std::thread::scope(|scope| {
        disks.into_iter().for_each(|disk| drop(scope.spawn(|| disk.detach())));
    });
    state.assert_empty();
    assert!(names.iter().collect::<std::collections::HashSet<_>>().len() == 8, "{names:?}");
}

#[test]
fn a_device_that_somebody_else_took_away_is_no_trouble() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), MIB);
    let disk = state.attach(text(&image.path), &[]);
    let pid = disk.daemon();
    run("losetup", ["--detach", disk.text()]);
    super::machine::wait_for_end(&pid);
    assert!(!disk.is_there());
    state.assert_empty();
    let line = failure(&state.output("detach", &[disk.text()]));
    assert!(line.contains("memdev has not attached it"), "{line}");
}
