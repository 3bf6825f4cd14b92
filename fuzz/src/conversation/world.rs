//! What a conversation is had with: images, sessions and their memory, without a server's threads and event loops.
//!
//! ```text
//!   vm       data everywhere                                what a client usually finds
//!   sparse   |data|hole|data|hole ...|  over three leaves    runs, holes, whole leaves
//!   cold     |data|not in memory|                           requests that are set aside until their pages came
//!   torn     |data|cut off at some moment|                  a base that shrinks while it is served
//!   tight    as vm, with memory for a few blocks            writes that find no room
//! ```

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use memdev::base::{Image, Source};
use memdev::handshake::{BlockSizes, Environment, ExportInfo, Refusal};
use memdev::net::{Address, Listener, Most, Stream};
use memdev::overlay::{BlockSize, Budget, Magazine, Pool};
use memdev::proto::TransmissionFlags;
use memdev::session::{Attachment, Caps, Description, Limits, Registry};
use memdev::transmission::MAX_PAYLOAD;

/// Bytes in a block of every overlay here.
pub(crate) const BLOCK: u64 = 4096;
/// Room for everything that one conversation may write.
const AMPLE: u64 = 64 << 20;
/// Room for a few blocks.
const LITTLE: u64 = 6 * BLOCK;
/// Bytes that somebody else has written, freed, and that nobody may ever see again.
const SECRET: u8 = 0xee;

/// A kind of image, and what it is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    Vm,
    Sparse,
    Cold,
    Torn,
    Tight,
}

impl Disk {
    pub(crate) const ALL: [Self; 5] = [Self::Vm, Self::Sparse, Self::Cold, Self::Torn, Self::Tight];

    /// The name of its export.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Sparse => "sparse",
            Self::Cold => "cold",
            Self::Torn => "torn",
            Self::Tight => "tight",
        }
    }

    /// Which image an export name asks for; the empty one for the first.
    fn of(export_name: &str) -> Option<Self> {
        let image = export_name.split('@').next().unwrap_or_default();
        Self::ALL.into_iter().find(|disk| disk.name() == image || (image.is_empty() && *disk == Self::Vm))
    }

    /// Bytes.
    pub(crate) fn size(self) -> u64 {
        match self {
            Self::Vm | Self::Tight => 17 * BLOCK + 369,
            Self::Sparse => 2 * 512 * BLOCK + 5 * BLOCK + 1,
            Self::Cold | Self::Torn => 12 * BLOCK,
        }
    }

    /// Where there is data; the rest is a hole.
    fn data(self) -> Vec<Range<u64>> {
        match self {
            Self::Sparse => {
                let leaf = 512 * BLOCK;
                vec![0..3 * BLOCK, leaf - 2 * BLOCK..leaf + BLOCK, 2 * leaf + BLOCK..self.size()]
            }
            _ => std::iter::once(0..self.size()).collect(),
        }
    }

    /// From where on it is not in memory, or cut off.
    pub(crate) fn edge(self) -> u64 {
        match self {
            Self::Cold | Self::Torn => 6 * BLOCK,
            _ => self.size(),
        }
    }

    /// Whether the answer to a request may come after that to a later one: some wait for pages.
    pub(crate) fn reorders(self) -> bool {
        matches!(self, Self::Cold | Self::Torn)
    }

    /// Whether every way of cutting the same input must give the same bytes. Not where requests may be reordered; nor
    /// where memory runs out, since how much of a write that fails is done depends on how much of it came at once.
    pub(crate) fn is_indifferent_to_cuts(self) -> bool {
        matches!(self, Self::Vm | Self::Sparse)
    }
}

/// One image, the file behind it, and what it should read as.
struct Ground {
    file: File,
    image: Arc<Image>,
    content: Vec<u8>,
}

/// Everything that lives as long as the process.
pub(crate) struct World {
    ample: Arc<Registry>,
    tight: Arc<Registry>,
    pool: Arc<Pool>,
    total: Arc<Budget>,
    pub(crate) magazine: RefCell<Magazine>,
    grounds: Vec<Ground>,
    stream: Arc<Stream>,
    // At the other end of `stream`: while it is open, the client counts as there.
    _client: UnixStream,
    /// Where replies are sent, and where they come out.
    pub(crate) replies: (UnixStream, UnixStream),
    /// Where a client's bytes are sent, and where they come out.
    pub(crate) requests: (UnixStream, UnixStream),
    /// Where what has arrived is put first.
    buffer: RefCell<Vec<u8>>,
}

