//! Messages of the protocol, version 3, as OpenSSH speaks it, with its extensions (draft-ietf-secsh-filexfer-02, OpenSSH's
//! PROTOCOL): put together, and read. What the server says is not trusted.

use std::io;

pub(super) const INIT: u8 = 1;
pub(super) const VERSION: u8 = 2;
pub(super) const OPEN: u8 = 3;
pub(super) const CLOSE: u8 = 4;
pub(super) const READ: u8 = 5;
pub(super) const WRITE: u8 = 6;
pub(super) const LSTAT: u8 = 7;
pub(super) const FSTAT: u8 = 8;
pub(super) const SETSTAT: u8 = 9;
pub(super) const FSETSTAT: u8 = 10;
pub(super) const OPENDIR: u8 = 11;
pub(super) const READDIR: u8 = 12;
pub(super) const REMOVE: u8 = 13;
pub(super) const MKDIR: u8 = 14;
pub(super) const RMDIR: u8 = 15;
pub(super) const REALPATH: u8 = 16;
pub(super) const STAT: u8 = 17;
pub(super) const RENAME: u8 = 18;
pub(super) const READLINK: u8 = 19;
pub(super) const SYMLINK: u8 = 20;
pub(super) const STATUS: u8 = 101;
pub(super) const HANDLE: u8 = 102;
pub(super) const DATA: u8 = 103;
pub(super) const NAME: u8 = 104;
pub(super) const ATTRS: u8 = 105;
pub(super) const EXTENDED: u8 = 200;

pub(super) const OPEN_READ: u32 = 1;
pub(super) const OPEN_WRITE: u32 = 2;
pub(super) const OPEN_CREATE: u32 = 8;
pub(super) const OPEN_EXCLUSIVE: u32 = 0x20;

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;
const HAS_EXTENDED: u32 = 1 << 31;

pub(super) const OK: u32 = 0;
pub(super) const END: u32 = 1;
const NO_SUCH_FILE: u32 = 2;
const PERMISSION_DENIED: u32 = 3;
const NO_CONNECTION: u32 = 6;
const CONNECTION_LOST: u32 = 7;
const UNSUPPORTED: u32 = 8;

/// As much is kept of what a server says in words, in bytes.
const TEXT_MAX: usize = 1 << 10;

/// The longest handle that the draft allows (section 6.2), in bytes.
const HANDLE_MAX: usize = 256;

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
    pub(super) fn write(&self, message: &mut Message) {
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

    pub(super) fn read(parser: &mut Parser<'_>) -> Option<Self> {
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
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    pub(super) fn number(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    pub(super) fn long(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    pub(super) fn text(&mut self, text: &[u8]) {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(text);
    }

    pub(super) fn whole(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        self.0
    }
}

pub(super) struct Parser<'a>(pub(super) &'a [u8]);

impl<'a> Parser<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn number(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub(super) fn long(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    pub(super) fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.bytes(usize::try_from(length).ok()?)
    }
}

/// What a server answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status(u32, String),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    Names(Vec<(Vec<u8>, Attributes)>),
    Attributes(Attributes),
}

impl Reply {
    /// Of what kind it is, and the number of the request.
    pub(super) fn head(message: &[u8]) -> Option<(u8, u32)> {
        let (&kind, rest) = message.split_first()?;
        Some((kind, Parser(rest).number()?))
    }

    /// The number of the request, and what is answered.
    pub(super) fn parse(message: &[u8]) -> Option<(u32, Self)> {
        let (&kind, rest) = message.split_first()?;
        let mut parser = Parser(rest);
        let id = parser.number()?;
        let reply = match kind {
            STATUS => {
                let code = parser.number()?;
                // Old servers say no more.
                let text = parser.text().unwrap_or_default();
                let text = String::from_utf8_lossy(&text[..text.len().min(TEXT_MAX)]).into_owned();
                Self::Status(code, text)
            }
            HANDLE => Self::Handle(parser.text().filter(|handle| handle.len() <= HANDLE_MAX)?.to_vec()),
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

    /// How many bytes, or names, it holds.
    pub(super) fn count(&self) -> usize {
        match self {
            // What is no text is shown by three bytes each.
            Self::Status(_, text) => text.len() / 3,
            Self::Handle(bytes) | Self::Data(bytes) => bytes.len(),
            Self::Names(names) => names.len(),
            Self::Attributes(_) => 0,
        }
    }

    pub(super) fn refused(self) -> io::Error {
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

pub(super) fn out_of_step() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the server's answer is not understood")
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
