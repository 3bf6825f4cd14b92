//! systemd: its own tool for socket activation, and the units in `docs/systemd`.

mod interop_support;
mod support;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use interop_support::{assert_same, attempt, run, said};
use rustix::process::Signal;
use support::server::scratch;
use support::{Image, MIB, Server};

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

/// A file of `docs/systemd`.
fn unit(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/systemd").join(name);
    fs::read_to_string(path).expect("the unit is in the project")
}

/// What will be `command` once somebody connects to one of `addresses`; systemd's tool becomes it.
fn on_first_client(addresses: &[&str], command: &[&str]) -> Server {
    let mut activate = Command::new("systemd-socket-activate");
    for address in addresses {
        activate.args(["-l", address]);
    }
    activate.args(command).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = Server::by(activate, scratch());
    server.wait_for_line("Listening on", addresses.len());
    server
}

#[test]
fn the_first_client_starts_the_server_and_all_addresses_are_served() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 3 * MIB, 1);
    let socket = dir.path().join("activated.sock");
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let addresses = [socket.to_str().expect("text"), &format!("127.0.0.1:{port}")];
    let mut server = on_first_client(
        &addresses,
        &["--fdname=local:network", MEMDEV, "serve", image.path.to_str().expect("text")],
    );
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    run("nbdcopy", [&format!("nbd+unix:///disk?socket={}", socket.display()), one.to_str().expect("text")]);
    run("nbdcopy", [&format!("nbd://127.0.0.1:{port}/disk"), two.to_str().expect("text")]);
    assert_same(&one, &image.path);
    assert_same(&two, &image.path);
    server.wait_for_line("listening on nbd", 2);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

#[test]
fn systemd_finds_no_fault_with_the_units() {
    let dir = scratch();
    // Where it is installed here.
    let service = unit("memdev.service").replace("/usr/bin/memdev", MEMDEV);
    let files =
        [("memdev.service", service), ("memdev.socket", unit("memdev.socket"))].map(|(name, text)| {
            let path = dir.path().join(name);
            fs::write(&path, text).expect("writing the unit");
            path
        });
    let arguments = |first: &[&'static str]| -> Vec<PathBuf> {
        first.iter().map(PathBuf::from).chain(files.iter().cloned()).collect()
    };
    let output = attempt("systemd-analyze", arguments(&["verify", "--man=no"]));
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
    // Its own measure of what a service could do, from 0 (nothing) to 100.
    let mut security = arguments(&["security", "--offline=true", "--threshold=15", "--no-pager"]);
    security.pop();
    let output = attempt("systemd-analyze", security);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn the_command_of_the_service_serves() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), MIB, 2);
    let service = unit("memdev.service");
    let command = service.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
    let words: Vec<String> = command
        .split(' ')
        .map(|word| {
            let word = word.replace("/usr/bin/memdev", MEMDEV);
            word.replace("/srv/memdev/root.img", image.path.to_str().expect("text"))
        })
        .collect();
    let socket = dir.path().join("s");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut server = on_first_client(&[socket.to_str().expect("text")], &words);
    let copy = dir.path().join("copy");
    run("nbdcopy", [&format!("nbd+unix:///root?socket={}", socket.display()), copy.to_str().expect("text")]);
    assert_same(&copy, &image.path);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}
