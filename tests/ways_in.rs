//! Ways to a server beside its plain addresses: one connection that is there already, vsock; and who may come in.

mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;
use support::server::{Serve, scratch};
use support::{Client, Image, MIB, Server, Stream, as_user, assert_bytes};

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

fn image(dir: &Path) -> Image {
    Image::random(dir.join("base.img"), MIB, 61)
}

/// Runs `memdev serve IMAGE ARGS` to its failure with `status`; the one line it says, without `memdev: `.
fn failure(image: &Image, args: &[&str], stdin: impl Into<Stdio>, status: i32) -> String {
    let mut command = Command::new(MEMDEV);
    let output = command.arg("serve").arg(&image.path).args(args).stdin(stdin).output().expect("memdev runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(status), "{said}");
    let line = said.strip_suffix('\n').and_then(|line| line.strip_prefix("memdev: "));
    line.filter(|line| !line.contains('\n')).unwrap_or_else(|| panic!("not one line: {said}")).to_owned()
}

// One connection that is there already.

/// A server for the connected socket `socket`, which it gets as its standard input, and as its output if `both`.
fn serve_connected(image: &Image, socket: OwnedFd, both: bool) -> Server {
    let mut command = Command::new(MEMDEV);
    command.arg("serve").arg(&image.path).args(["--fd", "0"]).stdout(Stdio::null());
    if both {
        command.stdout(socket.try_clone().expect("a second handle"));
    }
    command.stdin(socket);
    Server::by(command, scratch())
}

#[test]
fn a_connected_socket_is_served_until_its_client_leaves() {
    let dir = scratch();
    let image = image(dir.path());
    for both in [false, true] {
        let (near, far) = UnixStream::pair().expect("a pair");
        let mut server = serve_connected(&image, far.into(), both);
        let mut client = Client::attach(Stream::Unix(near), "base").expect("the image is offered");
        client.write(0, &[7; 5000]);
        assert_eq!(client.read(0, 5000), [7; 5000]);
        assert_bytes(&client.read(8192, 4096), &image.bytes(8192, 4096), 8192);
        server.assert_alive();
        client.disconnect();
        assert!(server.wait().success());
        assert!(server.log().is_empty(), "it listens nowhere: {:?}", server.log());
    }
}

#[test]
fn a_client_that_vanishes_ends_its_server_too() {
    let dir = scratch();
    let image = image(dir.path());
    let (near, far) = UnixStream::pair().expect("a pair");
    let mut server = serve_connected(&image, far.into(), false);
    let mut client = Client::attach(Stream::Unix(near), "base").expect("the image is offered");
    client.write(0, &[7; 4096]);
    client.cut();
    assert!(server.wait().success());

    // Before it has said anything.
    let (near, far) = UnixStream::pair().expect("a pair");
    let mut server = serve_connected(&image, far.into(), false);
    drop(near);
    assert!(server.wait().success());
}

#[test]
fn a_connected_tcp_socket_will_do_and_a_signal_ends_it() {
    let dir = scratch();
    let image = image(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let near = TcpStream::connect(listener.local_addr().expect("an address")).expect("connecting to it");
    let (far, _) = listener.accept().expect("the connection");
    let mut server = serve_connected(&image, far.into(), false);
    let mut client = Client::attach(Stream::Tcp(near), "base").expect("the image is offered");
    assert_bytes(&client.read_all(), &image.all(), 0);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    client.peer().expect_end();
}

#[test]
fn what_is_no_connected_stream_socket_is_refused() {
    let dir = scratch();
    let image = image(dir.path());
    let (datagrams, _other) = UnixDatagram::pair().expect("a pair");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let flags = SocketFlags::CLOEXEC;
    let lonely =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket");
    for (socket, why) in [
        (Stdio::null(), "it is no socket"),
        (OwnedFd::from(datagrams).into(), "it is no stream socket"),
        (OwnedFd::from(listener).into(), "it listens, and has no client"),
        (lonely.into(), "it is not connected"),
    ] {
        assert_eq!(
            failure(&image, &["--fd", "0"], socket, 1),
            format!(
                "Cannot serve descriptor 0: {why}; give the number of a connected unix, TCP or vsock stream socket"
            )
        );
    }
    let line = failure(&image, &["--fd", "1000"], Stdio::null(), 1);
    assert!(line.starts_with("Cannot serve descriptor 1000: bad file descriptor; give the number"), "{line}");
    let line = failure(&image, &["--fd=-1"], Stdio::null(), 2);
    assert!(line.contains("--fd"), "{line}");
    let line = failure(&image, &["--fd", "0", "--tcp", "127.0.0.1:0"], Stdio::null(), 2);
    assert!(line.contains("cannot be used with"), "{line}");
}

// Virtual machines.

/// Whether this kernel has vsock at all.
fn has_vsock() -> bool {
    rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None).is_ok()
}

/// What can be tested without a virtual machine: loopback vsock is a module of its own that few kernels have.
#[test]
fn a_vsock_port_is_listened_on_shown_and_refused_to_a_second_server() {
    let dir = scratch();
    let image = image(dir.path());
    if !has_vsock() {
        let line = failure(&image, &["--vsock", "0"], Stdio::null(), 1);
        assert!(line.contains("load the kernel's vsock module"), "{line}");
        return;
    }
    let server = Serve::image(&image).args(["--vsock", "0"]).start();
    let shown = |server: &Server| {
        server.log().iter().find_map(|line| line.strip_prefix("listening on nbd+vsock://").map(str::to_owned))
    };
    support::wait_until("the vsock address is shown", || shown(&server).is_some());
    let address = shown(&server).expect("it was there just now");
    let (cid, port) = address.split_once(':').expect("CID:PORT");
    assert!(cid.parse::<u32>().is_ok() && port.parse::<u32>().is_ok_and(|port| port > 1023), "{address}");

    let line = failure(&image, &["--vsock", port], Stdio::null(), 1);
    assert!(line.contains("address already in use; stop the server there or choose another port"), "{line}");
    let line = failure(&image, &["--vsock", &format!("77777:{port}")], Stdio::null(), 1);
    assert_eq!(
        line,
        format!(
            "Cannot listen on nbd+vsock://77777:{port}: cannot assign requested address; \
             give the port alone, without a CID, or the CID of this machine"
        )
    );
    server.stop();
}

#[test]
fn a_client_that_finds_no_vsock_server_says_so_in_one_line() {
    // CID 1 is the machine itself where there is loopback; there or not, nobody listens on this port.
    let output =
        Command::new(MEMDEV).args(["info", "nbd+vsock://1:4000000000/x"]).output().expect("memdev runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("memdev: Cannot connect to nbd+vsock://1:4000000000: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn what_is_no_vsock_address_is_a_usage_error() {
    let dir = scratch();
    let image = image(dir.path());
    for text in ["host:1", "1:2:3", "-1", ""] {
        let line = failure(&image, &[&format!("--vsock={text}")], Stdio::null(), 2);
        assert!(line.contains("write PORT or CID:PORT") || text.is_empty(), "{text}: {line}");
    }
}

// Who may come in.

#[test]
fn a_unix_socket_has_the_permissions_asked_for_whatever_the_umask() {
    let dir = scratch();
    let image = image(dir.path());
    for (mode, umask) in [("0600", "000"), ("0660", "077"), ("666", "022"), ("0", "000")] {
        let folder = scratch();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("opening the directory");
        let socket = folder.path().join("nbd.sock");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\""), MEMDEV, "serve"]);
        command.arg(&image.path).args(["--unix-mode", mode, "--unix"]).arg(&socket);
        let mut server = Server::by(command, folder);
        server.wait_for_line("listening on", 1);
        let found = fs::metadata(&socket).expect("the socket").permissions().mode() & 0o7777;
        let mode = u32::from_str_radix(mode, 8).expect("octal");
        assert_eq!(found, mode, "{found:o} instead of {mode:o}");
        // Only root can be somebody else.
        if let Some(connected) = as_user(60_001, || UnixStream::connect(&socket).is_ok()) {
            assert_eq!(connected, mode & 0o002 != 0, "another user, with mode {mode:o}");
        }
        server.stop();
    }
    let line = failure(&image, &["--unix-mode", "rw"], Stdio::null(), 2);
    assert!(line.contains("write them in octal"), "{line}");
}

