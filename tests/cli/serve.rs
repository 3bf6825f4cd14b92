//! `memdev serve`: starting, addresses, stopping. What it does for its clients is tested elsewhere.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStderr, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{MEMDEV, failure, memdev, with_image};

/// A running `memdev serve`, killed when dropped.
pub(crate) struct Server {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// What it said that it listens on.
    pub(crate) uris: Vec<String>,
}

impl Server {
    /// Starts it and waits until it listens on `addresses` addresses.
    pub(crate) fn start(mut command: std::process::Command, addresses: usize) -> Self {
        let mut child =
            command.env_remove("MEMDEV_LOG").stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut uris = Vec::new();
        while uris.len() < addresses {
            let mut line = String::new();
            stderr.read_line(&mut line).unwrap();
            let uri = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("it said {line:?}"));
            uris.push(uri.trim_end().to_owned());
        }
        Self { child, stderr, uris }
    }

    fn unix(image: &Path, socket: &Path) -> Self {
        let mut command = std::process::Command::new(MEMDEV);
        command.arg("serve").arg(image).arg("--unix").arg(socket);
        Self::start(command, 1)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// How it ended, and what it said after it listened.
    fn wait(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(30), "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_address_is_shown_as_a_uri_that_answers() {
    let (dir, image) = with_image();
    let sockets = [dir.path().join("one"), dir.path().join("two words")];
    let mut command = std::process::Command::new(MEMDEV);
    command.arg("serve").arg(&image).args(["--tcp", "127.0.0.1:0"]);
    command.args(["--tcp", "127.0.0.1:0", "--unix", "one", "--unix", "two words"]).current_dir(dir.path());
    let server = Server::start(command, 4);
    let mut tcp = Vec::new();
    for uri in &server.uris {
        if let Some(address) = uri.strip_prefix("nbd://") {
            TcpStream::connect(address).expect(uri);
            tcp.push(address);
        }
    }
    assert_eq!(tcp.len(), 2);
    assert_ne!(tcp[0], tcp[1]);
    let path = dir.path().display();
    assert!(server.uris.contains(&format!("nbd+unix:///?socket={path}/one")), "absolute: {:?}", server.uris);
    assert!(server.uris.contains(&format!("nbd+unix:///?socket={path}/two%20words")), "{:?}", server.uris);
    sockets.iter().for_each(|socket| drop(UnixStream::connect(socket).unwrap()));
    server.signal(Signal::TERM);
    assert!(server.wait().0.success());
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

/// With nothing to log, the arguments of a log macro are not evaluated: waiting for the signal there did not wait.
#[test]
fn it_serves_until_a_signal_then_removes_its_socket_and_exits_0() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (dir, image) = with_image();
        let socket = dir.path().join("s");
        let mut server = Server::unix(&image, &socket);
        let meta = fs::symlink_metadata(&socket).unwrap();
        assert!(meta.file_type().is_socket());
        assert_eq!(meta.permissions().mode() & 0o7777, 0o600, "its owner's only");
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(server.child.try_wait().unwrap(), None, "still there");
        server.signal(signal);
        let (status, said) = server.wait();
        assert_eq!(status.code(), Some(0), "{signal:?}: {said}");
        assert_eq!(said, "");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the image is left");
    }
}

#[test]
fn what_is_no_raw_disk_is_served_with_a_warning() {
    let (dir, image) = with_image();
    let other = dir.path().join("disk.qcow2");
    fs::write(&other, [b"QFI\xfb".as_slice(), &[0; 4092]].concat()).unwrap();
    let mut command = std::process::Command::new(MEMDEV);
    command.arg("serve").args([&image, &other]).arg("--unix").arg(dir.path().join("s"));
    let mut child = command.env_remove("MEMDEV_LOG").stderr(Stdio::piped()).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let lines = log.lines().map_while(Result::ok);
    let said: Vec<_> = lines.take_while(|line| !line.starts_with("listening")).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let expected = format!(
        "{} looks like a qcow2 image, and is served as the raw bytes that it is; convert it first: qemu-img convert",
        other.display()
    );
    assert_eq!(said.iter().filter(|line| line.contains("looks like")).count(), 1, "{said:?}");
    assert!(said.iter().any(|line| line.contains(&expected)), "{said:?}");
}

