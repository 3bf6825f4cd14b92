//! The moment between "all threads are there" and "clients are served", in which the server confines itself.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use memdev::handshake::Knobs;
use memdev::net::{Address, Listener};
use memdev::overlay::BlockSize;
use memdev::session::Caps;
use memdev::worker::{Limits, LockMemory, Memory, Server, ServerConfig};

use super::support::server::scratch;
use super::support::{Image, KIB, MIB};

fn config(dir: &Path) -> ServerConfig {
    let image = Image::random(dir.join("base.img"), 64 * KIB, 1);
    let address = Address::unix(dir.join("socket")).unwrap();
    ServerConfig {
        images: vec![("base".to_owned(), image.path)],
        listeners: vec![Listener::bind(&address).unwrap()],
        connections: Vec::new(),
        workers: 2,
        memory: Some(64 * MIB),
        lock_memory: LockMemory::default(),
        seal: false,
        overflow: None,
        session_memory: None,
        session_caps: Caps::default(),
        block_size: BlockSize::DEFAULT,
        linger: Duration::ZERO,
        knobs: Knobs::default(),
        limits: Limits::default(),
        tls: None,
        control: None,
    }
}

#[test]
fn nobody_is_greeted_before_the_server_is_ready() {
    let dir = scratch();
    let mut early = None;
    let config = config(dir.path());
    let memory = Memory::reserve(&config).unwrap();
    let server = Server::start_when(config, memory, |_| {
        let mut client = UnixStream::connect(dir.path().join("socket")).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let error = client.read(&mut [0; 8]).expect_err("no greeting");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        early = Some(client);
        Ok(())
    })
    .unwrap();
    let mut client = early.expect("it was made");
    client.set_read_timeout(None).unwrap();
    let mut magic = [0; 8];
    client.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"NBDMAGIC");
    server.stop().unwrap();
}

#[test]
fn a_server_that_does_not_get_ready_is_gone() {
    let dir = scratch();
    let refused = |_: &Server| Err(memdev::Error::new(memdev::ErrorKind::Unsupported, "Not today"));
    let config = config(dir.path());
    let memory = Memory::reserve(&config).unwrap();
    let error = Server::start_when(config, memory, refused).unwrap_err();
    assert_eq!(error.to_string(), "Not today");
    assert!(!dir.path().join("socket").exists());
}
