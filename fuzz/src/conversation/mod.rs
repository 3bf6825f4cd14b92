//! Whole conversations: all that a client says, from its flags to its goodbye, to the handshake and then the transmission
//! phase, on a small device over a real image, held against a model.
//!
//! ```text
//!   | knobs 1 | cuts 2 | client flags 4 | options ... | requests ... |
//! ```
//!
//! Knobs: bit 0 withholds structured replies, bit 1 the flag NO_ZEROES, bit 3 extended headers; bit 4 offers TLS, bit 5 demands it,
//! and what follows a STARTTLS is taken for what came through it. Cuts: from which the lengths of random pieces
//! follow, and when the image that shrinks does so. Which device it is about says the export's name: see [`world`].
//!
//! The same bytes are said three times: in one piece, request by request, and cut at random. Each time, every byte that
//! comes back must be part of a reply, every request must be answered once, with its cookie, by what the specification
//! wants, and what is read, then and at the end, must be what the model holds. Where nothing may be reordered and no memory
//! is missing, the three must agree to the byte. In the end all memory must have been given back.

mod model;
pub(crate) mod plan;
mod replies;
mod talk;
mod world;

use std::ops::Range;

use memdev::handshake::{Knobs, Negotiated};
use memdev::proto::{
    Command, CommandFlags, Cookie, DIRTY_WRITTEN, DIRTY_ZERO, Errno, META_CONTEXT_MEMDEV_DIRTY, STATE_ZERO,
};

use super::handshake::tls_policy;
use model::Model;
use plan::{Ask, Plan, Planned};
use replies::Answer;
use talk::{Beginning, Cut, Greeted, Lengths, Manner, Replies, greet, transmit};
pub(crate) use world::Disk;
use world::{BLOCK, World};

/// One input.
pub fn body(data: &[u8]) {
    let Some((&[knobs, cut_high, cut_low], client)) = data.split_first_chunk::<3>() else { return };
    converse(knobs, u16::from_be_bytes([cut_high, cut_low]), client);
}

/// A client that says `client`, three times.
pub(crate) fn converse(knobs: u8, seed: u16, client: &[u8]) {
    let knobs = Knobs {
        structured_replies: knobs & 1 == 0,
        handshake_flags_mask: if knobs & 2 == 0 { u16::MAX } else { 1 },
        extended_headers: knobs & 8 == 0,
        tls: tls_policy(knobs),
    };
    World::with(|world| {
        let tears_after = Some(u32::from(seed & 7));
        let once = |cut| {
            let gathers = (cut == Cut::Random).then_some(64 + usize::from(seed >> 3));
            have(world, client, Manner { knobs, cut, gathers, tears_after }, seed)
        };
        let whole = once(Cut::Whole);
        for cut in [Cut::Requests, Cut::Random] {
            let (beginning, replies) = once(cut);
            assert_eq!(beginning, whole.0, "the handshake, cut {cut:?}");
            let Greeted::Ready(disk, ..) = beginning.greeted else { continue };
            if disk.is_indifferent_to_cuts() {
                assert!(replies == whole.1, "the replies, cut {cut:?}, differ from those to one piece");
            }
        }
    });
}

/// One conversation from its first byte to its last, checked by itself.
fn have(world: &World, client: &[u8], manner: Manner, seed: u16) -> (Beginning, Option<Replies>) {
    world.begin();
    let mut lengths = Lengths::new(seed);
    let (beginning, attachment) = greet(world, client, manner, &mut lengths);
    let mut talked = None;
    if let (Greeted::Ready(disk, _, negotiated), Some(attachment)) = (&beginning.greeted, attachment) {
        let plan = Plan::read(&client[beginning.taken..], *disk, negotiated);
        let replies = transmit(world, (*disk, attachment), negotiated.clone(), &plan, manner, &mut lengths);
        let exact = !disk.reorders() || manner.cut == Cut::Requests;
        let mut model = Model::new(world.content(*disk), exact);
        judge(&plan, *disk, negotiated, &replies, &mut model);
        look_again(world, *disk, &mut model);
        talked = Some(replies);
    }
    world.end();
    (beginning, talked)
}

/// Holds the answers against the requests, and both against the model.
fn judge(plan: &Plan, disk: Disk, negotiated: &Negotiated, replies: &Replies, model: &mut Model<'_>) {
    let mut waiting: Vec<&Planned> = plan.requests.iter().filter(|request| request.is_whole).collect();
    if !model.is_exact() {
        // Whatever may be written may be read, from the first answer to the last.
        plan.requests.iter().for_each(|request| apply(plan, request, false, model));
    }
    let mut rest = &replies.bytes[..];
    while !rest.is_empty() {
        let find = |waiting: &[&Planned], cookie: Cookie| {
            let at = if disk.reorders() {
                waiting.iter().position(|request| request.ask.cookie == cookie)
            } else {
                waiting.first().is_some_and(|request| request.ask.cookie == cookie).then_some(0)
            };
            at.unwrap_or_else(|| panic!("{cookie:?} is of no request, or not of the next, or answered twice"))
        };
        let Some(answer) = replies::next(&mut rest, negotiated, |cookie| waiting[find(&waiting, cookie)])
        else {
            assert!(replies.is_lost, "half a reply");
            break;
        };
        let request = waiting.remove(find(&waiting, Cookie(answer.cookie)));
        check(request, &answer, disk, model);
        if model.is_exact() {
            let is_done = answer.error.is_none();
            if is_done || request.verdict.is_ok() {
                apply(plan, request, is_done, model);
            }
        }
    }
    // Who is hung up on, or out of step, gets no more answers; what then waited for pages is given up.
    let may_be_left = replies.is_lost || (plan.breaks_off && disk.reorders());
    assert!(waiting.is_empty() || may_be_left, "{} requests are not answered: {waiting:?}", waiting.len());
    if model.is_exact() {
        let unanswered = waiting.into_iter().chain(plan.requests.iter().filter(|request| !request.is_whole));
        unanswered.for_each(|request| apply(plan, request, false, model));
    }
}

