//! From a request to what is to be done, or to the error it gets: pure, over the request, the export and what was
//! negotiated. Behind this no range is out of bounds and no flag is unknown.

use crate::error::ErrorKind;
use crate::handshake::{ContextSet, KnownContext, Negotiated};
use crate::proto::{Command, CommandFlags, Errno, ExtendedRequest, StatusPayload};
use std::ops::Range;

/// Most bytes of payload, either way: what is advertised as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// What a valid request wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        range: Range<u64>,
        dont_fragment: bool,
    },
    Write {
        range: Range<u64>,
    },
    Flush,
    Trim {
        range: Range<u64>,
    },
    WriteZeroes {
        range: Range<u64>,
        allocate: bool,
    },
    Cache {
        range: Range<u64>,
    },
    BlockStatus(StatusQuery),
    /// Block status whose range and contexts are in a payload of so many bytes, which is on its way.
    ChosenStatus {
        payload: usize,
        one: bool,
    },
    Disconnect,
}

/// What a block status request wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StatusQuery {
    pub(super) range: Range<u64>,
    /// One extent of each context is enough.
    pub(super) one: bool,
    pub(super) contexts: ContextSet,
}

/// The longest payload that says anything sensible about block status: every context once.
pub(super) const MAX_STATUS_PAYLOAD: usize = StatusPayload::size(KnownContext::ALL.len());

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
            // Whoever could have brought it has failed.
            ErrorKind::Away => (Errno::Io, "memory that is on disk cannot be read"),
            ErrorKind::Shutdown | ErrorKind::Elsewhere => (Errno::Shutdown, "server is shutting down"),
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
        Command::Write if negotiated.extended_headers => CommandFlags::PAYLOAD_LEN,
        Command::WriteZeroes => CommandFlags::NO_HOLE.union(CommandFlags::FAST_ZERO),
        Command::BlockStatus if negotiated.extended_headers => {
            CommandFlags::REQ_ONE.union(CommandFlags::PAYLOAD_LEN)
        }
        Command::BlockStatus => CommandFlags::REQ_ONE,
        _ => CommandFlags::NONE,
    };
    own.union(CommandFlags::FUA)
}

/// Bytes that follow the header of a request, whatever becomes of it.
///
/// The extension demands `PAYLOAD_LEN` on every write, but QEMU leaves it out, and sends the payload all the same: a
/// write without it is taken to have one, as nobody could mean anything else.
pub(super) fn payload_length(request: &ExtendedRequest, negotiated: &Negotiated) -> u64 {
    let announced = negotiated.extended_headers && request.flags.contains(CommandFlags::PAYLOAD_LEN);
    if announced || request.command == Command::Write { request.length } else { 0 }
}

/// Decides about a request for an export of `size` bytes.
pub(super) fn validate(
    request: &ExtendedRequest,
    size: u64,
    negotiated: &Negotiated,
) -> Result<Action, Refused> {
    let ExtendedRequest { flags, command, offset, length, .. } = *request;
    if command == Command::Disc {
        return Ok(Action::Disconnect);
    }
    let misplaced = flags.without(allowed_flags(command, negotiated));
    if !misplaced.is_empty() {
        let payload = misplaced == CommandFlags::PAYLOAD_LEN && negotiated.extended_headers;
        return refuse(
            Errno::Inval,
            if payload { "command takes no payload" } else { "unknown command flag" },
        );
    }
    if matches!(command, Command::Read | Command::Write) && length > u64::from(MAX_PAYLOAD) {
        // EOVERFLOW is for reads, and only where structured replies are negotiated.
        let long_reply = command == Command::Read && negotiated.structured_replies;
        let errno = if long_reply { Errno::Overflow } else { Errno::Inval };
        return refuse(errno, "payload is longer than the maximum block size");
    }
    let within = |errno| range_within(offset, length, size, errno);
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
        Command::BlockStatus if negotiated.contexts.is_empty() => {
            return refuse(Errno::Inval, "no metadata context was negotiated");
        }
        Command::BlockStatus if flags.contains(CommandFlags::PAYLOAD_LEN) => {
            // Longer ones name a context twice, or one that there is not.
            let payload = usize::try_from(length).ok().filter(|&payload| payload <= MAX_STATUS_PAYLOAD);
            let Some(payload) = payload else { return Err(BAD_STATUS_PAYLOAD) };
            Action::ChosenStatus { payload, one: flags.contains(CommandFlags::REQ_ONE) }
        }
        Command::BlockStatus => Action::BlockStatus(StatusQuery {
            range: status_range(offset, length, size)?,
            one: flags.contains(CommandFlags::REQ_ONE),
            contexts: negotiated.contexts,
        }),
        Command::Disc => Action::Disconnect,
        Command::Other(_) => return refuse(Errno::Inval, "unknown command"),
    })
}

