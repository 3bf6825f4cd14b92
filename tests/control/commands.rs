//! The commands: what people and scripts see.

use super::support::nbd::ENOSPC;
use super::support::{GIB, Request, Stream, wait_until};
use super::{Client, House, failure, number};
use serde_json::Value;
use std::process::{Command, Stdio};

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect(text)
}

#[test]
fn new_prints_a_uri_that_can_be_connected_to() {
    let house = House::new();
    let uri = house.run(&["new", "base", "--id", "mine", "--memory", "1G"]);
    assert_eq!(uri, format!("nbd+unix:///base@mine?socket={}\n", house.server.socket().display()));
    assert_eq!(number(&house.session("base@mine")["memory"]["limit"]), GIB);
    let uri = house.run(&["new", "base"]);
    let id = uri.strip_prefix("nbd+unix:///base@").unwrap().split('?').next().unwrap();
    assert_eq!(id.len(), 32);
    let shown =
        Command::new(env!("CARGO_BIN_EXE_memdev")).args(["info", "--json", uri.trim()]).output().unwrap();
    assert_eq!(
        json(&String::from_utf8(shown.stdout).unwrap())["exports"][0]["export-name"],
        format!("base@{id}")
    );
    let made = json(&house.run(&["new", "base", "--json"]));
    assert_eq!(made["uris"].as_array().unwrap().len(), 1);
    assert!(
        house
            .fail(&["new", "base", "--id", "mine"])
            .starts_with("There is such a session already: base@mine")
    );
    assert_eq!(house.fail(&["new", "none"]), "No such export none; 'memdev image list' lists the images");
    assert_eq!(
        house.fail(&["new", "base@y"]),
        "No such export base@y; give the image's name, and the session's id with --id"
    );
    for bad in ["", "a b", "a@b"] {
        let line = failure(&mut house.command(&["new", "base", "--id", bad]), 2);
        assert!(line.contains("--id <ID>"), "{line}");
    }
}

#[test]
fn over_tcp_a_made_session_is_for_who_knows_its_name() {
    let house = House::with(&["--tcp", "127.0.0.1:0"]);
    let made = json(&house.run(&["new", "base", "--json"]));
    let uri = made["uris"][1].as_str().unwrap();
    let (address, name) = uri.strip_prefix("nbd://").unwrap().split_once('/').unwrap();
    let mut client = Client::attach(Stream::tcp(address).unwrap(), name).expect("it is there");
    client.write(0, &[1; 4096]);
    assert_eq!(house.session(name)["owner"], "who knows its name");
    // It is that client's now, and not of users who come by the unix socket.
    assert!(house.server.try_client(name).is_err());
}

#[test]
fn ps_lists_what_is_there() {
    let house = House::new();
    assert_eq!(house.run(&["ps"]).lines().count(), 1, "only the head");
    assert_eq!(json(&house.run(&["ps", "--json"])), Value::Array(Vec::new()));
    let mut client = house.server.client("base@one");
    client.write(0, &[1; 12288]);
    client.trim(0, 4096);
    house.run(&["new", "base", "--id", "two"]);
    let text = house.run(&["ps"]);
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    assert_eq!(rows[0][..3], ["SESSION", "IMAGE", "OWNER"], "{text}");
    let own = format!("user {}", rustix::process::geteuid().as_raw());
    assert_eq!((&rows[1][..3], rows[1][4]), (&["base@one", "base", own.as_str()][..], "1"), "{text}");
    assert_eq!(rows[1][5..7], ["12 KiB", "8 KiB"], "{text}");
    assert_eq!((&rows[2][..3], rows[2][4]), (&["base@two", "base", "nobody yet"][..], "0"), "{text}");
    let listed = json(&house.run(&["ps", "--json"]));
    assert_eq!(listed[0]["name"], "base@one");
    assert_eq!(listed, house_list(&house, &listed));
}

/// The sessions as the API has them, with the times and rates of `listed`, which go on. What private roots of this machine carry is
/// the command's to add: nothing here.
fn house_list(house: &House, listed: &Value) -> Value {
    let mut all = house.get("/v1/sessions")["sessions"].take();
    for (now, then) in all.as_array_mut().unwrap().iter_mut().zip(listed.as_array().unwrap()) {
        for field in ["age_seconds", "rates"] {
            now[field] = then[field].clone();
        }
        now["carry"] = Value::Array(Vec::new());
    }
    all
}

#[test]
fn ps_shows_more_sessions_than_are_in_one_answer() {
    let house = House::new();
    for _ in 0..1100 {
        house.create("");
    }
    assert_eq!(json(&house.run(&["ps", "--json"])).as_array().unwrap().len(), 1100);
}

#[test]
fn stat_tells_of_a_session_and_of_the_server() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 4096]);
    client.read(0, 16384);
    // How long it took is noted a moment after the client has its reply.
    wait_until("it is noted", || number(&house.session("base@x")["latency"]["read"]["requests"]) == 1);
    let text = house.run(&["stat", "base@x"]);
    for part in [
        "session: base@x\n",
        "    connections: 1\n        uid ",
        "memory: 4 KiB of",
        "requests: 1 reads, 1 writes, 0 write-zeroes, 0 trims, 0 flushes, 0 others; 0 errors",
        "read from: 75.0% image, 25.0% overlay, 0.0% holes",
        "reads took: mean ",
        ", p99 ",
    ] {
        assert!(text.contains(part), "{part} in:\n{text}");
    }
    let server = house.run(&["stat"]);
    for part in
        ["server: memdev 0", "image: base, 4 MiB", "sessions: 1 of ", "bytes: 16 KiB read, 4 KiB written"]
    {
        assert!(server.contains(part), "{part} in:\n{server}");
    }
    assert_eq!(number(&json(&house.run(&["stat", "--json"]))["requests"]["writes"]), 1);
    assert_eq!(json(&house.run(&["stat", "base@x", "--json"]))["latency"]["write"]["requests"], 1);
    let line = house.fail(&["stat", "base@y"]);
    assert_eq!(line, "No such session: base@y; 'memdev ps' lists the sessions");
}

