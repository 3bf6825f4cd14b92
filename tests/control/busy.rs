//! Sessions that are busy while somebody looks at them all the time.

use super::support::{Request, wait_until};
use super::{House, ask_on, number};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Reads and writes, made and ended sessions, connections that come and go, and a thousand looks at all of it: nothing
/// fails, and no number goes down.
#[test]
fn a_thousand_looks_at_busy_sessions() {
    let house = House::with(&["--linger", "0s", "--workers", "2"]);
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for index in 0..3_u8 {
            let (house, stop, done) = (&house, &stop, &done);
            scope.spawn(move || {
                let mut client = house.server.client(&format!("base@busy{index}"));
                while !stop.load(Ordering::Relaxed) {
                    let offset = done.fetch_add(2, Ordering::Relaxed) % 512 * 4096;
                    client.write(offset, &[index; 4096]);
                    assert_eq!(client.read(offset, 4096), [index; 4096]);
                }
                client.disconnect();
            });
        }
        let (house, stop) = (&house, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut client = house.server.client("base");
                client.call(&Request::read(0, 512)).ok();
                client.disconnect();
                house.create("{\"id\":\"brief\"}");
                assert_eq!(house.ask("DELETE", "/v1/sessions/base@brief", "").status, 204);
            }
        });
        wait_until("the first is there", || house.names().iter().any(|name| name == "base@busy0"));
        let mut stream = house.connect();
        let mut last = 0;
        for turn in 0..1000 {
            let path = ["/v1/sessions", "/v1/server", "/metrics", "/v1/sessions/base@busy0"][turn % 4];
            let answer = ask_on(&mut stream, "GET", path, "");
            assert_eq!(answer.status, 200, "{path}: {}", answer.text);
            if path == "/v1/server" {
                let reads = number(&answer.json()["requests"]["reads"]);
                assert!(reads >= last, "{reads} after {last}");
                last = reads;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    wait_until("all have left", || house.names().is_empty());
    // Their blocks are taken apart beside the workers.
    wait_until("their memory is back", || number(&house.get("/v1/server")["memory"]["data"]) == 0);
    // Each turn of the three is a write and a read; others have read, too.
    let server = house.get("/v1/server");
    assert_eq!(number(&server["requests"]["writes"]) * 2, done.load(Ordering::Relaxed));
    assert!(number(&server["requests"]["reads"]) >= number(&server["requests"]["writes"]));
    assert_eq!(number(&server["requests"]["errors"]), 0);
}
