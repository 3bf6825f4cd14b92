//! One connection to an SFTP server, by the system's own `ssh`: its keys, agent, known hosts and settings are those that
//! people have.
//!
//! The protocol is version 3, as OpenSSH speaks it, with its extensions (draft-ietf-secsh-filexfer-02, OpenSSH's PROTOCOL).
//! What the server says is not trusted: lengths are bounded, and whatever is out of step ends the connection.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::MemfdFlags;

use crate::carry::stores::address::Address;
use crate::carry::stores::is_name;
use crate::error::plain;

const INIT: u8 = 1;
const VERSION: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSTAT: u8 = 8;
const SETSTAT: u8 = 9;
const FSETSTAT: u8 = 10;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const MKDIR: u8 = 14;
const RMDIR: u8 = 15;
const REALPATH: u8 = 16;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const READLINK: u8 = 19;
const SYMLINK: u8 = 20;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;

const OPEN_READ: u32 = 1;
const OPEN_WRITE: u32 = 2;
const OPEN_CREATE: u32 = 8;
const OPEN_EXCLUSIVE: u32 = 0x20;

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;
const HAS_EXTENDED: u32 = 1 << 31;

const OK: u32 = 0;
const END: u32 = 1;
const NO_SUCH_FILE: u32 = 2;
const PERMISSION_DENIED: u32 = 3;
const NO_CONNECTION: u32 = 6;
const CONNECTION_LOST: u32 = 7;
const UNSUPPORTED: u32 = 8;

/// What every server takes in one message (the draft's 34,000 bytes), less the message's own.
const PART: usize = 32 << 10;
/// How many of them are on their way, one way or the other.
const IN_FLIGHT: usize = 32;
/// The longest message that is taken; OpenSSH sends none longer.
const MESSAGE_MAX: usize = 256 << 10;

/// What a server tells of a file; what it does not tell is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    pub(super) owner: Option<(u32, u32)>,
    /// With the kind of the file.
    pub(super) mode: Option<u32>,
    /// When it was read, and changed, in seconds since 1970.
    pub(super) times: Option<(u32, u32)>,
}

impl Attributes {
    fn write(&self, message: &mut Message) {
        let flags = [
            (self.size.is_some(), HAS_SIZE),
            (self.owner.is_some(), HAS_OWNER),
            (self.mode.is_some(), HAS_MODE),
            (self.times.is_some(), HAS_TIMES),
        ];
        message.number(flags.iter().filter(|flag| flag.0).map(|flag| flag.1).sum());
        if let Some(size) = self.size {
            message.long(size);
        }
        let pair = |message: &mut Message, pair: Option<(u32, u32)>| {
            if let Some((first, second)) = pair {
                message.number(first);
                message.number(second);
            }
        };
        pair(message, self.owner);
        if let Some(mode) = self.mode {
            message.number(mode);
        }
        pair(message, self.times);
    }

    fn read(parser: &mut Parser<'_>) -> Option<Self> {
        let flags = parser.number()?;
        let mut this = Self::default();
        if flags & HAS_SIZE != 0 {
            this.size = Some(parser.long()?);
        }
        if flags & HAS_OWNER != 0 {
            this.owner = Some((parser.number()?, parser.number()?));
        }
        if flags & HAS_MODE != 0 {
            this.mode = Some(parser.number()?);
        }
        if flags & HAS_TIMES != 0 {
            this.times = Some((parser.number()?, parser.number()?));
        }
        if flags & HAS_EXTENDED != 0 {
            for _ in 0..parser.number()? {
                parser.text()?;
                parser.text()?;
            }
        }
        Some(this)
    }
}

/// A message that is being put together; its length comes first.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    fn number(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    fn long(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    fn text(&mut self, text: &[u8]) {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(text);
    }

    fn whole(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        self.0
    }
}

struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    fn long(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.bytes(usize::try_from(length).ok()?)
    }
}

/// What a server answers.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Status(u32, String),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    Names(Vec<(Vec<u8>, Attributes)>),
    Attributes(Attributes),
}

