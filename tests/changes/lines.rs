//! What is told of each kind of change, and how.

use super::{Edited, changes, patch, told_of, trouble};
use serde_json::{Value, json};
use std::fs;

/// One change of every kind.
pub(crate) fn every_kind() -> Edited {
    let edited = Edited::new(&[], "");
    let text = edited.file("text", b"changed\n");
    let same = edited.file("same", b"base\n");
    let script = format!(
        "write {same} /etc/added\n\
         mkdir /etc/dir\n\
         write {same} /etc/dir/inner\n\
         symlink /etc/dir/to ../nowhere\n\
         set_inode_field /usr/large mode 0100600\n\
         set_inode_field /usr/large uid 70000\n\
         ea_set /usr/large user.note value\n\
         rm /usr/link\n\
         symlink /usr/link bin/other\n\
         ln /usr/bin/tool /usr/bin/third\n\
         sif /usr/bin/tool links_count 3\n\
         cd /etc\n\
         mknod pipe p\n\
         mknod null c 1 3\n\
         rm /etc/hostname\n\
         write {text} /etc/hostname\n\
         rm /etc/motd\n"
    );
    edited.edit(&script);
    edited
}

const LINES: &str = "\
A /etc/added
A /etc/dir
A /etc/dir/inner
A /etc/dir/to
M /etc/hostname (content)
D /etc/motd
A /etc/null
A /etc/pipe
A /usr/bin/third (a link to /usr/bin/other)
M /usr/large (mode 0644 -> 0600, owner 0:0 -> 70000:0, xattrs)
M /usr/link (content)
";

#[test]
fn every_kind_of_change_has_a_line() {
    let edited = every_kind();
    // Who made the base owns its files.
    let owner = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let lines = LINES.replace("owner 0:0 -> 70000:0", &format!("owner {owner}:{group} -> 70000:{group}"));
    let told = told_of(&edited.now, &edited.base, &[]);
    let told: String = told.lines().map(|line| line.to_owned() + "\n").collect();
    // debugfs makes files of root's, and mkfs those of who runs it.
    let told = told.replace(&format!("content, owner {owner}:{group} -> 0:0"), "content");
    assert_eq!(told, lines);
    assert_eq!(told_of(&edited.base, &edited.base, &[]), "");
}

#[test]
fn json_has_both_sides() {
    let edited = every_kind();
    let told = told_of(&edited.now, &edited.base, &["--json"]);
    let list: Vec<Value> = serde_json::from_str(&told).unwrap();
    assert_eq!(told.lines().count(), list.len() + 2, "one line a change");
    let find = |path: &str| list.iter().find(|change| change["path"] == path).unwrap_or(&Value::Null);
    let large = find("/usr/large");
    assert_eq!((&large["change"], &large["what"]), (&json!("modified"), &json!(["mode", "owner", "xattrs"])));
    assert_eq!((&large["before"]["mode"], &large["now"]["mode"]), (&json!("0644"), &json!("0600")));
    assert_eq!((&large["now"]["size"], &large["now"]["uid"]), (&json!(300_000), &json!(70_000)));
    assert_eq!(large["now"]["xattrs"], json!({ "user.note": "76616c7565" }));
    let link = find("/usr/link");
    assert_eq!(
        (&link["before"]["target"], &link["now"]["target"]),
        (&json!("bin/tool"), &json!("bin/other"))
    );
    assert_eq!(find("/etc/null")["now"]["device"], json!([1, 3]));
    assert_eq!(find("/etc/null")["now"]["type"], "character device");
    let gone = find("/etc/motd");
    assert_eq!(
        (&gone["change"], &gone["now"], &gone["before"]["size"]),
        (&json!("deleted"), &Value::Null, &json!(6))
    );
    assert_eq!(find("/usr/bin/third")["link"], "/usr/bin/other");
    assert_eq!(find("/etc/pipe")["change"], "added");
    assert_eq!(told_of(&edited.base, &edited.base, &["--json"]), "[]\n");
}

#[test]
fn what_was_renamed_is_deleted_and_added() {
    let edited = Edited::new(&[], "ln /etc/motd /usr/motd\nunlink /etc/motd\n");
    let expected = "D /etc/motd\nA /usr/motd (was /etc/motd)\n";
    assert_eq!(told_of(&edited.now, &edited.base, &[]), expected);
}

