//! Private roots: what their kernel has not written yet is told as well.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use super::House;

/// A private root in which the script runs until its input ends; it has come to where it says `ready`.
fn start(house: &House, name: &str, root: &[&str], script: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
    command.arg("run").args(["--name", name, "--state"]).arg(house.state()).args(root);
    command.args(["--", "sh", "-c", &format!("{script}; echo ready; cat")]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("memdev");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

fn end(mut child: Child) {
    drop(child.stdin.take());
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_private_root_on_a_servers_session_is_told_while_it_runs() {
    let house = House::debian();
    let script =
        "echo changed > /etc/hostname; rm /etc/motd; mkdir /srv/new; echo of nobody > /tmp/elsewhere";
    let child = start(&house, "kiosk", &["--session", &house.uri("kiosk")], script);
    let out = house.attempt_root("kiosk");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let told = String::from_utf8(out.stdout).unwrap();
    let told: Vec<_> = told.lines().collect();
    for line in ["M /etc/hostname (content)", "D /etc/motd", "A /srv/new"] {
        assert!(told.contains(&line), "{told:?}");
    }
    assert!(!told.iter().any(|line| line.contains("elsewhere")), "{told:?}");
    end(child);

    // One that no server has.
    let golden = std::env::var("MEMDEV_ROOT_IMAGE").unwrap();
    let child = start(&house, "alone", &[&golden], "true");
    let out = house.attempt_root("alone");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("No server has the session that is the root of alone"), "{said}");
    let said = String::from_utf8(house.attempt_root("nobody").stderr).unwrap();
    assert!(said.contains("No private root is called 'nobody': there is alone"), "{said}");
    end(child);
    house.server.stop();
}
