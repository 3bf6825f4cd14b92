//! A session's life: connect, handshake, first read, disconnect, over a unix socket, by the `nbd` crate's client. Its
//! server, a thread a connection on one shared read-only buffer, is the baseline.

mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use memdev::handshake::Knobs;
use memdev::net::{Address, Listener};
use memdev::overlay::BlockSize;
use memdev::session::Caps;
use memdev::worker::{Limits, LockMemory, Server, ServerConfig};
use std::io::{self, BufReader, BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use support::{SIZE, image_file};

/// A stream that is buffered both ways.
struct Buffered {
    reader: BufReader<UnixStream>,
    writer: BufWriter<UnixStream>,
}

impl Buffered {
    fn new(stream: UnixStream) -> Self {
        let reader = BufReader::new(stream.try_clone().expect("a second descriptor"));
        Self { reader, writer: BufWriter::new(stream) }
    }
}

impl Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The crate does not flush before it waits for an answer.
        self.writer.flush()?;
        self.reader.read(buffer)
    }
}

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Connects, reads the first block, says goodbye.
fn live(socket: &Path) {
    let mut stream = Buffered::new(UnixStream::connect(socket).expect("a server"));
    let export = nbd::client::handshake(&mut stream, b"root").expect("an export");
    let mut block = [0; 4096];
    {
        let mut client = nbd::client::NbdClient::new(&mut stream, &export);
        client.read_exact(&mut block).expect("the first block");
    }
    assert_ne!(block[0], 0);
}

/// Data that many may read and nobody writes.
struct ReadOnly(Cursor<Arc<[u8]>>);

impl Read for ReadOnly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Seek for ReadOnly {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

impl Write for ReadOnly {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves `data` until the process ends.
fn serve_by_crate(socket: &Path, data: &Arc<[u8]>) {
    let (listener, data) = (UnixListener::bind(socket).expect("a listener"), Arc::clone(data));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, data) = (stream.expect("a connection"), Arc::clone(&data));
            std::thread::spawn(move || {
                let mut stream = Buffered::new(stream);
                let size = data.len() as u64;
                let export =
                    |_: &str| Ok(nbd::server::Export::<()> { size, readonly: true, ..Default::default() });
                // A client that hangs up is no failure.
                if nbd::server::handshake(&mut stream, export).is_ok() {
                    let _ = nbd::server::transmission(stream, ReadOnly(Cursor::new(data)));
                }
            });
        }
    });
}

fn session(c: &mut Criterion) {
    let (image, folder) = (image_file(), tempfile::tempdir().expect("a folder"));
    let socket = folder.path().join("memdev");
    let listener = Listener::bind(&Address::unix(&socket).expect("a short path")).expect("a listener");
    let server = Server::start(ServerConfig {
        images: vec![("root".into(), image.path().to_owned())],
        listeners: vec![listener],
        connections: Vec::new(),
        workers: 1,
        memory: Some(SIZE),
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
    })
    .expect("a server");
    let mut group = c.benchmark_group("connect, handshake, first read, disconnect");
    group.bench_function("memdev", |b| b.iter(|| live(&socket)));
    let socket = folder.path().join("crate");
    serve_by_crate(&socket, &Arc::from(vec![1; 1 << 20]));
    group.bench_function("nbd crate", |b| b.iter(|| live(&socket)));
    group.finish();
    server.stop().expect("a clean end");
}

criterion_group!(benches, session);
criterion_main!(benches);
