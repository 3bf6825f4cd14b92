//! Sockets that a service manager has bound, and what the server tells it.
//!
//! A shell stands for the service manager: it moves its standard input and output to descriptors 3 and 4, sets the
//! variables and becomes the server. What systemd's own tool and libnbd do is in the interop tests.

mod support;

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType};
use rustix::process::Signal;
use support::server::scratch;
use support::{Client, Image, MIB, PATIENCE, Server, Stream, assert_bytes};

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

/// `memdev serve IMAGE ARGS`, started with one or two sockets as a service manager does it.
fn activated(image: &Path, args: &[&str], first: OwnedFd, second: Option<OwnedFd>) -> Command {
    let mut command = Command::new("sh");
    let sockets = if second.is_some() { "3<&0 4>&1" } else { "3<&0" };
    let script = format!("exec {sockets} </dev/null >/dev/null; LISTEN_PID=$$ exec \"$0\" \"$@\"");
    command.args(["-c", &script, MEMDEV, "serve"]).arg(image).args(args);
    command.env("LISTEN_FDS", if second.is_some() { "2" } else { "1" }).env_remove("MEMDEV_LOG");
    command.stdin(first).stdout(second.map_or(Stdio::null(), Stdio::from));
    command
}

/// Its failure: one line, without `memdev: `.
fn failure(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.stderr(Stdio::piped()).output().expect("sh can be run");
    let said = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(1), "{said}");
    let line = said.strip_suffix('\n').and_then(|line| line.strip_prefix("memdev: "));
    line.filter(|line| !line.contains('\n')).unwrap_or_else(|| panic!("not one line: {said}")).to_owned()
}

fn assert_serves(stream: Stream, image: &Image) {
    let mut client = Client::attach(stream, "base").expect("the image is offered");
    assert_bytes(&client.read_all(), &image.all(), 0);
    client.disconnect();
}

#[test]
fn the_sockets_of_a_service_manager_are_served_and_stay_its_own() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let path = dir.path().join("activated.sock");
    let unix = UnixListener::bind(&path).expect("a unix socket");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a TCP socket");
    let port = tcp.local_addr().expect("an address").port();
    // Whoever comes before the server has started waits.
    let early = Stream::unix(&path).expect("somebody listens");

    let mut server = Server::by(activated(&image.path, &[], unix.into(), Some(tcp.into())), scratch());
    server.wait_for_line("listening on", 2);
    assert_eq!(
        server.log(),
        [
            format!("listening on nbd+unix:///?socket={}", path.display()),
            format!("listening on nbd://127.0.0.1:{port}")
        ],
        "these, and no default address"
    );
    assert_serves(early, &image);
    assert_serves(Stream::unix(&path).expect("it listens"), &image);
    assert_serves(Stream::tcp(&format!("127.0.0.1:{port}")).expect("it listens"), &image);

    for descriptor in [3, 4] {
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{descriptor}", server.pid())).expect("open");
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("its flags").trim();
        let flags = u32::from_str_radix(flags, 8).expect("octal");
        assert_ne!(flags & 0o4000, 0, "descriptor {descriptor} is non-blocking: {flags:o}");
        assert_ne!(flags & 0o2_000_000, 0, "descriptor {descriptor} is close-on-exec: {flags:o}");
    }
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(path.exists(), "the socket's file belongs to who made it");
}

#[test]
fn typed_addresses_are_added_to_the_inherited_ones() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 2);
    let path = dir.path().join("activated.sock");
    let unix = UnixListener::bind(&path).expect("a unix socket");
    let own = dir.path().join("own.sock");
    let args = ["--unix", own.to_str().expect("text"), "--tcp", "127.0.0.1:0"];
    let mut server = Server::by(activated(&image.path, &args, unix.into(), None), scratch());
    server.wait_for_line("listening on", 3);
    assert_serves(Stream::unix(&path).expect("it listens"), &image);
    assert_serves(Stream::unix(&own).expect("it listens"), &image);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(path.exists() && !own.exists());
}

#[test]
fn what_is_meant_for_another_process_is_not_touched() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 3);
    let unix = UnixListener::bind(dir.path().join("activated.sock")).expect("a unix socket");
    let own = dir.path().join("own.sock");
    let mut command = Command::new("sh");
    command.args(["-c", "exec 3<&0 </dev/null; exec \"$0\" \"$@\"", MEMDEV, "serve"]);
    command.arg(&image.path).arg("--unix").arg(&own);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1").stdin(OwnedFd::from(unix)).stdout(Stdio::null());
    let mut server = Server::by(command, scratch());
    server.wait_for_line("listening on", 1);
    assert_serves(Stream::unix(&own).expect("it listens"), &image);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert_eq!(server.log().len(), 1, "{:?}", server.log());
}

