//! Real file systems, much work at the same time, and checks that they are in order afterwards.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate};

use super::machine::{Mount, State};
use crate::interop_support::{run, run_btrfs, succeed, uri};
use crate::support::{Image, MIB, Random, Server, size};

/// Where each of the file systems is checked.
fn check(kind: &str, device: &Path) {
    let device = device.as_os_str();
    match kind {
        "ext4" => run("e2fsck", ["-fn".as_ref(), device]),
        "xfs" => run("xfs_repair", ["-n".as_ref(), device]),
        _ => run_btrfs(
            "btrfs",
            ["check".as_ref(), "--readonly".as_ref(), "--check-data-csum".as_ref(), device],
        ),
    };
}

fn work_on(kind: &str, image_size: u64) {
    let state = State::new();
    let image = Image::empty(state.path("disk.img"), image_size);
    let path = image.path.to_str().expect("text");
    match kind {
        "ext4" => run("mkfs.ext4", ["-q", "-F", path]),
        "xfs" => run("mkfs.xfs", ["-q", path]),
        _ => run_btrfs("mkfs.btrfs", ["-q", path]),
    };
    let before = image.fingerprint();
    let server = Server::of(&image);
    let source = uri(&server, "disk@worked-on");
    let package = package(&state.path("package"));

    let disk = state.attach(&source, &["--connections", "2"]);
    let mount = Mount::new(&disk.path, kind);
    let files =
        fs::create_dir(mount.path("trees")).map(|()| mount.path("trees")).expect("creating a directory");
    std::thread::scope(|scope| {
        scope.spawn(|| copy_trees(&files));
        scope.spawn(|| build(&mount.path("program")));
        scope.spawn(|| verify(mount.root()));
        scope.spawn(|| use_git(&mount.path("repository")));
        scope.spawn(|| install(&mount.path("installed"), &package));
        for seed in 0..3 {
            let file = mount.path(&format!("random{seed}"));
            scope.spawn(move || exercise(&file, seed, 1500));
        }
    });
    run("fstrim", [mount.root()]);
    run("sync", ["-f".as_ref(), mount.root().as_os_str()]);
    let sum = checksums(mount.root());
    mount.unmount();
    check(kind, &disk.path);
    disk.detach();

    // All of it is in the session, not in a cache of this machine's.
    let disk = state.attach(&source, &[]);
    check(kind, &disk.path);
    let mount = Mount::new(&disk.path, kind);
    assert!(checksums(mount.root()) == sum, "every file is as it was");
    run(
        "git",
        ["-C".as_ref(), mount.path("repository/clone").as_os_str(), "fsck".as_ref(), "--full".as_ref()],
    );
    mount.unmount();
    disk.detach();
    state.assert_empty();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn ext4_is_in_order_after_much_work() {
    work_on("ext4", 512 * MIB);
}

#[test]
fn xfs_is_in_order_after_much_work() {
    work_on("xfs", 640 * MIB);
}

#[test]
fn btrfs_is_in_order_after_much_work() {
    work_on("btrfs", 768 * MIB);
}

/// Copies the sources of this project again and again, some at the same time, and deletes some.
fn copy_trees(to: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"));
    for round in 0..3 {
        std::thread::scope(|scope| {
            for copy in 0..4 {
                let target = to.join(format!("{round}.{copy}"));
                scope.spawn(move || {
                    fs::create_dir(&target).expect("creating a directory");
                    let [src, tests, docs] = ["src", "tests", "docs"].map(|name| from.join(name));
                    run(
                        "cp",
                        [
                            "-a".as_ref(),
                            src.as_os_str(),
                            tests.as_os_str(),
                            docs.as_os_str(),
                            target.as_os_str(),
                        ],
                    );
                    run("diff", ["-r".as_ref(), src.as_os_str(), target.join("src").as_os_str()]);
                });
            }
        });
        fs::remove_dir_all(to.join(format!("{round}.0"))).expect("deleting a tree");
    }
}

/// Random writes by mapping, past the cache and through it, each read again and compared.
fn verify(at: &Path) {
    for (name, words) in [
        ("mapped", ["--ioengine=mmap", "--bs=4k", "--fsync=128"]),
        ("direct", ["--ioengine=libaio", "--direct=1", "--iodepth=16"]),
        ("cached", ["--ioengine=psync", "--bsrange=512-64k", "--fdatasync=64"]),
    ] {
        let (name, directory) = (format!("--name={name}"), format!("--directory={}", at.display()));
        let job = [
            "--rw=randwrite",
            "--size=8m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--minimal",
            "--verify_state_save=0",
        ];
        run("fio", [&[name.as_str(), &directory][..], &words, &job].concat());
    }
}

/// A program of many small parts, built by several compilers at a time, cleaned away and built again.
fn build(at: &Path) {
    const PARTS: u32 = 60;
    fs::create_dir(at).expect("creating a directory");
    let write = |name: &str, text: &str| fs::write(at.join(name), text).expect("creating a file");
    let mut main = "#include <stdio.h>\n".to_owned();
    let mut sum = String::new();
    for part in 0..PARTS {
        let text = format!(
            "#include <stdlib.h>\n#include <string.h>\nstatic char text[4096] = \"{part}\";\n\
             int part{part}(void) {{ return atoi(text) + (int)strlen(text + 8); }}\n"
        );
        write(&format!("part{part}.c"), &text);
        main += &format!("int part{part}(void);\n");
        sum += &format!(" + part{part}()");
    }
    write("main.c", &format!("{main}int main(void) {{ printf(\"%d\\n\", 0{sum}); return 0; }}\n"));
    write(
        "Makefile",
        "parts := $(patsubst %.c,%.o,$(wildcard part*.c))\n\
         program: main.o parts.a\n\tcc -o $@ $^\n\
         parts.a: $(parts)\n\tar rc $@ $^\n\
         %.o: %.c\n\tcc -g -O1 -c -o $@ $<\n\
         clean:\n\trm -f program parts.a *.o\n",
    );
    let make = |target: &str| {
        run("make", ["-s".as_ref(), "-j4".as_ref(), "-C".as_ref(), at.as_os_str(), target.as_ref()]);
    };
    for round in 0..2 {
        if round > 0 {
            make("clean");
        }
        make("program");
        let output = run(at.join("program").to_str().expect("text"), [""; 0]);
        assert_eq!(output, format!("{}\n", PARTS * (PARTS - 1) / 2));
    }
}

/// A repository with branches, a clone, and all of it packed anew.
fn use_git(at: &Path) {
    let git = |directory: &Path, args: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "120", "git"]).arg("-C").arg(directory).args(args);
        // Of whoever runs the tests, nothing is asked.
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
        for role in ["AUTHOR", "COMMITTER"] {
            command
                .env(format!("GIT_{role}_NAME"), "Nobody")
                .env(format!("GIT_{role}_EMAIL"), "nobody@example.org");
        }
        succeed("git", command)
    };
    let origin = at.join("origin");
    fs::create_dir_all(&origin).expect("creating a directory");
    git(&origin, &["init", "--quiet", "--initial-branch=main"]);
    let mut random = Random::new(5);
    for commit in 0..12 {
        if commit % 4 == 3 {
            git(&origin, &["checkout", "--quiet", "-b", &format!("branch{commit}")]);
        }
        for file in 0..20 {
            let text =
                random.bytes(2000 + 100 * file).iter().map(|byte| format!("{byte}\n")).collect::<String>();
            fs::write(origin.join(format!("file{file}")), text).expect("writing a file");
        }
        git(&origin, &["add", "--all"]);
        git(&origin, &["commit", "--quiet", "--message", "Change everything"]);
    }
    git(at, &["clone", "--quiet", "--no-local", "origin", "clone"]);
    git(&origin, &["gc", "--quiet", "--prune=now"]);
    git(&at.join("clone"), &["checkout", "--quiet", "HEAD~6"]);
    git(&origin, &["fsck", "--full"]);
}

