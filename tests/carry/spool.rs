//! What cannot be delivered at the end is kept, and delivered later.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use crate::house::{House, tree};
use crate::interop_support::{run, said};

/// A small file system in memory.
pub struct Small(std::path::PathBuf);

impl Small {
    pub fn at(path: std::path::PathBuf, size: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        let options = format!("size={size}");
        run("mount", ["-t", "tmpfs", "-o", &options, "none", path.to_str().unwrap()]);
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        run("umount", ["-l", self.0.to_str().unwrap()]);
    }
}

#[track_caller]
pub fn id_of(output: &Output) -> String {
    let said = said(output);
    let (_, id) = said.trim_end().rsplit_once("memdev carry resume ").expect(&said);
    id.to_owned()
}

#[test]
fn a_full_destination() {
    let house = House::new();
    let small = Small::at(house.dest(""), "1m");
    let script = "mkdir d; echo first >d/a; head -c 3000000 /dev/urandom >d/big; sha256sum d/big >sum; ln -s d/big link; chmod 600 d/big";
    let output = house.attempt(&["--carry-wait", "3s"], script);
    assert_eq!(output.status.code(), Some(74), "{}", said(&output));
    assert!(said(&output).contains("no space left on device"), "{}", said(&output));
    let id = id_of(&output);
    let spooled = house.spooled();
    assert_eq!((spooled.len(), spooled[0]["id"].as_str()), (1, Some(&*id)), "{spooled:?}");
    assert_eq!(spooled[0]["path"], "/home/u");
    assert!(spooled[0]["bytes"].as_u64().unwrap() >= 3_000_000, "{spooled:?}");
    let spool = house.place.state().join("spool");
    assert_eq!(spool.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    for line in tree(&spool) {
        assert!(line.contains(" 700") || line.contains(" 600 "), "{line}");
    }
    assert!(!house.tree().iter().any(|line| line.contains(".memdev-carry")), "{:?}", house.tree());
    // It stays until it is delivered.
    let failed = house.memdev_carry(&["resume", &id]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(said(&failed).contains("stays in the spool: try again later"), "{}", said(&failed));
    drop(small);
    let resumed = house.memdev_carry(&["resume"]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(house.spooled().is_empty());
    // What had been delivered was in the file system that is gone.
    assert!(house.dest("d/big").exists() && house.dest("link").symlink_metadata().is_ok());
    let elsewhere = House::to(house.dest(""));
    let all = elsewhere.tree();
    assert!(all.contains(&"d/big 600 3000000".to_owned()), "{all:?}");
}

#[test]
fn a_destination_that_has_gone() {
    let house = House::new();
    let gone = house.place.path("gone");
    let script = "echo ready; read x; echo late >x; echo late >y; exit 3";
    let carry = format!("/home/u={}", house.dest("").display());
    let mut command = house
        .place
        .run(&["--carry", &carry, "--workdir", "/home/u", "--carry-wait", "1s"], &["sh", "-c", script]);
    command
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    use std::io::{BufRead, BufReader};
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    fs::rename(house.dest(""), &gone).unwrap();
    fs::remove_dir(&gone).unwrap();
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "the command's own status is kept");
    let id = id_of(&output);
    let failed = house.memdev_carry(&["resume"]);
    assert!(said(&failed).contains("make the directory, or mount it"), "{}", said(&failed));
    fs::create_dir(house.dest("")).unwrap();
    // Named by how it begins.
    let resumed = house.memdev_carry(&["resume", &id[..6]]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert_eq!(house.tree(), ["x 644 5", "y 644 5"]);
}

#[test]
fn what_is_not_to_be_delivered_is_forgotten() {
    let house = House::new();
    let small = Small::at(house.dest(""), "64k");
    let output = house.attempt(&["--carry-wait", "500ms"], "head -c 1000000 /dev/zero | tr '\\0' x >big");
    let id = id_of(&output);
    let text = String::from_utf8(house.memdev_carry(&["status"]).stdout).unwrap();
    assert!(text.starts_with(&format!("spool {id}: ")), "{text}");
    assert_eq!(house.memdev_carry(&["forget", "0123"]).status.code(), Some(1));
    let forgot = house.memdev_carry(&["forget", &id]);
    assert!(forgot.status.success(), "{}", said(&forgot));
    assert!(house.spooled().is_empty());
    assert!(house.memdev_carry(&["resume"]).status.success(), "there is nothing to be delivered");
    drop(small);
}

#[test]
fn a_spool_that_cannot_be_used_is_said() {
    let house = House::new();
    let small = Small::at(house.dest(""), "64k");
    fs::create_dir_all(house.place.state()).unwrap();
    let spool = house.place.state().join("spool");
    fs::create_dir(&spool).unwrap();
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o755)).unwrap();
    let output = house.attempt(&["--carry-wait", "500ms"], "head -c 1000000 /dev/zero | tr '\\0' x >big");
    assert_eq!(output.status.code(), Some(74));
    assert!(said(&output).contains("are LOST"), "{}", said(&output));
    assert!(said(&output).contains("it is open to others"), "{}", said(&output));
    drop(small);
}

#[test]
fn what_somebody_has_changed_meanwhile_is_kept() {
    let house = House::new();
    let small = Small::at(house.dest(""), "64k");
    fs::write(house.dest("x"), "before").unwrap();
    let output = house.attempt(&["--carry-wait", "500ms"], "head -c 1000000 /dev/zero | tr '\\0' x >x");
    assert_eq!(output.status.code(), Some(74), "{}", said(&output));
    assert_eq!(house.read("x"), "before", "whole, if old");
    fs::write(house.dest("x"), "meanwhile").unwrap();
    run("mount", ["-o", "remount,size=8m", house.dest("").to_str().unwrap()]);
    let resumed = house.memdev_carry(&["resume"]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(said(&resumed).contains("x was changed by another session as well"), "{}", said(&resumed));
    assert_eq!(house.read("x").len(), 1_000_000);
    let tree = house.tree();
    let kept = tree.iter().find(|line| line.starts_with("x.conflict-other-")).expect("it is kept");
    assert_eq!(house.read(kept.split(' ').next().unwrap()), "meanwhile");
    drop(small);
}
