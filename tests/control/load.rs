//! `memdev load`: sessions that begin as saved images, and loads that leave nothing.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::support::{Image, wait_until};
use super::{Client, House, MIB, failure, number, scratch};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().expect("qemu-utils, which tools/setup installs");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Writes in every way.
fn write(client: &mut Client) {
    client.write(5000, &[7; 100]);
    client.write(MIB - 10, &[8; 1 << 20]);
    client.zeroes(3 * MIB + 1, 100_000);
    client.trim(3 * MIB + 500_000, 200_000);
    client.write(4 * MIB - 300, &[9; 300]);
}

#[test]
fn what_was_saved_comes_back() {
    let house = House::new();
    let dir = scratch();
    let (file, again) = (dir.path().join("x"), dir.path().join("y"));
    let base = text(&house.image.path).to_owned();
    let mut client = house.server.client("base@x");
    write(&mut client);
    let written = client.read_all();
    for (format, over) in [("qcow2", true), ("qcow2", false), ("raw", false)] {
        let base: &[&str] = if over { &["--base", &base] } else { &[] };
        house.run(&[&["save", "base@x", text(&file), "--format", format][..], base].concat());
        let uri = house.run(&["load", "base", text(&file), "--id", "y"]);
        assert_eq!(uri, format!("nbd+unix:///base@y?socket={}\n", house.server.socket().display()));
        wait_until("who loaded it has left", || number(&house.session("base@y")["connections"]) == 0);
        let told = house.session("base@y");
        assert_eq!(told["owner"], Value::Null, "{told}");
        assert_eq!(house.names(), ["base@x", "base@y"]);
        // Whatever the file has, the session holds what is not as in the image.
        let held = number(&told["memory"]["data"]);
        assert!((1 << 20..1_200_000).contains(&held), "{format}, {over}: {held}");
        house.run(&[&["save", "base@y", text(&again), "--format", format][..], base].concat());
        run("qemu-img", &["compare", "-q", "-f", format, "-F", format, text(&file), text(&again)]);
        let mut loaded = house.server.client("base@y");
        assert!(loaded.read_all() == written, "{format}, over a base: {over}");
        loaded.write(0, &[1; 10]);
        house.run(&["end", "base@y"]);
    }
}

#[test]
fn what_qemu_has_written_over_the_same_base_is_loaded() {
    let house = House::new();
    let dir = scratch();
    let (file, raw) = (dir.path().join("x.qcow2"), dir.path().join("raw"));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", text(&house.image.path), "-F", "raw", text(&file)],
    );
    let commands = ["write -P 1 10000 200000", "write -z 1M 1M", "write -P 2 1500k 4k", "discard 3M 64k"];
    for command in commands {
        run("qemu-io", &["-f", "qcow2", "-c", command, text(&file)]);
    }
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&file), text(&raw)]);
    let made: Value = serde_json::from_str(&house.run(&["load", "base", text(&file), "--json"])).unwrap();
    assert_eq!(made["id"].as_str().unwrap().len(), 32);
    let mut loaded = house.server.client(made["name"].as_str().unwrap());
    assert!(loaded.read_all() == fs::read(&raw).unwrap());

    // Compressed, and by a relative name through a link.
    let link = dir.path().join("base.img");
    std::os::unix::fs::symlink(&house.image.path, &link).unwrap();
    let packed = dir.path().join("packed.qcow2");
    let args = ["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-B", "base.img", "-F", "raw", "x.qcow2"];
    let out = Command::new("qemu-img").args(args).arg(&packed).current_dir(&dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    house.run(&["load", "base", text(&packed), "--id", "packed"]);
    assert!(house.server.client("base@packed").read_all() == fs::read(&raw).unwrap());
}

