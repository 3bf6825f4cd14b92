//! What a client's bytes ask for, read once, as a whole, by the letter of the specification: an opinion of the
//! transmission phase that owes nothing to the code under test but the names of commands and flags.

use std::ops::Range;

use memdev::handshake::Negotiated;
use memdev::proto::{Command, CommandFlags, Cookie, Errno, ExtendedRequest, Request};
use memdev::transmission::MAX_PAYLOAD;

use super::world::Disk;

/// Bytes that one conversation may have looked at, read, written and zeroed: beyond it, the client is cut off.
const MOST_WORK: u64 = 6 << 20;
/// What a request costs whatever it asks for.
const LEAST_WORK: u64 = 512;

/// How requests are laid out on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// 28 bytes, with a length of 32 bits.
    Compact,
    /// 32 bytes, with a length of 64 bits, which may be that of a payload.
    Extended,
}

impl Encoding {
    /// What was agreed on.
    pub(crate) fn of(negotiated: &Negotiated) -> Self {
        if negotiated.extended_headers { Self::Extended } else { Self::Compact }
    }

    /// Bytes of a header.
    pub(crate) fn header_size(self) -> usize {
        match self {
            Self::Compact => Request::SIZE,
            Self::Extended => ExtendedRequest::SIZE,
        }
    }

    /// The place of the cookie in a header.
    fn cookie(self) -> Range<usize> {
        match self {
            Self::Compact | Self::Extended => 8..16,
        }
    }

    /// Reads a header of the right size; nothing when its magic is wrong.
    fn decode(self, header: &[u8]) -> Option<Ask> {
        match self {
            Self::Compact => Request::parse(header.try_into().ok()?).ok().map(Ask::from),
            Self::Extended => ExtendedRequest::parse(header.try_into().ok()?).ok(),
        }
    }

    /// Writes a header. A length that has no room in it is cut off.
    pub(crate) fn encode(self, ask: &Ask) -> Vec<u8> {
        match self {
            Self::Compact => {
                let Ask { flags, command, cookie, offset, length } = *ask;
                let length = u32::try_from(length & 0xffff_ffff).expect("32 bits");
                Request { flags, command, cookie, offset, length }.encode().to_vec()
            }
            Self::Extended => ask.encode().to_vec(),
        }
    }

    /// Bytes of payload behind a header.
    fn payload(self, ask: &Ask) -> u64 {
        let is_told = self == Self::Extended && ask.flags.contains(CommandFlags::PAYLOAD_LEN);
        if is_told || ask.command == Command::Write { ask.length } else { 0 }
    }
}

/// What a request asks for, whatever its header looked like.
pub(crate) type Ask = ExtendedRequest;

/// One request of a conversation.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) ask: Ask,
    /// The range it is about; of no meaning when it is not valid.
    pub(crate) range: Range<u64>,
    /// The metadata contexts that it wants to know of.
    pub(crate) contexts: Vec<u32>,
    /// Its bytes on the wire, header and payload, as far as they come.
    pub(crate) wire: Range<usize>,
    /// Its payload, as far as it comes.
    pub(crate) payload: Range<usize>,
    /// Whether all of it comes. If not, it is never answered.
    pub(crate) is_whole: bool,
    /// Whether it is valid, or else the error it must get.
    pub(crate) verdict: Result<(), Errno>,
}

/// All requests of a conversation.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The bytes to send.
    pub(crate) wire: Vec<u8>,
    /// The requests in them that are acted on, all but a goodbye.
    pub(crate) requests: Vec<Planned>,
    /// Whether the stream goes out of step in the end, so that what is still waiting is given up.
    pub(crate) breaks_off: bool,
}

