//! Caps on what a session may be asked to do: what is beyond waits, and does not fail; nobody else notices; and nothing is
//! left of who goes while it waits.
//!
//! Times are bounds from below, which follow from the cap: of `n` requests the last goes when the others have come in, less
//! what comes in within a tenth of a second.

use super::support::{MIB, Request, nbd, wait_until};
use super::{Client, House, Stream, failure, number};
use serde_json::json;
use std::time::{Duration, Instant};

/// Small ones: all of them fit into sockets while they wait.
fn writes(count: u64) -> Vec<Request> {
    (0..count)
        .map(|index| Request::write(index % 512 * 8192, &[u8::try_from(index % 256).expect("a byte"); 512]))
        .collect()
}

/// What `act` takes at least, if so many seconds of a cap are used, and a tenth is there at once.
#[track_caller]
fn takes(seconds: f64, act: impl FnOnce()) {
    let start = Instant::now();
    act();
    let (took, least) = (start.elapsed(), Duration::from_secs_f64(seconds - 0.1));
    assert!(took >= least, "{took:?} instead of {least:?}");
}

fn done(house: &House, session: &str) -> u64 {
    let requests = &house.session(session)["requests"];
    number(&requests["writes"]) + number(&requests["reads"])
}

#[test]
fn requests_beyond_the_cap_wait_and_other_sessions_do_not() {
    let house = House::new();
    let (mut capped, mut free) = (house.server.client("base@capped"), house.server.client("base@free"));
    house.run(&["set", "base@capped", "--iops", "400"]);
    takes(199.0 / 400.0, || capped.pipeline(&writes(200)).into_iter().for_each(|reply| drop(reply.ok())));
    // A minute's worth and more.
    house.run(&["set", "base@capped", "--iops", "2"]);
    let waiting = capped.send_all(&writes(150));
    free.pipeline(&writes(1000)).into_iter().for_each(|reply| drop(reply.ok()));
    assert_eq!(done(&house, "base@free"), 1000);
    assert!(done(&house, "base@capped") < 350, "it waits");
    // Who waits goes on when the cap is lifted.
    house.run(&["set", "base@capped", "--iops", "none"]);
    for cookie in waiting {
        capped.wait(cookie).ok();
    }
    assert_eq!(done(&house, "base@capped"), 350);
    assert_eq!(capped.read(149 * 8192, 512), vec![149; 512]);
}

#[test]
fn bytes_that_are_read_and_written_have_a_cap_of_their_own() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    house.run(&["set", "base@x", "--bandwidth", "4M"]);
    // Larger than what comes in within a tenth of a second: it goes, and what is behind it waits for that.
    let requests = [Request::read(0, 2 * MIB), Request::read(0, 1)];
    takes(0.5, || client.pipeline(&requests).into_iter().for_each(|reply| drop(reply.ok())));
    let requests = [Request::write(0, &[7; 2 << 20]), Request::write(0, &[8])];
    takes(0.5, || client.pipeline(&requests).into_iter().for_each(|reply| drop(reply.ok())));
    // What moves no bytes needs none, and what is refused costs none; both wait for nobody but those before them.
    house.run(&["set", "base@x", "--bandwidth", "1"]);
    client.read(0, 4096);
    client.flush();
    client.zeroes(0, 4 * MIB);
    client.trim(0, MIB);
    client.call(&Request::read(4 * MIB, 32 * MIB)).fails(nbd::EINVAL);
    assert!(client.in_flight() == 0);
}

#[test]
fn all_connections_of_a_session_have_one_cap_together() {
    let house = House::with(&["--workers", "2"]);
    let mut clients: Vec<Client> = (0..8).map(|_| house.server.client("base@x")).collect();
    house.run(&["set", "base@x", "--iops", "400"]);
    takes(199.0 / 400.0, || {
        let cookies: Vec<_> = clients.iter_mut().map(|client| client.send_all(&writes(25))).collect();
        for (client, cookies) in clients.iter_mut().zip(cookies) {
            cookies.into_iter().for_each(|cookie| drop(client.wait(cookie).ok()));
        }
    });
}

/// A connection with one request has its turn among those with many: the requests of the session do not have to be done first.
#[test]
fn a_connection_with_many_requests_does_not_keep_others_of_its_session_waiting() {
    let house = House::new();
    let (mut many, mut one) = (house.server.client("base@x"), house.server.client("base@x"));
    house.run(&["set", "base@x", "--iops", "5"]);
    many.send_all(&writes(400));
    wait_until("they wait", || done(&house, "base@x") > 0);
    one.read(0, 4096);
    // More than a minute's worth: if it had been behind them, there were none left.
    assert!(number(&house.session("base@x")["requests"]["writes"]) < 400);
}