#[test]
fn what_cannot_be_loaded_is_one_line_and_leaves_no_session() {
    let house = House::with(&["--session-memory", "64K"]);
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let copy = path("copy.img");
    fs::copy(&house.image.path, &copy).unwrap();
    let other = Image::random(path("other.img"), 4 * MIB, 9);
    let create = |name: &str, base: &Path, more: &[&str]| {
        let file = path(name);
        run(
            "qemu-img",
            &[&["create", "-q", "-f", "qcow2", "-b", text(base), "-F", "raw", text(&file)], more].concat(),
        );
        file
    };
    let base = house.image.path.clone();
    let longer = create("longer.qcow2", &base, &["8M"]);
    let wrong = create("wrong.qcow2", &copy, &[]);
    fs::write(path("short.img"), [1; 4096]).unwrap();
    let nested = path("nested.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&wrong), "-F", "qcow2", text(&nested)]);
    let gone = create("gone.qcow2", &copy, &[]);
    let red = path("red.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "\x1b[31mred", "-F", "raw", text(&red), "4M"],
    );
    house.create(r#"{"id":"there"}"#);
    let is_wrong = "is not what is served: The image base is on";
    for (file, more, why) in [
        (&wrong, &[][..], is_wrong),
        (&nested, &[], "The backing file of"),
        // Nothing that a file says is done by a terminal.
        (&red, &[], "/?[31mred"),
        (&longer, &[], "A session on base has 4194304 bytes, and"),
        (&path("short.img"), &[], "A session on base has 4194304 bytes, and"),
        (&path("none"), &[], "no such file or directory; give the path of a saved image, qcow2 or raw"),
        (&other.path, &[], "No memory for what is in"),
        (&other.path, &["--id", "there"], "There is such a session already: base@there"),
    ] {
        let line = house.fail(&[&["load", "base", text(file)][..], more].concat());
        assert!(line.contains(why), "{line}");
        assert_eq!(house.names(), ["base@there"], "{line}");
    }
    let line = house.fail(&["load", "none", text(&wrong)]);
    assert_eq!(line, "No such export none; 'memdev image list' lists the images");
    let line = house.fail(&["load", "base@y", text(&wrong)]);
    assert_eq!(line, "No such export base@y; give the image's name, and the session's id with --id");
    fs::remove_file(&copy).unwrap();
    assert!(house.fail(&["load", "base", text(&gone)]).contains("Cannot look at the base"));
    let line = failure(&mut house.command(&["load", "base", text(&wrong), "--id", "a b"]), 2);
    assert!(line.contains("--id <ID>"), "{line}");
    // Whoever knows better may say so.
    house.run(&["load", "base", text(&wrong), "--trust-base", "--id", "trusted"]);
    assert!(house.server.client("base@trusted").read_all() == house.image.bytes(0, 4 * MIB));
    house.run(&["load", "base", text(&other.path), "--memory", "8M", "--id", "roomy"]);
    assert!(house.server.client("base@roomy").read_all() == other.bytes(0, 4 * MIB));
}

#[test]
fn a_load_that_ends_early_leaves_no_session() {
    let dir = scratch();
    // Slow enough not to be over before it is interrupted, whenever that can be done.
    let house = House::of(64 * MIB, &["--session-bandwidth", "4M"]);
    let other = Image::random(dir.path().join("other.img"), 64 * MIB, 9);
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut command = house.command(&["load", "base", text(&other.path), "--id", "x"]);
        let mut loading = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        wait_until("something is loaded", || {
            assert!(loading.try_wait().unwrap().is_none(), "it was over before it was interrupted");
            let all = house.get("/v1/sessions");
            all["sessions"].as_array().unwrap().iter().any(|session| number(&session["memory"]["data"]) > 0)
        });
        assert_ne!(house.names(), ["base@x"], "nobody can come in before it is complete");
        kill_process(Pid::from_child(&loading), signal).expect("a signal");
        assert_eq!(loading.wait().expect("its end").signal(), Some(signal.as_raw()));
        wait_until("there is no session", || house.names().is_empty());
        wait_until("its memory is given back", || number(&house.get("/v1/server")["memory"]["data"]) == 0);
    }
}

#[test]
fn a_session_is_held_by_the_connection_it_was_made_on() {
    let house = House::new();
    let mut holder = house.connect();
    let made = super::ask_on(&mut holder, "POST", "/v1/sessions", r#"{"id":"a","held":true}"#);
    assert_eq!(made.status, 201, "{}", made.text);
    let kept = super::ask_on(&mut holder, "POST", "/v1/sessions", r#"{"id":"b","held":true}"#);
    assert_eq!(kept.status, 201);
    let fork = super::ask_on(&mut holder, "POST", "/v1/sessions/base@a/fork", r#"{"id":"c","held":true}"#);
    assert_eq!(fork.status, 201);
    let mut client = house.server.client("base@b");
    client.write(0, &[5; 4096]);
    // Let go under another name; who is in it stays.
    let change = r#"{"id":"d","held":false}"#;
    let renamed = super::ask_on(&mut holder, "PATCH", "/v1/sessions/base@b", change);
    assert_eq!((renamed.status, &renamed.json()["name"]), (200, &Value::from("base@d")), "{}", renamed.text);
    assert_eq!(client.read(0, 4096), [5; 4096]);
    assert_eq!(house.names(), ["base@a", "base@d", "base@c"]);
    // Called otherwise by somebody else, it is held all the same.
    let renamed = super::ask_on(&mut house.connect(), "PATCH", "/v1/sessions/base@c", r#"{"id":"e"}"#);
    assert_eq!(renamed.status, 200, "{}", renamed.text);
    assert_eq!(house.names(), ["base@a", "base@d", "base@e"]);
    let refused = super::ask_on(&mut holder, "PATCH", "/v1/sessions/base@d", r#"{"held":true}"#);
    assert_eq!((refused.status, refused.kind().as_str()), (400, "invalid"));
    for (id, status) in [("a", 409), ("a b", 400), ("d", 200)] {
        let answer =
            super::ask_on(&mut holder, "PATCH", "/v1/sessions/base@d", &format!(r#"{{"id":"{id}"}}"#));
        assert_eq!(answer.status, status, "{}", answer.text);
    }
    // A name that is somebody else's by then is not touched.
    house.run(&["end", "base@a"]);
    house.create(r#"{"id":"a"}"#);
    drop(holder);
    wait_until("the fork is gone", || house.names() == ["base@d", "base@a"]);
    assert_eq!(house.server.client("base@d").read(0, 4096), [5; 4096]);
}