impl Plan {
    /// What `client`, the bytes behind the handshake, asks of `disk`.
    pub(crate) fn read(client: &[u8], disk: Disk, negotiated: &Negotiated) -> Self {
        let encoding = Encoding::of(negotiated);
        let mut plan = Self { wire: client.to_vec(), requests: Vec::new(), breaks_off: false };
        let (mut at, mut work) = (0, 0);
        while let Some(header) = client.get(at..at + encoding.header_size()) {
            let Some(mut ask) = encoding.decode(header) else {
                plan.breaks_off = true;
                return plan;
            };
            if ask.command == Command::Disc {
                return plan;
            }
            work += LEAST_WORK + if ask.length <= disk.size() { ask.length } else { 0 };
            if work > MOST_WORK {
                plan.wire.truncate(at);
                return plan;
            }
            if disk.reorders() {
                // Answers are told apart by their cookies alone.
                ask.cookie = Cookie(ask.cookie.0 << 32 | plan.requests.len() as u64);
                let place = encoding.cookie();
                plan.wire[at + place.start..at + place.end].copy_from_slice(&ask.cookie.0.to_be_bytes());
            }
            let start = at + encoding.header_size();
            if encoding == Encoding::Extended && encoding.payload(&ask) > u64::from(MAX_PAYLOAD) {
                // Too much to be drained, and nothing else is left: it is hung up on.
                return plan;
            }
            let wanted = usize::try_from(encoding.payload(&ask)).unwrap_or(usize::MAX);
            let payload = start..start.saturating_add(wanted).min(client.len());
            at = payload.end;
            let is_whole = payload.len() == wanted;
            let mut contexts = negotiated.contexts.iter().map(|context| context.on_the_wire().id).collect();
            let (mut length, mut verdict) = (ask.length, verdict(&ask, disk.size(), negotiated));
            if ask.command == Command::BlockStatus && encoding.payload(&ask) > 0 && verdict.is_ok() {
                (length, verdict) = chosen(&client[payload.clone()], &mut contexts);
            }
            let range = ask.offset..ask.offset.saturating_add(length);
            if ask.command == Command::BlockStatus && (length == 0 || range.end > disk.size()) {
                verdict = verdict.and(Err(Errno::Inval));
            }
            let wire = start - encoding.header_size()..at;
            plan.requests.push(Planned { ask, range, contexts, wire, payload, is_whole, verdict });
            if !is_whole {
                break;
            }
        }
        plan
    }
}

/// Whether a request is valid, by docs/protocol.md; for block status, but for its range.
fn verdict(ask: &Ask, size: u64, negotiated: &Negotiated) -> Result<(), Errno> {
    let Negotiated { structured_replies: chunks, extended_headers: extended, contexts, .. } = negotiated;
    let (known, beyond) = match ask.command {
        Command::Read => (if *chunks { CommandFlags::DF } else { CommandFlags::NONE }, Errno::Inval),
        Command::Write => (CommandFlags::NONE, Errno::NoSpc),
        Command::WriteZeroes => (CommandFlags::NO_HOLE.union(CommandFlags::FAST_ZERO), Errno::NoSpc),
        Command::BlockStatus => (CommandFlags::REQ_ONE, Errno::Inval),
        Command::Flush | Command::Trim | Command::Cache => (CommandFlags::NONE, Errno::Inval),
        _ => return Err(Errno::Inval),
    };
    let takes_payload = *extended && matches!(ask.command, Command::Write | Command::BlockStatus);
    let known = known.union(if takes_payload { CommandFlags::PAYLOAD_LEN } else { CommandFlags::NONE });
    let unknown = ask.flags.bits() & !known.bits() & !CommandFlags::FUA.bits();
    let has_data = matches!(ask.command, Command::Read | Command::Write);
    let ends = ask.offset.checked_add(ask.length);
    if unknown != 0 {
        Err(Errno::Inval)
    } else if has_data && ask.length > u64::from(MAX_PAYLOAD) {
        Err(if *chunks && ask.command == Command::Read { Errno::Overflow } else { Errno::Inval })
    } else if ask.command == Command::Flush {
        if ask.offset == 0 && ask.length == 0 { Ok(()) } else { Err(Errno::Inval) }
    } else if ask.command == Command::BlockStatus {
        if contexts.is_empty() { Err(Errno::Inval) } else { Ok(()) }
    } else if ends.is_none_or(|end| end > size) {
        Err(beyond)
    } else {
        Ok(())
    }
}

/// A payload that says of how many bytes and of which of the selected contexts to tell: a length of 64 bits, then one
/// number at least of 32 bits, none of them twice.
fn chosen(payload: &[u8], contexts: &mut Vec<u32>) -> (u64, Result<(), Errno>) {
    let Some((length, numbers)) = payload.split_first_chunk() else { return (0, Err(Errno::Inval)) };
    let (numbers, rest) = numbers.as_chunks();
    let numbers: Vec<u32> = numbers.iter().map(|number| u32::from_be_bytes(*number)).collect();
    let twice = (1..numbers.len()).any(|at| numbers[..at].contains(&numbers[at]));
    let is_valid = rest.is_empty()
        && !numbers.is_empty()
        && !twice
        && numbers.iter().all(|number| contexts.contains(number));
    contexts.retain(|known| numbers.contains(known));
    (u64::from_be_bytes(*length), if is_valid { Ok(()) } else { Err(Errno::Inval) })
}