thread_local! {
    static WORLD: World = World::new();
}

impl World {
    /// Does something with this thread's world.
    pub(crate) fn with<R>(act: impl FnOnce(&Self) -> R) -> R {
        WORLD.with(act)
    }

    fn new() -> Self {
        let block_size = BlockSize::new(u32::try_from(BLOCK).expect("4096")).expect("a block size");
        let pool = Pool::new(AMPLE, block_size).expect("address space");
        let total = Budget::total(AMPLE);
        let (mut sources, mut grounds) = (Vec::new(), Vec::new());
        for disk in Disk::ALL {
            let content = content(disk);
            let file = unnamed_file(&content, &disk.data());
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let source = Source::open(disk.name(), path.as_ref()).expect("an image");
            let image = source.latest();
            image.warm(0..disk.size()).expect("an image that can be read");
            grounds.push(Ground { file, image, content });
            sources.push(source);
        }
        let tight = sources.split_off(4);
        let registry = |sources, session_memory| {
            let sessions = Most { all: 10, each: None };
            let (linger, caps) = (Duration::from_secs(3600), Caps::default());
            let limits = Limits { session_memory, linger, sessions, caps, seal: false };
            Registry::new(sources, Arc::clone(&pool), Arc::clone(&total), limits)
        };
        let (stream, client) = stream();
        let pair = || {
            let (near, far) = UnixStream::pair().expect("a socketpair");
            far.set_nonblocking(true).expect("a non-blocking end");
            (near, far)
        };
        Self {
            ample: registry(sources, AMPLE),
            tight: registry(tight, LITTLE),
            magazine: RefCell::new(Magazine::new(Arc::clone(&pool))),
            pool,
            total,
            grounds,
            stream: Arc::new(stream),
            _client: client,
            replies: pair(),
            requests: pair(),
            buffer: RefCell::new(vec![0; 256 << 10]),
        }
    }

    fn registry(&self, disk: Disk) -> &Arc<Registry> {
        if disk == Disk::Tight { &self.tight } else { &self.ample }
    }

    fn ground(&self, disk: Disk) -> &Ground {
        let at = Disk::ALL.iter().position(|&other| other == disk).expect("one of them");
        &self.grounds[at]
    }

    /// What the disk reads as before anything is written.
    pub(crate) fn content(&self, disk: Disk) -> &[u8] {
        &self.ground(disk).content
    }

    /// A place in the session that a conversation about `disk` is about, for somebody else.
    pub(crate) fn attach(&self, disk: Disk) -> Attachment {
        let name = format!("{}@conversation", disk.name());
        self.registry(disk).attach(&name, &self.stream).expect("the session that is there").1
    }

    /// Leaves bytes of somebody else's in the memory that is used next.
    pub(crate) fn begin(&self) {
        let somebody = self.ample.attach("sparse@somebody-else", &self.stream).expect("a session").1;
        let device = somebody.session().device();
        let (first, bytes) = (100 * BLOCK, 16 * BLOCK);
        let mut magazine = self.magazine.borrow_mut();
        let secret = vec![SECRET; usize::try_from(bytes).expect("a few blocks")];
        device.write(first, &secret, &mut magazine).expect("room for a few blocks");
        device.trim(&(first..first + bytes), &mut magazine);
    }

    /// Puts an image back as it was.
    fn renew(&self, disk: Disk) {
        let ground = self.ground(disk);
        match disk {
            Disk::Cold => {
                ground.file.set_len(disk.edge()).expect("a shorter file");
                ground.file.set_len(disk.size()).expect("a longer file");
                // A part at a time, and one call that only begins again.
                (0..3).for_each(|_| ground.image.recheck_residency());
                assert!(!ground.image.is_warm(disk.edge()..disk.size()));
            }
            Disk::Torn if ground.image.length_now() < disk.size() => {
                ground.file.write_all_at(&ground.content, 0).expect("room for the image");
                ground.image.warm(0..disk.size()).expect("an image that can be read");
            }
            _ => {}
        }
    }

    /// Cuts off the end of the torn image.
    pub(crate) fn tear(&self) {
        self.ground(Disk::Torn).file.set_len(Disk::Torn.edge()).expect("a shorter file");
    }