#[test]
fn names_that_come_to_be_of_one_file_or_of_two_are_told() {
    let edited = Edited::new(&[], "");
    let copy = edited.file("copy", b"#!/bin/sh\n");
    let like = "sif /usr/bin/tool mode 0100644\nsif /usr/bin/other mode 0100644\n";
    edited.edit(&format!("{like}sif /usr/bin/tool uid 0\nsif /usr/bin/tool gid 0\n"));
    fs::copy(&edited.now, &edited.base).unwrap();
    edited.edit(&format!(
        "unlink /usr/bin/tool\nsif /usr/bin/other links_count 1\nwrite {copy} /usr/bin/tool\nsif /usr/bin/tool mode 0100644\n"
    ));
    assert_eq!(told_of(&edited.now, &edited.base, &[]), "M /usr/bin/tool (links)\n");
    assert_eq!(
        told_of(&edited.base, &edited.now, &[]),
        "M /usr/bin/tool (links, a link to /usr/bin/other)\n"
    );
}

#[test]
fn times_are_told_if_asked_for() {
    let edited = Edited::new(&[], "sif /etc/motd mtime 20200101\nsif /etc/hostname atime 20200101\n");
    assert_eq!(told_of(&edited.now, &edited.base, &[]), "");
    assert_eq!(told_of(&edited.now, &edited.base, &["--times"]), "M /etc/motd (mtime)\n");
}

#[test]
fn the_exit_status_is_that_of_diff_if_asked_for() {
    let edited = Edited::new(&[], "rm /etc/motd\n");
    let (now, base) = (edited.now.to_str().unwrap(), edited.base.to_str().unwrap());
    let status = |args: &[&str]| changes(args).status.code();
    assert_eq!(status(&[now, "--base", base]), Some(0));
    assert_eq!(status(&[now, "--base", base, "--exit-code"]), Some(1));
    assert_eq!(status(&[base, "--base", base, "--exit-code"]), Some(0));
    assert_eq!(trouble(&[now, "--exit-code"]).1, Some(2));
    assert_eq!(trouble(&[now]).1, Some(1));
}

#[test]
fn every_make_of_file_system_is_understood() {
    let cases: [&[&str]; 9] = [
        &["-t", "ext2"],
        &["-t", "ext3", "-b", "1024"],
        &["-b", "1024", "-O", "^64bit"],
        &["-b", "2048", "-O", "^metadata_csum"],
        &["-I", "128"],
        &["-O", "inline_data"],
        &["-O", "meta_bg,^resize_inode", "-b", "1024"],
        &["-O", "ea_inode"],
        &["-O", "bigalloc,^resize_inode"],
    ];
    for options in cases {
        let edited = Edited::new(options, "");
        let large = edited.file("large", &super::support::Random::new(7).bytes(700_000));
        let small = edited.file("small", b"in an inode");
        edited.edit(&format!(
            "rm /etc/motd\nrm /usr/large\nwrite {large} /usr/large\nwrite {small} /etc/small\nmkdir /dir\n\
             sif /usr/bin/tool mode 0100755\n"
        ));
        let told = told_of(&edited.now, &edited.base, &["--json"]);
        let list: Vec<Value> = serde_json::from_str(&told).unwrap();
        let brief = |change: &Value| {
            let text = |key: &str| change[key].as_str().unwrap_or_default().to_owned();
            (text("path"), text("change"))
        };
        let expected = [
            ("/dir", "added"),
            ("/etc/motd", "deleted"),
            ("/etc/small", "added"),
            ("/usr/bin/other", "modified"),
            ("/usr/bin/tool", "modified"),
            ("/usr/large", "modified"),
        ];
        let expected: Vec<_> = expected.map(|(path, change)| (path.to_owned(), change.to_owned())).into();
        assert_eq!(list.iter().map(brief).collect::<Vec<_>>(), expected, "{options:?}");
        assert!(list[5]["what"].as_array().unwrap().contains(&json!("content")), "{options:?}");
    }
}

#[test]
fn what_is_damaged_is_said_in_one_line() {
    let edited = Edited::new(&[], "");
    let (now, base) = (edited.now.to_str().unwrap(), edited.base.to_str().unwrap());
    // A directory that leads to itself.
    edited.edit("ln /etc /etc/again\n");
    let (said, status) = trouble(&[now, "--base", base]);
    let why = "The file system of the session is damaged: a directory is in several places; check a copy";
    assert!(status == Some(1) && said.contains(why), "{said}");
    // An inode that says its attributes lie somewhere where none can.
    fs::copy(&edited.base, &edited.now).unwrap();
    edited.edit("sif /etc/motd file_acl 4294967295\n");
    let (said, _) = trouble(&[now, "--base", base]);
    assert!(said.contains("The file system of the session is damaged: inode "), "{said}");
    // The superblock says that it is larger than the disk.
    fs::copy(&edited.base, &edited.now).unwrap();
    patch(&edited.now, 1024 + 4, &[0xff; 4]);
    let (said, _) = trouble(&[now, "--base", base]);
    assert!(said.contains("larger than its disk"), "{said}");
    // No file system at all.
    patch(&edited.now, 1024, &[0; 1024]);
    let (said, _) = trouble(&[now, "--base", base]);
    assert!(said.contains("No ext4 is on the disk of the session"), "{said}");
}
