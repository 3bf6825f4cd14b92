//! Many requests at a time over one connection, with simple replies: one side sends, the other receives, and what was
//! asked is known by its cookie.
//!
//! ```text
//!   dispatching threads ── Submitter::submit ──> socket ──> server
//!                              │ slot: who asked                │
//!   receiving thread   <── Receiver::run <────── socket <───────┘
//! ```
//!
//! Simple replies, because every reply is then one piece with one header, as the kernel's own client has it; holes are
//! worth nothing to a block device, which has to hand out zeroes anyway.

use std::fs::File;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt;

use crate::error::{Error, ErrorKind, Result};
use crate::net::Address;
use crate::proto::{Command, CommandFlags, Cookie, Errno, Request, SIMPLE_REPLY_SIZE, SimpleReply};

use super::haggling::{Export, Haggling};
use super::socket::dial;

/// A host that vanished is noticed after about this long, also with requests on their way.
const HOST_PATIENCE: Duration = Duration::from_secs(30);

/// Replies without data are 16 bytes: many of them are received at once.
const BUFFER: usize = 64 << 10;

/// Connects to the server at `address` and opens export `name` with simple replies and no time limits: a socket in the
/// transmission phase, for a [`Submitter`] and a [`Receiver`] or for the kernel.
///
/// # Errors
/// Nobody answers there, the server refuses, or it does not speak a protocol that is known here.
pub fn open_simple(address: &Address, name: &str) -> Result<(OwnedFd, Export)> {
    let fd = dial(address)?;
    let cannot = |error: io::Error| Error::io("Cannot set up the connection to", error).on(address);
    if let Address::Tcp { .. } = address {
        watch_host(&fd).map_err(|errno| cannot(errno.into()))?;
    }
    let transport = File::from(fd.try_clone().map_err(cannot)?);
    let haggling = Haggling::simple_over(transport).map_err(|error| error.on(format!("({address})")))?;
    let export = haggling.go(name)?.export().clone();
    let forever = |timeout| sockopt::set_socket_timeout(&fd, timeout, None);
    forever(sockopt::Timeout::Recv).map_err(|errno| cannot(errno.into()))?;
    forever(sockopt::Timeout::Send).map_err(|errno| cannot(errno.into()))?;
    Ok((fd, export))
}

/// A server whose host vanished sends no end: without this a device would wait for it for ever.
fn watch_host(stream: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, HOST_PATIENCE / 3)?;
    sockopt::set_tcp_keepintvl(stream, HOST_PATIENCE / 6)?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(HOST_PATIENCE.as_millis()).unwrap_or(u32::MAX))
}

/// A request on its way.
struct Flight<T> {
    token: T,
    /// Bytes of data that its reply brings if it succeeds.
    reading: u32,
}

/// The requests on their way, by the low half of their cookies. The high half counts the uses of a slot, so that a
/// server which answers twice is found out.
struct Flights<T> {
    slots: Vec<(u32, Option<Flight<T>>)>,
    free: Vec<u32>,
    over: bool,
}

impl<T> Flights<T> {
    fn begin(&mut self, flight: Flight<T>) -> Result<Cookie, T> {
        if self.over {
            return Err(flight.token);
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let Ok(index) = u32::try_from(self.slots.len()) else { return Err(flight.token) };
                self.slots.push((0, None));
                index
            }
        };
        let slot = &mut self.slots[index as usize];
        slot.0 = slot.0.wrapping_add(1);
        slot.1 = Some(flight);
        Ok(Cookie(u64::from(slot.0) << 32 | u64::from(index)))
    }

    fn end(&mut self, cookie: Cookie) -> Option<Flight<T>> {
        let (uses, index) = (cookie.0 >> 32, u32::try_from(cookie.0 & u64::from(u32::MAX)).ok()?);
        let slot = self.slots.get_mut(index as usize)?;
        if u64::from(slot.0) != uses {
            return None;
        }
        let flight = slot.1.take()?;
        self.free.push(index);
        Some(flight)
    }
}

struct Shared<T> {
    flights: Mutex<Flights<T>>,
}