#[test]
fn set_changes_the_limit_and_end_ends() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    assert_eq!(house.run(&["set", "base@x", "--memory", "8K"]), "");
    client.write(0, &[1; 8192]);
    client.call(&Request::write(65536, &[1; 4096])).fails(ENOSPC);
    assert_eq!(json(&house.run(&["set", "base@x", "--memory", "1M", "--json"]))["memory"]["limit"], 1 << 20);
    client.write(65536, &[1; 4096]);
    assert!(failure(&mut house.command(&["set", "base@x"]), 2).contains("--memory <SIZE>"));
    assert!(house.fail(&["set", "base@y", "--memory", "1M"]).starts_with("No such session: base@y"));

    house.run(&["new", "base", "--id", "y"]);
    let line = house.fail(&["end", "base@none", "base@y", "base@x"]);
    assert!(line.starts_with("No such session: base@none"), "{line}");
    assert!(house.names().is_empty(), "the others are ended all the same");
    client.peer().expect_end();
    house.run(&["new", "base", "--id", "z"]);
    assert_eq!(json(&house.run(&["end", "base@z", "--json"]))["ended"][0], "base@z");
    let line = house.fail(&["end", "rubbish"]);
    assert_eq!(line, "No such session: rubbish; write IMAGE@ID; 'memdev ps' lists the sessions");
    assert!(house.fail(&["end", "base"]).starts_with("Not the name of a session: base"));
    assert_eq!(house.fail(&["end", "none@x"]), "No such export none; 'memdev image list' lists the images");
}

#[test]
fn top_shows_the_busiest_first_again_and_again() {
    let house = House::new();
    house.run(&["new", "base", "--id", "idle"]);
    let mut client = house.server.client("base@busy");
    wait_until("the busy one is first", || {
        client.read(0, 4096);
        json(&house.run(&["top", "--json", "--count", "1"]))["sessions"][0]["name"] == "base@busy"
    });
    let text = house.run(&["top", "--count", "2", "--interval", "100ms"]);
    assert_eq!(text.matches("SESSION").count(), 2, "{text}");
    assert!(!text.contains('\x1b'), "nothing for terminals where there is none");
    assert!(text.contains("base@busy") && text.contains("base@idle"), "{text}");
    let lines = house.run(&["top", "--json", "--count", "3", "--interval", "100ms"]);
    let all: Vec<Value> = lines.lines().map(json).collect();
    assert_eq!(all.len(), 3);
    assert_eq!(number(&all[2]["server"]["sessions"]["now"]), 2);
    // A reader that has seen enough ends it.
    let mut command = house.command(&["top", "--interval", "100ms"]);
    let mut top = command.stdout(Stdio::piped()).spawn().unwrap();
    drop(top.stdout.take());
    wait_until("it has ended", || top.try_wait().unwrap().is_some());
    assert!(top.wait().unwrap().success());
}

#[test]
fn top_in_a_terminal_repaints_its_screen() {
    let house = House::new();
    house.run(&["new", "base", "--id", "idle"]);
    let memdev = format!(
        "stty rows 3 cols 40; exec {} top --count 2 --interval 100ms --control {}",
        env!("CARGO_BIN_EXE_memdev"),
        house.socket().display()
    );
    let output =
        Command::new("script").args(["-qec", &memdev, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("\x1b[2J").count(), 1, "cleared once: {text:?}");
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(
        lines.iter().all(|line| line.replace("\x1b[H\x1b[2J", "").chars().count()
            <= 39 + "\x1b[K".len() + "\x1b[J\x1b[H".len()),
        "{lines:?}"
    );
    assert!(!text.contains("SESSION"), "there is room for two lines: {text:?}");
}

#[test]
fn without_a_server_it_is_said_what_to_do() {
    let memdev = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.env_remove("MEMDEV_CONTROL");
        command
    };
    for args in
        [&["ps"][..], &["new", "x"], &["stat"], &["top"], &["end", "x"], &["set", "x", "--memory", "1"]]
    {
        let line = failure(memdev().args(args), 2);
        assert_eq!(line, "No control socket given; use --control PATH, or set MEMDEV_CONTROL");
        let line = failure(memdev().args(args).args(["--control", "/none/control.sock"]), 1);
        assert_eq!(
            line,
            "Cannot reach the control socket /none/control.sock: no such file or directory; give the path that the \
             server was started with: memdev serve --control PATH"
        );
    }
    let house = House::new();
    let output = memdev().arg("ps").env("MEMDEV_CONTROL", house.socket()).output().unwrap();
    assert!(output.status.success());
    // Something else that listens is not taken for it.
    let line = failure(memdev().args(["ps", "--control"]).arg(house.server.socket()), 1);
    assert!(line.starts_with("What answers at") && line.contains("is no memdev server"), "{line}");
    assert!(line.ends_with("; give the path that the server was started with: memdev serve --control PATH"));
    let line = failure(memdev().args(["ps", "--control"]).arg(&house.image.path), 1);
    assert!(line.contains(": it is no socket; give the path that the server was started with"), "{line}");
}
