//! A mounted file system that is saved while it is worked on: frozen for that moment, what is saved is in order, holds what
//! had been written by then, and can be gone on with.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::machine::{Mount, State};
use crate::interop_support::{run, uri};
use crate::support::server::Serve;
use crate::support::{Image, MIB, wait_until};

const WRITERS: usize = 3;

/// Makes one numbered file after the other, and removes those of before, until it is over.
fn work(at: &Path, over: &AtomicBool, made: &AtomicU64) {
    fs::create_dir(at).expect("a directory");
    for number in 0_u64.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let mut file = File::create(at.join(number.to_string())).expect("a file");
        file.write_all(&number.to_be_bytes().repeat(2000)).expect("writing it");
        made.store(number + 1, Ordering::Relaxed);
        if number >= 20 {
            fs::remove_file(at.join((number - 20).to_string())).expect("removing one");
        }
    }
}

/// The number of the newest file there, of which all are whole.
fn newest(at: &Path) -> u64 {
    let numbers = fs::read_dir(at).expect("the directory").map(|entry| {
        let entry = entry.expect("an entry");
        let number: u64 = entry.file_name().to_str().expect("text").parse().expect("a number");
        (number, fs::read(entry.path()).expect("the file"))
    });
    let mut files: Vec<_> = numbers.collect();
    files.sort_unstable();
    let (last, _) = *files.last().expect("some files");
    for (number, bytes) in &files {
        // The last one may have been begun only.
        let expected = number.to_be_bytes().repeat(2000);
        assert!(*bytes == expected || *number == last && expected.starts_with(bytes), "file {number}");
    }
    last
}

#[test]
fn a_frozen_file_system_is_saved_clean_and_comes_back() {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), 256 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let control = state.path("control");
    let server = Serve::image(&image).args(["--control".as_ref(), control.as_os_str()]).start();
    let memdev = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let output = command.args(args).arg("--control").arg(&control).output().expect("memdev can be run");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let (saved, raw) = (state.path("saved.qcow2"), state.path("saved.img"));
    let [saved, raw, base] = [&saved, &raw, &image.path].map(|path| path.to_str().expect("text"));

    let disk = state.attach(&uri(&server, "disk@live"), &[]);
    let mount = Mount::new(&disk.path, "ext4");
    let over = AtomicBool::new(false);
    let made: [AtomicU64; WRITERS] = Default::default();
    thread::scope(|scope| {
        for (number, made) in made.iter().enumerate() {
            let (at, over) = (mount.path(&number.to_string()), &over);
            scope.spawn(move || work(&at, over, made));
        }
        for turn in 1..=3 {
            wait_until("some work was done", || {
                made.iter().all(|made| made.load(Ordering::Relaxed) > turn * 40)
            });
            run("fsfreeze", ["-f".as_ref(), mount.root().as_os_str()]);
            let frozen: Vec<u64> = made.iter().map(|made| made.load(Ordering::Relaxed)).collect();
            memdev(&["save", "disk@live", saved, "--base", base]);
            run("fsfreeze", ["-u".as_ref(), mount.root().as_os_str()]);
            // Without looking into the journal: nothing is left to be done.
            run("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", saved, raw]);
            run("e2fsck", ["-fn", raw]);
            // A session that begins as that, on another device.
            memdev(&["load", "disk", saved, "--id", &format!("back{turn}")]);
            let back = state.attach(&uri(&server, &format!("disk@back{turn}")), &[]);
            let mounted = Mount::new(&back.path, "ext4");
            for (number, made) in frozen.iter().enumerate() {
                let newest = newest(&mounted.path(&number.to_string()));
                assert!(newest + 1 == *made || newest == *made, "{newest} was there, and {made} were made");
            }
            fs::write(mounted.path("more"), "one goes on from there").expect("a file");
            mounted.unmount();
            run("e2fsck", ["-fn".as_ref(), back.path.as_os_str()]);
            back.detach();
            memdev(&["end", &format!("disk@back{turn}")]);
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(!mount.path("more").exists(), "the session itself knows nothing of it");
    mount.unmount();
    run("e2fsck", ["-fn".as_ref(), disk.path.as_os_str()]);
    disk.detach();
    state.assert_empty();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}
