//! `--mount`: file systems that only the kernel understands.

use std::fs;
use std::path::Path;

use super::House;
use super::edits::script;
use super::interop_support::mounted::Mounted;
use super::interop_support::{run, run_btrfs};
use super::support::server::scratch;
use super::support::{Image, MIB, Random};
use super::walk::{Walk, assert_same, told};

/// Random edits of a tree on a file system of this kind, told and walked.
fn is_told(kind: &str, make: &[&str], options: &str) {
    let dir = scratch();
    let path = dir.path().join("root.img");
    let image = Image::empty(&path, 512 * MIB);
    let words = make[1..].iter().copied().chain([path.to_str().unwrap()]);
    if kind == "btrfs" {
        run_btrfs(make[0], words)
    } else {
        run(make[0], words)
    };
    let place = dir.path().join("place");
    fs::create_dir(&place).unwrap();
    run("mount", ["-o", "loop", path.to_str().unwrap(), place.to_str().unwrap()]);
    let fill = |root: &Path| {
        let mut random = Random::new(1);
        for directory in 0..20 {
            let directory = root.join(format!("directory{directory}"));
            fs::create_dir(&directory).unwrap();
            for file in 0..20 {
                let length = random.below(20_000);
                fs::write(directory.join(format!("file{file}")), random.bytes(length)).unwrap();
            }
        }
    };
    fill(&place);
    run("umount", [&place]);
    let house = House::unseen(&image, dir);
    let mut base = Mounted::attach(&house.uri("untouched"));
    base.mount_as(kind, options);
    let before = Walk::of(&base.root());
    base.detach();
    let mut mounted = Mounted::attach(&house.uri("x"));
    mounted.mount_as(kind, options);
    script(&mounted.root(), &mut Random::new(2), 80);
    super::sync(&mounted);
    let now = Walk::of(&mounted.root());
    let expected = before.expected(&now);
    assert!(expected.len() > 20, "{}", expected.len());
    let found = told(&house.changes("x", &["--json", "--times", "--mount"]));
    assert_same(&found, &expected, kind);
    assert!(house.devices_left().is_empty(), "{:?}", house.devices_left());
    mounted.detach();
    house.server.stop();
}

#[test]
fn xfs_is_told() {
    is_told("xfs", &["mkfs.xfs", "-q"], "nouuid");
}

#[test]
fn btrfs_is_told() {
    is_told("btrfs", &["mkfs.btrfs", "-q"], "rw");
}
