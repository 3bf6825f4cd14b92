//! The terminal between the one outside and the one inside. The command never gets a terminal of the host: what may write
//! to one can also type on it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::command::Size;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::Buffer;

/// As much is moved at a time.
const CHUNK: usize = 16 << 10;

/// The end of input, as one types it.
const END: u8 = 4;

/// Which of standard input, output and error are terminals.
///
/// # Errors
/// `Invalid` if one of them is a directory: from there one would get to all of the host.
pub(super) fn standard() -> Result<[bool; 3]> {
    let mut terminals = [false; 3];
    for (number, is_terminal) in terminals.iter_mut().enumerate() {
        let fd = descriptor(number);
        *is_terminal = isatty(fd);
        let stat = rustix::fs::fstat(fd);
        if stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
            let why = format!("Descriptor {number} is a directory, by which the host could be reached");
            return Err(Error::new(ErrorKind::Invalid, why).advise("give it /dev/null"));
        }
    }
    Ok(terminals)
}

fn descriptor(number: usize) -> BorrowedFd<'static> {
    match number {
        0 => rustix::stdio::stdin(),
        1 => rustix::stdio::stdout(),
        _ => rustix::stdio::stderr(),
    }
}

/// How the new terminal is to be.
pub(super) fn size(terminals: [bool; 3]) -> Size {
    let whole = terminals[0] && terminals[1];
    let window = (0..3).filter(|&n| terminals[n]).find_map(|n| tcgetwinsize(descriptor(n)).ok());
    let (rows, columns) = window.map_or((24, 80), |window| (window.ws_row, window.ws_col));
    Size { rows, columns, whole }
}

/// What is moved between the two.
pub(super) struct Relay {
    terminals: [bool; 3],
    inner: File,
    /// What the terminal outside was like before, if it was changed.
    before: Option<Termios>,
    /// What is typed, and the part of it that was not taken yet. Neither this nor what is shown stays once it was moved: what
    /// people read and write inside would be in this process's memory otherwise, which may be swapped out.
    typed: Buffer,
    waiting: Range<usize>,
    shown: Buffer,
    input_over: bool,
    output_over: bool,
}

impl Relay {
    /// Takes over the terminal outside.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn start(terminals: [bool; 3], inner: OwnedFd) -> Result<Self> {
        let failed = |error: Errno| Error::io("Cannot set up the terminal", error);
        let flags = rustix::fs::fcntl_getfl(&inner).map_err(failed)?;
        rustix::fs::fcntl_setfl(&inner, flags | OFlags::NONBLOCK).map_err(failed)?;
        let mut relay = Self {
            terminals,
            inner: inner.into(),
            before: None,
            typed: buffer()?,
            waiting: 0..0,
            shown: buffer()?,
            input_over: false,
            output_over: false,
        };
        if size(terminals).whole {
            let before = tcgetattr(descriptor(0)).map_err(failed)?;
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(descriptor(0), OptionalActions::Flush, &raw).map_err(failed)?;
            relay.before = Some(before);
        }
        Ok(relay)
    }

    /// What to wait for: the terminal inside, and, where something may be typed, the one outside.
    pub(super) fn wanted(&self) -> Vec<PollFd<'_>> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.output_over);
        flags.set(PollFlags::OUT, !self.waiting.is_empty());
        let mut fds = Vec::new();
        if !flags.is_empty() {
            fds.push(PollFd::new(&self.inner, flags));
        }
        if self.reads_outside() {
            fds.push(PollFd::from_borrowed_fd(descriptor(0), PollFlags::IN));
        }
        fds
    }

    /// Whether the last of what is [wanted](Self::wanted) is the terminal outside.
    pub(super) fn reads_outside(&self) -> bool {
        self.terminals[0] && !self.input_over && self.waiting.is_empty()
    }

    /// Moves what there is; `may_read` if the terminal outside was found readable. Whether that has hung up.
    pub(super) fn turn(&mut self, may_read: bool) -> bool {
        let mut hung_up = false;
        if may_read && self.reads_outside() {
            match rustix::io::read(descriptor(0), self.typed.bytes()) {
                Ok(0) if self.before.is_none() => {
                    self.typed[0] = END;
                    self.take_typed(1);
                }
                Ok(0) | Err(Errno::IO) => {
                    self.input_over = true;
                    hung_up = true;
                }
                Ok(got) => self.take_typed(got),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => self.input_over = true,
            }
        }
        if !self.waiting.is_empty() {
            match self.inner.write(&self.typed[self.waiting.clone()]) {
                Ok(written) => self.waiting.start += written,
                Err(error) if is_later(&error) => {}
                Err(_) => self.waiting = 0..0,
            }
            if self.waiting.is_empty() {
                self.typed.wipe();
            }
        }
        self.show();
        hung_up
    }

    /// So much was typed.
    fn take_typed(&mut self, count: usize) {
        self.typed.note_used(count);
        self.waiting = 0..count;
    }

    /// Shows what the command has written: one piece; whether there was any.
    fn show(&mut self) -> bool {
        match self.inner.read(self.shown.bytes()) {
            Ok(got @ 1..) => {
                self.shown.note_used(got);
                let to = (0..3).rev().filter(|&n| self.terminals[n]).min_by_key(|&n| (n + 2) % 3);
                let _ = to.map(|to| write_all(descriptor(to), &self.shown[..got]));
                self.shown.wipe();
                true
            }
            Err(error) if is_later(&error) => false,
            // Nobody has it open any more; or not yet.
            Ok(_) | Err(_) => {
                self.output_over = true;
                false
            }
        }
    }

    /// The window outside has another size.
    pub(super) fn resize(&self) {
        let _ = tcsetwinsize(&self.inner, size(self.terminals).window());
    }
}

impl Drop for Relay {
    /// Shows the rest, and leaves the terminal outside as it was.
    fn drop(&mut self) {
        while self.show() {}
        if let Some(before) = &self.before {
            let _ = tcsetattr(descriptor(0), OptionalActions::Drain, before);
        }
    }
}

/// Room for what is moved, locked where that is allowed.
fn buffer() -> Result<Buffer> {
    let buffer = Buffer::new(CHUNK).map_err(|error| Error::io("Cannot have memory for a terminal", error))?;
    let _ = buffer.lock();
    Ok(buffer)
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd.as_fd(), bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
                rustix::event::poll(&mut fds, None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
