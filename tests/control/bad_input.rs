//! Nonsense, too much, too slow, too many: each is answered or hung up on, and nobody else notices.

use super::{House, ask_on, curl, read_answer, send_raw};
use std::io::{Read, Write};
use std::time::Duration;

/// It still answers, and still serves.
fn assert_well(house: &mut House) {
    house.server.assert_alive();
    assert_eq!(house.ask("GET", "/v1/server", "").status, 200);
    assert_eq!(house.server.client("base").read(0, 4096), house.image.bytes(0, 4096));
}

#[test]
fn what_does_not_exist_is_said() {
    let mut house = House::new();
    for (method, path, status, kind) in [
        ("GET", "/", 404, "not-found"),
        ("GET", "/v1", 404, "not-found"),
        ("GET", "/v1/sessions/", 400, "invalid"),
        ("GET", "/v1/sessions/base@none", 404, "not-found"),
        ("GET", "/v1/sessions/base@:1", 404, "not-found"),
        ("GET", "/v1/sessions/base@:x", 404, "not-found"),
        ("GET", "/v1/sessions/none@x", 404, "not-found"),
        ("GET", "/v1/sessions/base", 400, "invalid"),
        ("GET", "/v1/sessions/base@a%20b", 400, "invalid"),
        ("GET", "/v1/sessions/base@x/y", 404, "not-found"),
        ("DELETE", "/v1/sessions/base@none", 404, "not-found"),
        ("PATCH", "/v1/sessions/base@none", 404, "not-found"),
        ("GET", "/v1/sessions?after=x", 400, "invalid"),
        ("GET", "/v1/sessions?limit=0", 400, "invalid"),
        ("GET", "/v1/sessions?order=up", 400, "invalid"),
        ("DELETE", "/v1/sessions", 405, "invalid"),
        ("POST", "/v1/server", 405, "invalid"),
        ("BREW", "/metrics", 405, "invalid"),
    ] {
        let answer = house.ask(method, path, "");
        assert_eq!(
            (answer.status, answer.kind().as_str()),
            (status, kind),
            "{method} {path}: {}",
            answer.text
        );
        assert_eq!(answer.text.lines().count(), 1, "{}", answer.text);
    }
    assert_well(&mut house);
}

#[test]
fn bodies_that_make_no_sense_are_refused_and_the_connection_stays() {
    let mut house = House::new();
    house.create(r#"{"id":"there"}"#);
    let mut stream = house.connect();
    let deep = "[".repeat(60_000);
    for (method, path, body) in [
        ("POST", "/v1/sessions", "{"),
        ("POST", "/v1/sessions", "null"),
        ("POST", "/v1/sessions", "[1]"),
        ("POST", "/v1/sessions", "{\"colour\":\"red\"}"),
        ("POST", "/v1/sessions", "{\"id\":7}"),
        ("POST", "/v1/sessions", "{\"id\":\"\"}"),
        ("POST", "/v1/sessions", "{\"id\":\"a/b\"}"),
        ("POST", "/v1/sessions", "{\"id\":\":1\"}"),
        ("POST", "/v1/sessions", "{\"id\":\"a?\"}"),
        ("POST", "/v1/sessions", "{\"memory\":-1}"),
        ("POST", "/v1/sessions", "{\"memory\":1e99}"),
        ("POST", "/v1/sessions", "{\"id\":\"x\"}{}"),
        ("POST", "/v1/sessions", &deep),
        ("PATCH", "/v1/sessions/base@there", "{\"memory\":\"1G\"}"),
        ("PATCH", "/v1/sessions/base@there", "{\"iopses\":1}"),
    ] {
        let answer = ask_on(&mut stream, method, path, body);
        assert_eq!(answer.status, 400, "{method} {path} {body:.60}: {}", answer.text);
    }
    let unknown = ask_on(&mut stream, "POST", "/v1/sessions", "{\"image\":\"none\"}");
    assert_eq!((unknown.status, unknown.kind().as_str()), (404, "not-found"));
    assert_eq!(ask_on(&mut stream, "POST", "/v1/sessions", "{\"image\":\"base@x\"}").status, 404);
    assert_eq!(house.names(), ["base@there"]);
    assert_well(&mut house);
}

#[test]
fn what_is_no_http_is_told_so_and_hung_up_on() {
    let mut house = House::new();
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(1000));
    let post = |fields: &str| format!("POST /v1/sessions HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n{{}}");
    for (bytes, status) in [
        ("\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\r\n\r\n", 400),
        ("NBDMAGICIHAVEOPT\r\n\r\n", 400),
        ("GET /v1/server\r\n\r\n", 400),
        ("GET /v1/server HTTP/1.1\r\n\r\n", 400),
        ("GET /v1/server HTTP/3.0\r\nHost: x\r\n\r\n", 505),
        (&long, 431),
        (&many, 431),
        (&post("Content-Length: 1000000000"), 413),
        (&post("Content-Length: x"), 400),
        (&post("Content-Length: 2\r\nContent-Length: 3"), 400),
        (&post("Transfer-Encoding: chunked"), 411),
        (&post("Content-Length: 2\r\nTransfer-Encoding: chunked"), 400),
    ] {
        let answers = send_raw(&house, bytes.as_bytes());
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [status], "{bytes:.60}");
        assert_eq!(answers[0].field("Connection"), Some("close"));
    }
    // What ends in the middle gets no answer.
    for bytes in ["", "G", "GET /v1/server HTTP/1.1\r\nHost: x\r\n", &post("Content-Length: 3")] {
        assert!(send_raw(&house, bytes.as_bytes()).is_empty(), "{bytes}");
    }
    assert!(house.names().is_empty());
    assert_well(&mut house);
}

