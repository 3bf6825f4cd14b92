//! A connection to an SFTP server, by the system's own `ssh`: its keys, agent, known hosts and settings are those that
//! people have. Several [`Requests`](super::requests::Requests) use it at once, so that what takes several round trips of each file
//! need not wait for the round trips of others:
//!
//! ```text
//!  Requests ──┐                                                ┌──> inbox of who asked
//!  Requests ──┼── one after the other ──> ssh ──> reader thread ─┼──> inbox of who asked
//!  Requests ──┘                                                └──> ...
//! ```
//!
//! What the server says is not trusted: lengths are bounded, and whatever is out of step ends the connection.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;

use super::message::{DATA, INIT, Message, Parser, Reply, STATUS, VERSION, out_of_step};
use super::requests::PART;
use crate::carry::stores::address::Address;
use crate::error::plain;

/// The longest message that is taken; OpenSSH sends none longer.
const MESSAGE_MAX: usize = 256 << 10;

/// The longest with a part of a file.
const DATA_MAX: usize = PART as usize + 64;

/// How long it may take until the server greets: to get there, and to log in.
const GREETING: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A request's number, and what is answered.
pub(super) type Answer = (u32, Reply);

/// A request's number, and of what kind its answer is if it is not refused.
pub(super) type Asked = (u32, u8);

/// A connection.
pub(super) struct Connection {
    ssh: Mutex<Child>,
    to: Mutex<Option<ChildStdin>>,
    /// What ssh has said.
    said: File,
    next: AtomicU32,
    answers: Arc<Answers>,
    extensions: BTreeSet<Vec<u8>>,
}

/// Who gets which answer.
#[derive(Default)]
struct Answers(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    is_broken: bool,
    /// By what the server has said.
    is_out_of_step: bool,
    next: u64,
    users: HashMap<u64, Sender<Answer>>,
    /// Requests that are not answered.
    due: HashMap<u32, Due>,
}

/// What is known of a request's answer.
struct Due {
    /// Whose it is: who has gone by then need not have it.
    user: u64,
    /// Of what kind it is if it is not refused.
    kind: u8,
}

impl Waiting {
    /// Who waits hears that nothing comes any more.
    fn give_up(&mut self) {
        self.is_broken = true;
        self.users.clear();
        self.due.clear();
    }
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads, until there is nothing more that could be read.
    fn read(&self, mut from: BufReader<ChildStdout>) {
        let Err(error) = self.read_all(&mut from);
        let mut waiting = self.lock();
        // What comes for somebody who has given up is not what was wrong.
        waiting.is_out_of_step = !waiting.is_broken && error.kind() == out_of_step().kind();
        waiting.give_up();
    }

