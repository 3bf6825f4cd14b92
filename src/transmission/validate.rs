//! From a request to what is to be done, or to the error it gets: pure, over the request, the export and what was
//! negotiated. Behind this no range is out of bounds and no flag is unknown.

use crate::error::ErrorKind;
use crate::handshake::Negotiated;
use crate::proto::{Command, CommandFlags, Errno, Request};
use std::ops::Range;

/// Most bytes of payload, either way: what is advertised as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// What a valid request wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read { range: Range<u64>, dont_fragment: bool },
    Write { range: Range<u64> },
    Flush,
    Trim { range: Range<u64> },
    WriteZeroes { range: Range<u64>, allocate: bool },
    Cache { range: Range<u64> },
    BlockStatus { range: Range<u64>, one: bool },
    Disconnect,
}

/// Why a request is refused: the error on the wire, and words for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) errno: Errno,
    pub(super) message: &'static str,
}

impl From<ErrorKind> for Refused {
    /// The error on the wire for every kind of failure: the one place where that is decided.
    fn from(kind: ErrorKind) -> Self {
        let (errno, message) = match kind {
            ErrorKind::Invalid | ErrorKind::Protocol => (Errno::Inval, "invalid request"),
            ErrorKind::NotFound | ErrorKind::Io => (Errno::Io, "base image cannot be read"),
            ErrorKind::Denied => (Errno::Perm, "not permitted"),
            ErrorKind::InUse => (Errno::Io, "in use"),
            ErrorKind::OutOfSpace => (Errno::NoSpc, "memory budget is used up"),
            ErrorKind::Unsupported => (Errno::NotSup, "not supported"),
            ErrorKind::Shutdown => (Errno::Shutdown, "server is shutting down"),
        };
        Self { errno, message }
    }
}

const fn refuse<T>(errno: Errno, message: &'static str) -> Result<T, Refused> {
    Err(Refused { errno, message })
}

/// The command flags that may come with a command. FUA may come with any, as the specification demands.
fn allowed_flags(command: Command, negotiated: &Negotiated) -> CommandFlags {
    let own = match command {
        Command::Read if negotiated.structured_replies => CommandFlags::DF,
        Command::WriteZeroes => CommandFlags::NO_HOLE.union(CommandFlags::FAST_ZERO),
        Command::BlockStatus => CommandFlags::REQ_ONE,
        _ => CommandFlags::NONE,
    };
    own.union(CommandFlags::FUA)
}