#[test]
fn a_huge_body_is_refused_before_it_is_sent() {
    let mut house = House::new();
    let (dir, code) = (super::scratch(), "%{http_code}");
    let body = dir.path().join("body");
    std::fs::write(&body, vec![b' '; 8 << 20]).unwrap();
    let upload = format!("@{}", body.display());
    let post =
        ["--data-binary", &upload, "http://x/v1/sessions", "--output", "/dev/null", "--write-out", code];
    assert_eq!(curl(&house.socket(), &post), "413");
    // One that is allowed is asked for.
    std::fs::write(&body, format!("{{\"id\":\"a\"{}}}", " ".repeat(60_000))).unwrap();
    let expecting = [&["--header", "Expect: 100-continue"][..], &post].concat();
    assert_eq!(curl(&house.socket(), &expecting), "201");
    assert_well(&mut house);
}

#[test]
fn a_slow_client_keeps_nobody_waiting_and_is_hung_up_on() {
    let mut house = House::new();
    let mut slow = house.connect();
    slow.write_all(b"GET /v1/server HTTP/1.1\r\nHost: x\r\nX-Slow: ").unwrap();
    // A byte now and then does not keep it alive.
    for _ in 0..200 {
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(house.ask("GET", "/v1/sessions", "").status, 200);
        if slow.write_all(b"x").is_err() {
            break;
        }
    }
    let mut rest = Vec::new();
    // Either an end or a reset.
    let _ = slow.read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert_well(&mut house);
}

#[test]
fn a_client_that_reads_nothing_keeps_nobody_waiting() {
    let mut house = House::new();
    for index in 0..300 {
        house.create(&format!("{{\"id\":\"s{index}\"}}"));
    }
    let mut deaf = house.connect();
    let request = "GET /v1/sessions HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400);
    deaf.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    // It takes no more requests than it can answer.
    let _ = deaf.write_all(request.as_bytes());
    for _ in 0..50 {
        assert_eq!(house.ask("GET", "/v1/server", "").status, 200);
    }
    assert_well(&mut house);
}

#[test]
fn many_connections_wait_for_a_place_or_take_that_of_an_idle_one() {
    let mut house = House::new();
    let before = house.server.usage();
    let mut crowd: Vec<_> = (0..500).map(|_| house.connect()).collect();
    // Those that say nothing make room for those that do.
    assert_eq!(ask_on(crowd.last_mut().unwrap(), "GET", "/v1/server", "").status, 200);
    for _ in 0..20 {
        assert_eq!(house.ask("GET", "/v1/server", "").status, 200);
    }
    assert!(house.server.usage().descriptors <= before.descriptors + 64 + 1, "{:?}", house.server.usage());
    // The first ones were hung up on.
    crowd[0].write_all(b"GET /v1/server HTTP/1.1\r\nHost: x\r\n\r\n").err();
    assert!(read_answer(&mut crowd[0], false).is_none());
    drop(crowd);
    assert_well(&mut house);
    house.server.settles_at(before, 4 << 20);
}