impl Reply {
    /// The number of the request, and what is answered.
    fn parse(message: &[u8]) -> Option<(u32, Self)> {
        let (&kind, rest) = message.split_first()?;
        let mut parser = Parser(rest);
        let id = parser.number()?;
        let reply = match kind {
            STATUS => {
                let code = parser.number()?;
                // Old servers say no more.
                let text = String::from_utf8_lossy(parser.text().unwrap_or_default()).into_owned();
                Self::Status(code, text)
            }
            HANDLE => Self::Handle(parser.text()?.to_vec()),
            DATA => Self::Data(parser.text()?.to_vec()),
            NAME => {
                let count = parser.number()?;
                let mut names = Vec::new();
                for _ in 0..count {
                    let name = parser.text()?.to_vec();
                    // How `ls -l` would show it.
                    parser.text()?;
                    names.push((name, Attributes::read(&mut parser)?));
                }
                Self::Names(names)
            }
            ATTRS => Self::Attributes(Attributes::read(&mut parser)?),
            _ => return None,
        };
        Some((id, reply))
    }

    fn refused(self) -> io::Error {
        let Self::Status(code, text) = self else { return out_of_step() };
        let kind = match code {
            END => io::ErrorKind::UnexpectedEof,
            NO_SUCH_FILE => io::ErrorKind::NotFound,
            PERMISSION_DENIED => io::ErrorKind::PermissionDenied,
            NO_CONNECTION | CONNECTION_LOST => io::ErrorKind::ConnectionAborted,
            UNSUPPORTED => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        let mut text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        if text.is_empty() {
            text = format!("status {code}");
        }
        io::Error::new(kind, format!("the server says: {text}"))
    }
}

fn out_of_step() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the server's answer is not understood")
}

/// A file or directory that is open there.
pub(super) type Handle = Vec<u8>;

/// A connection.
pub(super) struct Connection {
    ssh: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// What ssh has said.
    said: File,
    next: u32,
    /// Requests that are not answered.
    waiting: BTreeSet<u32>,
    /// Answers that nobody has asked for yet.
    early: HashMap<u32, Reply>,
    broken: bool,
    extensions: BTreeSet<Vec<u8>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.to.take());
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
    }
}

impl Connection {
    pub(super) fn new(address: &Address) -> io::Result<Self> {
        let said = File::from(rustix::fs::memfd_create("ssh", MemfdFlags::CLOEXEC)?);
        let mut command = Command::new("ssh");
        // As sftp(1) has it; and nobody is there to answer a question, or to see that the network is gone.
        for option in [
            "BatchMode=yes",
            "ClearAllForwardings=yes",
            "ConnectTimeout=15",
            "ForwardAgent=no",
            "ForwardX11=no",
            "PermitLocalCommand=no",
            "ServerAliveCountMax=3",
            "ServerAliveInterval=10",
        ] {
            command.args(["-o", option]);
        }
        if let Some(port) = address.port {
            command.args(["-p", &port.to_string()]);
        }
        if let Some(user) = &address.user {
            command.args(["-l", user]);
        }
        command.args(["-s", "--", &address.host, "sftp"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(said.try_clone()?);
        let mut ssh = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("ssh: {}", plain(&error))))?;
        let (to, from) = (ssh.stdin.take(), ssh.stdout.take().ok_or_else(out_of_step)?);
        let mut this = Self {
            ssh,
            to,
            from: BufReader::with_capacity(MESSAGE_MAX, from),
            said,
            next: 0,
            waiting: BTreeSet::new(),
            early: HashMap::new(),
            broken: false,
            extensions: BTreeSet::new(),
        };
        match this.greet() {
            Ok(()) => Ok(this),
            Err(error) => Err(this.explain(error)),
        }
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut message = Message::new(INIT);
        message.number(3);
        self.write(message)?;
        let message = self.receive()?;
        let (&kind, rest) = message.split_first().ok_or_else(out_of_step)?;
        let mut parser = Parser(rest);
        if kind != VERSION || parser.number().is_none_or(|version| version < 3) {
            return Err(out_of_step());
        }
        while let Some(name) = parser.text() {
            parser.text();
            self.extensions.insert(name.to_vec());
        }
        Ok(())
    }

    pub(super) fn has(&self, extension: &str) -> bool {
        self.extensions.contains(extension.as_bytes())
    }

    /// Whether it can be used for something else.
    pub(super) fn is_fine(&self) -> bool {
        !self.broken && self.waiting.is_empty() && self.early.is_empty()
    }