#[test]
fn the_network_is_let_in_only_when_told() {
    let dir = scratch();
    let image = image(dir.path());
    let socket = dir.path().join("s");
    let socket = socket.to_str().expect("text");
    for address in ["0.0.0.0:0", "[::]:0"] {
        let line = failure(&image, &["--unix", socket, "--tcp", address], Stdio::null(), 1);
        let host = address.trim_end_matches('0');
        assert!(line.starts_with(&format!("Will not listen on nbd://{host}")), "{line}");
        assert!(line.ends_with(
            " without encryption; listen on 127.0.0.1, demand TLS (--tls-certificates), or add --insecure if everybody on that network may read the images"
        ), "{line}");
        assert!(!Path::new(socket).exists(), "nothing is left of a server that did not start");

        let mut server = Serve::image(&image).args(["--insecure", "--tcp", address]).start();
        server.wait_for_line("listening on nbd://", 1);
        let uri =
            server.log().into_iter().find_map(|line| line.split_once("nbd://").map(|(_, a)| a.to_owned()));
        let port = uri.as_deref().and_then(|uri| uri.rsplit_once(':')).expect("an address").1.to_owned();
        let mut client =
            Client::attach(Stream::tcp(&format!("127.0.0.1:{port}")).expect("it listens"), "base")
                .expect("the image is offered");
        client.read(0, 4096);
    }
    // Loopback, however it is written, needs no leave.
    for address in ["127.0.0.1:0", "127.9.9.9:0", "localhost:0"] {
        Serve::image(&image).args(["--tcp", address]).start().stop();
    }
}
