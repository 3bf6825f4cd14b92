//! Conversations put together from steps, so that the fuzzer need not find magics and lengths: a handshake that succeeds,
//! then requests whose ranges lie where something may go wrong, and now and then bytes that are no request.
//!
//! ```text
//!   | knobs 1 | cuts 2 | beginning 1 | step 8 | step 8 | ...
//!   beginning    bits 0-2 the device, bit 3 EXPORT_NAME instead of GO, bit 4 no structured replies, bit 5 no context,
//!                bit 6 options that are refused before, bit 7 extended headers
//!   step         | kind 1 | flags 1 | offset 2 | length 2 | fill 1 | twist 1 |
//! ```
//!
//! What becomes of it is checked as for [`super::conversation`].

use memdev::proto::{
    ClientFlags, Command, CommandFlags, Cookie, InfoPayload, META_CONTEXT_BASE_ALLOCATION,
    META_CONTEXT_MEMDEV_DIRTY, MetaContextPayload, OptionCode, OptionHeader, StatusPayload,
};

use super::conversation::plan::{Ask, Encoding};
use super::conversation::{Disk, converse};

/// Numbers of metadata contexts: of those there are, and of one that there is not.
const CONTEXTS: [u32; 3] = [META_CONTEXT_BASE_ALLOCATION, META_CONTEXT_MEMDEV_DIRTY, 77];

/// Bytes of one step.
const STEP: usize = 8;
/// Steps that are taken, at most.
const MOST_STEPS: usize = 64;
/// Bytes of payload in one conversation, at most.
const MOST_PAYLOAD: u64 = 2 << 20;

/// One input.
pub fn body(data: &[u8]) {
    let Some((&[knobs, cut_high, cut_low, beginning], steps)) = data.split_first_chunk::<4>() else { return };
    let disk = Disk::ALL[usize::from(beginning & 7) % Disk::ALL.len()];
    let mut client = begin(beginning, disk);
    let mut payload = 0;
    for (number, step) in steps.as_chunks::<STEP>().0.iter().take(MOST_STEPS).enumerate() {
        let form = if beginning & 0x80 == 0 { Encoding::Compact } else { Encoding::Extended };
        append(&mut client, (step, number as u64), form, disk, &mut payload);
    }
    converse(knobs, u16::from_be_bytes([cut_high, cut_low]), &client);
}

/// A handshake by which a client gets to the device.
fn begin(form: u8, disk: Disk) -> Vec<u8> {
    let mut client = ClientFlags::FIXED_NEWSTYLE.bits().to_be_bytes().to_vec();
    let mut option = |option, payload: &[u8]| {
        let length = u32::try_from(payload.len()).expect("short options");
        client.extend_from_slice(&OptionHeader { option, length }.encode());
        client.extend_from_slice(payload);
    };
    if form & 0x40 != 0 {
        option(OptionCode::StartTls, &[]);
        option(OptionCode::Info, &InfoPayload::build("none", &[]));
        option(OptionCode::Other(99), b"what is this?");
    }
    if form & 0x10 == 0 {
        option(OptionCode::StructuredReply, &[]);
    }
    if form & 0x80 != 0 {
        option(OptionCode::ExtendedHeaders, &[]);
    }
    if form & 0x20 == 0 {
        let queries = ["base:allocation", "memdev:dirty"];
        option(OptionCode::SetMetaContext, &MetaContextPayload::build(disk.name(), &queries));
    }
    if form & 0x08 == 0 {
        option(OptionCode::Go, &InfoPayload::build(disk.name(), &[]));
    } else {
        option(OptionCode::ExportName, disk.name().as_bytes());
    }
    client
}

