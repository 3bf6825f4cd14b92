//! Real file systems on sessions, mounted read-write by the machine's own kernel (nbdfuse, loop, ext4).
//!
//! They need root, /dev/fuse and loop devices, so a plain `cargo test` leaves them out; `tools/test` runs them and lets
//! none be missing.

mod interop_support;
mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use interop_support::mounted::Mounted;
use interop_support::{run, uri};
use support::server::scratch;
use support::{Image, MIB, Random, Server};

/// An ext4 image of `size` bytes with what is in `tree`.
fn ext4_image(path: &Path, size: u64, tree: &Path) -> Image {
    let image = Image::empty(path, size);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), "-d".as_ref(), tree.as_os_str(), path.as_os_str()]);
    image
}

/// A tree with some hundred files; `content(n)` is what file n holds.
fn some_tree(root: &Path) {
    for directory in 0..8 {
        let directory = root.join(format!("dir{directory}"));
        fs::create_dir_all(&directory).expect("creating a directory");
        for file in 0..40 {
            fs::write(directory.join(format!("file{file}")), content(file)).expect("creating a file");
        }
    }
    fs::write(root.join("hostname"), "golden\n").expect("creating a file");
}

fn content(n: u64) -> Vec<u8> {
    Random::new(n).bytes(500 * n + n)
}

/// Copies what a session holds into a file and checks the file system in it, apart from the loop device.
#[track_caller]
fn assert_clean_copy(uri: &str, copy: &Path) {
    run("nbdcopy", [uri.as_ref(), copy.as_os_str()]);
    run("e2fsck", ["-fn".as_ref(), copy.as_os_str()]);
}

/// One file of an unmounted file system image.
fn file_in(image: &Path, path: &str) -> String {
    run("debugfs", ["-R".as_ref(), format!("cat {path}").as_ref(), image.as_os_str()])
}