/// A Debian package with many files.
fn package(at: &Path) -> std::path::PathBuf {
    fs::create_dir_all(at.join("DEBIAN")).expect("creating a directory");
    fs::create_dir_all(at.join("usr/share/probe")).expect("creating a directory");
    let control = "Package: memdev-probe\nVersion: 1.0\nArchitecture: all\n\
        Maintainer: Nobody <nobody@example.org>\nDescription: A probe\n";
    fs::write(at.join("DEBIAN/control"), control).expect("creating a file");
    for n in 0..400 {
        let text = format!("{n}\n").repeat(n);
        fs::write(at.join(format!("usr/share/probe/{n}")), text).expect("creating a file");
    }
    let deb = at.with_extension("deb");
    run("dpkg-deb", ["--root-owner-group".as_ref(), "--build".as_ref(), at.as_os_str(), deb.as_os_str()]);
    deb
}

/// Installs and reinstalls the package under `root`, with all the syncing that dpkg does.
fn install(root: &Path, package: &Path) {
    for directory in ["admin/info", "admin/updates", "admin/triggers", "files"] {
        fs::create_dir_all(root.join(directory)).expect("creating a directory");
    }
    for file in ["admin/status", "admin/available"] {
        fs::write(root.join(file), "").expect("creating a file");
    }
    let [admin, files] = ["admin", "files"].map(|name| root.join(name).display().to_string());
    for _ in 0..2 {
        let (admin, files) = (format!("--admindir={admin}"), format!("--instdir={files}"));
        run("dpkg", [admin.as_ref(), files.as_ref(), "--install".as_ref(), package.as_os_str()]);
    }
    run("dpkg", [&format!("--admindir={admin}"), &format!("--instdir={files}"), "--verify", "memdev-probe"]);
    assert_eq!(fs::read(root.join("files/usr/share/probe/7")).expect("an installed file"), b"7\n".repeat(7));
}

