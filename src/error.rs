//! The one public error type: what kind of failure, doing what, on what, and why.
//!
//! The kind is small and stable, so that callers (and the wire, see [`crate::transmission`]) can decide by it; the
//! context is for people. Messages start with a capital letter and do not repeat their source.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it was. Decide by this, show the whole [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked for makes no sense or is out of range.
    Invalid,
    /// A name, file or address does not exist.
    NotFound,
    /// The caller may not do this.
    Denied,
    /// The name, file or address is taken by somebody else.
    InUse,
    /// A memory budget or a table is full.
    OutOfSpace,
    /// The system or a device failed.
    Io,
    /// This server, kernel or file does not support it.
    Unsupported,
    /// The peer broke the protocol.
    Protocol,
    /// The server is shutting down.
    Shutdown,
    /// It is not in memory now and has to be brought there first: to be tried again then. Nobody outside is told so.
    Away,
    /// It is another server's, which has taken over, or is being taken over from.
    Elsewhere,
}

/// A failure: its kind, what was being done, on what, and the cause underneath.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    subject: Option<String>,
    source: Option<io::Error>,
    advice: Option<&'static str>,
}

impl Error {
    /// A failure of `kind`; `message` says what failed, without its cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), subject: None, source: None, advice: None }
    }

    /// A failed system call; the kind follows from the operating system's error.
    pub fn io(message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => ErrorKind::InUse,
            io::ErrorKind::InvalidInput => ErrorKind::Invalid,
            io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull => ErrorKind::OutOfSpace,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self { kind, message: message.into(), subject: None, source: Some(source), advice: None }
    }

    /// Names what the operation was on: an address, an export, a session.
    #[must_use]
    pub fn on(mut self, subject: impl fmt::Display) -> Self {
        self.subject = Some(subject.to_string());
        self
    }

    /// Names the file the operation was on.
    #[must_use]
    pub fn on_path(self, path: impl AsRef<Path>) -> Self {
        let path: PathBuf = path.as_ref().to_owned();
        self.on(path.display())
    }

    /// Adds what the person who reads this can do about it.
    #[must_use]
    pub fn advise(mut self, advice: &'static str) -> Self {
        self.advice = Some(advice);
        self
    }

    /// What kind of failure it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    /// One line: `What failed, "on what": why; what to do`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(subject) = &self.subject {
            write!(f, " {subject}")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {}", plain(source))?;
        }
        if let Some(advice) = self.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

/// What an error says, as it goes into the middle of a line. The system's own begin in lower case, and lose the
/// "(os error N)" that the standard library adds, which helps nobody; what others say stays as it is, as it may name
/// paths and variables.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(_) => text.split(" (os error").next().unwrap_or(&text).to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_what_on_what_why_and_what_to_do() {
        let error = Error::io("Cannot open image", io::Error::from_raw_os_error(2))
            .on_path("/no/such.img")
            .advise("give the path of a raw disk image");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(
            error.to_string(),
            "Cannot open image /no/such.img: no such file or directory; give the path of a raw disk image"
        );
    }

    #[test]
    fn what_others_say_keeps_its_names_and_what_is_behind_a_number() {
        let text = "set AWS_REGION in /Home/x (os error 5 is what it means)";
        assert_eq!(
            Error::io("Cannot sign", io::Error::other(text)).to_string(),
            format!("Cannot sign: {text}")
        );
        let inner = io::Error::new(
            io::ErrorKind::NotFound,
            format!("ssh: {}", plain(&io::Error::from_raw_os_error(2))),
        );
        assert_eq!(
            Error::io("Cannot connect", inner).to_string(),
            "Cannot connect: ssh: no such file or directory"
        );
    }

    #[test]
    fn the_kind_follows_from_the_system_error() {
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(13)).kind(), ErrorKind::Denied);
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(98)).kind(), ErrorKind::InUse);
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(5)).kind(), ErrorKind::Io);
    }
}
