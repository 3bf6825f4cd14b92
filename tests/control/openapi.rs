//! `docs/openapi.json` and the server tell the same: every path and method in it is called, every answer has the fields
//! that it says and no others, and nothing is offered that is not in it.

use super::support::wait_until;
use super::{House, ask_on, ask_with};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::fd::AsFd;

fn document() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("the document")).expect("JSON")
}

const METHODS: [&str; 7] = ["get", "put", "post", "delete", "patch", "options", "trace"];

/// Every path with its methods.
fn operations(document: &Value) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let methods = item.as_object().expect("methods").keys().filter(|key| METHODS.contains(&key.as_str()));
        all.extend(methods.map(|method| (path.clone(), method.to_uppercase())));
    }
    all
}

/// What is asked, and the status that it is answered with. The session `base@there` is there, `base@used` is in use.
const CALLS: &[(&str, &str, &str, &str, u16)] = &[
    ("/v1/server", "GET", "/v1/server", "", 200),
    ("/v1/takeover", "POST", "/v1/takeover", "", 200),
    ("/v1/takeover", "POST", "/v1/takeover", r#"{"now":true}"#, 400),
    (COMMIT, "POST", COMMIT, "", 400),
    ("/v1/images", "GET", "/v1/images", "", 200),
    (IMAGE, "GET", "/v1/images/base", "", 200),
    (IMAGE, "GET", "/v1/images/none", "", 404),
    (IMAGE, "PUT", "/v1/images/base", r#"{"path":"base.img"}"#, 400),
    // A server that is confined cannot open it, though root could.
    (IMAGE, "PUT", "/v1/images/base", r#"{"path":"/etc/passwd"}"#, 403),
    (IMAGE, "PUT", "/v1/images/base", r#"{"path":"/no/such"}"#, 404),
    ("/v1/sessions", "GET", "/v1/sessions?after=0&limit=1", "", 200),
    ("/v1/sessions", "GET", "/v1/sessions?after=-1", "", 400),
    ("/v1/sessions", "POST", "/v1/sessions", r#"{"image":"base","id":"a","memory":4096}"#, 201),
    ("/v1/sessions", "POST", "/v1/sessions", r#"{"id":"a b"}"#, 400),
    ("/v1/sessions", "POST", "/v1/sessions", r#"{"image":"none"}"#, 404),
    ("/v1/sessions", "POST", "/v1/sessions", r#"{"id":"there"}"#, 409),
    ("/v1/sessions/{name}", "GET", "/v1/sessions/base@used", "", 200),
    ("/v1/sessions/{name}", "GET", "/v1/sessions/base", "", 400),
    ("/v1/sessions/{name}", "GET", "/v1/sessions/base@none", "", 404),
    (
        "/v1/sessions/{name}",
        "PATCH",
        "/v1/sessions/base@there",
        r#"{"memory":8192,"iops":1000,"bandwidth":0}"#,
        200,
    ),
    ("/v1/sessions/{name}", "PATCH", "/v1/sessions/base@there", r#"{"size":1}"#, 400),
    ("/v1/sessions/{name}", "PATCH", "/v1/sessions/base@none", "{}", 404),
    ("/v1/sessions/{name}", "PATCH", "/v1/sessions/base@there", r#"{"id":"used"}"#, 409),
    ("/v1/sessions/{name}", "DELETE", "/v1/sessions/base", "", 400),
    ("/v1/sessions/{name}", "DELETE", "/v1/sessions/base@none", "", 404),
    ("/v1/sessions/{name}", "DELETE", "/v1/sessions/base@there", "", 204),
    ("/metrics", "GET", "/metrics", "", 200),
    (POINTS, "POST", "/v1/sessions/base@used/checkpoints", r#"{"name":"one"}"#, 201),
    (POINTS, "POST", "/v1/sessions/base@used/checkpoints", r#"{"name":"one"}"#, 409),
    (POINTS, "POST", "/v1/sessions/base@used/checkpoints", r#"{"name":"a b"}"#, 400),
    (POINTS, "POST", "/v1/sessions/base@none/checkpoints", r#"{"name":"one"}"#, 404),
    (POINTS, "POST", "/v1/sessions/base@:1/checkpoints", r#"{"name":"one"}"#, 501),
    (POINTS, "GET", "/v1/sessions/base@used/checkpoints", "", 200),
    (POINTS, "GET", "/v1/sessions/base/checkpoints", "", 400),
    (POINTS, "GET", "/v1/sessions/base@none/checkpoints", "", 404),
    (POINTS, "GET", "/v1/sessions/base@:1/checkpoints", "", 501),
    (
        "/v1/sessions/{name}/rollback",
        "POST",
        "/v1/sessions/base@used/rollback",
        r#"{"checkpoint":"one"}"#,
        200,
    ),
    ("/v1/sessions/{name}/rollback", "POST", "/v1/sessions/base@used/rollback", "{}", 400),
    (
        "/v1/sessions/{name}/rollback",
        "POST",
        "/v1/sessions/base@used/rollback",
        r#"{"checkpoint":"two"}"#,
        404,
    ),
    ("/v1/sessions/{name}/rollback", "POST", "/v1/sessions/base@:1/rollback", r#"{"checkpoint":"one"}"#, 501),
    (POINT, "DELETE", "/v1/sessions/base@used/checkpoints/one", "", 204),
    (POINT, "DELETE", "/v1/sessions/base@used/checkpoints/one", "", 404),
    (POINT, "DELETE", "/v1/sessions/base/checkpoints/one", "", 400),
    (POINT, "DELETE", "/v1/sessions/base@:1/checkpoints/one", "", 501),
    ("/v1/sessions/{name}/reset", "POST", "/v1/sessions/base@used/reset", "", 200),
    ("/v1/sessions/{name}/reset", "POST", "/v1/sessions/base@used/reset", r#"{"to":"one"}"#, 400),
    ("/v1/sessions/{name}/reset", "POST", "/v1/sessions/base@none/reset", "", 404),
    ("/v1/sessions/{name}/reset", "POST", "/v1/sessions/base@:1/reset", "", 501),
    (FORK, "POST", "/v1/sessions/base@used/fork", r#"{"id":"b","unclaimed":true}"#, 201),
    (FORK, "POST", "/v1/sessions/base@used/fork", r#"{"id":"b"}"#, 409),
    (FORK, "POST", "/v1/sessions/base@used/fork", r#"{"id":"a/b"}"#, 400),
    (FORK, "POST", "/v1/sessions/base@none/fork", "", 404),
    (FORK, "POST", "/v1/sessions/base@:1/fork", "", 501),
];

const COMMIT: &str = "/v1/takeover/commit";
const IMAGE: &str = "/v1/images/{name}";
const POINTS: &str = "/v1/sessions/{name}/checkpoints";
const POINT: &str = "/v1/sessions/{name}/checkpoints/{checkpoint}";
const FORK: &str = "/v1/sessions/{name}/fork";

#[test]
fn every_call_of_the_document_is_answered_as_it_says() {
    let document = document();
    let house = House::with(&["--max-sessions", "4", "--max-sessions-per-owner", "4"]);
    house.create(r#"{"id":"there"}"#);
    let mut client = house.server.client("base@used");
    client.write(0, &[1; 4096]);
    client.read(0, 8192);
    let mut called = BTreeSet::new();
    let mut call = |template: &str, method: &str, path: &str, body: &str, status: u16| {
        let answer = house.ask(method, path, body);
        assert_eq!(answer.status, status, "{method} {path} {body}: {}", answer.text);
        let operation = &document["paths"][template][method.to_lowercase()];
        let response = &operation["responses"][status.to_string()];
        assert!(response.is_object(), "{method} {template}: {status} is not in the document");
        match response["content"].as_object() {
            None => assert!(answer.text.is_empty(), "{method} {path}: a body that is not in the document"),
            Some(content) => {
                let (kind, media) = content.iter().next().expect("one kind");
                let said = answer.field("Content-Type").expect("a kind");
                assert!(said.starts_with(kind.as_str()), "{said}");
                if kind == "application/json" {
                    check(&document, &media["schema"], &answer.json(), &format!("{method} {path}"));
                }
            }
        }
        called.insert((template.to_owned(), method.to_owned(), status.to_string()));
    };
    for (template, method, path, body, status) in CALLS {
        call(template, method, path, body, *status);
    }
    let again = serde_json::json!({ "path": house.image.path }).to_string();
    call(IMAGE, "PUT", "/v1/images/base", &again, 200);
    call("/v1/sessions", "POST", "/v1/sessions", "", 201);
    call("/v1/sessions", "POST", "/v1/sessions", "", 403);
    call(FORK, "POST", "/v1/sessions/base@used/fork", "", 403);
    // Two workers' worth of memory is all there is: not even a session has room.
    let tight = House::with(&["--memory", "6K"]);
    tight.create(r#"{"id":"x"}"#);
    let fill = |path: &str, named: bool| {
        let body = |turn| if named { format!(r#"{{"name":"{turn}"}}"#) } else { String::new() };
        let mut answers = (0..).map(|turn| tight.ask("POST", path, &body(turn)));
        answers.find(|answer| answer.status != 201).expect("memory ends")
    };
    for (template, path) in [
        (POINTS, "/v1/sessions/base@x/checkpoints"),
        ("/v1/sessions", "/v1/sessions"),
        (FORK, "/v1/sessions/base@x/fork"),
    ] {
        let full = fill(path, template == POINTS);
        assert_eq!((full.status, full.kind().as_str()), (507, "out-of-space"), "{path}");
        check(&document, &document["components"]["schemas"]["Failure"], &full.json(), path);
        called.insert((template.to_owned(), "POST".to_owned(), "507".to_owned()));
    }

    // Another server takes its place, and dies. Without anybody who is connected it would end then.
    let _client = house.server.client("base@used");
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a pair");
    let (mut kept, stream) = (house.connect(), pair(SocketType::STREAM));
    let unfit = ask_with(&mut kept, ("POST", COMMIT), "{}", &[stream.0.as_fd()]);
    assert_eq!((unfit.status, unfit.kind().as_str()), (400, "invalid"), "{}", unfit.text);
    let bridge = pair(SocketType::SEQPACKET);
    let mut commit = |body: &str| ask_with(&mut kept, ("POST", COMMIT), body, &[bridge.0.as_fd()]);
    let taken = commit("{}");
    assert_eq!(taken.status, 200, "{}", taken.text);
    check(&document, &document["components"]["schemas"]["Taken"], &taken.json(), COMMIT);
    let mut sessions: Vec<String> = serde_json::from_value(taken.json()["sessions"].clone()).expect("names");
    sessions.sort_unstable();
    assert!(sessions.contains(&"base@used".to_owned()), "{sessions:?}");
    drop(bridge.1);
    wait_until("it has noticed", || house.server.log().iter().any(|line| line.contains("has ended")));
    let again = commit("{}");
    let offer = ask_on(&mut kept, "POST", "/v1/takeover", "");
    for (path, status, answer) in [(COMMIT, "409", &again), ("/v1/takeover", "409", &offer)] {
        assert_eq!((answer.status, answer.kind().as_str()), (409, "in-use"), "{}", answer.text);
        called.insert((path.to_owned(), "POST".to_owned(), status.to_owned()));
    }
    called.insert((COMMIT.to_owned(), "POST".to_owned(), "200".to_owned()));

    for (path, method) in operations(&document) {
        let responses = &document["paths"][&path][method.to_lowercase()]["responses"];
        for status in responses.as_object().expect("responses").keys() {
            let key = (path.clone(), method.clone(), status.clone());
            assert!(called.contains(&key), "nothing tries {method} {path}: {status}");
        }
    }
}

#[test]
fn no_method_is_offered_that_is_not_in_the_document() {
    let document = document();
    let house = House::new();
    house.create(r#"{"id":"there"}"#);
    let operations = operations(&document);
    let paths: BTreeSet<&String> = operations.iter().map(|(path, _)| path).collect();
    for path in paths {
        let name = if path == IMAGE { "base" } else { "base@there" };
        let concrete = path.replace("{name}", name).replace("{checkpoint}", "one");
        let answer = house.ask("BREW", &concrete, "");
        assert_eq!(answer.status, 405, "{path}: {}", answer.text);
        let allowed: BTreeSet<&str> =
            answer.field("Allow").expect("405 says what is allowed").split(", ").collect();
        let mut documented: BTreeSet<&str> =
            operations.iter().filter(|(other, _)| other == path).map(|(_, method)| method.as_str()).collect();
        if documented.contains("GET") {
            documented.insert("HEAD");
        }
        assert_eq!(allowed, documented, "{path}");
        for method in
            METHODS.map(str::to_uppercase).iter().filter(|method| !documented.contains(method.as_str()))
        {
            assert_eq!(house.ask(method, &concrete, "").status, 405, "{method} {path}");
        }
    }
}

/// A value is what the schema says, and has nothing that it does not say.
fn check(document: &Value, schema: &Value, value: &Value, place: &str) {
    if let Some(reference) = schema["$ref"].as_str() {
        let pointer = reference.strip_prefix('#').expect("a reference within the document");
        let schema = document.pointer(pointer).unwrap_or_else(|| panic!("{reference} is not there"));
        return check(document, schema, value, place);
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().map(|kind| kind.as_str().expect("a kind")).collect(),
        _ => panic!("{place}: a schema without a type"),
    };
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{place}: what is {other}?"),
    };
    assert!(kinds.iter().any(|kind| is(kind)), "{place}: {value} is none of {kinds:?}");
    if let Some(names) = schema["enum"].as_array() {
        assert!(names.contains(value), "{place}: {value} is none of {names:?}");
    }
    if let (Some(least), Some(number)) = (schema["minimum"].as_f64(), value.as_f64()) {
        assert!(number >= least, "{place}: {number}");
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check(document, &schema["items"], item, &format!("{place}[{index}]"));
    }
    if let Some(object) = value.as_object() {
        let properties = schema["properties"].as_object().expect("properties");
        assert_eq!(schema["additionalProperties"], false, "{place}: nothing else is allowed");
        let fields: BTreeSet<&String> = object.keys().collect();
        let required: BTreeSet<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for field in &fields {
            assert!(properties.contains_key(field.as_str()), "{place}.{field} is not in the document");
        }
        for field in required {
            assert!(object.contains_key(field), "{place}.{field} is missing");
        }
        for (field, value) in object {
            check(document, &properties[field], value, &format!("{place}.{field}"));
        }
    }
}
