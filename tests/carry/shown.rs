//! What is on its way is shown where sessions are: by `memdev ps`, `stat` and `enter --list`.

use std::fs;

use serde_json::Value;

use crate::house::{HOME, House};
use crate::interop_support::{run, said, uri};
use crate::machine::image;
use crate::spool::Small;
use crate::support::server::Serve;
use crate::support::{Image, wait_until};

#[test]
fn sessions_show_what_they_carry() {
    let house = House::new();
    let copy = Image::empty(house.place.path("debian.img"), fs::metadata(image()).unwrap().len());
    run("cp", ["--sparse=always".as_ref(), image().as_os_str(), copy.path.as_os_str()]);
    let socket = house.place.path("control");
    let control = ["--control", socket.to_str().unwrap()];
    let server = Serve::image(&copy).args(control).start();
    let session = uri(&server, "debian@kept");
    let small = Small::at(house.dest(""), "64k");
    let carry = format!("{HOME}={}", house.dest("").display());
    let options = ["--name", "kiosk", "--backend", "fuse", "--carry", &carry, "--session", &session];
    let mut command = house.place.memdev("run", &options);
    command.args(["--", "sh", "-c", "echo ready; head -c 1000000 /dev/urandom >/home/u/big; sleep 1000"]);
    let running = house.place.begin(command);
    wait_until("it has failed", || house.status()["running"][0]["last_error"].is_string());

    let ask = |subcommand: &str, arguments: &[&str]| {
        let output = house.place.memdev(subcommand, arguments).output().unwrap();
        assert!(output.status.success(), "{subcommand}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let with_control = |arguments: &[&str]| [&control[..], arguments].concat().to_vec().join("\n");
    for (subcommand, arguments, begin) in [
        ("ps", with_control(&[]), "debian@kept carries /home/u to "),
        ("stat", with_control(&["debian@kept"]), "    carries /home/u to "),
        ("enter", "--list".to_owned(), "    carries /home/u to "),
    ] {
        let arguments: Vec<_> = arguments.split('\n').collect();
        let text = ask(subcommand, &arguments);
        let line = text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{text}"));
        assert!(line.contains("1 waiting (976.5 KiB), 0 delivered"), "{text}");
        assert!(text.contains("    failed: big: no space left on device; for "), "{text}");
        let json: Value =
            serde_json::from_str(&ask(subcommand, &[&arguments[..], &["--json"]].concat())).unwrap();
        let carry = if json.is_array() { &json[0]["carry"] } else { &json["carry"] };
        assert_eq!((&carry[0]["waiting"], &carry[0]["session"]), (&1.into(), &"kiosk".into()), "{json}");
        assert!(carry[0]["failing_since"].as_u64() > Some(1_700_000_000), "{json}");
    }
    // Another session's are not its.
    let other = uri(&server, "debian@other");
    let mut client = house.place.memdev("run", &["--backend", "fuse", "--session", &other]);
    client.args(["--", "sh", "-c", "echo ready; sleep 1000"]);
    let beside = house.place.begin(client);
    let text = ask("stat", &with_control(&["debian@other"]).split('\n').collect::<Vec<_>>());
    assert!(!text.contains("carries"), "{text}");
    drop(beside);
    run("mount", ["-o", "remount,size=8m", house.dest("").to_str().unwrap()]);
    wait_until("it is delivered", || house.dest("big").exists());
    wait_until("nothing fails any more", || house.status()["running"][0]["failing_since"].is_null());
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    drop(small);
    server.stop();
}