/// Decides about a request for an export of `size` bytes.
pub(super) fn validate(request: &Request, size: u64, negotiated: &Negotiated) -> Result<Action, Refused> {
    let Request { flags, command, offset, length, .. } = *request;
    if command == Command::Disc {
        return Ok(Action::Disconnect);
    }
    if !flags.without(allowed_flags(command, negotiated)).is_empty() {
        return refuse(Errno::Inval, "unknown command flag");
    }
    if matches!(command, Command::Read | Command::Write) && length > MAX_PAYLOAD {
        // EOVERFLOW is for reads, and only where structured replies are negotiated.
        let long_reply = command == Command::Read && negotiated.structured_replies;
        let errno = if long_reply { Errno::Overflow } else { Errno::Inval };
        return refuse(errno, "payload is longer than the maximum block size");
    }
    let range = offset.checked_add(u64::from(length)).filter(|&end| end <= size).map(|end| offset..end);
    let within = |errno| range.clone().ok_or(Refused { errno, message: "beyond the end of the export" });
    Ok(match command {
        Command::Read => {
            Action::Read { range: within(Errno::Inval)?, dont_fragment: flags.contains(CommandFlags::DF) }
        }
        Command::Write => Action::Write { range: within(Errno::NoSpc)? },
        Command::Flush if offset != 0 || length != 0 => return refuse(Errno::Inval, "flush takes no range"),
        Command::Flush => Action::Flush,
        Command::Trim => Action::Trim { range: within(Errno::Inval)? },
        // Zeroing sends no payload and at most marks blocks that are zeroed already, so it is always faster than
        // writing zeroes: FAST_ZERO needs no refusal.
        Command::WriteZeroes => Action::WriteZeroes {
            range: within(Errno::NoSpc)?,
            allocate: flags.contains(CommandFlags::NO_HOLE),
        },
        Command::Cache => Action::Cache { range: within(Errno::Inval)? },
        Command::BlockStatus if !negotiated.base_allocation => {
            return refuse(Errno::Inval, "no metadata context was negotiated");
        }
        Command::BlockStatus if length == 0 => return refuse(Errno::Inval, "block status of nothing"),
        Command::BlockStatus => {
            Action::BlockStatus { range: within(Errno::Inval)?, one: flags.contains(CommandFlags::REQ_ONE) }
        }
        Command::Disc => Action::Disconnect,
        Command::Other(_) => return refuse(Errno::Inval, "unknown command"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Cookie;

    const SIZE: u64 = 1000;

    fn negotiated(structured_replies: bool) -> Negotiated {
        Negotiated { export_name: String::new(), structured_replies, base_allocation: structured_replies }
    }

    fn check(command: Command, flags: CommandFlags, offset: u64, length: u32) -> Result<Action, Errno> {
        let request = Request { flags, command, cookie: Cookie(1), offset, length };
        validate(&request, SIZE, &negotiated(true)).map_err(|refused| refused.errno)
    }

    #[test]
    fn ranges_beyond_the_end_get_the_error_of_their_command() {
        for (command, errno) in [
            (Command::Read, Errno::Inval),
            (Command::Write, Errno::NoSpc),
            (Command::WriteZeroes, Errno::NoSpc),
            (Command::Trim, Errno::Inval),
            (Command::Cache, Errno::Inval),
            (Command::BlockStatus, Errno::Inval),
        ] {
            assert!(check(command, CommandFlags::NONE, 990, 10).is_ok(), "{command:?}");
            assert_eq!(check(command, CommandFlags::NONE, 990, 11), Err(errno), "{command:?}");
            assert_eq!(check(command, CommandFlags::NONE, u64::MAX, 10), Err(errno), "{command:?}");
        }
    }

    #[test]
    fn flags_are_allowed_where_they_mean_something() {
        assert!(check(Command::Read, CommandFlags::DF.union(CommandFlags::FUA), 0, 1).is_ok());
        assert_eq!(check(Command::Write, CommandFlags::DF, 0, 1), Err(Errno::Inval));
        assert_eq!(check(Command::Read, CommandFlags(1 << 15), 0, 1), Err(Errno::Inval));
        assert_eq!(
            check(Command::WriteZeroes, CommandFlags::NO_HOLE, 1, 2),
            Ok(Action::WriteZeroes { range: 1..3, allocate: true })
        );
        let plain = Request {
            flags: CommandFlags::DF,
            command: Command::Read,
            cookie: Cookie(1),
            offset: 0,
            length: 1,
        };
        assert!(validate(&plain, SIZE, &negotiated(false)).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_invalid() {
        assert_eq!(check(Command::Other(77), CommandFlags::NONE, 0, 0), Err(Errno::Inval));
        assert_eq!(check(Command::Flush, CommandFlags::NONE, 1, 0), Err(Errno::Inval));
        assert_eq!(check(Command::BlockStatus, CommandFlags::NONE, 0, 0), Err(Errno::Inval));
        assert_eq!(check(Command::Read, CommandFlags::NONE, 0, MAX_PAYLOAD + 1), Err(Errno::Overflow));
        assert_eq!(check(Command::Write, CommandFlags::NONE, 0, MAX_PAYLOAD + 1), Err(Errno::Inval));
        assert_eq!(
            check(Command::Read, CommandFlags::NONE, 1000, 0),
            Ok(Action::Read { range: 1000..1000, dont_fragment: false })
        );
    }

    #[test]
    fn every_kind_of_failure_has_its_error_on_the_wire() {
        for (kind, errno) in [
            (ErrorKind::Invalid, Errno::Inval),
            (ErrorKind::Protocol, Errno::Inval),
            (ErrorKind::NotFound, Errno::Io),
            (ErrorKind::Io, Errno::Io),
            (ErrorKind::InUse, Errno::Io),
            (ErrorKind::Denied, Errno::Perm),
            (ErrorKind::OutOfSpace, Errno::NoSpc),
            (ErrorKind::Unsupported, Errno::NotSup),
            (ErrorKind::Shutdown, Errno::Shutdown),
        ] {
            assert_eq!(Refused::from(kind).errno, errno);
        }
    }
}