    /// What went wrong, in ssh's words if it has any.
    pub(super) fn explain(&mut self, error: io::Error) -> io::Error {
        if !self.broken {
            return error;
        }
        drop(self.to.take());
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
        let mut text = vec![0; 4096];
        let got = self.said.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..got]).into_owned();
        let mut lines = text.lines().map(|line| line.trim().replace(char::is_control, " "));
        match lines.rfind(|line| !line.is_empty()) {
            Some(line) => io::Error::new(io::ErrorKind::ConnectionAborted, format!("ssh says: {line}")),
            None => error,
        }
    }

    fn write(&mut self, message: Message) -> io::Result<()> {
        let result = match &mut self.to {
            Some(to) => to.write_all(&message.whole()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.or_broken(result)
    }

    fn or_broken<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            self.broken = true;
            match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => {
                    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection to the server is lost")
                }
                _ => error,
            }
        })
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        let result = self.from.read_exact(&mut length);
        self.or_broken(result)?;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length == 0 || length > MESSAGE_MAX {
            return self.or_broken(Err(out_of_step()));
        }
        let mut message = vec![0; length];
        let result = self.from.read_exact(&mut message);
        self.or_broken(result)?;
        Ok(message)
    }

    /// Sends a request; its answer is for [`Self::answer`].
    fn send(&mut self, kind: u8, build: impl FnOnce(&mut Message)) -> io::Result<u32> {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let mut message = Message::new(kind);
        message.number(id);
        build(&mut message);
        self.write(message)?;
        self.waiting.insert(id);
        Ok(id)
    }

    fn answer(&mut self, id: u32) -> io::Result<Reply> {
        loop {
            if let Some(reply) = self.early.remove(&id) {
                return Ok(reply);
            }
            let message = self.receive()?;
            let parsed = Reply::parse(&message).filter(|(id, _)| self.waiting.contains(id));
            let (found, reply) = self.or_broken(parsed.ok_or_else(out_of_step))?;
            self.waiting.remove(&found);
            self.early.insert(found, reply);
        }
    }

    /// Takes the answer that a request only can have, or else tells what is wrong.
    fn done(&mut self, id: u32) -> io::Result<()> {
        match self.answer(id)? {
            Reply::Status(OK, _) => Ok(()),
            other => Err(other.refused()),
        }
    }

    fn ask(&mut self, kind: u8, build: impl FnOnce(&mut Message)) -> io::Result<()> {
        let id = self.send(kind, build)?;
        self.done(id)
    }

    fn attributes(&mut self, id: u32) -> io::Result<Attributes> {
        match self.answer(id)? {
            Reply::Attributes(attributes) => Ok(attributes),
            other => Err(other.refused()),
        }
    }

    fn handle(&mut self, id: u32) -> io::Result<Handle> {
        match self.answer(id)? {
            Reply::Handle(handle) => Ok(handle),
            other => Err(other.refused()),
        }
    }

    fn name(&mut self, id: u32) -> io::Result<Vec<u8>> {
        match self.answer(id)? {
            Reply::Names(mut names) if names.len() == 1 => Ok(names.remove(0).0),
            other => Err(other.refused()),
        }
    }

    /// What is at each of these, links not followed. One round trip.
    pub(super) fn lstat_all(&mut self, paths: &[Vec<u8>]) -> io::Result<Vec<io::Result<Attributes>>> {
        let mut ids = Vec::new();
        for path in paths {
            ids.push(self.send(LSTAT, |message| message.text(path))?);
        }
        let mut all = Vec::new();
        for id in ids {
            let result = self.attributes(id);
            if self.broken {
                return result.map(|_| Vec::new());
            }
            all.push(result);
        }
        Ok(all)
    }

    pub(super) fn lstat(&mut self, path: &[u8]) -> io::Result<Attributes> {
        let id = self.send(LSTAT, |message| message.text(path))?;
        self.attributes(id)
    }

    pub(super) fn stat(&mut self, path: &[u8]) -> io::Result<Attributes> {
        let id = self.send(STAT, |message| message.text(path))?;
        self.attributes(id)
    }

    pub(super) fn setstat(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.ask(SETSTAT, |message| {
            message.text(path);
            attributes.write(message);
        })
    }

    pub(super) fn fsetstat(&mut self, handle: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.ask(FSETSTAT, |message| {
            message.text(handle);
            attributes.write(message);
        })
    }

    /// The same, whose answer [`Self::settle`] waits for.
    pub(super) fn fsetstat_later(&mut self, handle: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.send(FSETSTAT, |message| {
            message.text(handle);
            attributes.write(message);
        })?;
        Ok(())
    }

    /// Of a symbolic link itself.
    pub(super) fn lsetstat(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.ask(EXTENDED, |message| {
            message.text(b"lsetstat@openssh.com");
            message.text(path);
            attributes.write(message);
        })
    }

    pub(super) fn real_path(&mut self, path: &[u8]) -> io::Result<Vec<u8>> {
        let id = self.send(REALPATH, |message| message.text(path))?;
        self.name(id)
    }

    /// Makes a file that is not there yet, for nobody else to read.
    pub(super) fn create(&mut self, path: &[u8]) -> io::Result<Handle> {
        let id = self.send(OPEN, |message| {
            message.text(path);
            message.number(OPEN_WRITE | OPEN_CREATE | OPEN_EXCLUSIVE);
            Attributes { mode: Some(0o600), ..Attributes::default() }.write(message);
        })?;
        self.handle(id)
    }

    pub(super) fn open(&mut self, path: &[u8]) -> io::Result<Handle> {
        let id = self.send(OPEN, |message| {
            message.text(path);
            message.number(OPEN_READ);
            message.number(0);
        })?;
        self.handle(id)
    }

    pub(super) fn close(&mut self, handle: &[u8]) -> io::Result<()> {
        self.ask(CLOSE, |message| message.text(handle))
    }

    /// Writes, without waiting for an answer until there are many: see [`Self::settle`].
    pub(super) fn write_at(&mut self, handle: &[u8], mut at: u64, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(PART) {
            while self.waiting.len() + self.early.len() >= IN_FLIGHT {
                self.settle_one()?;
            }
            self.send(WRITE, |message| {
                message.text(handle);
                message.long(at);
                message.text(part);
            })?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn settle_one(&mut self) -> io::Result<()> {
        let first = self.waiting.first().into_iter().chain(self.early.keys()).min().copied();
        first.map_or(Ok(()), |id| self.done(id))
    }

    /// Waits for all answers that are due; the first of them that refuses.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        while !self.broken && self.waiting.len() + self.early.len() > 0 {
            let one = self.settle_one();
            result = result.and(one);
        }
        result
    }

    /// Forgets answers that are due, whatever they are.
    fn forget(&mut self) {
        while !self.broken
            && let Some(id) = self.waiting.first().copied()
        {
            let _ = self.answer(id);
        }
        self.early.clear();
    }

    pub(super) fn sync(&mut self, handle: &[u8]) -> io::Result<()> {
        self.ask(EXTENDED, |message| {
            message.text(b"fsync@openssh.com");
            message.text(handle);
        })
    }

    /// The same, whose answer [`Self::settle`] waits for.
    pub(super) fn sync_later(&mut self, handle: &[u8]) -> io::Result<()> {
        self.send(EXTENDED, |message| {
            message.text(b"fsync@openssh.com");
            message.text(handle);
        })?;
        Ok(())
    }

    /// Closes a file that was written, in one round trip: whether all was done that was asked for, the first refusal if not, and what
    /// the file is like then.
    pub(super) fn finish(&mut self, handle: &[u8]) -> (io::Result<()>, io::Result<Attributes>) {
        let asked = self.send(FSTAT, |message| message.text(handle));
        let closed = self.send(CLOSE, |message| message.text(handle)).map(drop);
        let attributes = asked.and_then(|id| self.attributes(id));
        (self.settle().and(closed), attributes)
    }

    /// Everything in a directory but itself and the one above.
    pub(super) fn list(&mut self, path: &[u8]) -> io::Result<Vec<(OsString, Attributes)>> {
        let id = self.send(OPENDIR, |message| message.text(path))?;
        let handle = self.handle(id)?;
        let mut all = Vec::new();
        let result = loop {
            let id = self.send(READDIR, |message| message.text(&handle))?;
            match self.answer(id)? {
                Reply::Names(names) => {
                    let names = names.into_iter().filter(|(name, _)| is_name(name));
                    all.extend(names.map(|(name, attributes)| (OsString::from_vec(name), attributes)));
                }
                Reply::Status(END, _) => break Ok(all),
                other => break Err(other.refused()),
            }
        };
        let _ = self.close(&handle);
        result
    }

    pub(super) fn read_link(&mut self, path: &[u8]) -> io::Result<OsString> {
        let id = self.send(READLINK, |message| message.text(path))?;
        Ok(OsString::from_vec(self.name(id)?))
    }

    pub(super) fn symlink(&mut self, target: &[u8], path: &[u8]) -> io::Result<()> {
        self.ask(SYMLINK, |message| {
            // In OpenSSH's order, which is not the draft's.
            message.text(target);
            message.text(path);
        })
    }

    pub(super) fn make_directory(&mut self, path: &[u8]) -> io::Result<()> {
        self.ask(MKDIR, |message| {
            message.text(path);
            Attributes { mode: Some(0o700), ..Attributes::default() }.write(message);
        })
    }

    pub(super) fn remove_directory(&mut self, path: &[u8]) -> io::Result<()> {
        self.ask(RMDIR, |message| message.text(path))
    }

    pub(super) fn remove(&mut self, path: &[u8]) -> io::Result<()> {
        self.ask(REMOVE, |message| message.text(path))
    }

    /// To a name that nothing has; else it fails.
    pub(super) fn rename(&mut self, from: &[u8], to: &[u8]) -> io::Result<()> {
        self.ask(RENAME, |message| {
            message.text(from);
            message.text(to);
        })
    }

    /// In the place of what has the name.
    pub(super) fn replace(&mut self, from: &[u8], to: &[u8]) -> io::Result<()> {
        self.ask(EXTENDED, |message| {
            message.text(b"posix-rename@openssh.com");
            message.text(from);
            message.text(to);
        })
    }
}

