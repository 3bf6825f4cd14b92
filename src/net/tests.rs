//! Listeners and streams over real sockets.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::net::sockopt;

use super::*;
use crate::error::ErrorKind;

fn unix(path: &Path) -> Address {
    Address::unix(path).unwrap()
}

/// A connection through loopback may take a moment to arrive in the queue.
fn accept(listener: &Listener) -> Stream {
    let start = Instant::now();
    loop {
        if let Some(stream) = listener.accept().unwrap() {
            return stream;
        }
        assert!(start.elapsed() < Duration::from_secs(90), "nobody came");
        thread::sleep(Duration::from_millis(1));
    }
}

fn assert_ready_for_an_event_loop(fd: impl AsFd) {
    assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
    assert!(rustix::fs::fcntl_getfl(&fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
}

#[test]
fn a_unix_listener_accepts_and_knows_its_peer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&unix(&path)).unwrap();
    assert_eq!(listener.uri(), format!("nbd+unix:///?socket={}", path.display()));
    assert_ready_for_an_event_loop(&listener);
    assert!(listener.accept().unwrap().is_none());

    let mut client = UnixStream::connect(&path).unwrap();
    let stream = accept(&listener);
    assert_ready_for_an_event_loop(&stream);
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(stream.peer().uid(), Some(uid));
    assert_eq!(stream.peer().to_string(), format!("uid {uid}, pid {}", std::process::id()));
    rustix::io::write(&stream, b"hello").unwrap();
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

#[test]
fn a_socket_file_is_its_owners_only_and_goes_with_its_listener() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&unix(&path)).unwrap();
    let meta = fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    drop(listener);
    assert!(!path.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left beside it");
}

#[test]
fn somebody_elses_file_in_our_place_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&unix(&path)).unwrap();
    fs::rename(&path, dir.path().join("moved")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    UnixStream::connect(&path).expect("the other server's socket is still there");
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let stale = fs::symlink_metadata(&path).expect("the standard library leaves the file").ino();

    let listener = Listener::bind(&unix(&path)).unwrap();
    assert!(fs::symlink_metadata(&path).is_ok());
    let error = Listener::bind(&unix(&path)).expect_err("live");
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert_eq!(
        error.to_string(),
        format!(
            "Cannot listen on {}: another server is answering there; stop it or choose another path",
            path.display()
        )
    );
    UnixStream::connect(&path).unwrap_or_else(|error| panic!("{error}; the stale inode was {stale}"));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_socket_of_another_type_is_in_use_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _live = UnixDatagram::bind(&path).unwrap();
    assert_eq!(Listener::bind(&unix(&path)).unwrap_err().kind(), ErrorKind::InUse);
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
    for path in [file.as_path(), link.as_path(), dir.path()] {
        let error = Listener::bind(&unix(path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("a file that is no socket is there"), "{error}");
        assert!(fs::symlink_metadata(path).is_ok());
    }
    assert_eq!(fs::read(file).unwrap(), b"precious");
}

#[test]
fn a_missing_directory_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let error = Listener::bind(&unix(&dir.path().join("no/s"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().ends_with("no such file or directory; make its directory first"), "{error}");
}

/// Without the lock on the directory one server removes the fresh socket of another between its own look and its own
/// bind: two servers run, one of them reachable by nobody.
#[test]
fn of_servers_that_start_together_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let start = Barrier::new(4);
    for _ in 0..100 {
        drop(UnixListener::bind(&path).unwrap());
        let results: Vec<_> = thread::scope(|scope| {
            let starters: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        Listener::bind(&unix(&path))
                    })
                })
                .collect();
            starters.into_iter().map(|starter| starter.join().unwrap()).collect()
        });
        let winners: Vec<_> = results.into_iter().filter_map(Result::ok).collect();
        assert_eq!(winners.len(), 1);
        let _client = UnixStream::connect(&path).unwrap();
        accept(&winners[0]);
    }
}

#[test]
fn a_tcp_listener_shows_its_real_port_and_its_peer() {
    let listener = Listener::bind(&Address::tcp("127.0.0.1:0").unwrap()).unwrap();
    assert_ready_for_an_event_loop(&listener);
    let uri: Uri = listener.uri().parse().unwrap();
    let Address::Tcp { host, port } = uri.address else { panic!("not TCP") };
    assert_eq!(host, "127.0.0.1");
    assert_ne!(port, 0);
    let mut client = TcpStream::connect((host, port)).unwrap();
    let stream = accept(&listener);
    assert_ready_for_an_event_loop(&stream);
    assert!(sockopt::tcp_nodelay(&stream).unwrap());
    assert_eq!(stream.peer().kind, PeerKind::Tcp { addr: client.local_addr().unwrap() });
    assert_eq!(stream.peer().uid(), None);
    client.write_all(b"x").unwrap();
}

#[test]
fn a_tcp_address_in_use_is_said_with_its_port() {
    let first = Listener::bind(&Address::tcp("127.0.0.1:0").unwrap()).unwrap();
    for bind in
        [(|address| Listener::bind(address).map(|_| ())) as fn(&Address) -> crate::Result<()>, |address| {
            Listener::bind_all(address).map(|_| ())
        }]
    {
        let error = bind(first.address()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert_eq!(
            error.to_string(),
            format!(
                "Cannot listen on {}: address already in use; stop the server there or choose another port",
                first.uri()
            )
        );
    }
}

#[test]
fn a_port_can_be_bound_again_right_after_its_server_ended() {
    let listener = Listener::bind(&Address::tcp("127.0.0.1:0").unwrap()).unwrap();
    let address = listener.address().clone();
    let Address::Tcp { host, port } = &address else { panic!("not TCP") };
    let client = TcpStream::connect((host.as_str(), *port)).unwrap();
    // The side that closes first is the one that is left in TIME_WAIT.
    drop(accept(&listener));
    drop(listener);
    drop(client);
    Listener::bind(&address).unwrap();
}

#[test]
fn a_name_is_looked_up_and_all_its_addresses_are_bound() {
    let free = Listener::bind(&Address::tcp("localhost:0").unwrap()).unwrap();
    let Address::Tcp { port, .. } = *free.address() else { panic!("not TCP") };
    drop(free);
    let listeners = Listener::bind_all(&Address::tcp(&format!("localhost:{port}")).unwrap()).unwrap();
    assert!(!listeners.is_empty());
    for listener in &listeners {
        let Address::Tcp { host, port } = listener.address() else { panic!("not TCP") };
        let _client = TcpStream::connect((host.as_str(), *port)).unwrap();
        accept(listener);
    }
    let error = Listener::bind(&Address::tcp("no-such-host.invalid:1").unwrap()).unwrap_err();
    assert!(
        error.to_string().starts_with("Cannot look up the host of nbd://no-such-host.invalid:1"),
        "{error}"
    );
}

#[test]
fn an_address_of_another_machine_is_refused_with_advice() {
    // TEST-NET-1 (RFC 5737): nobody has it.
    let error = Listener::bind_all(&Address::tcp("192.0.2.1:10809").unwrap()).unwrap_err();
    assert!(error.to_string().contains("choose an address of this machine"), "{error}");
}