    fn read_all(&self, from: &mut BufReader<ChildStdout>) -> io::Result<Infallible> {
        loop {
            let message = receive(from)?;
            let (kind, id) = Reply::head(&message).ok_or_else(out_of_step)?;
            let due = self.lock().due.remove(&id).ok_or_else(out_of_step)?;
            // What many have asked for at once is to take no more memory than that.
            let fits = kind == STATUS || (kind == due.kind && (kind != DATA || message.len() <= DATA_MAX));
            if !fits {
                return Err(out_of_step());
            }
            let answer = Reply::parse(&message).ok_or_else(out_of_step)?;
            if let Some(user) = self.lock().users.get(&due.user) {
                let _ = user.send(answer);
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

impl Connection {
    /// # Errors
    /// In ssh's words, if it has any.
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
        let (to, from) = (ssh.stdin.take(), ssh.stdout.take());
        let mut this = Self {
            ssh: Mutex::new(ssh),
            to: Mutex::new(to),
            said,
            next: AtomicU32::new(0),
            answers: Arc::default(),
            extensions: BTreeSet::new(),
        };
        let mut from = BufReader::with_capacity(MESSAGE_MAX, from.ok_or_else(out_of_step)?);
        let mut hello = Message::new(INIT);
        hello.number(3);
        if let Err(error) = this.write(&hello.whole()) {
            return Err(this.explain(lost(error)));
        }
        // ssh itself gives up a server that is silent, but not one that does not speak SFTP.
        let greets = poll(&mut [PollFd::new(from.get_ref(), PollFlags::IN)], Some(&GREETING));
        if !greets.is_ok_and(|count| count > 0) {
            return Err(this.explain(io::Error::new(io::ErrorKind::TimedOut, "the server does not answer")));
        }
        match Self::greet(&mut from) {
            Ok(extensions) => this.extensions = extensions,
            Err(error) => return Err(this.explain(lost(error))),
        }
        let answers = Arc::clone(&this.answers);
        // It ends with ssh.
        std::thread::Builder::new().name("sftp-reader".into()).spawn(move || answers.read(from))?;
        Ok(this)
    }

    fn greet(from: &mut BufReader<ChildStdout>) -> io::Result<BTreeSet<Vec<u8>>> {
        let message = receive(from)?;
        let (&kind, rest) = message.split_first().ok_or_else(out_of_step)?;
        let mut parser = Parser(rest);
        if kind != VERSION || parser.number().is_none_or(|version| version < 3) {
            return Err(out_of_step());
        }
        let mut extensions = BTreeSet::new();
        while let Some(name) = parser.text() {
            parser.text();
            extensions.insert(name.to_vec());
        }
        Ok(extensions)
    }

    pub(super) fn has(&self, extension: &str) -> bool {
        self.extensions.contains(extension.as_bytes())
    }

    /// How many use it; `None` if it is of no use any more.
    pub(super) fn users(&self) -> Option<usize> {
        let waiting = self.answers.lock();
        (!waiting.is_broken).then_some(waiting.users.len())
    }

    /// One more user: its number, and where its answers come to, until the connection is lost.
    pub(super) fn join(&self) -> (u64, Receiver<Answer>) {
        let (sender, inbox) = channel();
        let mut waiting = self.answers.lock();
        waiting.next += 1;
        let user = waiting.next;
        // Else the inbox is at its end at once.
        if !waiting.is_broken {
            waiting.users.insert(user, sender);
        }
        (user, inbox)
    }

    /// Why no answers come any more.
    pub(super) fn why_lost(&self) -> io::Error {
        if self.answers.lock().is_out_of_step {
            out_of_step()
        } else {
            lost(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// One less.
    pub(super) fn leave(&self, user: u64) {
        self.answers.lock().users.remove(&user);
    }

    /// A number for the next request.
    pub(super) fn number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends whole messages of `user`'s, which ask for this.
    pub(super) fn send(&self, user: u64, asked: &[Asked], messages: &[u8]) -> io::Result<()> {
        {
            let mut waiting = self.answers.lock();
            if waiting.is_broken {
                return Err(lost(io::ErrorKind::BrokenPipe.into()));
            }
            // Before it is sent: an answer may be there at once.
            waiting.due.extend(asked.iter().map(|&(number, kind)| (number, Due { user, kind })));
        }
        self.write(messages).map_err(|error| {
            // Nobody knows how much of it was sent.
            self.answers.lock().give_up();
            lost(error)
        })
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match &mut *self.to.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(to) => to.write_all(bytes),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The connection is of no use any more: what went wrong, in ssh's words if it has any.
    pub(super) fn explain(&self, error: io::Error) -> io::Error {
        self.end();
        let mut text = vec![0; 4096];
        let got = self.said.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..got]).into_owned();
        let mut lines = text.lines().map(|line| line.trim().replace(char::is_control, " "));
        match lines.rfind(|line| !line.is_empty()) {
            Some(line) => io::Error::new(io::ErrorKind::ConnectionAborted, format!("ssh says: {line}")),
            None => error,
        }
    }

    /// Whoever writes or waits hears of it.
    fn end(&self) {
        self.answers.lock().give_up();
        let mut ssh = self.ssh.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = ssh.kill();
        let _ = ssh.wait();
        // Somebody who writes just now finds nobody there.
        if let Ok(mut to) = self.to.try_lock() {
            drop(to.take());
        }
    }
}

/// What is said of an end that nobody has explained.
fn lost(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => {
            io::Error::new(io::ErrorKind::ConnectionAborted, "the connection to the server is lost")
        }
        _ => error,
    }
}

fn receive(from: &mut BufReader<ChildStdout>) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length == 0 || length > MESSAGE_MAX {
        return Err(out_of_step());
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message)?;
    Ok(message)
}
