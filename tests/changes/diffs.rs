//! `--diff`: what has changed within files.

use super::{Edited, told_of, trouble};
use crate::interop_support::run;
use std::fs;

fn edited() -> Edited {
    let edited = Edited::new(&[], "");
    let new = edited.file("new", b"one\ntwo\n");
    let other = edited.file("other", b"changed\nwithout an end");
    let binary = edited.file("binary", b"\x7fELF\0\0");
    edited.edit(&format!(
        "rm /etc/hostname\nwrite {other} /etc/hostname\nwrite {new} /etc/new\nwrite {binary} /usr/binary\n\
         sif /etc/motd mode 0100600\nrm /usr/link\nsymlink /usr/link elsewhere\nmkdir /dir\n\
         rm /usr/large\nwrite {new} /usr/large\nrm /usr/bin/tool\n"
    ));
    edited
}

#[test]
fn text_is_told_by_lines_and_all_else_in_one() {
    let edited = edited();
    let told = |path: &str| told_of(&edited.now, &edited.base, &["--diff", path]);
    let hostname = "\
--- a/etc/hostname
+++ b/etc/hostname
@@ -1 +1,2 @@
-base
+changed
+without an end
\\ No newline at end of file
";
    assert_eq!(told("/etc/hostname"), hostname);
    assert_eq!(told("etc/hostname/"), hostname);
    let new = "--- /dev/null\n+++ b/etc/new\n@@ -0,0 +1,2 @@\n+one\n+two\n";
    assert_eq!(told("/etc"), format!("{hostname}{new}"));
    let usr = "\
--- a/usr/bin/tool
+++ /dev/null
@@ -1 +0,0 @@
-#!/bin/sh
Only now: b/usr/binary (binary file)
a/usr/large was a binary file, and b/usr/large is text
a/usr/link was a symbolic link to bin/tool, and b/usr/link is a symbolic link to elsewhere
";
    assert_eq!(told("/usr"), usr);
    assert_eq!(told("/"), format!("{hostname}{new}{usr}"));
    assert_eq!(told("/etc/motd"), "", "its content is as it was");
    // The beginning of a name is none.
    for path in ["/no/such", "/et"] {
        let args = [edited.now.to_str().unwrap(), "--base", edited.base.to_str().unwrap(), "--diff", path];
        let (said, status) = trouble(&args);
        assert_eq!(
            (said, status),
            (format!("memdev: Neither the session nor its base has {path}\n"), Some(1))
        );
    }
}

#[test]
fn patch_makes_of_the_base_what_the_session_has() {
    let edited = edited();
    let (before, now) = (edited.dir.path().join("before"), edited.dir.path().join("now"));
    for (image, tree) in [(&edited.base, &before), (&edited.now, &now)] {
        fs::create_dir(tree).unwrap();
        run("debugfs", ["-R".as_ref(), format!("rdump /etc {}", tree.display()).as_ref(), image.as_os_str()]);
    }
    let patch = edited.file("patch", told_of(&edited.now, &edited.base, &["--diff", "/etc"]).as_bytes());
    run("patch", ["-p1", "-s", "-d", before.to_str().unwrap(), "-i", &patch]);
    for name in ["hostname", "motd", "new"] {
        let content = |tree: &std::path::Path| fs::read(tree.join("etc").join(name)).unwrap();
        assert_eq!(content(&before), content(&now), "{name}");
    }
}