impl<T> Shared<T> {
    fn flights(&self) -> MutexGuard<'_, Flights<T>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending side of a connection. `T` is what is kept of each request until its reply comes.
pub struct Submitter<T> {
    socket: Mutex<File>,
    shared: Arc<Shared<T>>,
}

/// The receiving side of a connection.
pub struct Receiver<T> {
    socket: BufReader<File>,
    shared: Arc<Shared<T>>,
}

/// The two sides of a connection that is in the transmission phase with simple replies, as [`open_simple`] gives one.
///
/// # Errors
/// The process has no descriptor left.
pub fn pipeline<T>(socket: OwnedFd) -> io::Result<(Submitter<T>, Receiver<T>)> {
    let socket = File::from(socket);
    let flights = Mutex::new(Flights { slots: Vec::new(), free: Vec::new(), over: false });
    let shared = Arc::new(Shared { flights });
    let receiver = Receiver {
        socket: BufReader::with_capacity(BUFFER, socket.try_clone()?),
        shared: Arc::clone(&shared),
    };
    Ok((Submitter { socket: Mutex::new(socket), shared }, receiver))
}

impl<T> Submitter<T> {
    /// Sends a request, with its payload if it is a write. Waits as long as the server does not take it.
    ///
    /// # Errors
    /// The token back, if the connection is over. A request that was under way when it ended comes back through the
    /// [`Receiver`] instead.
    pub fn submit(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
        payload: &[u8],
        token: T,
    ) -> Result<(), T> {
        let reading = if command == Command::Read { length } else { 0 };
        let cookie = self.shared.flights().begin(Flight { token, reading })?;
        let request = Request { flags, command, cookie, offset, length }.encode();
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = send(&socket, &request, payload) {
            tracing::warn!(%error, "Cannot send to the server");
            // The receiver notices, and answers everything that is under way, this request too.
            let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
        }
        Ok(())
    }

    /// Tells the server that this is the end; what is under way is still answered.
    pub fn disconnect(&self) {
        let request = Request {
            flags: CommandFlags::NONE,
            command: Command::Disc,
            cookie: Cookie(0),
            offset: 0,
            length: 0,
        };
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        // A server that is gone needs not be told.
        let _ = send(&socket, &request.encode(), &[]);
    }
}

fn send(mut socket: &File, request: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(request), IoSlice::new(payload)];
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        match socket.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // An empty payload is no byte that could be sent.
        if rest.iter().all(|slice| slice.is_empty()) {
            return Ok(());
        }
    }
    Ok(())
}

impl<T> Receiver<T> {
    /// Receives replies until the connection ends, and hands each to `each`: the token of its request with the data that
    /// it asked for (empty unless it was a read) or the server's error. At the end, every request that is still under way
    /// is handed over with `EIO`, and no further one is taken.
    ///
    /// Says why it ended.
    pub fn run(mut self, mut each: impl FnMut(T, Result<&[u8], Errno>)) -> Error {
        let error = self.receive(&mut each);
        let left: Vec<T> = {
            let mut flights = self.shared.flights();
            flights.over = true;
            flights.slots.iter_mut().filter_map(|slot| slot.1.take()).map(|flight| flight.token).collect()
        };
        left.into_iter().for_each(|token| each(token, Err(Errno::Io)));
        error
    }

    fn receive(&mut self, each: &mut impl FnMut(T, Result<&[u8], Errno>)) -> Error {
        let broken =
            |how: &str| Error::new(ErrorKind::Protocol, format!("The server breaks the protocol: it {how}"));
        let mut data = Vec::new();
        loop {
            let mut header = [0; SIMPLE_REPLY_SIZE];
            if let Err(error) = self.socket.read_exact(&mut header) {
                return ended(error);
            }
            let Ok(reply) = SimpleReply::parse(&header) else { return broken("sends no simple reply") };
            let Some(flight) = self.shared.flights().end(reply.cookie) else {
                return broken("answers what was not asked");
            };
            if let Some(errno) = Errno::from_wire(reply.error) {
                each(flight.token, Err(errno));
                continue;
            }
            let length = flight.reading as usize;
            if data.len() < length {
                data.resize(length, 0);
            }
            if let Err(error) = self.socket.read_exact(&mut data[..length]) {
                each(flight.token, Err(Errno::Io));
                return ended(error);
            }
            each(flight.token, Ok(&data[..length]));
        }
    }
}