#[test]
fn a_file_system_is_changed_in_a_session_and_is_in_order_afterwards() {
    let dir = scratch();
    let tree = dir.path().join("tree");
    some_tree(&tree);
    let image = ext4_image(&dir.path().join("disk.img"), 192 * MIB, &tree);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let session = uri(&server, "disk@one");

    let mut disk = Mounted::new(&session);
    assert_eq!(fs::read(disk.path("dir3/file7")).expect("reading a file of the base"), content(7));

    // Rewrite, append, punch, rename, link, delete, and a directory of many small files.
    fs::write(disk.path("hostname"), "changed\n").expect("rewriting a file");
    let mut log = fs::OpenOptions::new().append(true).open(disk.path("dir0/file1")).expect("opening a file");
    log.write_all(b"appended").expect("appending");
    log.sync_all().expect("fsync reaches the session");
    drop(log);
    let big = fs::File::create(disk.path("big")).expect("creating a file");
    for block in 0..64_u64 {
        big.write_all_at(&Random::new(block).bytes(MIB), block * MIB).expect("writing a large file");
    }
    big.sync_all().expect("fsync reaches the session");
    drop(big);
    run(
        "fallocate",
        [
            "--punch-hole".as_ref(),
            "--offset=10M".as_ref(),
            "--length=20M".as_ref(),
            disk.path("big").as_os_str(),
        ],
    );
    fs::remove_dir_all(disk.path("dir1")).expect("deleting a directory");
    fs::rename(disk.path("dir2"), disk.path("moved")).expect("renaming a directory");
    fs::hard_link(disk.path("dir3/file7"), disk.path("linked")).expect("linking");
    symlink("linked", disk.path("symlinked")).expect("linking");
    fs::create_dir(disk.path("many")).expect("creating a directory");
    for n in 0..2000 {
        fs::write(disk.path(&format!("many/{n}")), format!("{n}\n")).expect("creating a file");
    }
    run("fstrim", [disk.root()]);
    run("sync", ["-f".as_ref(), disk.root().as_os_str()]);
    disk.unmount();
    disk.assert_clean();

    // Mounted again, all of it is there.
    disk.mount();
    let now =
        |path: &str| fs::read(disk.path(path)).unwrap_or_else(|error| panic!("reading {path}: {error}"));
    assert_eq!(now("hostname"), b"changed\n");
    assert_eq!(now("dir0/file1"), [content(1), b"appended".to_vec()].concat());
    let big = now("big");
    let (mib, hole) = (1 << 20, (10 << 20)..(30 << 20));
    for block in 0..64_usize {
        let part = &big[block * mib..(block + 1) * mib];
        if hole.contains(&(block * mib)) {
            assert!(part.iter().all(|byte| *byte == 0), "MiB {block} was punched out");
        } else {
            assert!(part == Random::new(block as u64).bytes(MIB), "MiB {block} is as it was written");
        }
    }
    assert!(!disk.path("dir1").exists());
    assert_eq!(now("moved/file5"), content(5));
    assert_eq!(now("symlinked"), content(7));
    assert_eq!(fs::metadata(disk.path("linked")).expect("the link is there").nlink(), 2);
    assert_eq!(now("many/1999"), b"1999\n");
    disk.detach();

    let copy = dir.path().join("copy.img");
    assert_clean_copy(&session, &copy);
    assert_eq!(file_in(&copy, "/hostname"), "changed\n");
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn two_mounted_sessions_have_their_own_changes() {
    let dir = scratch();
    let tree = dir.path().join("tree");
    some_tree(&tree);
    let image = ext4_image(&dir.path().join("disk.img"), 64 * MIB, &tree);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let names = ["alice", "bob"];

    let mut disks = names.map(|name| Mounted::new(&uri(&server, &format!("disk@{name}"))));
    for (disk, name) in disks.iter().zip(names) {
        fs::write(disk.path("hostname"), name).expect("rewriting a file");
        fs::write(disk.path(name), name).expect("creating a file");
    }
    for (disk, name) in disks.iter().zip(names) {
        assert_eq!(fs::read_to_string(disk.path("hostname")).expect("reading a file"), name);
        let others = names.iter().filter(|other| **other != name);
        others.for_each(|other| assert!(!disk.path(other).exists(), "{name} sees a file of {other}"));
    }
    for (disk, name) in disks.iter_mut().zip(names) {
        disk.unmount();
        disk.assert_clean();
        let copy = dir.path().join(name);
        assert_clean_copy(&uri(&server, &format!("disk@{name}")), &copy);
        assert_eq!(file_in(&copy, "/hostname"), name);
    }
    let third = Mounted::new(&uri(&server, "disk@carol"));
    assert_eq!(fs::read_to_string(third.path("hostname")).expect("reading a file"), "golden\n");
    third.detach();
    disks.into_iter().for_each(Mounted::detach);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

/// A Debian package with a file of its own, a changed file of the system, and a script that runs when it is installed.
fn package(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("package");
    for directory in ["DEBIAN", "usr/bin", "usr/share/memdev-probe"] {
        fs::create_dir_all(tree.join(directory)).expect("creating a directory");
    }
    let write = |path: &str, text: &str, mode: u32| {
        let path = tree.join(path);
        fs::write(&path, text).expect("creating a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("setting a file's mode");
    };
    let control = "Package: memdev-probe\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n\
                   Description: A probe that is installed in a session\n";
    write("DEBIAN/control", control, 0o644);
    write("DEBIAN/postinst", "#!/bin/sh\nset -e\nln -sf /usr/bin/memdev-probe /usr/bin/probe\n", 0o755);
    write("usr/bin/memdev-probe", "#!/bin/sh\necho probe works\n", 0o755);
    for n in 0..300 {
        write(&format!("usr/share/memdev-probe/{n}"), &format!("{n}\n").repeat(n), 0o644);
    }
    let deb = dir.join("memdev-probe.deb");
    run("dpkg-deb", ["--root-owner-group".as_ref(), "--build".as_ref(), tree.as_os_str(), deb.as_os_str()]);
    deb
}

#[test]
fn packages_are_changed_in_a_debian_root() {
    let golden = std::env::var("MEMDEV_ROOT_IMAGE")
        .expect("MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image prints it");
    let dir = scratch();
    let size = fs::metadata(&golden).expect("the Debian root image is there").len();
    let image = Image::empty(dir.path().join("root.img"), size);
    run("cp", ["--sparse=always".as_ref(), golden.as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let session = uri(&server, "root@one");
    let deb = package(dir.path());

    let mut disk = Mounted::new(&session);
    let root = disk.root();
    let inside = |args: &[&str]| run("chroot", [root.to_str().expect("text")].iter().chain(args));
    let packages = |text: &str| text.lines().filter(|line| line.starts_with("ii ")).count();
    let installed = packages(&inside(&["dpkg", "--list"]));
    assert!(installed > 50, "it is a Debian root: {installed} packages");

    // Install, reinstall, and remove a package that came with the image.
    fs::copy(&deb, disk.path("tmp/probe.deb")).expect("copying the package into the root");
    inside(&["dpkg", "--install", "/tmp/probe.deb"]);
    assert_eq!(inside(&["probe"]), "probe works\n");
    inside(&["dpkg", "--verify", "memdev-probe"]);
    inside(&["dpkg", "--install", "/tmp/probe.deb"]);
    inside(&["dpkg", "--purge", "--force-depends", "tzdata"]);
    assert!(!disk.path("usr/share/zoneinfo/Europe/Berlin").exists());

    // Files of other packages: rewritten, replaced by rename, deleted; users and a hostname of one's own.
    fs::write(disk.path("etc/hostname"), "session-one\n").expect("rewriting a file");
    inside(&["useradd", "--create-home", "somebody"]);
    inside(&["sh", "-c", "for f in /etc/*.conf; do sed -i '1i # changed' $f; done; rm -rf /usr/share/doc/*"]);
    let version = inside(&["cat", "/etc/debian_version"]);
    run("sync", ["-f".as_ref(), disk.root().as_os_str()]);
    disk.unmount();
    disk.assert_clean();

    disk.mount();
    assert_eq!(packages(&inside(&["dpkg", "--list"])), installed, "one more, one less");
    assert_eq!(inside(&["dpkg", "--audit"]), "");
    assert_eq!(inside(&["probe"]), "probe works\n");
    assert_eq!(inside(&["stat", "--format=%U", "/home/somebody"]), "somebody\n");
    disk.detach();

    let copy = dir.path().join("copy.img");
    assert_clean_copy(&session, &copy);
    assert_eq!(file_in(&copy, "/etc/hostname"), "session-one\n");
    assert_eq!(file_in(&copy, "/etc/debian_version"), version);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}