#[test]
fn what_is_no_listening_stream_socket_is_refused_by_name() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 4);
    let (connected, _other) = UnixStream::pair().expect("a pair");
    let cases: [(OwnedFd, &str); 4] = [
        (File::open(&image.path).expect("the image").into(), "it is no socket"),
        (UnixDatagram::unbound().expect("a socket").into(), "it is no stream socket"),
        (UdpSocket::bind("127.0.0.1:0").expect("a socket").into(), "it is no stream socket"),
        (connected.into(), "it does not listen"),
    ];
    for (socket, why) in cases {
        let mut command = activated(&image.path, &[], socket, None);
        command.env("LISTEN_FDNAMES", "disk");
        assert_eq!(
            failure(command),
            format!(
                "Cannot listen on descriptor 3 ('disk'): {why}; let the socket unit have ListenStream= and Accept=no"
            )
        );
    }

    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a TCP socket"));
    let mut two_of_one = activated(&image.path, &[], listener(), None);
    two_of_one.env("LISTEN_FDS", "2");
    let line = failure(two_of_one);
    assert!(line.starts_with("Cannot take over descriptor 4: bad file descriptor"), "{line}");
    let mut no_number = activated(&image.path, &[], listener(), None);
    no_number.env("LISTEN_FDS", "many");
    let line = failure(no_number);
    assert!(line.starts_with("LISTEN_FDS is 'many'"), "{line}");
}

#[test]
fn a_socket_for_the_network_needs_leave_like_a_typed_address() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 5);
    let listener = || OwnedFd::from(TcpListener::bind("0.0.0.0:0").expect("a TCP socket"));
    let line = failure(activated(&image.path, &[], listener(), None));
    assert!(line.starts_with("Will not listen on nbd://0.0.0.0:"), "{line}");
    let mut server = Server::by(activated(&image.path, &["--insecure"], listener(), None), scratch());
    server.wait_for_line("listening on nbd://0.0.0.0:", 1);
}

/// Bound to every context id of this machine, which is all that can be had without a virtual machine; the client's half
/// is not tested, as few kernels have vsock loopback.
#[test]
fn a_vsock_socket_is_taken_over_too() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 7);
    let script = "
import os, socket, sys
try:
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError:
    sys.exit('this kernel has no vsock')
s.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
s.listen()
print('port', s.getsockname()[1], file=sys.stderr, flush=True)
if s.fileno() == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(s.fileno(), 3, inheritable=True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[1], sys.argv[1:])
";
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script, MEMDEV, "serve"]).arg(&image.path).stdin(Stdio::null());
    let mut server = Server::by(command, scratch());
    if rustix::net::socket(AddressFamily::VSOCK, SocketType::STREAM, None).is_err() {
        server.wait();
        support::wait_until("it is said", || !server.log().is_empty());
        assert_eq!(server.log(), ["this kernel has no vsock"]);
        return;
    }
    server.wait_for_line("listening on nbd+vsock://", 1);
    let log = server.log();
    let port = log[0].strip_prefix("port ").expect("the port comes first");
    assert!(log[1].ends_with(&format!(":{port}")), "{log:?}");
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

#[test]
fn the_service_manager_is_told_when_clients_can_come_and_when_it_ends() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 6);
    let notify = dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).expect("a datagram socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let told = || {
        let mut bytes = [0; 100];
        let length = manager.recv(&mut bytes).expect("it tells something");
        String::from_utf8(bytes[..length].to_vec()).expect("text")
    };
    let socket = dir.path().join("nbd.sock");
    let mut command = Command::new(MEMDEV);
    command.arg("serve").arg(&image.path).arg("--unix").arg(&socket).env("NOTIFY_SOCKET", &notify);
    let mut server = Server::by(command, scratch());
    assert_eq!(told(), "READY=1");
    assert_serves(Stream::unix(&socket).expect("it said that it is ready"), &image);
    server.signal(Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    assert!(server.wait().success());

    // One that fails says nothing.
    let mut command = Command::new(MEMDEV);
    command.arg("serve").arg(dir.path().join("missing.img")).arg("--unix").arg(&socket);
    failure({
        command.env("NOTIFY_SOCKET", &notify);
        command
    });
    manager.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    manager.recv(&mut [0; 100]).expect_err("nothing more was said");
}