/// The memory of a server that cannot start is of no interest.
#[test]
fn an_image_that_is_not_there_is_all_that_is_said() {
    let (dir, _) = with_image();
    let missing = dir.path().join("missing.img");
    let mut command = std::process::Command::new("setpriv");
    // Root without its powers may lock as little as everybody.
    command.args(["--bounding-set=-all", "--inh-caps=-all", "prlimit", "--memlock=1048576"]);
    command.arg(MEMDEV).arg("serve").arg(&missing).env_remove("MEMDEV_LOG");
    command.args(["--memory", "256G", "--tcp", "127.0.0.1:0"]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("memdev: Cannot open image") && said.lines().count() == 1, "{said}");
}

#[test]
fn it_survives_a_hang_up_under_nohup() {
    let (dir, image) = with_image();
    let mut command = std::process::Command::new("nohup");
    command
        .arg(MEMDEV)
        .arg("serve")
        .arg(&image)
        .arg("--unix")
        .arg(dir.path().join("s"))
        .stdout(Stdio::null());
    let mut server = Server::start(command, 1);
    server.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(server.child.try_wait().unwrap(), None, "still there");
    server.signal(Signal::TERM);
    assert!(server.wait().0.success());
}

#[test]
fn a_live_socket_is_refused_and_goes_on_serving() {
    let (dir, image) = with_image();
    let socket = dir.path().join("s");
    let server = Server::unix(&image, &socket);
    let line = failure(memdev().arg("serve").arg(&image).arg("--unix").arg(&socket), 1);
    assert_eq!(
        line,
        format!(
            "Cannot listen on {}: another server is answering there; stop it or choose another path",
            socket.display()
        )
    );
    UnixStream::connect(&socket).unwrap();
    drop(server);
}

#[test]
fn the_socket_of_a_killed_server_is_replaced() {
    let (dir, image) = with_image();
    let socket = dir.path().join("s");
    let server = Server::unix(&image, &socket);
    server.signal(Signal::KILL);
    assert!(!server.wait().0.success());
    assert!(fs::symlink_metadata(&socket).is_ok(), "a killed server cannot remove it");
    assert!(UnixStream::connect(&socket).is_err());
    let server = Server::unix(&image, &socket);
    UnixStream::connect(&socket).unwrap();
    server.signal(Signal::TERM);
    assert!(server.wait().0.success());
    assert!(!socket.exists());
}

#[test]
fn what_is_not_a_socket_is_never_replaced() {
    let (dir, image) = with_image();
    let line = failure(memdev().arg("serve").arg(&image).arg("--unix").arg(&image), 1);
    assert!(line.contains("a file that is no socket is there; remove it or choose another path"), "{line}");
    assert_eq!(fs::read(&image).unwrap(), [1; 8192]);
    let missing = dir.path().join("no/s");
    let line = failure(memdev().arg("serve").arg(&image).arg("--unix").arg(&missing), 1);
    assert!(line.contains("no such file or directory; make its directory first"), "{line}");
}

#[test]
fn a_port_in_use_is_one_line_and_takes_no_other_address_with_it() {
    let (dir, image) = with_image();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let socket = dir.path().join("s");
    let mut command = memdev();
    let line =
        failure(command.arg("serve").arg(&image).arg("--unix").arg(&socket).args(["--tcp", &address]), 1);
    assert_eq!(
        line,
        format!(
            "Cannot listen on nbd://{address}: address already in use; stop the server there or choose another port"
        )
    );
    assert!(!socket.exists());
    let line = failure(memdev().arg("serve").arg(&image).args(["--tcp", "no-such-host.invalid:1"]), 1);
    assert!(line.contains("Cannot look up the host"), "{line}");
}

#[test]
fn descriptors_are_raised_to_the_hard_limit() {
    let (dir, image) = with_image();
    let mut command = std::process::Command::new("sh");
    let script = format!("ulimit -S -n 64; exec {MEMDEV} serve \"$0\" --unix \"$1\"");
    command.args(["-c", &script]).arg(&image).arg(dir.path().join("s"));
    let server = Server::start(command, 1);
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let mut values = limit.split_whitespace();
    assert_eq!(values.next(), values.next(), "soft and hard: {limit}");
}

#[test]
fn the_knobs_withhold_what_they_say() {
    let (dir, image) = with_image();
    let mut command = std::process::Command::new(MEMDEV);
    command.arg("serve").arg(&image).arg("--unix").arg(dir.path().join("s"));
    command.args(["--no-structured-replies", "--mask-handshake", "0x1"]);
    let server = Server::start(command, 1);
    let text = memdev().args(["info", &server.uris[0]]).output().unwrap().stdout;
    assert!(String::from_utf8(text).unwrap().contains("without TLS, simple replies"));

    // The greeting: two magics, then the handshake flags, of which only fixed newstyle is left.
    let mut greeting = [0; 18];
    UnixStream::connect(dir.path().join("s")).unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x01");
}