/// Random operations on one file, each compared with what a file in memory would hold (as `fsx` does).
fn exercise(path: &Path, seed: u64, operations: u32) {
    const MOST: u64 = 2 * MIB;
    let mut random = Random::new(seed);
    let mut model: Vec<u8> = Vec::new();
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .expect("opening a file")
    };
    let mut file = open();
    for step in 0..operations {
        let offset = random.below(MOST);
        let length = random.below(128 << 10) + 1;
        let end = (offset + length).min(MOST);
        match random.below(12) {
            0..=3 => {
                let data = random.bytes(end - offset);
                file.write_all_at(&data, offset).expect("writing");
                if model.len() < size(end) {
                    model.resize(size(end), 0);
                }
                model[size(offset)..size(end)].copy_from_slice(&data);
            }
            4..=6 => {
                let mut data = vec![0; size(end - offset)];
                let mut got = 0;
                while let Ok(n @ 1..) = file.read_at(&mut data[got..], offset + got as u64) {
                    got += n;
                }
                let expected = model.get(size(offset)..).unwrap_or_default();
                let expected = &expected[..expected.len().min(size(end - offset))];
                assert!(data[..got] == *expected, "step {step} of seed {seed}: {got} bytes at {offset}");
            }
            7 => {
                file.set_len(offset).expect("setting the length");
                model.resize(size(offset), 0);
            }
            8 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, offset, end - offset).expect("punching a hole");
                let hole = size(offset).min(model.len())..size(end).min(model.len());
                model[hole].fill(0);
            }
            9 => file.sync_data().expect("syncing"),
            10 => file.sync_all().expect("syncing"),
            _ => file = open(),
        }
    }
    assert!(fs::read(path).expect("reading the file") == model, "seed {seed}, at the end");
}

/// The checksum of every file below `root`, by its path.
fn checksums(root: &Path) -> String {
    let script = "cd \"$0\" && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    run("sh", ["-c".as_ref(), script.as_ref(), root.as_os_str()])
}
