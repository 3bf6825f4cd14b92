//! A batch of requests through the transmission phase and a socketpair, in one thread: what the data path costs
//! without a scheduler in between. The `nbd` crate's server, on a copy of the image in memory, is the baseline.

mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memdev::base::Source;
use memdev::cow::Piece;
use memdev::handshake::Negotiated;
use memdev::net::{Address, Listener, Most};
use memdev::overlay::Magazine;
use memdev::proto::{Command, CommandFlags, Cookie, Request, SIMPLE_REPLY_SIZE};
use memdev::session::{Caps, Limits, Registry};
use memdev::sys::Buffer;
use memdev::transmission::{Context, Flushed, Output, Pause, Share, Transmission, Warm};
use std::io::{self, BufWriter, Cursor, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{Memory, SIZE, image_file, scattered};
use tempfile::NamedTempFile;

/// A batch as a client with so many requests in flight sends it.
struct Batch {
    name: &'static str,
    command: Command,
    length: u32,
    count: u32,
}

const BATCHES: [Batch; 4] = [
    Batch { name: "32 reads of 4 KiB", command: Command::Read, length: 4096, count: 32 },
    Batch { name: "32 writes of 4 KiB", command: Command::Write, length: 4096, count: 32 },
    Batch { name: "8 reads of 128 KiB", command: Command::Read, length: 128 << 10, count: 8 },
    Batch { name: "8 writes of 128 KiB", command: Command::Write, length: 128 << 10, count: 8 },
];

impl Batch {
    /// The bytes on the wire, and how many bytes the replies have.
    fn build(&self) -> (Vec<u8>, usize) {
        let mut bytes = Vec::new();
        for i in 0..u64::from(self.count) {
            let offset = scattered(i, SIZE / u64::from(self.length)) * u64::from(self.length);
            let (command, cookie, length) = (self.command, Cookie(i), self.length);
            bytes.extend(Request { flags: CommandFlags::NONE, command, cookie, offset, length }.encode());
            if command == Command::Write {
                bytes.resize(bytes.len() + length as usize, 7);
            }
        }
        let data = if self.command == Command::Read { self.length as usize } else { 0 };
        (bytes, self.count as usize * (SIMPLE_REPLY_SIZE + data))
    }
}

/// Both ends of a socket that takes a whole batch of replies.
fn socketpair() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().expect("a socketpair");
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 4 << 20).expect("a larger send buffer");
    far.set_nonblocking(true).expect("a non-blocking end");
    (near, far)
}

/// Takes the replies off the wire, as many as are there.
fn drain(far: &mut UnixStream, sink: &mut [u8]) -> usize {
    let mut taken = 0;
    while let Ok(count @ 1..) = far.read(sink) {
        taken += count;
    }
    taken
}

/// A transmission phase, and all that it stands on.
struct Line {
    transmission: Transmission,
    magazine: Magazine,
    output: Output,
    plain: Buffer,
    orders: Vec<Warm>,
    pieces: Vec<Piece>,
    near: UnixStream,
    far: UnixStream,
    sink: Vec<u8>,
    _memory: Memory,
    _file: NamedTempFile,
}

impl Line {
    fn new() -> Self {
        let (file, memory) = (image_file(), Memory::new());
        let source = Source::open("root", file.path()).expect("an image");
        source.latest().warm(0..SIZE).expect("an image that can be read");
        let limits = Limits {
            session_memory: 2 * SIZE,
            linger: Duration::ZERO,
            sessions: Most { all: 1, each: None },
            caps: Caps::default(),
            seal: false,
        };
        let (pool, total) = (Arc::clone(&memory.pool), Arc::clone(&memory.total));
        let registry = Registry::new(vec![source], Arc::clone(&pool), total, limits);
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("socket");
        let listener = Listener::bind(&Address::unix(&socket).expect("a short path")).expect("a listener");
        let _client = UnixStream::connect(&socket).expect("a connection");
        let stream = listener.accept().expect("no error").expect("the connection that was just made");
        let (_, attachment) = registry.attach("root", &Arc::new(stream)).expect("a session");
        let negotiated = Negotiated { export_name: "root".into(), ..Negotiated::default() };
        let (near, far) = socketpair();
        Self {
            transmission: Transmission::new(attachment, negotiated),
            magazine: Magazine::new(pool),
            output: Output::default(),
            plain: Buffer::new(0x20000).expect("memory"),
            orders: Vec::new(),
            pieces: Vec::new(),
            near,
            far,
            sink: vec![0; 256 << 10],
            _memory: memory,
            _file: file,
        }
    }

    /// Acts on the batch; returns the bytes of the replies.
    fn exchange(&mut self, batch: &[u8]) -> usize {
        let (mut at, mut taken) = (0, 0);
        loop {
            // As a worker does, once a turn.
            self.output.begin(Instant::now());
            let mut cx = Context {
                magazine: &mut self.magazine,
                output: &mut self.output,
                orders: &mut self.orders,
                pieces: &mut self.pieces,
                share: Share::ALL,
            };
            let (used, pause) = self.transmission.consume(&batch[at..], &mut cx);
            at += used;
            loop {
                let device = self.transmission.attachment().session().device();
                let (near, plain) = (self.near.as_fd(), &mut self.plain);
                let flushed = self.output.flush(near, Some(device), &mut self.magazine, plain);
                taken += drain(&mut self.far, &mut self.sink);
                self.transmission.account(&mut self.output);
                if flushed.expect("a socket that works") == Flushed::All {
                    break;
                }
            }
            match pause {
                Pause::Output | Pause::Turn => {}
                Pause::Input => return taken,
                Pause::Waiting | Pause::Paced(_) | Pause::Over => {
                    unreachable!("warm pages, no caps, and a stream in step")
                }
            }
        }
    }
}

/// What the `nbd` crate reads requests from and writes replies to.
struct Wire<'a> {
    input: &'a [u8],
    output: BufWriter<&'a UnixStream>,
}

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

fn transmission(c: &mut Criterion) {
    let mut line = Line::new();
    let mut copy = vec![1; usize::try_from(SIZE).expect("an image that fits into memory")];
    let (near, mut far) = socketpair();
    let mut sink = vec![0; 256 << 10];
    for batch in &BATCHES {
        let (bytes, replies) = batch.build();
        let mut group = c.benchmark_group(format!("transmission/{}", batch.name));
        group.throughput(Throughput::Elements(batch.count.into()));
        group.bench_function("memdev", |b| b.iter(|| assert_eq!(line.exchange(&bytes), replies)));
        let goodbye = Request {
            flags: CommandFlags::NONE,
            command: Command::Disc,
            cookie: Cookie(0),
            offset: 0,
            length: 0,
        };
        let bytes = [&bytes[..], &goodbye.encode()].concat();
        group.bench_function("nbd crate", |b| {
            b.iter(|| {
                let wire = Wire { input: &bytes, output: BufWriter::with_capacity(256 << 10, &near) };
                nbd::server::transmission(wire, Cursor::new(&mut copy[..])).expect("a whole batch");
                assert_eq!(drain(&mut far, &mut sink), replies);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, transmission);
criterion_main!(benches);