fn ended(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(ErrorKind::Io, "The server hung up"),
        _ => Error::io("Cannot receive from the server", error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    /// A server's side of a socket pair, and both sides of the pipeline.
    fn pair() -> (UnixStream, Submitter<&'static str>, Receiver<&'static str>) {
        let (server, client) = UnixStream::pair().unwrap();
        let (submitter, receiver) = pipeline(client.into()).unwrap();
        (server, submitter, receiver)
    }

    fn request(server: &mut UnixStream) -> Request {
        let mut bytes = [0; Request::SIZE];
        server.read_exact(&mut bytes).unwrap();
        Request::parse(&bytes).unwrap()
    }

    type Heard = (&'static str, std::result::Result<Vec<u8>, Errno>);

    fn listen(receiver: Receiver<&'static str>) -> (mpsc::Receiver<Heard>, thread::JoinHandle<String>) {
        let (sender, heard) = mpsc::channel();
        let thread = thread::spawn(move || {
            receiver
                .run(|token, result| sender.send((token, result.map(<[u8]>::to_vec))).unwrap())
                .to_string()
        });
        (heard, thread)
    }

    #[test]
    fn replies_find_their_requests_in_any_order() {
        let (mut server, submitter, receiver) = pair();
        let (heard, thread) = listen(receiver);
        submitter.submit(Command::Read, CommandFlags::NONE, 512, 4, &[], "read").unwrap();
        submitter.submit(Command::Write, CommandFlags::FUA, 7, 3, b"abc", "write").unwrap();
        let read = request(&mut server);
        let write = request(&mut server);
        let mut payload = [0; 3];
        server.read_exact(&mut payload).unwrap();
        assert_eq!((read.offset, read.length, &payload), (512, 4, b"abc"));
        assert_eq!((write.command, write.flags), (Command::Write, CommandFlags::FUA));
        server.write_all(&crate::proto::simple_reply(Some(Errno::NoSpc), write.cookie)).unwrap();
        server.write_all(&crate::proto::simple_reply(None, read.cookie)).unwrap();
        server.write_all(b"data").unwrap();
        assert_eq!(heard.recv().unwrap(), ("write", Err(Errno::NoSpc)));
        assert_eq!(heard.recv().unwrap(), ("read", Ok(b"data".to_vec())));
        drop(server);
        assert_eq!(thread.join().unwrap(), "The server hung up");
    }

    #[test]
    fn what_is_under_way_when_the_server_dies_fails_and_nothing_is_taken_after() {
        let (server, submitter, receiver) = pair();
        submitter.submit(Command::Flush, CommandFlags::NONE, 0, 0, &[], "flush").unwrap();
        drop(server);
        let (heard, thread) = listen(receiver);
        assert_eq!(heard.recv().unwrap(), ("flush", Err(Errno::Io)));
        thread.join().unwrap();
        assert_eq!(submitter.submit(Command::Flush, CommandFlags::NONE, 0, 0, &[], "late"), Err("late"));
    }

    #[test]
    fn a_reply_that_comes_twice_or_to_nothing_ends_the_connection() {
        for answers in 0..2 {
            let (mut server, submitter, receiver) = pair();
            let (heard, thread) = listen(receiver);
            submitter.submit(Command::Flush, CommandFlags::NONE, 0, 0, &[], "flush").unwrap();
            let cookie = request(&mut server).cookie;
            for _ in 0..answers {
                server.write_all(&crate::proto::simple_reply(None, cookie)).unwrap();
            }
            let strange = if answers > 0 { cookie } else { Cookie(99) };
            server.write_all(&crate::proto::simple_reply(None, strange)).unwrap();
            assert!(thread.join().unwrap().contains("answers what was not asked"));
            let expected = if answers > 0 { Ok(vec![]) } else { Err(Errno::Io) };
            assert_eq!(heard.recv().unwrap(), ("flush", expected));
        }
    }

    #[test]
    fn slots_are_used_again_under_new_cookies() {
        let mut flights = Flights { slots: Vec::new(), free: Vec::new(), over: false };
        let first = flights.begin(Flight { token: 1, reading: 0 }).unwrap();
        assert_eq!(flights.end(first).unwrap().token, 1);
        let second = flights.begin(Flight { token: 2, reading: 0 }).unwrap();
        assert_ne!(first, second);
        assert!(flights.end(first).is_none());
        assert_eq!((flights.slots.len(), flights.end(second).unwrap().token), (1, 2));
    }
}