const BAD_STATUS_PAYLOAD: Refused = Refused {
    errno: Errno::Inval,
    message: "payload is no length and list of metadata contexts that were negotiated, each once",
};

/// Decides about the payload of a block status request for `offset` of an export of `size` bytes.
pub(super) fn validate_status(
    payload: &[u8],
    offset: u64,
    one: bool,
    size: u64,
    negotiated: &Negotiated,
) -> Result<StatusQuery, Refused> {
    let payload = StatusPayload::parse(payload).map_err(|_| BAD_STATUS_PAYLOAD)?;
    let mut contexts = ContextSet::default();
    for id in payload.contexts() {
        let known = KnownContext::from_id(id).filter(|&context| negotiated.contexts.contains(context));
        contexts.insert(known.ok_or(BAD_STATUS_PAYLOAD)?).map_err(|_| BAD_STATUS_PAYLOAD)?;
    }
    Ok(StatusQuery { range: status_range(offset, payload.length, size)?, one, contexts })
}

fn status_range(offset: u64, length: u64, size: u64) -> Result<Range<u64>, Refused> {
    if length == 0 {
        return refuse(Errno::Inval, "block status of nothing");
    }
    range_within(offset, length, size, Errno::Inval)
}

fn range_within(offset: u64, length: u64, size: u64, errno: Errno) -> Result<Range<u64>, Refused> {
    let range = offset.checked_add(length).filter(|&end| end <= size).map(|end| offset..end);
    range.ok_or(Refused { errno, message: "beyond the end of the export" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Cookie;

    const SIZE: u64 = 1000;

    /// With simple replies, with structured ones, with extended headers; the latter two with all contexts.
    fn every_form() -> [Negotiated; 3] {
        let contexts = KnownContext::ALL.into_iter().collect();
        let structured = Negotiated { structured_replies: true, contexts, ..Negotiated::default() };
        let extended = Negotiated { extended_headers: true, ..structured.clone() };
        [Negotiated::default(), structured, extended]
    }

    fn request(command: Command, flags: CommandFlags, offset: u64, length: u64) -> ExtendedRequest {
        ExtendedRequest { flags, command, cookie: Cookie(1), offset, length }
    }

    /// What becomes of a request with compact headers and structured replies.
    fn check(command: Command, flags: CommandFlags, offset: u64, length: u64) -> Result<Action, Errno> {
        let [_, structured, _] = every_form();
        validate(&request(command, flags, offset, length), SIZE, &structured).map_err(|refused| refused.errno)
    }

    /// The same with extended headers.
    fn check_extended(
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Result<Action, Errno> {
        let [_, _, extended] = every_form();
        validate(&request(command, flags, offset, length), SIZE, &extended).map_err(|refused| refused.errno)
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
            if !matches!(command, Command::Read | Command::Write) {
                let end = check_extended(command, CommandFlags::NONE, 990, u64::MAX - 5);
                assert_eq!(end, Err(errno), "{command:?}");
            }
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
        let [simple, ..] = every_form();
        assert!(validate(&request(Command::Read, CommandFlags::DF, 0, 1), SIZE, &simple).is_err());
    }

    #[test]
    fn a_payload_length_is_for_extended_headers_and_where_a_payload_has_a_meaning() {
        let flag = CommandFlags::PAYLOAD_LEN;
        assert_eq!(check(Command::Write, flag, 0, 1), Err(Errno::Inval));
        assert_eq!(check(Command::BlockStatus, flag, 0, 12), Err(Errno::Inval));
        assert_eq!(check_extended(Command::Write, flag, 0, 1), Ok(Action::Write { range: 0..1 }));
        assert_eq!(
            check_extended(Command::Write, CommandFlags::NONE, 0, 1),
            Ok(Action::Write { range: 0..1 })
        );
        for command in [
            Command::Read,
            Command::Flush,
            Command::Trim,
            Command::Cache,
            Command::WriteZeroes,
            Command::Other(77),
        ] {
            assert_eq!(check_extended(command, flag, 0, 1), Err(Errno::Inval), "{command:?}");
        }
        assert_eq!(check_extended(Command::Disc, flag, 0, 1), Ok(Action::Disconnect));
    }

    #[test]
    fn payloads_follow_writes_and_what_says_that_one_follows() {
        let [simple, structured, extended] = every_form();
        let (none, flag) = (CommandFlags::NONE, CommandFlags::PAYLOAD_LEN);
        for negotiated in [&simple, &structured, &extended] {
            assert_eq!(payload_length(&request(Command::Write, none, 0, 7), negotiated), 7);
            assert_eq!(payload_length(&request(Command::Trim, none, 0, 7), negotiated), 0);
        }
        for command in [Command::Write, Command::Trim, Command::BlockStatus, Command::Other(77)] {
            assert_eq!(payload_length(&request(command, flag, 0, 7), &extended), 7, "{command:?}");
        }
        assert_eq!(payload_length(&request(Command::Trim, flag, 0, 7), &structured), 0);
    }

    #[test]
    fn block_status_tells_of_the_contexts_chosen_or_of_all() {
        let [_, structured, extended] = every_form();
        let all = structured.contexts;
        let query = |range, one, contexts| StatusQuery { range, one, contexts };
        assert_eq!(
            check(Command::BlockStatus, CommandFlags::REQ_ONE, 1, 2),
            Ok(Action::BlockStatus(query(1..3, true, all)))
        );
        let flag = CommandFlags::PAYLOAD_LEN;
        assert_eq!(
            check_extended(Command::BlockStatus, flag.union(CommandFlags::REQ_ONE), 1, 16),
            Ok(Action::ChosenStatus { payload: 16, one: true })
        );
        assert_eq!(check_extended(Command::BlockStatus, flag, 1, 20), Err(Errno::Inval));
        assert_eq!(check_extended(Command::BlockStatus, flag, 1, u64::MAX), Err(Errno::Inval));

        let chosen = |length, contexts: &[u32]| {
            validate_status(&StatusPayload::build(length, contexts), 10, false, SIZE, &extended)
        };
        let only = |context| [context].into_iter().collect();
        assert_eq!(chosen(5, &[2]), Ok(query(10..15, false, only(KnownContext::Dirty))));
        assert_eq!(chosen(5, &[1]), Ok(query(10..15, false, only(KnownContext::BaseAllocation))));
        assert_eq!(chosen(5, &[2, 1]), Ok(query(10..15, false, all)));
        for bad in [chosen(5, &[1, 1]), chosen(5, &[3]), chosen(5, &[]), chosen(0, &[1]), chosen(991, &[1])] {
            assert_eq!(bad.unwrap_err().errno, Errno::Inval);
        }
        let partly = Negotiated { contexts: only(KnownContext::Dirty), ..extended.clone() };
        let payload = StatusPayload::build(5, &[1]);
        assert!(validate_status(&payload, 10, false, SIZE, &partly).is_err(), "it was not negotiated");
        assert!(validate_status(&payload[..11], 10, false, SIZE, &extended).is_err());
        let none = Negotiated { contexts: ContextSet::default(), ..extended };
        assert!(validate(&request(Command::BlockStatus, flag, 0, 12), SIZE, &none).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_invalid() {
        assert_eq!(check(Command::Other(77), CommandFlags::NONE, 0, 0), Err(Errno::Inval));
        assert_eq!(check(Command::Flush, CommandFlags::NONE, 1, 0), Err(Errno::Inval));
        assert_eq!(check(Command::BlockStatus, CommandFlags::NONE, 0, 0), Err(Errno::Inval));
        for length in [u64::from(MAX_PAYLOAD) + 1, 1 << 32, u64::MAX] {
            assert_eq!(check_extended(Command::Read, CommandFlags::NONE, 0, length), Err(Errno::Overflow));
            assert_eq!(check(Command::Write, CommandFlags::NONE, 0, length), Err(Errno::Inval));
        }
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