fn append(
    client: &mut Vec<u8>,
    (step, number): (&[u8; STEP], u64),
    form: Encoding,
    disk: Disk,
    spent: &mut u64,
) {
    let [kind, flags, offset_high, offset_low, length_high, length_low, fill, twist] = *step;
    let command = match kind % 16 {
        0..=3 => Command::Read,
        4..=8 => Command::Write,
        9 => Command::Trim,
        10 | 11 => Command::WriteZeroes,
        12 => Command::BlockStatus,
        13 => Command::Cache,
        14 => Command::Flush,
        _ if kind == 0xff => Command::Disc,
        _ => Command::Other(u16::from(kind)),
    };
    let size = disk.size();
    let is_flush = command == Command::Flush && twist & 0x80 == 0;
    let offset = if is_flush { 0 } else { place(u16::from_be_bytes([offset_high, offset_low]), size) };
    let mut length = if is_flush { 0 } else { extent(u16::from_be_bytes([length_high, length_low]), size) };
    // Beyond the end only when asked for: such requests end there.
    if twist & 0x40 == 0 && offset <= size {
        length = length.min(size - offset);
    }
    if command == Command::Write {
        length = length.min(MOST_PAYLOAD - *spent);
        *spent += length;
    }
    let mut ask = Ask {
        flags: CommandFlags(match flags % 16 {
            0..=7 => 0,
            8 => CommandFlags::FUA.bits(),
            9 => CommandFlags::NO_HOLE.bits(),
            10 => CommandFlags::DF.bits(),
            11 => CommandFlags::REQ_ONE.bits(),
            12 => CommandFlags::FAST_ZERO.bits() | CommandFlags::NO_HOLE.bits(),
            13 => CommandFlags::DF.bits() | CommandFlags::FUA.bits(),
            14 => CommandFlags::PAYLOAD_LEN.bits(),
            _ => 1 << (flags >> 4),
        }),
        command,
        // Also cookies that are not unique, which is the client's own affair.
        cookie: Cookie(if twist & 0x20 == 0 { number } else { 7 }),
        offset,
        length,
    };
    let at = client.len();
    let has_payload = form == Encoding::Extended && ask.flags.contains(CommandFlags::PAYLOAD_LEN);
    if has_payload && command == Command::BlockStatus {
        // Some contexts, in any order, some of them twice.
        let contexts: Vec<u32> =
            (0..fill & 3).map(|n| CONTEXTS[usize::from(fill >> (2 + 2 * n)) % 3]).collect();
        let payload = StatusPayload::build(length, &contexts);
        ask.length = payload.len() as u64;
        client.extend_from_slice(&form.encode(&ask));
        client.extend_from_slice(&payload);
        return;
    }
    client.extend_from_slice(&form.encode(&ask));
    if command == Command::Write || (has_payload && length < 10_000) {
        let length = usize::try_from(length).expect("a small payload");
        // Zero blocks, blocks of one byte, and blocks that differ in every byte.
        match fill {
            0 => client.resize(client.len() + length, 0),
            1..0x80 => client.resize(client.len() + length, fill),
            _ => client
                .extend((0..length).map(|at| fill.wrapping_mul(u8::try_from(at % 256).unwrap_or(0)) ^ fill)),
        }
    }
    // Now and then a wrong bit, or a payload that is too short.
    match twist & 0x1f {
        0x1f => client[at + usize::from(fill) % form.header_size()] ^= 1 << (flags & 7),
        0x1e => client.truncate(client.len().saturating_sub(usize::from(fill)).max(at)),
        _ => {}
    }
}

/// A place on a device: near a border of blocks, of leaves, of what is there.
fn place(choice: u16, size: u64) -> u64 {
    let [anchor, near] = choice.to_be_bytes();
    let anchor = match anchor % 16 {
        0 => 0,
        1 => 512 * 4096,
        2 => 2 * 512 * 4096,
        3 => size,
        4 => size / 2,
        5 => 6 * 4096,
        6 => u64::MAX,
        7 => size.saturating_sub(4096),
        anchor => u64::from(anchor) * 4096,
    };
    let blocks = u64::from(near >> 5) * 4096;
    // From 15 bytes before to 16 bytes behind.
    (anchor.wrapping_add(blocks).wrapping_add(u64::from(near & 31))).wrapping_sub(if near & 31 > 16 {
        32
    } else {
        0
    })
}

/// A length: of nothing, of a few bytes, of about some blocks, of everything.
fn extent(choice: u16, size: u64) -> u64 {
    let [kind, count] = choice.to_be_bytes();
    let count = u64::from(count);
    match kind % 8 {
        0 => count,
        1 => 512 * (1 + count % 16),
        2 => 4096 * (1 + count % 8),
        3 => (4096 * (1 + count % 8)).wrapping_sub(1 + count / 8),
        4 => 4096 * (1 + count % 8) + 1 + count / 8,
        5 => 4096 * (1 + count),
        6 => size,
        _ => (count << 24) | count,
    }
}
