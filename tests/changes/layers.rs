//! `--tar`: what comes into a layer, and what cannot. That it gives what the session has, where it is put over the base, is
//! tried in `tests/changes_mounted`.

use super::lines::every_kind;
use super::{Edited, changes, told_of};
use crate::interop_support::run;
use std::fs;

/// The entries of a layer as GNU tar lists them: kind and mode, owner, name with where a link leads to.
fn listed(layer: &std::path::Path) -> Vec<String> {
    let text = run("tar", ["-tvf", layer.to_str().unwrap(), "--numeric-owner", "--full-time"]);
    let one = |line: &str| {
        let mut fields = line.split_whitespace();
        let (mode, owner) = (fields.next().unwrap(), fields.next().unwrap());
        let rest: Vec<_> = fields.skip(3).collect();
        format!("{mode} {owner} {}", rest.join(" "))
    };
    text.lines().map(one).collect()
}

#[test]
fn a_layer_has_what_is_new_or_differs_and_marks_for_what_is_gone() {
    let edited = every_kind();
    let layer = edited.dir.path().join("layer.tar");
    assert_eq!(told_of(&edited.now, &edited.base, &["--tar", layer.to_str().unwrap()]), "");
    let listed = listed(&layer);
    let owner = format!("{}/{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let expected = [
        "-rw-r--r-- 0/0 etc/.wh.motd",
        "drwxr-xr-x 0/0 ./",
        &format!("drwxr-xr-x {owner} etc/"),
        "-rw-r--r-- 0/0 etc/added",
        "drwxr-xr-x 0/0 etc/dir/",
        "-rw-r--r-- 0/0 etc/dir/inner",
        "lrwxrwxrwx 0/0 etc/dir/to -> ../nowhere",
        "-rw-r--r-- 0/0 etc/hostname",
        "crw-r--r-- 0/0 etc/null",
        "prw-r--r-- 0/0 etc/pipe",
        &format!("drwxr-xr-x {owner} usr/"),
        &format!("drwxr-xr-x {owner} usr/bin/"),
        &format!("-rw-r--r-- {owner} usr/bin/other"),
        &format!("hrw-r--r-- {owner} usr/bin/third link to usr/bin/other"),
        &format!("hrw-r--r-- {owner} usr/bin/tool link to usr/bin/other"),
        &format!("-rw------- 70000/{} usr/large", rustix::process::getegid().as_raw()),
        "lrwxrwxrwx 0/0 usr/link -> bin/other",
    ];
    // debugfs sets other modes than mkfs for what it makes, from one version to the next: the kind is what counts here.
    let brief = |line: &str| line.split_once(' ').map(|(mode, rest)| format!("{} {rest}", &mode[..1]));
    let (found, expected): (Vec<_>, Vec<_>) =
        (listed.iter().map(|line| brief(line)).collect(), expected.iter().map(|line| brief(line)).collect());
    assert_eq!(found, expected, "{listed:#?}");
    let content = run("tar", ["-xOf", layer.to_str().unwrap(), "etc/hostname"]);
    assert_eq!(content, "changed\n");
    assert_eq!(
        fs::read_dir(edited.dir.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "part"))
            .count(),
        0
    );
}

#[test]
fn where_nothing_has_changed_a_layer_is_empty() {
    let edited = Edited::new(&[], "");
    let out = changes(&[edited.now.to_str().unwrap(), "--base", edited.base.to_str().unwrap(), "--tar", "-"]);
    assert!(out.status.success());
    assert!(out.stdout.len() >= 1024 && out.stdout.iter().all(|byte| *byte == 0));
}

/// A directory that is a file now: what was in it goes without a mark, since no layer could have it.
#[test]
fn what_was_in_a_directory_goes_with_it() {
    let edited = Edited::new(&[], "");
    let file = edited.file("file", b"x");
    edited.edit(&format!("rm /etc/hostname\nrm /etc/motd\nrmdir /etc\nwrite {file} /etc\n"));
    let layer = edited.dir.path().join("layer.tar");
    told_of(&edited.now, &edited.base, &["--tar", layer.to_str().unwrap()]);
    let names: Vec<_> =
        listed(&layer).iter().map(|line| line.split(' ').nth(2).unwrap().to_owned()).collect();
    assert_eq!(names, ["./", "etc"]);
}

#[test]
fn what_a_layer_cannot_hold_is_named_and_fails_it() {
    let edited = Edited::new(&[], "");
    let file = edited.file("file", b"x");
    edited.edit(&format!(
        "write {file} /etc/.wh.hostname\nmkdir /.wh.dir\nwrite {file} /.wh.dir/below\nwrite {file} /etc/fine\n\
         write {file} /socket\nsif /socket mode 0140644\n"
    ));
    let layer = edited.dir.path().join("layer.tar");
    let args = [
        edited.now.to_str().unwrap(),
        "--base",
        edited.base.to_str().unwrap(),
        "--tar",
        layer.to_str().unwrap(),
    ];
    let out = changes(&args);
    let said = String::from_utf8(out.stderr).unwrap();
    let expected = "\
        memdev: Left out /.wh.dir: its name is one that layers use themselves\n\
        memdev: Left out /.wh.dir/below: its name is one that layers use themselves\n\
        memdev: Left out /etc/.wh.hostname: its name is one that layers use themselves\n\
        memdev: Left out /socket: a socket\n\
        memdev: The layer is not all that has changed: 3 things are missing; they are named above\n";
    assert_eq!((said.as_str(), out.status.code()), (expected, Some(1)));
    let listed = listed(&layer);
    assert!(listed.iter().any(|line| line.ends_with(" etc/fine")), "{listed:?}");
    assert!(!listed.iter().any(|line| line.contains(".wh.")), "{listed:?}");
    // A socket alone is missed by nobody.
    edited.edit("rm /etc/.wh.hostname\nrm /.wh.dir/below\nrmdir /.wh.dir\n");
    let out = changes(&args);
    assert!(out.status.success());
    assert_eq!(String::from_utf8(out.stderr).unwrap(), "memdev: Left out /socket: a socket\n");
}

#[test]
fn numbers_and_names_that_no_header_holds_come_all_the_same() {
    let edited = Edited::new(&[], "");
    let file = edited.file("file", b"x");
    let long = "n".repeat(200);
    edited.edit(&format!(
        "write {file} /{long}\nsif /{long} uid 3000000000\nsif /{long} mtime @0xffffffff\n\
         symlink /link {}\nwrite {file} /Größe\n",
        "t".repeat(150)
    ));
    let layer = edited.dir.path().join("layer.tar");
    told_of(&edited.now, &edited.base, &["--tar", layer.to_str().unwrap()]);
    let text = run(
        "tar",
        ["-tvf", layer.to_str().unwrap(), "--numeric-owner", "--full-time", "--quoting-style=literal"],
    );
    assert!(text.contains("3000000000/0"), "{text}");
    assert!(
        text.contains(&format!("1969-12-31 23:59:59 {long}\n"))
            || text.contains(&format!("2106-02-07 06:28:15 {long}\n")),
        "{text}"
    );
    assert!(text.contains(&format!("link -> {}\n", "t".repeat(150))), "{text}");
    assert!(text.contains(" Größe\n"), "{text}");
}