/// Reads a file, with several requests on their way.
pub(super) struct Reading {
    handle: Handle,
    /// From where on nothing was asked for.
    at: u64,
    /// Requests, and how many bytes each asked for, in the order of the file.
    asked: std::collections::VecDeque<(u32, usize)>,
    part: Vec<u8>,
    taken: usize,
    at_end: bool,
}

impl Reading {
    pub(super) fn new(handle: Handle) -> Self {
        let asked = std::collections::VecDeque::new();
        Self { handle, at: 0, asked, part: Vec::new(), taken: 0, at_end: false }
    }

    pub(super) fn read(&mut self, connection: &mut Connection, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.part.len() && !self.at_end {
            while self.asked.len() < IN_FLIGHT {
                let id = connection.send(READ, |message| {
                    message.text(&self.handle);
                    message.long(self.at);
                    message.number(u32::try_from(PART).unwrap_or(u32::MAX));
                })?;
                self.asked.push_back((id, PART));
                self.at += PART as u64;
            }
            let Some((id, wanted)) = self.asked.pop_front() else { break };
            let begin = self.at - (self.asked.len() as u64 + 1) * PART as u64;
            match connection.answer(id)? {
                Reply::Data(part) if !part.is_empty() && part.len() <= wanted => {
                    if part.len() < wanted {
                        // There may be more in between: it is asked for again from there.
                        connection.forget();
                        self.asked.clear();
                        self.at = begin + part.len() as u64;
                    }
                    (self.part, self.taken) = (part, 0);
                }
                Reply::Status(END, _) => self.at_end = true,
                other => return Err(other.refused()),
            }
        }
        let rest = &self.part[self.taken..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }

    pub(super) fn end(&mut self, connection: &mut Connection) {
        connection.forget();
        let _ = connection.close(&self.handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let all =
            Attributes { size: Some(7), owner: Some((1, 2)), mode: Some(0o100_644), times: Some((3, 4)) };
        for attributes in [
            Attributes::default(),
            Attributes { mode: None, ..all.clone() },
            Attributes { owner: None, ..all.clone() },
            Attributes { times: None, ..all.clone() },
            all,
        ] {
            let mut message = Message(Vec::new());
            attributes.write(&mut message);
            let mut parser = Parser(&message.0);
            assert_eq!(Attributes::read(&mut parser), Some(attributes));
            assert!(parser.0.is_empty());
        }
    }

    #[test]
    fn what_is_cut_short_is_not_understood() {
        let mut message = Message(vec![NAME]);
        message.number(9);
        message.number(1);
        message.text(b"x");
        message.text(b"-rw x");
        Attributes { size: Some(5), ..Attributes::default() }.write(&mut message);
        let (id, reply) = Reply::parse(&message.0).unwrap();
        let attributes = Attributes { size: Some(5), ..Attributes::default() };
        assert_eq!((id, reply), (9, Reply::Names(vec![(b"x".to_vec(), attributes)])));
        for length in 0..message.0.len() {
            assert_eq!(Reply::parse(&message.0[..length]), None, "{length}");
        }
        let mut many = Message(vec![NAME]);
        many.number(9);
        many.number(u32::MAX);
        assert_eq!(Reply::parse(&many.0), None);
    }
}
