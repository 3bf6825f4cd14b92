//! A destination that is away or refuses while the session goes on.

use std::fs;

use crate::house::House;
use crate::interop_support::said;
use crate::spool::Small;
use crate::support::wait_until;

#[test]
fn the_session_goes_on_and_everything_is_delivered_when_there_is_room() {
    let house = House::new();
    let small = Small::at(house.dest(""), "256k");
    let running = house.start(
        &[],
        "head -c 1000000 /dev/urandom >big; i=0; while sleep 0.1; do echo $i >count; i=$((i+1)); done",
    );
    wait_until("it has failed", || house.status()["running"][0]["last_error"].is_string());
    let status = house.status();
    assert!(status["running"][0]["failures"].as_u64().unwrap() > 0, "{status}");
    assert!(status["running"][0]["last_error"].as_str().unwrap().contains("no space left"), "{status}");
    crate::interop_support::run("mount", ["-o", "remount,size=8m", house.dest("").to_str().unwrap()]);
    wait_until("it is delivered", || house.dest("big").metadata().is_ok_and(|file| file.len() == 1_000_000));
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    assert!(house.spooled().is_empty());
    drop(small);
}

#[test]
fn a_destination_that_is_not_there_lets_nobody_in() {
    let house = House::to("/no/such/directory".into());
    let output = house.attempt(&[], "echo inside");
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{}", said(&output));
    assert!(said(&output).contains("/no/such/directory"), "{}", said(&output));
    assert!(said(&output).contains("make the directory, or mount it"), "{}", said(&output));
}

#[test]
fn what_cannot_be_understood_is_said() {
    let house = House::new();
    let dest = house.dest("");
    for (carry, expected) in [
        ("/home/u".to_owned(), "write PATH=DEST"),
        (format!("home={}", dest.display()), "no path from the private root's /"),
        (format!("/tmp/x={}", dest.display()), "/tmp is not on the private root's disk"),
        ("/home/u=ftp://host/x".to_owned(), "Cannot carry to ftp://"),
    ] {
        let output = house.place.attempt(&["--carry", &carry], "echo inside");
        assert!(!output.status.success() && output.stdout.is_empty(), "{carry}");
        assert!(said(&output).contains(expected), "{carry}: {}", said(&output));
    }
    let carry = format!("/home/u={}", dest.display());
    let output = house.place.attempt(&["--carry", &carry, "--carry-exclude", "a{b"], "true");
    assert!(said(&output).contains("Cannot understand the pattern 'a{b'"), "{}", said(&output));
    assert_eq!(fs::read_dir(dest).unwrap().count(), 0);
}
