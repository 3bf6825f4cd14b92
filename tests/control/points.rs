//! Checkpoints, rollback, reset and fork, by the API and by the commands.

use super::support::{MIB, Request, wait_until};
use super::{House, number};
use serde_json::{Value, json};

#[test]
fn a_session_goes_back_and_forth_by_its_checkpoints() {
    let house = House::new();
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 4096]);
    assert_eq!(house.run(&["checkpoint", "base@x", "one"]), "");
    client.write(0, &[2; 4096]);
    client.write(MIB, &[2; 4096]);
    let taken: Value = serde_json::from_str(&house.run(&["checkpoint", "base@x", "two", "--json"])).unwrap();
    assert_eq!((&taken["name"], &taken["data"]), (&json!("two"), &json!(8192)));
    client.zeroes(0, 2 * MIB);
    assert_eq!(house.run(&["rollback", "base@x", "one"]), "");
    assert_eq!((client.read(0, 4096), client.read(MIB, 4096)), (vec![1; 4096], house.image.bytes(MIB, 4096)));
    house.run(&["rollback", "base@x", "two"]);
    assert_eq!((client.read(0, 4096), client.read(MIB, 4096)), (vec![2; 4096], vec![2; 4096]));
    let text = house.run(&["checkpoint", "base@x"]);
    let names: Vec<_> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["CHECKPOINT", "one", "two"]);
    house.run(&["reset", "base@x"]);
    assert_eq!(client.read(0, 2 * MIB), house.image.bytes(0, 2 * MIB));
    house.run(&["checkpoint", "base@x", "one", "--drop"]);
    house.run(&["checkpoint", "base@x", "two", "--drop"]);
    assert_eq!(house.get("/v1/sessions/base@x/checkpoints"), json!({ "checkpoints": [] }));
    wait_until("all is given back", || number(&house.get("/v1/server")["memory"]["data"]) == 0);
}

#[test]
fn a_fork_goes_its_own_way_and_waits_for_its_client() {
    let house = House::with(&["--linger", "0s"]);
    let mut client = house.server.client("base@x");
    client.write(0, &[1; 8192]);
    let uri = house.run(&["fork", "base@x", "--id", "y"]);
    assert!(uri.starts_with("nbd+unix:///base@y?socket="), "{uri}");
    let other: Value = serde_json::from_str(&house.run(&["fork", "base@x", "--json"])).unwrap();
    assert_eq!(other["id"].as_str().unwrap().len(), 32);
    assert_eq!(other["owner"], house.session("base@x")["owner"]);
    client.write(0, &[2; 4096]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut fork = house.server.client("base@y");
    fork.write(4096, &[3; 4096]);
    assert_eq!(fork.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    assert_eq!(client.read(0, 8192), [[2; 4096], [1; 4096]].concat());
    // The first one's end takes nothing from the others.
    house.run(&["end", "base@x"]);
    assert_eq!(fork.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    let mut third = house.server.client(other["name"].as_str().unwrap());
    assert_eq!(third.read(0, 8192), [1; 8192]);
    fork.call(&Request::flush()).ok();
}

#[test]
fn what_cannot_be_is_one_line() {
    let house = House::new();
    let _client = house.server.client("base@x");
    let own = house.server.client("base");
    let private = house.names().into_iter().find(|name| name.contains("@:")).expect("the private one");
    house.run(&["checkpoint", "base@x", "a"]);
    for (args, line) in [
        (&["checkpoint", "base@none", "a"][..], "base@none"),
        (&["checkpoint", "base@x", "a"], "a"),
        (&["checkpoint", "base@x", "a b"], "a b"),
        (&["checkpoint", "base@x", "b", "--drop"], "No such checkpoint: b"),
        (&["rollback", "base@x", "b"], "No such checkpoint: b"),
        (&["rollback", "base@none", "b"], "base@none"),
        (&["reset", "base@none"], "base@none"),
        (&["fork", "base@none"], "base@none"),
        (&["fork", "base@x", "--id", "x"], "base@x"),
        (&["checkpoint", &private, "a"], "has no points"),
        (&["reset", &private], "has no points"),
        (&["fork", &private], "has no points"),
    ] {
        let said = house.fail(args);
        assert!(said.contains(line), "{args:?}: {said}");
    }
    let kind = |path: &str, body: &str| {
        let answer = house.ask("POST", &format!("/v1/sessions/base@x/{path}"), body);
        (answer.status, answer.kind())
    };
    let invalid = || (400, "invalid".to_owned());
    assert_eq!(kind("checkpoints", "{}"), invalid());
    assert_eq!(kind("rollback", "{}"), invalid());
    assert_eq!(kind("rollback", "{\"to\":\"a\"}"), invalid());
    assert_eq!(kind("reset", "{\"to\":\"a\"}"), invalid());
    assert_eq!(kind("fork", "{\"id\":\"a/b\"}"), invalid());
    assert_eq!(kind("bend", "{}"), (404, "not-found".to_owned()));
    own.disconnect();
}