/// Whether a valid request may fail, with this error.
fn may_fail(request: &Planned, error: u32, disk: Disk) -> bool {
    match disk {
        Disk::Tight => {
            let takes_memory = matches!(request.ask.command, Command::Write | Command::WriteZeroes);
            error == Errno::NoSpc.to_wire() && takes_memory
        }
        // A write needs what it leaves of its blocks.
        Disk::Torn => error == Errno::Io.to_wire() && request.range.end.next_multiple_of(BLOCK) > disk.edge(),
        _ => false,
    }
}

/// One answer against its request, and against what the device held when it was done.
fn check(request: &Planned, answer: &Answer, disk: Disk, model: &mut Model<'_>) {
    let ask = &request.ask;
    match (request.verdict, answer.error) {
        (Err(errno), error) => return assert_eq!(error, Some(errno.to_wire()), "{ask:?}"),
        (Ok(()), Some(error)) => {
            return assert!(may_fail(request, error, disk), "{ask:?} fails with {error}");
        }
        (Ok(()), None) => {}
    }
    model.check(ask.offset, &answer.data);
    for (context, extents) in &answer.extents {
        let mut at = ask.offset;
        assert!(!extents.is_empty());
        assert!(!ask.flags.contains(CommandFlags::REQ_ONE) || extents.len() == 1);
        for (length, flags) in extents {
            let end = at + length;
            assert!(end <= request.range.end, "extents reach beyond what was asked for");
            check_extent(*context, at..end, *flags, model);
            at = end;
        }
    }
}

/// What a metadata context says about a range, against what the device held.
fn check_extent(context: u32, range: Range<u64>, flags: u64, model: &Model<'_>) {
    let (written, zero) = if context == META_CONTEXT_MEMDEV_DIRTY {
        (Some(flags & u64::from(DIRTY_WRITTEN) != 0), DIRTY_ZERO)
    } else {
        (None, STATE_ZERO)
    };
    if flags & u64::from(zero) != 0 {
        model.check_zero(range.clone());
    }
    match written {
        Some(true) => model.check_written(range),
        Some(false) => model.check_unwritten(range),
        None => {}
    }
}

/// Does to the model what a request does to the device.
fn apply(plan: &Plan, request: &Planned, is_done: bool, model: &mut Model<'_>) {
    let ask = &request.ask;
    if request.verdict.is_err() {
        return;
    }
    match ask.command {
        Command::Write => {
            let data = &plan.wire[request.payload.clone()];
            let range = ask.offset..ask.offset + data.len() as u64;
            model.change(range, is_done, |at, part| part.copy_from_slice(&data[at..at + part.len()]));
        }
        Command::WriteZeroes => model.zero(request.range.clone(), is_done),
        // A hint: where there is no memory to note it, nothing happens.
        Command::Trim => model.trim(request.range.clone(), is_done),
        _ => {}
    }
}

/// Blocks that are read at the end, at most, from either end of those that were touched.
const MOST_LOOKED_AT: usize = 200;

/// Reads what was touched, and its neighbours, over another connection to the same session.
fn look_again(world: &World, disk: Disk, model: &mut Model<'_>) {
    let last = disk.size().div_ceil(BLOCK) - 1;
    let mut blocks: Vec<u64> = model.touched().take(MOST_LOOKED_AT).collect();
    blocks.extend(model.touched().rev().take(MOST_LOOKED_AT));
    blocks
        .extend(blocks.clone().into_iter().flat_map(|block| [block.saturating_sub(1), last.min(block + 1)]));
    blocks.sort_unstable();
    blocks.dedup();
    let plain = Negotiated::default();
    let encoding = plan::Encoding::of(&plain);
    let reads = blocks.chunk_by(|a, b| a + 1 == *b).map(|run| {
        let (start, end) = (run[0] * BLOCK, ((run[0] + run.len() as u64) * BLOCK).min(disk.size()));
        let (flags, command, cookie) = (CommandFlags::NONE, Command::Read, Cookie(start));
        encoding.encode(&Ask { flags, command, cookie, offset: start, length: end - start })
    });
    let plan = Plan::read(&reads.collect::<Vec<_>>().concat(), disk, &plain);
    let manner = Manner { knobs: Knobs::default(), cut: Cut::Requests, gathers: None, tears_after: None };
    let attachment = (disk, world.attach(disk));
    let replies = transmit(world, attachment, plain.clone(), &plan, manner, &mut Lengths::new(0));
    judge(&plan, disk, &plain, &replies, model);
}
