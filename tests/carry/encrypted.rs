//! What goes to the spool is encrypted to somebody: by memdev and Debian's `age`, each reading what the other has written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::house::House;
use crate::interop_support::{run, said};
use crate::spool::{Small, id_of};

/// A key of age's: its file, and whom is encrypted to.
fn key(house: &House, name: &str) -> (PathBuf, String) {
    let path = house.place.path(name);
    run("age-keygen", ["-o", path.to_str().unwrap()]);
    let public = Command::new("age-keygen").arg("-y").arg(&path).output().unwrap();
    (path, String::from_utf8(public.stdout).unwrap().trim().to_owned())
}

/// All files below.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() { left.push(entry.path()) } else { all.push(entry.path()) }
        }
    }
    all
}

#[test]
fn what_is_in_the_spool_is_for_one_to_read() {
    let house = House::new();
    let small = Small::at(house.dest(""), "4k");
    fs::write(house.dest("filler"), [1; 4096]).unwrap();
    let (identity, recipient) = key(&house, "key");
    let (other, _) = key(&house, "other");
    let script = "mkdir secret-dir; echo secret-content >secret-dir/secret-name; head -c 3000000 /dev/urandom >secret-big; chmod 600 secret-big; \
                  truncate -s 8G secret-holes; echo secret-end >>secret-holes; printf x >\"$(printf 'secret-\\377')\"; : >secret-empty; \
                  n=secret-$(printf '%0200d' 1); mkdir -p $n/$n; echo deep >$n/$n/x; touch -d @1000000000 secret-dir/secret-name; rm filler; \
                  ls -A >secret-list; sha256sum secret-big >secret-sum";
    let options = ["--carry-wait", "500ms", "--carry-deletes", "--carry-recipient", &recipient];
    let output = house.attempt(&options, script);
    assert_eq!(output.status.code(), Some(74), "{}", said(&output));
    let id = id_of(&output);
    let status = house.spooled();
    assert_eq!((status.len(), &status[0]["recipient"]), (1, &recipient.clone().into()), "{status:?}");
    assert!(status[0]["bytes"].as_u64().unwrap() > 8 << 30, "{status:?}");
    let text = String::from_utf8(house.memdev_carry(&["status"]).stdout).unwrap();
    assert!(text.contains(&format!(", encrypted to {recipient}")), "{text}");

    // Nothing of it can be read, nor found.
    let spool = house.place.state().join("spool");
    let found = files(&spool);
    for file in &found {
        let bytes = fs::read(file).unwrap();
        let is_secret = bytes.windows(6).any(|part| part == b"secret");
        assert!(!is_secret && !file.to_string_lossy().contains("secret"), "{}", file.display());
    }
    let size: u64 = found.iter().map(|file| file.metadata().unwrap().len()).sum();
    assert!(size < 4_000_000, "holes take no room: {size}");

    // What any age and any tar make of it.
    let script = "set -e -o pipefail; mkdir \"$3\"; age -d -i \"$1\" \"$2\" | tar -x -C \"$3\"";
    let out = house.place.path("out");
    let archive = spool.join(&id).join("rest.age");
    let done =
        Command::new("bash").args(["-c", script, "bash"]).args([&identity, &archive, &out]).output().unwrap();
    assert!(done.status.success(), "{}", said(&done));
    assert_eq!(fs::read_to_string(out.join("files/secret-dir/secret-name")).unwrap(), "secret-content\n");
    assert_eq!(out.join("files/secret-big").metadata().unwrap().len(), 3_000_000);

    let refused = house.memdev_carry(&["resume", &id]);
    assert!(said(&refused).contains("it is encrypted to age1"), "{}", said(&refused));
    assert!(said(&refused).contains("--identity FILE"), "{}", said(&refused));
    let wrong = house.memdev_carry(&["resume", "--identity", other.to_str().unwrap()]);
    assert!(said(&wrong).contains("age says: no identity matched"), "{}", said(&wrong));
    let identity = identity.to_str().unwrap();
    let failed = house.memdev_carry(&["resume", "--identity", identity]);
    assert!(said(&failed).contains("stays in the spool: try again later"), "{}", said(&failed));
    run("mount", ["-o", "remount,size=16m", house.dest("").to_str().unwrap()]);
    let resumed = house.memdev_carry(&["resume", &id, "--identity", identity]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(house.spooled().is_empty() && files(&spool).is_empty());
    let script = "set -e; test ! -e filler; sha256sum -c --quiet secret-sum; test $(stat -c %a secret-big) = 600; test $(stat -c %s secret-holes) = 8589934603; \
                  test $(tail -c 11 secret-holes) = secret-end; test $(stat -c %Y secret-dir/secret-name) = 1000000000; test $(cat secret-*/secret-*/x) = deep; \
                  ls -A | grep -v secret-sum | diff - secret-list";
    house.sh(&[], script);
    drop(small);
}

#[test]
fn what_nothing_can_be_encrypted_to_lets_nobody_in() {
    let house = House::new();
    let bad = format!("age1{}", "q".repeat(58));
    for (recipient, expected) in
        [("me", "'me' is no recipient of age"), ("-i", "is no recipient"), (&bad, "age says: ")]
    {
        let output = house.attempt(&[&format!("--carry-recipient={recipient}")], "echo inside");
        assert!(!output.status.success() && output.stdout.is_empty(), "{recipient}");
        assert!(said(&output).contains(expected), "{recipient}: {}", said(&output));
    }
}

/// What is not whole is not taken for delivered.
#[test]
fn a_rest_that_is_cut_stays() {
    let house = House::new();
    let small = Small::at(house.dest(""), "4k");
    fs::write(house.dest("filler"), [1; 4096]).unwrap();
    let (identity, recipient) = key(&house, "key");
    let script = "for i in 1 2 3; do head -c 200000 /dev/urandom >f$i; done";
    let output = house.attempt(&["--carry-wait", "500ms", "--carry-recipient", &recipient], script);
    let id = id_of(&output);
    run("mount", ["-o", "remount,size=16m", house.dest("").to_str().unwrap()]);
    let archive = house.place.state().join("spool").join(&id).join("rest.age");
    let whole = fs::read(&archive).unwrap();
    fs::write(&archive, &whole[..whole.len() / 2]).unwrap();
    let arguments = ["resume", &id, "--identity", identity.to_str().unwrap()];
    let failed = house.memdev_carry(&arguments);
    let why = "rest.age: age says: failed to decrypt and authenticate payload chunk";
    let is_line = said(&failed).trim_end().lines().count() == 1;
    assert!(!failed.status.success() && said(&failed).contains(why) && is_line, "{}", said(&failed));
    assert_eq!(house.spooled().len(), 1);
    assert!(house.dest("f1").exists() && !house.dest("f3").exists(), "{:?}", house.tree());
    assert!(!house.tree().iter().any(|line| line.contains(".memdev-carry")), "{:?}", house.tree());
    fs::write(&archive, &whole).unwrap();
    let resumed = house.memdev_carry(&arguments);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert_eq!(house.tree().len(), 4, "{:?}", house.tree());
    drop(small);
}