    /// Ends all sessions; everything must have been given back then.
    pub(crate) fn end(&self) {
        self.ample.end_all();
        self.tight.end_all();
        let held = (self.total.data(), self.total.map(), self.total.pinned());
        assert_eq!(held, (0, 0, 0), "no session, no memory");
        self.magazine.borrow_mut().flush();
        #[cfg(fuzzing)]
        assert_eq!(self.pool.slots_in_use(), 0, "a slot is held by nobody");
        assert!(self.pool.staging().has_room());
        for end in [&self.replies.1, &self.requests.1] {
            self.drain(end, &mut Vec::new());
        }
    }

    /// Takes everything that has arrived.
    pub(crate) fn drain(&self, mut socket: &UnixStream, out: &mut Vec<u8>) {
        let buffer = &mut *self.buffer.borrow_mut();
        while let Ok(count @ 1..) = socket.read(buffer) {
            out.extend_from_slice(&buffer[..count]);
        }
    }
}

/// Bytes none of which is zero, that differ from place to place and from disk to disk.
fn content(disk: Disk) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(disk.size()).expect("a small disk")];
    for range in disk.data() {
        for at in range.start..range.end.min(if disk == Disk::Cold { disk.edge() } else { u64::MAX }) {
            let mixed = (at + disk.size()).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            content[usize::try_from(at).expect("a small disk")] = mixed.to_be_bytes()[7] | 1;
        }
    }
    content
}

/// A file with `content` where there is data, and holes elsewhere; gone when it is closed.
fn unnamed_file(content: &[u8], data: &[Range<u64>]) -> File {
    let path = temporary("image");
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path).expect("a temporary file");
    std::fs::remove_file(&path).expect("a file that was just made");
    file.set_len(content.len() as u64).expect("a longer file");
    for range in data {
        let place = |at: u64| usize::try_from(at).expect("a small disk");
        file.write_all_at(&content[place(range.start)..place(range.end)], range.start).expect("room");
    }
    // Some file systems tell of data only once it has its place on the disk.
    file.sync_all().expect("a file that can be written");
    file
}

/// A stream as a listener gives it, and its client.
fn stream() -> (Stream, UnixStream) {
    let path = temporary("socket");
    let listener = Listener::bind(&Address::unix(&path).expect("a short path")).expect("a listener");
    let client = UnixStream::connect(&path).expect("a connection");
    let stream = listener.accept().expect("no error").expect("the connection that was just made");
    (stream, client)
}

/// A path that nobody else uses.
fn temporary(what: &str) -> PathBuf {
    let nonce =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos());
    std::env::temp_dir().join(format!("memdev-fuzz-{what}-{}-{nonce}", std::process::id()))
}

/// The world as a handshake sees it.
pub(crate) struct Exports<'a>(pub(crate) &'a World);

impl Exports<'_> {
    fn info(description: Description) -> ExportInfo {
        ExportInfo {
            name: description.name,
            description: description.text,
            size: description.size,
            flags: TransmissionFlags::HAS_FLAGS.union(TransmissionFlags::SEND_FLUSH),
            block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD },
        }
    }
}

impl Environment for Exports<'_> {
    type Export = (Disk, Attachment);

    fn list(&self) -> Vec<(String, String)> {
        Disk::ALL.iter().map(|disk| (disk.name().to_owned(), "a disk".to_owned())).collect()
    }

    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal> {
        let disk = Disk::of(name).ok_or(Refusal::Unknown)?;
        let found = self.0.registry(disk).describe(name, &self.0.stream);
        found.map(Self::info).map_err(|error| Refusal::Invalid(error.to_string()))
    }

    fn open(&self, name: &str) -> Result<(ExportInfo, Self::Export), Refusal> {
        let info = self.describe(name)?;
        let disk = Disk::of(name).ok_or(Refusal::Unknown)?;
        self.0.renew(disk);
        // Whatever session it asks for, it gets one that can be looked at from outside.
        Ok((info, (disk, self.0.attach(disk))))
    }
}

impl World {
    /// Sends a client's bytes to where they are received.
    pub(crate) fn say(&self, bytes: &[u8]) {
        (&self.requests.0).write_all(bytes).expect("a socket with room");
    }
}
