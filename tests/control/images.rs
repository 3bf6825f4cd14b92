//! Another file for an image while it is served: who gets which, and when the old one goes.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::{Image, wait_until};
use super::{House, MIB, ask_with, curl, failure, number, scratch};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

fn set(name: &str, path: &Path) -> String {
    format!("{name}={}", text(path))
}

/// Whether the server has the file mapped.
fn is_mapped(house: &House, path: &Path) -> bool {
    let maps = fs::read_to_string(format!("/proc/{}/maps", house.server.pid())).expect("the server lives");
    maps.lines().any(|line| line.ends_with(text(path)))
}

fn images(house: &House) -> Value {
    house.get("/v1/images")["images"].clone()
}

#[test]
fn new_sessions_get_the_new_file_and_old_ones_keep_theirs() {
    let house = House::with(&["--linger", "0s"]);
    // Where the server can open nothing, and of another size.
    let elsewhere = scratch();
    let new = Image::random(elsewhere.path().join("new.img"), 2 * MIB, 7);
    let mut own = house.server.client("base");
    let mut named = house.server.client("base@x");
    named.write(0, &[1; 4096]);
    assert_eq!(house.run(&["image", "set", &set("base", &new.path)]), "");

    let mut fresh = house.server.client("base");
    assert!(fresh.read_all() == new.bytes(0, 2 * MIB));
    let mut other = house.server.client("base@y");
    assert!(other.read_all() == new.bytes(0, 2 * MIB));
    // Those who were there: the one who is alone, and whoever names the session.
    assert!(own.read_all() == house.image.bytes(0, 4 * MIB));
    let mut again = house.server.client("base@x");
    assert_eq!(again.read(0, 4096), [1; 4096]);
    assert!(again.read(4096, 1 << 20) == house.image.bytes(4096, MIB));
    // A fork is on what its session is on.
    house.run(&["fork", "base@x", "--id", "z"]);
    assert!(house.server.client("base@z").read(4096, 1 << 20) == house.image.bytes(4096, MIB));

    let base = house.session("base@x")["base"].clone();
    let path = text(&house.image.path);
    assert_eq!(
        (&base["path"], &base["generation"], &base["current"]),
        (&json!(path), &json!(1), &json!(false))
    );
    let base = house.session("base@y")["base"].clone();
    let path = text(&new.path);
    assert_eq!(
        (&base["path"], &base["generation"], &base["current"]),
        (&json!(path), &json!(2), &json!(true))
    );
    let listed = house.run(&["ps"]);
    let shown = |name: &str| listed.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(shown("base@x").contains(" base#1 ") && shown("base@y").contains(" base "), "{listed}");
    let stat = house.run(&["stat", "base@x"]);
    assert!(stat.contains(&format!("image: base#1, 4 MiB, {}", text(&house.image.path))), "{stat}");
    let list = house.run(&["image", "list"]);
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["IMAGE", "SIZE", "OPENED", "SESSIONS", "FILE"]);
    assert_eq!((rows[1][0], rows[1][4]), ("base", "2"), "{list}");
    assert_eq!((rows[2][0], *rows[2].last().unwrap()), ("base#1", text(&house.image.path)), "{list}");

    // A session that is saved over a base, is saved over the one that it is on.
    let file = elsewhere.path().join("saved");
    let line = house.fail(&["save", "base@x", text(&file), "--base", text(&new.path)]);
    assert!(line.starts_with("base@x is on ") && line.contains("as it was before it was replaced"), "{line}");
    house.run(&["save", "base@x", text(&file), "--base", text(&house.image.path)]);
    // Which is not what a new session would be on.
    assert!(house.fail(&["load", "base", text(&file)]).contains("A session on base has 2097152 bytes"));

    assert!(is_mapped(&house, &house.image.path));
    drop((own, named, again));
    wait_until("the old file is unmapped", || !is_mapped(&house, &house.image.path));
    assert_eq!(images(&house)[0]["files"].as_array().unwrap().len(), 1);
    assert!(is_mapped(&house, &new.path) && fresh.read_all() == new.bytes(0, 2 * MIB));
}

#[test]
fn what_nobody_is_on_goes_at_once() {
    let house = House::new();
    let elsewhere = scratch();
    let mut before = house.image.path.clone();
    for turn in 0..5 {
        let new = Image::random(elsewhere.path().join(format!("{turn}.img")), 2 * MIB, turn);
        let set: Value =
            serde_json::from_str(&house.run(&["image", "set", &set("base", &new.path), "--json"])).unwrap();
        assert_eq!((&set["name"], &set["files"][0]["generation"]), (&json!("base"), &json!(turn + 2)));
        wait_until("the one before is unmapped", || !is_mapped(&house, &before));
        assert!(house.server.client("base").read_all() == new.bytes(0, 2 * MIB));
        before = new.path.clone();
    }
}

