//! The counters: what they count, exactly, and that nothing is lost when connections close.

use super::support::{MIB, Request, nbd, wait_until};
use super::{House, number};
use serde_json::Value;

#[test]
fn every_request_is_counted_once() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    for index in 0..10 {
        client.write(index * 8192, &[1; 4096]);
    }
    client.read(0, 8192);
    client.read(4096, 4096);
    client.zeroes(0, 4096);
    client.read(0, 4096);
    client.trim(8192, 4096);
    client.flush();
    client.call(&Request::status(0, MIB)).ok();
    // Out of range.
    client.call(&Request::read(4 * MIB, 4096)).fails(nbd::EINVAL);
    // In slices.
    client.read(0, 3 * MIB);
    // How long it took is noted a moment after the client has its reply.
    wait_until("the last one is noted", || {
        number(&house.session("base@x")["latency"]["read"]["requests"]) == 5
    });
    let session = house.session("base@x");
    let requests = &session["requests"];
    let count = |name: &str| number(&requests[name]);
    assert_eq!((count("reads"), count("writes"), count("zeroes")), (4, 10, 1), "{requests}");
    assert_eq!((count("trims"), count("flushes"), count("others")), (1, 1, 1), "{requests}");
    assert_eq!(count("errors"), 1, "{requests}");
    let bytes = &session["bytes"];
    assert_eq!(number(&bytes["written"]), 40960);
    assert_eq!(number(&bytes["read"]), 8192 + 4096 + 4096 + 3 * MIB);
    // One block is zero, one trimmed, eight are the session's own; the first read found one more of these.
    assert_eq!(number(&bytes["from_overlay"]), 4096 + 8 * 4096);
    assert_eq!(number(&bytes["from_holes"]), 4096 + 2 * 4096);
    assert_eq!(number(&bytes["from_base"]), 4096 + 4096 + 3 * MIB - 10 * 4096);
    let latency = &session["latency"];
    // What was refused took its time, too.
    assert_eq!(number(&latency["read"]["requests"]), 5);
    assert_eq!(number(&latency["write"]["requests"]), 10);
    assert_eq!(number(&latency["other"]["requests"]), 4);
    let time = |name: &str| latency["read"][name].as_f64().unwrap();
    assert!(time("p50_us") <= time("p90_us") && time("p99_us") <= time("p999_us"), "{latency}");
    assert!(time("p999_us") >= 1.0 && time("mean_us") > 0.0, "{latency}");
}

#[test]
fn what_closed_connections_did_is_not_forgotten() {
    let house = House::new();
    let before = house.server.client("base@x");
    for _ in 0..5 {
        let mut client = house.server.client("base@x");
        client.read(0, 4096);
        client.disconnect();
    }
    let reads = |value: &Value| number(&value["requests"]["reads"]);
    wait_until("all have left", || number(&house.session("base@x")["connections"]) == 1);
    assert_eq!(reads(&house.session("base@x")), 5);
    // Neither by the server, when the session itself is over.
    let mut private = house.server.client("base");
    private.read(0, 4096);
    private.disconnect();
    wait_until("it is gone", || house.names() == ["base@x"]);
    assert_eq!(house.ask("DELETE", "/v1/sessions/base@x", "").status, 204);
    drop(before);
    wait_until("it is gone, too", || house.names().is_empty());
    let server = house.get("/v1/server");
    assert_eq!((reads(&server), number(&server["latency"]["read"]["requests"])), (6, 6));
}

#[test]
fn rates_are_those_of_now() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    let rate = |name: &str| house.session("base@x")["rates"][name].as_f64().unwrap();
    wait_until("reads are seen", || {
        client.read(0, 4096);
        rate("reads_per_second") > 0.0 && rate("bytes_read_per_second") > 0.0
    });
    assert!(rate("writes_per_second").abs() < f64::EPSILON);
    wait_until("nothing is read any more", || rate("reads_per_second").abs() < f64::EPSILON);
}
