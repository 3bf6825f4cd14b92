//! Where a session can be looked at: live, at rest, saved; on a whole disk.

use super::lines::every_kind;
use super::{Edited, changes, session_uri, told, told_of, trouble};
use crate::support::server::scratch;
use crate::support::{Client, Image, MIB, Stream};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// The live sessions by name, as `memdev ps` has them.
fn sessions(edited: &Edited) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
    let out = command.args(["ps", "--json", "--control"]).arg(edited.control()).output().unwrap();
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    let list = list.as_array().cloned().unwrap_or_else(|| list["sessions"].as_array().unwrap().clone());
    list.iter().map(|session| session["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_session_is_told_alike_live_at_rest_and_saved() {
    let edited = every_kind();
    let expected = told_of(&edited.now, &edited.base, &["--json"]);
    assert!(expected.lines().count() > 10, "{expected}");
    let (server, client) = edited.serve();
    let control = edited.control();
    let live = ["base@x", "--json", "--control", control.to_str().unwrap()];
    assert_eq!(told(&live), expected);
    assert_eq!(sessions(&edited), ["base@x"], "no fork is left");
    let uri = session_uri(&server, "base@x");
    assert_eq!(told(&[&uri, "--json"]), expected);
    assert_eq!(told(&[&uri, "--json", "--base", edited.base.to_str().unwrap()]), expected);
    // Saved in every way.
    let (saved, base) = (edited.dir.path().join("saved"), edited.base.to_str().unwrap());
    for more in [&["--base", base][..], &[], &["--format", "raw"]] {
        let mut save = Command::new(env!("CARGO_BIN_EXE_memdev"));
        let status = save.arg("save").arg(&uri).arg(&saved).args(more).status().unwrap();
        assert!(status.success());
        assert_eq!(told_of(&saved, &edited.base, &["--json"]), expected, "{more:?}");
    }
    let mut with_base = live.to_vec();
    with_base.extend(["--base", edited.base.to_str().unwrap()]);
    assert_eq!(told(&with_base), expected);
    drop(client);
    server.stop();
}

/// The image's name has another image by now: sessions keep the one that they began with, and are compared with that.
#[test]
fn a_session_is_held_against_the_image_that_it_began_with() {
    let edited = every_kind();
    let expected = told_of(&edited.now, &edited.base, &[]);
    let (server, client) = edited.serve();
    let kept = edited.dir.path().join("kept.img");
    fs::copy(&edited.base, &kept).unwrap();
    let other = Edited::new(&["-U", "11111111-2222-3333-4444-555555555555"], "");
    let new = edited.dir.path().join("new.img");
    fs::copy(&other.base, &new).unwrap();
    fs::rename(&new, &edited.base).unwrap();
    // The server looks at the name for a new session.
    drop(Client::attach(Stream::unix(server.socket()).unwrap(), "base").unwrap());
    let control = edited.control();
    assert_eq!(told(&["base@x", "--control", control.to_str().unwrap()]), expected);
    let uri = session_uri(&server, "base@x");
    let (said, _) = trouble(&[&uri]);
    assert!(said.contains("not made of this base; give the image that it was made of with --base"), "{said}");
    assert_eq!(told(&[&uri, "--base", kept.to_str().unwrap()]), expected);
    drop(client);
    server.stop();
}

#[test]
fn a_file_system_in_a_partition_is_found() {
    let edited = every_kind();
    let dir = scratch();
    let (base, now) = (dir.path().join("base.img"), dir.path().join("now.img"));
    for (disk, part) in [(&base, &edited.base), (&now, &edited.now)] {
        let image = Image::empty(disk, 20 * MIB);
        let script = "label: gpt\nstart=2048, size=2048\nstart=4096, size=32768\n";
        let table = dir.path().join("table");
        fs::write(&table, script).unwrap();
        let mut sfdisk = Command::new("sfdisk");
        sfdisk.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").arg("-q").arg(disk);
        assert!(sfdisk.stdin(fs::File::open(&table).unwrap()).status().unwrap().success());
        super::patch(disk, 4096 * 512, &fs::read(part).unwrap());
        drop(image);
    }
    let expected = told_of(&edited.now, &edited.base, &[]);
    assert_eq!(told_of(&now, &base, &["--partition", "2"]), expected);
    let (now, base) = (now.to_str().unwrap(), base.to_str().unwrap());
    let (said, _) = trouble(&[now, "--base", base, "--partition", "3"]);
    assert!(said.contains("no partition 3, but 1, 2"), "{said}");
    let (said, _) = trouble(&[now, "--base", base]);
    assert!(said.contains("No ext4 is on the disk"), "{said}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let edited = every_kind();
    let now = edited.now.to_str().unwrap();
    let (said, status) = trouble(&[now]);
    assert!(said.contains("What to compare with was not said"), "{said}");
    assert_eq!(status, Some(1));
    let (said, _) = trouble(&["/no/such"]);
    let why =
        "Cannot read /no/such: no such file or directory; give a session, its URI, or the path of a saved";
    assert!(said.contains(why), "{said}");
    let (said, _) = trouble(&["/no/such", "--base", now]);
    assert!(said.contains("Cannot read /no/such: no such file or directory; give the path of a saved image"));
    let (said, _) = trouble(&[now, "--base", "/no/such"]);
    assert!(said.contains("Cannot open image /no/such: no such file or directory; give the path"), "{said}");
    let (said, status) = trouble(&["base@x"]);
    assert!(said.contains("No control socket given"), "{said}");
    assert_eq!(status, Some(2));
    let (server, client) = edited.serve();
    let (said, _) = trouble(&[&session_uri(&server, "base")]);
    assert!(said.contains("name a session, as NAME@ID"), "{said}");
    let control = edited.control();
    let (said, _) = trouble(&["base@other", "--control", control.to_str().unwrap()]);
    assert!(said.contains("No such session"), "{said}");
    let small = edited.file("small.img", &[0; 4096]);
    let (said, _) = trouble(&[&session_uri(&server, "base@x"), "--base", &small]);
    assert!(said.contains("its base cannot have 4096"), "{said}");
    let (said, _) = trouble(&[now, "--base", &small]);
    assert!(said.contains("its base cannot have 4096"), "{said}");
    drop(client);
    server.stop();
    assert!(changes(&["--help"]).status.success());
}
