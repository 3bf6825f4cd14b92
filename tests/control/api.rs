//! What can be asked for: lists, one session, making, changing and ending them.

use super::support::nbd::ENOSPC;
use super::support::{KIB, MIB, Request, wait_until};
use super::{House, ask_on, curl, number};
use serde_json::{Value, json};

#[test]
fn curl_sees_the_server() {
    let house = House::new();
    let server: Value = serde_json::from_str(&curl(&house.socket(), &["http://x/v1/server"])).unwrap();
    assert_eq!(server["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(number(&server["pid"]), u64::from(house.server.pid()));
    assert_eq!(server["images"], json!([{ "name": "base", "size": 4 * MIB }]));
    assert_eq!(server["sessions"]["now"], 0);
    let address = server["addresses"][0].as_str().unwrap();
    assert!(address.starts_with("nbd+unix:///?socket=/"), "{address}");
}

#[test]
fn every_session_is_listed_with_what_it_is() {
    let house = House::new();
    assert_eq!(house.get("/v1/sessions"), json!({ "sessions": [], "next": null, "before": [] }));
    let mut named = house.server.client("base@one");
    named.write(0, &[7; 8192]);
    let _other = house.server.client("base@one");
    let own = house.server.client("base");
    let all = house.get("/v1/sessions");
    let [one, two] = &all["sessions"].as_array().unwrap()[..] else { panic!("{all}") };
    assert_eq!(
        (&one["name"], &one["image"], &one["id"]),
        (&json!("base@one"), &json!("base"), &json!("one"))
    );
    assert_eq!(one["owner"], format!("user {}", rustix::process::geteuid().as_raw()));
    assert_eq!((number(&one["connections"]), number(&one["size"])), (2, 4 * MIB));
    assert_eq!((number(&one["memory"]["data"]), number(&one["bytes"]["written"])), (8192, 8192));
    assert!(one["age_seconds"].as_f64().unwrap() > 0.0);
    let uri = format!("nbd+unix:///base@one?socket={}", house.server.socket().display());
    assert_eq!(one["uris"], json!([uri]));
    let name = two["name"].as_str().unwrap();
    assert_eq!(name, format!("base@:{}", number(&two["serial"])));
    assert_eq!((&two["id"], &two["uris"], number(&two["connections"])), (&Value::Null, &json!([]), 1));
    assert_eq!(house.session(name)["peers"].as_array().unwrap().len(), 1);
    // By this name it cannot be entered.
    assert!(house.server.try_client(name).is_err());
    own.disconnect();
    wait_until("the private session is gone", || house.names() == ["base@one"]);
}

#[test]
fn lists_come_in_pages() {
    let house = House::new();
    let names: Vec<String> = (0..7).map(|index| format!("base@s{index}")).collect();
    for index in 0..7 {
        house.create(&format!("{{\"id\":\"s{index}\"}}"));
    }
    let mut seen = Vec::new();
    let mut after = 0;
    loop {
        let page = house.get(&format!("/v1/sessions?limit=3&after={after}"));
        let sessions = page["sessions"].as_array().unwrap();
        assert!(sessions.len() <= 3);
        seen.extend(sessions.iter().map(|session| session["name"].as_str().unwrap().to_owned()));
        match page["next"].as_u64() {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(seen, names);
}

#[test]
fn a_session_is_made_entered_and_ended() {
    let house = House::with(&["--linger", "0s"]);
    let made = house.create(r#"{"image":"base","id":"mine","memory":65536}"#);
    assert_eq!((&made["name"], &made["owner"]), (&json!("base@mine"), &Value::Null));
    assert_eq!(number(&made["memory"]["limit"]), 65536);
    assert_eq!(house.ask("POST", "/v1/sessions", r#"{"id":"mine"}"#).status, 409);
    // It waits for its first client, however short the linger time.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut client = house.server.client("base@mine");
    client.write(0, &[1; 65536]);
    client.call(&Request::write(MIB, &[1; 4096])).fails(ENOSPC);
    let own = format!("user {}", rustix::process::geteuid().as_raw());
    assert_eq!(house.session("base@mine")["owner"], own);

    let ended = house.ask("DELETE", "/v1/sessions/base@mine", "");
    assert_eq!((ended.status, ended.text.as_str()), (204, ""));
    client.peer().expect_end();
    assert_eq!(house.ask("GET", "/v1/sessions/base@mine", "").status, 404);
    assert_eq!(house.ask("DELETE", "/v1/sessions/base@mine", "").status, 404);
    // Whoever asks for the name now gets a new one.
    assert_eq!(house.server.client("base@mine").read(0, 4096), house.image.bytes(0, 4096));
    wait_until("everything is given back", || number(&house.get("/v1/server")["memory"]["data"]) == 0);
}

#[test]
fn without_an_id_it_gets_one_that_nobody_can_guess() {
    let house = House::new();
    let ids: Vec<String> = (0..20).map(|_| house.create("")["id"].as_str().unwrap().to_owned()).collect();
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 20);
    for id in ids {
        assert!(id.len() == 32 && id.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
    }
}

#[test]
fn a_private_session_is_ended_with_its_connection() {
    let house = House::new();
    let mut client = house.server.client("base");
    client.write(0, &[3; 4096]);
    let [name] = &house.names()[..] else { panic!("one session") };
    assert_eq!(house.ask("DELETE", &format!("/v1/sessions/{name}"), "").status, 204);
    client.peer().expect_end();
    wait_until("it is gone", || house.names().is_empty());
}

#[test]
fn a_limit_is_changed_while_the_session_is_used() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 65536]);
    let set = |memory: u64| {
        let answer = house.ask("PATCH", "/v1/sessions/base@x", &format!("{{\"memory\":{memory}}}"));
        assert_eq!((answer.status, number(&answer.json()["memory"]["limit"])), (200, memory));
    };
    set(32 * KIB);
    // What it has it keeps, and may change.
    client.write(0, &[2; 65536]);
    client.call(&Request::write(MIB, &[2; 4096])).fails(ENOSPC);
    client.trim(0, 32 * KIB + 4096);
    client.write(MIB, &[2; 4096]);
    client.call(&Request::write(2 * MIB, &[2; 4096])).fails(ENOSPC);
    set(MIB);
    client.write(2 * MIB, &[2; 4096]);
    assert_eq!(client.read(60 * KIB, 4096), [2; 4096]);
    assert_eq!(number(&house.session("base@x")["requests"]["errors"]), 2);
    // Nothing to change is no error.
    assert_eq!(house.ask("PATCH", "/v1/sessions/base@x", "{}").status, 200);
}

#[test]
fn one_connection_serves_many_requests_also_all_at_once() {
    use std::io::Write;
    let house = House::new();
    let mut stream = house.connect();
    for _ in 0..100 {
        assert_eq!(ask_on(&mut stream, "GET", "/v1/sessions", "").status, 200);
    }
    let one = "GET /v1/server HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(one.repeat(50).as_bytes()).unwrap();
    for _ in 0..50 {
        assert_eq!(super::read_answer(&mut stream, false).unwrap().status, 200);
    }
    let head = ask_on(&mut stream, "HEAD", "/v1/server", "");
    assert!(head.status == 200 && head.text.is_empty() && head.field("Content-Length").is_some());
    assert!(
        head.field("Date").is_some_and(|date| date.ends_with(" GMT") && date.len() == 29),
        "{}",
        head.head
    );
}

#[test]
fn prometheus_gets_numbers_of_all_and_of_each() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 4096]);
    client.read(0, 8192);
    // How long it took is noted a moment after the client has its reply.
    wait_until("it is noted", || number(&house.session("base@x")["latency"]["read"]["requests"]) == 1);
    let text = curl(&house.socket(), &["http://x/metrics"]);
    for line in [
        "memdev_sessions 1",
        "memdev_requests_total{command=\"read\"} 1",
        "memdev_requests_total{command=\"write\"} 1",
        "memdev_read_source_bytes_total{source=\"base\"} 4096",
        "memdev_read_source_bytes_total{source=\"overlay\"} 4096",
        "memdev_request_duration_seconds_count{command=\"read\"} 1",
        "memdev_request_duration_seconds_bucket{command=\"read\",le=\"+Inf\"} 1",
        "memdev_session_requests_total{session=\"base@x\",image=\"base\",command=\"write\"} 1",
        "memdev_session_memory_data_bytes{session=\"base@x\",image=\"base\"} 4096",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in:\n{text}");
    }
    // Every line is a comment or a number of a family that was announced.
    let mut families = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            families.push(rest.split(' ').next().unwrap().to_owned());
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = name.split('{').next().unwrap();
            let family = families.last().unwrap();
            let suffix = name.strip_prefix(family.as_str()).expect(line);
            assert!(["", "_bucket", "_sum", "_count"].contains(&suffix), "{line}");
        }
    }
}