#[test]
fn what_is_renamed_over_it_later_is_seen_where_it_can_be_opened() {
    let house = House::new();
    let folder = house.image.path.parent().unwrap().to_owned();
    let image = |folder: &Path, name: &str, seed| Image::random(folder.join(name), 2 * MIB, seed);
    // Beneath a directory that the server may read.
    let new = image(&folder, "new.img", 7);
    house.run(&["image", "set", &set("base", &new.path)]);
    let next = image(&folder, "next.img", 8);
    fs::rename(&next.path, &new.path).unwrap();
    assert!(house.server.client("base").read_all() == next.bytes(0, 2 * MIB));
    // Elsewhere it stays what was handed over.
    let elsewhere = scratch();
    let far = image(elsewhere.path(), "far.img", 9);
    let further = image(elsewhere.path(), "further.img", 10);
    house.run(&["image", "set", &set("base", &far.path)]);
    let expected = far.bytes(0, 2 * MIB);
    fs::rename(&further.path, &far.path).unwrap();
    assert!(house.server.client("base").read_all() == expected);
    let kept = || house.server.log().iter().any(|line| line.contains("keeping the image as it was"));
    wait_until("it is said", kept);
    // What is at the path it is said to be at counts only if it is that file.
    fs::remove_file(&far.path).unwrap();
    let answer = put(&house, r#"{"path":"/etc/hostname"}"#, &[File::open(&new.path).unwrap()]);
    assert_eq!(answer.0, 200, "{}", answer.1);
    assert!(house.server.client("base").read_all() == next.bytes(0, 2 * MIB));
}

#[test]
fn what_is_no_raw_disk_is_said_in_the_log_when_it_is_set() {
    let house = House::new();
    let elsewhere = scratch();
    let packed = elsewhere.path().join("packed.img");
    fs::write(&packed, [b"\x1f\x8b\x08".as_slice(), &[0; 4093]].concat()).unwrap();
    house.run(&["image", "set", &set("base", &packed)]);
    let said =
        "looks like a gzip compressed file, and is served as the raw bytes that it is; unpack it first";
    let times = || house.server.log().iter().filter(|line| line.contains(said)).count();
    wait_until("it is said", || times() == 1);
}

/// PUTs with descriptors; the status and what is said.
fn put(house: &House, body: &str, files: &[File]) -> (u16, String) {
    let mut stream = house.connect();
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let answer = ask_with(&mut stream, ("PUT", "/v1/images/base"), body, &files);
    (answer.status, answer.text)
}

#[test]
fn what_is_no_image_is_one_line_and_changes_nothing() {
    let house = House::new();
    let elsewhere = scratch();
    let path = |name: &str| elsewhere.path().join(name);
    fs::write(path("empty"), []).unwrap();
    let fifo = Command::new("mkfifo").arg(path("fifo")).status().unwrap();
    assert!(fifo.success());
    for (file, why) in [
        (path("none"), "no such file or directory; give the path of a readable raw disk image"),
        (path("empty"), "it is empty"),
        (elsewhere.path().to_owned(), "it is a directory"),
        (path("fifo"), "Neither a regular file nor a block device"),
        (PathBuf::from("/dev/null"), "Neither a regular file nor a block device"),
    ] {
        let line = house.fail(&["image", "set", &set("base", &file)]);
        assert!(line.contains(why) && line.contains(text(&file)), "{line}");
    }
    assert!(
        house.fail(&["image", "set", &set("none", &house.image.path)]).starts_with("No such image: none")
    );
    assert!(failure(&mut house.command(&["image", "set", text(&house.image.path)]), 2).contains("NAME=FILE"));

    let read_only = || File::open(&house.image.path).unwrap();
    let writable = File::options().read(true).write(true).open(&house.image.path).unwrap();
    let named = json!({ "path": house.image.path }).to_string();
    let before = house.server.usage().descriptors;
    for (body, files, why) in [
        (named.as_str(), vec![writable], "not open for reading alone"),
        (&named, vec![read_only(), read_only()], "One descriptor"),
        (r#"{"path":"base.img"}"#, vec![read_only()], "absolute"),
        ("{}", vec![read_only()], "absolute"),
        (r#"{"path":"/x","more":1}"#, vec![read_only()], "not what belongs here"),
    ] {
        let (status, said) = put(&house, body, &files);
        assert!(status == 400 && said.contains(why), "{status}: {said}");
    }
    wait_until("no descriptor stays", || house.server.usage().descriptors <= before);
    let files = images(&house)[0]["files"].clone();
    assert_eq!((files.as_array().unwrap().len(), number(&files[0]["generation"])), (1, 1));
    // Without a descriptor it is for the server to open.
    let sent = curl(&house.socket(), &["-X", "PUT", "http://memdev/v1/images/base", "-d", &named]);
    let set: Value = serde_json::from_str(&sent).unwrap();
    assert_eq!(set["files"][0]["generation"], json!(2), "{sent}");
}
