//! What one delivery, or one who looks, asks a server for: over a [`Connection`] that others use, too.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::connection::{Answer, Asked, Connection};
use super::message::{
    ATTRS, Attributes, CLOSE, DATA, END, EXTENDED, FSETSTAT, FSTAT, HANDLE, LSTAT, MKDIR, Message, NAME, OK,
    OPEN, OPEN_CREATE, OPEN_EXCLUSIVE, OPEN_READ, OPEN_WRITE, OPENDIR, READ, READDIR, READLINK, REALPATH,
    REMOVE, RENAME, RMDIR, Reply, SETSTAT, STAT, STATUS, SYMLINK, WRITE,
};
use crate::carry::stores::is_name;

/// What every server takes in one message (the draft's 34,000 bytes), less the message's own.
pub(super) const PART: u32 = 32 << 10;
/// How many of them are on their way, one way or the other.
const IN_FLIGHT: usize = 32;
/// So many bytes of requests are sent although nobody waits for an answer yet.
const MANY: usize = 64 << 10;

/// What is answered to a request of this kind if it is not refused.
fn expected(kind: u8) -> u8 {
    match kind {
        OPEN | OPENDIR => HANDLE,
        READ => DATA,
        READDIR | REALPATH | READLINK => NAME,
        LSTAT | FSTAT | STAT => ATTRS,
        _ => STATUS,
    }
}

/// A file or directory that is open there.
pub(super) type Handle = Vec<u8>;

/// Requests, which are answered in any order. They are sent together when an answer is waited for.
pub(super) struct Requests {
    connection: Arc<Connection>,
    user: u64,
    inbox: Receiver<Answer>,
    /// What is to be sent, and what it asks for.
    outbox: (Vec<u8>, Vec<Asked>),
    /// Requests that are not answered.
    waiting: BTreeSet<u32>,
    /// Answers that nobody has asked for yet.
    early: HashMap<u32, Reply>,
    is_broken: bool,
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.connection.leave(self.user);
    }
}

impl Requests {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        let (user, inbox) = connection.join();
        Self {
            connection,
            user,
            inbox,
            outbox: (Vec::new(), Vec::new()),
            waiting: BTreeSet::new(),
            early: HashMap::new(),
            is_broken: false,
        }
    }

    pub(super) fn has(&self, extension: &str) -> bool {
        self.connection.has(extension)
    }

    /// What went wrong, in ssh's words if the connection is lost and it has any.
    pub(super) fn explain(&self, error: io::Error) -> io::Error {
        if self.is_broken { self.connection.explain(error) } else { error }
    }

    /// Asks for something; the answer is for [`Self::answer`].
    fn send(&mut self, kind: u8, build: impl FnOnce(&mut Message)) -> io::Result<u32> {
        let id = self.connection.number();
        let mut message = Message::new(kind);
        message.number(id);
        build(&mut message);
        self.outbox.0.extend_from_slice(&message.whole());
        self.outbox.1.push((id, expected(kind)));
        self.waiting.insert(id);
        if self.outbox.0.len() >= MANY {
            self.flush()?;
        }
        Ok(id)
    }

    fn flush(&mut self) -> io::Result<()> {
        let (messages, asked) = &mut self.outbox;
        if messages.is_empty() {
            return Ok(());
        }
        let sent = self.connection.send(self.user, asked, messages);
        messages.clear();
        asked.clear();
        self.is_broken |= sent.is_err();
        sent
    }

    fn answer(&mut self, id: u32) -> io::Result<Reply> {
        self.flush()?;
        loop {
            if let Some(reply) = self.early.remove(&id) {
                return Ok(reply);
            }
            let Ok((found, reply)) = self.inbox.recv() else {
                self.is_broken = true;
                return Err(self.connection.why_lost());
            };
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
            if self.is_broken {
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
        for part in bytes.chunks(PART as usize) {
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
        while !self.is_broken && self.waiting.len() + self.early.len() > 0 {
            let one = self.settle_one();
            result = result.and(one);
        }
        result
    }

    /// Forgets answers that are due, whatever they are.
    fn forget(&mut self) {
        while !self.is_broken
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
    /// What it is said to have. It is read to its end, wherever that is; but what is not expected is asked for one part at a time.
    size: u64,
    /// From where on nothing was asked for.
    at: u64,
    /// Requests, where they begin and how many bytes each asked for, in the order of the file.
    asked: VecDeque<(u32, u64, u32)>,
    part: Vec<u8>,
    taken: usize,
    at_end: bool,
}

impl Reading {
    pub(super) fn new(handle: Handle, size: u64) -> Self {
        Self { handle, size, at: 0, asked: VecDeque::new(), part: Vec::new(), taken: 0, at_end: false }
    }

    pub(super) fn read(&mut self, requests: &mut Requests, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.part.len() && !self.at_end {
            while self.asked.is_empty() || (self.asked.len() < IN_FLIGHT && self.at <= self.size) {
                let begin = self.at;
                // The end is asked for beside the last part: nothing is behind it.
                let expected = u32::try_from(self.size.saturating_sub(begin)).unwrap_or(u32::MAX);
                let wanted = if expected == 0 { PART } else { expected.min(PART) };
                let id = requests.send(READ, |message| {
                    message.text(&self.handle);
                    message.long(begin);
                    message.number(wanted);
                })?;
                self.asked.push_back((id, begin, wanted));
                self.at += u64::from(wanted);
            }
            let Some((id, begin, wanted)) = self.asked.pop_front() else { break };
            match requests.answer(id)? {
                Reply::Data(part) if !part.is_empty() && part.len() <= wanted as usize => {
                    if part.len() < wanted as usize {
                        // There may be more in between: it is asked for again from there.
                        requests.forget();
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

    /// Nobody waits for the answers.
    pub(super) fn end(&mut self, requests: &mut Requests) {
        let closed = requests.send(CLOSE, |message| message.text(&self.handle));
        let _ = closed.and_then(|_| requests.flush());
    }
}