#[test]
fn nothing_is_left_of_who_goes_while_it_waits() {
    let house = House::with(&["--tcp", "127.0.0.1:0"]);
    let empty = house.server.usage();
    let wait_for_leaving = || {
        wait_until("it is gone", || number(&house.session("base@x")["connections"]) == 0);
    };
    house.create(r#"{"id":"x"}"#);
    house.run(&["set", "base@x", "--bandwidth", "1"]);
    for _ in 0..10 {
        let mut client = house.server.client("base@x");
        client.send_all(&[Request::read(0, MIB), Request::write(0, &[1; 4096])]);
        client.send_all(&writes(50));
        client.cut();
        wait_for_leaving();
    }
    // They took nothing with them but what they were given: it is there again when the cap is another.
    house.run(&["set", "base@x", "--bandwidth", "1G"]);
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 4096]);
    house.run(&["set", "base@x", "--bandwidth", "1"]);
    client.send_all(&writes(50));
    // Its end, however it waits.
    house.run(&["end", "base@x"]);
    wait_until("all is as it was", || house.server.usage().descriptors <= empty.descriptors);
    let uri = house.get("/v1/server")["addresses"][1].as_str().unwrap().to_owned();
    let address = uri.strip_prefix("nbd://").unwrap().trim_end_matches('/');
    let mut client = Client::attach(Stream::tcp(address).unwrap(), "base@y").expect("it is there");
    house.run(&["set", "base@y", "--iops", "1"]);
    client.send_all(&writes(50));
    house.run(&["end", "base@y"]);
    wait_until("all is as it was", || house.server.usage().descriptors <= empty.descriptors);
}

#[test]
fn caps_are_shown_inherited_and_given_to_all_by_default() {
    let house = House::with(&["--session-iops", "500", "--session-bandwidth", "20M"]);
    let caps = |name: &str| house.session(name)["caps"].clone();
    let mut own = house.server.client("base");
    own.write(0, &[1; 4096]);
    assert_eq!(caps(&house.names()[0]), json!({"iops": 500, "bandwidth": 20 * MIB}));
    house.run(&["new", "base", "--id", "x"]);
    assert!(house.run(&["stat", "base@x"]).contains("    cap: 500 requests/s\n    cap: 20 MiB/s\n"));
    house.run(&["set", "base@x", "--iops", "0"]);
    assert_eq!(caps("base@x"), json!({"iops": null, "bandwidth": 20 * MIB}));
    house.run(&["fork", "base@x", "--id", "y"]);
    assert_eq!(caps("base@y"), json!({"iops": null, "bandwidth": 20 * MIB}));
    house.run(&["set", "base@x", "--bandwidth", "none", "--iops", "7"]);
    assert_eq!(caps("base@x"), json!({"iops": 7, "bandwidth": null}));
    assert_eq!(caps("base@y"), json!({"iops": null, "bandwidth": 20 * MIB}));
    for bad in [&["--iops", "5k"], &["--bandwidth", "fast"]] {
        let line = failure(house.command(&["set", "base@x"]).args(bad), 2);
        assert!(line.contains("or none"), "{line}");
    }
    let line = failure(&mut house.command(&["set", "base@x"]), 2);
    assert!(line.contains("--iops"), "{line}");
}

/// The reads that are begun for a client that takes no reply, when no more are.
fn begun(house: &House) -> u64 {
    let count = || number(&house.session("base@x")["requests"]["reads"]);
    let (mut last, mut since) = (0, Instant::now());
    // For so long that the server was not just kept from its work.
    wait_until("no more are begun", || {
        let now = count();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        last > 0 && since.elapsed() > Duration::from_secs(3)
    });
    last
}

#[test]
fn requests_in_flight_on_a_connection_have_a_limit_of_their_own() {
    // More than any socket takes, in one piece of requests.
    let reads: Vec<_> = (0..8000).map(|index| Request::read(index % 1024 * 4096, 4096)).collect();
    let (few, many) = (House::with(&["--max-requests-in-flight", "1"]), House::new());
    let mut clients = [few.server.client("base@x"), many.server.client("base@x")];
    let cookies = clients.each_mut().map(|client| client.send_all(&reads));
    // What the socket takes is sent; of what it does not take there is a batch, which has as many as there may be.
    let (stuck_few, stuck_many) = (begun(&few), begun(&many));
    assert!(stuck_few + 64 < stuck_many && stuck_many < 8000, "{stuck_few} {stuck_many}");
    for (mut client, cookies) in clients.into_iter().zip(cookies) {
        cookies.into_iter().for_each(|cookie| drop(client.wait(cookie).ok()));
    }
    for house in [&few, &many] {
        assert_eq!(number(&house.session("base@x")["requests"]["reads"]), 8000);
    }
}
