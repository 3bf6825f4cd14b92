//! Doing what a valid request asks for.
//!
//! A read first makes sure that it will not wait for a disk, and that the base still has what it is about to promise:
//! a file that was truncated is found out here, where an error can still be replied, and not in the middle of a reply.

use super::reply::Asked;
use super::validate::Action;
use super::{Aside, Context, Job, Need, Output, Transmission, status};
use crate::cow::{Device, Piece, Remainder};
use crate::error::ErrorKind;
use crate::overlay::{LongRead, Outcome};
use crate::proto::REPLY_FLAG_DONE;
use crate::session::Count;
use std::ops::Range;

/// Bytes of a read that are queued before others have a turn.
const READ_SLICE: u64 = 1 << 20;
/// Bytes that are trimmed or zeroed before others have a turn.
const ZERO_SLICE: u64 = 128 << 20;
/// Bytes that are zeroed and given memory before others have a turn.
const ALLOCATE_SLICE: u64 = 4 << 20;
/// Bytes of which one look tells whether they are in memory, before others have a turn.
const CACHE_SLICE: u64 = 128 << 20;

/// A part of a read.
struct Slice<'a> {
    whole: &'a Range<u64>,
    now: Range<u64>,
    dont_fragment: bool,
    view: Option<&'a LongRead>,
}

impl Transmission {
    pub(super) fn act(
        &mut self,
        asked: Asked,
        action: Action,
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) {
        let device = self.attachment.session().device();
        match action {
            Action::Read { range, dont_fragment } => match device.read_needs(&range) {
                Some(cold) => {
                    self.set_aside(Need::Base, cold, Aside::Read { asked, range, dont_fragment }, cx)
                }
                None => self.begin_read(asked, range, dont_fragment, base_length, cx),
            },
            // The caller has its payload, and takes it up itself.
            Action::Write { .. } | Action::ChosenStatus { .. } => {
                asked.fail(ErrorKind::Invalid.into(), cx.output)
            }
            // What is acknowledged is visible to all at once, and there is nothing below to be flushed to.
            Action::Flush => conclude(asked, Ok(()), cx.output),
            Action::Trim { range } => self.job = Some(Job::Trim { asked, left: range }),
            Action::WriteZeroes { range, allocate } => match device.write_needs(&range) {
                Some(cold) => {
                    self.set_aside(Need::Base, cold, Aside::WriteZeroes { asked, range, allocate }, cx)
                }
                None => {
                    let (left, returns) = (range.clone(), device.overlay().returns());
                    self.job = Some(Job::WriteZeroes { asked, whole: range, left, allocate, returns });
                }
            },
            Action::Cache { range } => self.job = Some(Job::Cache { asked, left: range }),
            Action::BlockStatus(query) => status::answer(device, asked, query, cx.output),
            Action::Disconnect => self.over = true,
        }
    }

    /// Goes on with a request whose base pages have come, or cannot come.
    pub(super) fn take_up(
        &mut self,
        aside: Aside,
        readable: bool,
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) {
        let unreadable = || if readable { Ok(()) } else { Err(ErrorKind::Io) };
        match aside {
            Aside::Read { asked, range, dont_fragment } => match unreadable() {
                Ok(()) => self.begin_read(asked, range, dont_fragment, base_length, cx),
                Err(kind) => asked.fail(kind.into(), cx.output),
            },
            Aside::Write { asked, rest } => match unreadable() {
                Ok(()) => self.try_rest(asked, rest, cx),
                Err(kind) => conclude(asked, Err(kind), cx.output),
            },
            Aside::WriteZeroes { asked, range, allocate } => match unreadable() {
                // One edge may be warm now and the other not.
                Ok(()) => self.act(asked, Action::WriteZeroes { range, allocate }, base_length, cx),
                Err(kind) => conclude(asked, Err(kind), cx.output),
            },
            Aside::Cache { asked, left } => match unreadable() {
                Ok(()) => self.job = Some(Job::Cache { asked, left }),
                Err(kind) => asked.fail(kind.into(), cx.output),
            },
        }
    }

    /// Ends a write whose whole blocks are published: the parts of blocks are left.
    pub(super) fn end_write(&mut self, asked: Asked, rest: Remainder, cx: &mut Context<'_>) {
        let device = self.attachment.session().device();
        let cold = rest.fragments.iter().filter_map(|fragment| {
            device.write_needs(&(fragment.offset..fragment.offset + fragment.data.len() as u64))
        });
        if let Some(cold) = cold.reduce(|all, next| all.start.min(next.start)..all.end.max(next.end)) {
            // At most a block at each end of the write: the few granules between them do no harm.
            self.set_aside(Need::Base, cold, Aside::Write { asked, rest }, cx);
        } else {
            self.try_rest(asked, rest, cx);
        }
    }

    /// Ends it, or has what it needs of the session brought in.
    fn try_rest(&mut self, asked: Asked, rest: Remainder, cx: &mut Context<'_>) {
        match self.write_rest(&rest, cx) {
            Err((ErrorKind::Away, part)) => {
                self.set_aside(Need::Blocks(None), part, Aside::Write { asked, rest }, cx);
            }
            result => conclude(asked, result.map_err(|(kind, _)| kind), cx.output),
        }
    }

    /// Writes the parts of blocks; if that fails, says which.
    fn write_rest(&self, rest: &Remainder, cx: &mut Context<'_>) -> Result<(), (ErrorKind, Range<u64>)> {
        let device = self.attachment.session().device();
        for fragment in &rest.fragments {
            device
                .write(fragment.offset, &fragment.data, cx.magazine)
                .map_err(|kind| (kind, fragment.offset..fragment.offset + fragment.data.len() as u64))?;
        }
        // Within a turn: what is found whole here is whole until it is acknowledged.
        if rest.is_torn(device) { Err((ErrorKind::Io, 0..0)) } else { Ok(()) }
    }

    fn begin_read(
        &mut self,
        asked: Asked,
        range: Range<u64>,
        dont_fragment: bool,
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) {
        let next = range.start;
        if range.end - next <= READ_SLICE {
            let slice = Slice { whole: &range, now: range.clone(), dont_fragment, view: None };
            match self.read_slice(asked, slice, base_length, cx) {
                Ok(()) => {}
                Err(ErrorKind::Away) => {
                    self.wait_for(Need::Blocks(None), range.clone(), cx);
                    self.job = Some(Job::Read { asked, whole: range, next, dont_fragment, view: None });
                }
                Err(kind) => asked.fail(kind.into(), cx.output),
            }
            return;
        }
        // A long reply cannot be taken back once it has begun: what all of it needs is looked at before.
        if !self.base_reaches(&range, base_length) {
            return asked.fail(ErrorKind::Io.into(), cx.output);
        }
        // It is done in several turns, between which the session may be rolled back.
        let view = Some(self.attachment.session().device().overlay().begin_long_read());
        let job = Job::Read { asked, whole: range, next, dont_fragment, view };
        self.job = self.work_on(job, base_length, cx);
    }

    /// Whether the base file still has all that a read of `range` takes from it.
    fn base_reaches(&self, range: &Range<u64>, base_length: &mut Option<u64>) -> bool {
        let device = self.attachment.session().device();
        let length = *base_length.get_or_insert_with(|| device.image().length_now());
        length >= device.size() || device.base_end(range) <= length
    }

    /// Does a slice of a job; gives back what is left of it.
    pub(super) fn work_on(
        &mut self,
        job: Job,
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) -> Option<Job> {
        let device = self.attachment.session().device();
        match job {
            Job::Read { asked, whole, next, dont_fragment, view } => {
                // At round offsets, so that chunks end where clients like them to.
                let last = whole.end - next <= READ_SLICE;
                let end = if last { whole.end } else { (next / READ_SLICE + 1) * READ_SLICE };
                let slice = Slice { whole: &whole, now: next..end, dont_fragment, view: view.as_deref() };
                match self.read_slice(asked, slice, base_length, cx) {
                    Ok(()) if end == whole.end => None,
                    Ok(()) => Some(Job::Read { asked, whole, next: end, dont_fragment, view }),
                    Err(ErrorKind::Away) if !std::mem::take(&mut self.is_lost) => {
                        self.wait_for(Need::Blocks(view.clone()), next..end, cx);
                        Some(Job::Read { asked, whole, next, dont_fragment, view })
                    }
                    Err(kind) => {
                        if next == whole.start || (asked.in_chunks() && !dont_fragment) {
                            asked.fail(kind.into(), cx.output);
                        } else {
                            // Data is promised that cannot be had, and there is no way left to say so.
                            self.over = true;
                            self.abandon_waiting();
                        }
                        None
                    }
                }
            }
            Job::Cache { asked, left } => {
                let (now, left) = slice(device, left, CACHE_SLICE);
                if let Some(cold) = device.read_needs(&now) {
                    self.set_aside(Need::Base, cold, Aside::Cache { asked, left }, cx);
                    return None;
                }
                if left.is_empty() {
                    asked.succeed(cx.output);
                    return None;
                }
                Some(Job::Cache { asked, left })
            }
            Job::Trim { asked, left } => {
                let (now, left) = slice(device, without_holes(device, left), ZERO_SLICE);
                device.trim(&now, cx.magazine);
                if left.is_empty() {
                    conclude(asked, Ok(()), cx.output);
                    return None;
                }
                Some(Job::Trim { asked, left })
            }
            Job::WriteZeroes { asked, whole, left, allocate, returns } => {
                if returns != device.overlay().returns() {
                    // What was zeroed may be lost by a rollback since: from the beginning.
                    self.act(asked, Action::WriteZeroes { range: whole, allocate }, base_length, cx);
                    return self.job.take();
                }
                if allocate && self.waits_for_room(cx) {
                    return Some(Job::WriteZeroes { asked, whole, left, allocate, returns });
                }
                let device = self.attachment.session().device();
                let all = left.clone();
                let (now, left) = if allocate {
                    slice(device, left, ALLOCATE_SLICE)
                } else {
                    slice(device, without_holes(device, left), ZERO_SLICE)
                };
                let result = device.write_zeroes(now.clone(), allocate, cx.magazine);
                if result == Err(ErrorKind::Away) && !std::mem::take(&mut self.is_lost) {
                    // Only what its edges keep is needed; it may have come by itself.
                    let edge = device.away_edge(&now).unwrap_or(0..0);
                    self.wait_for(Need::Blocks(None), edge, cx);
                    return Some(Job::WriteZeroes { asked, whole, left: all, allocate, returns });
                }
                if left.is_empty() || result.is_err() {
                    conclude(asked, result, cx.output);
                    return None;
                }
                Some(Job::WriteZeroes { asked, whole, left, allocate, returns })
            }
        }
    }

    /// Queues a part of the reply to a read.
    fn read_slice(
        &mut self,
        asked: Asked,
        slice: Slice<'_>,
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) -> Outcome<()> {
        let Slice { whole, now, dont_fragment, view } = slice;
        let device = self.attachment.session().device();
        let continued = now.start > whole.start;
        let pieces = &mut *cx.pieces;
        let mut base_end = 0;
        let (mut from_base, mut from_overlay, mut from_holes) = (0, 0, 0);
        let read = device.read_in(view, now.clone(), |piece| {
            match &piece {
                Piece::Base { offset, len } => {
                    base_end = base_end.max(offset + *len as u64);
                    from_base += *len as u64;
                }
                Piece::Blocks { len, .. } => from_overlay += *len as u64,
                Piece::Zero { len } => from_holes += *len as u64,
            }
            pieces.push(piece);
        });
        let is_short =
            base_end > 0 && base_end > *base_length.get_or_insert_with(|| device.image().length_now());
        if let Err(kind) = if is_short { Err(ErrorKind::Io) } else { read } {
            for piece in pieces.drain(..) {
                if let Piece::Blocks { run, .. } = piece {
                    device.release(run, cx.magazine);
                }
            }
            return Err(kind);
        }
        let traffic = self.attachment.line().traffic();
        for (source, bytes) in [
            (Count::BytesFromBase, from_base),
            (Count::BytesFromOverlay, from_overlay),
            (Count::BytesFromHoles, from_holes),
        ] {
            if bytes > 0 {
                traffic.add(source, bytes);
            }
        }
        if now.end == whole.end {
            cx.output.note_answer(asked);
        }
        cx.output.put_read(asked, continued, |output| {
            if asked.in_chunks() && !dont_fragment {
                put_chunks(output, asked, &now, now.end == whole.end, pieces);
            } else {
                if !continued {
                    put_one_header(output, asked, whole);
                }
                pieces.drain(..).for_each(|piece| output.put_piece(piece));
            }
        });
        Ok(())
    }
}

/// What goes before the data of a reply to a read that is all in one piece.
fn put_one_header(output: &mut Output, asked: Asked, whole: &Range<u64>) {
    match u32::try_from(whole.end - whole.start) {
        Ok(0) | Err(_) => asked.put_end(output),
        Ok(length) => asked.put_data_header(REPLY_FLAG_DONE, whole.start, length, output),
    }
}

/// Chunks: one for each stretch of data, one for each hole.
fn put_chunks(output: &mut Output, asked: Asked, range: &Range<u64>, last: bool, pieces: &mut Vec<Piece>) {
    if pieces.is_empty() && last {
        return asked.put_end(output);
    }
    let is_hole = |piece: &Piece| matches!(piece, Piece::Zero { .. });
    let mut offset = range.start;
    let mut rest = pieces.drain(..).peekable();
    let mut stretch: Vec<Piece> = Vec::new();
    while let Some(first) = rest.next() {
        let hole = is_hole(&first);
        let mut length = first.len() as u64;
        stretch.push(first);
        while let Some(next) = rest.next_if(|next| is_hole(next) == hole) {
            length += next.len() as u64;
            stretch.push(next);
        }
        let flags = if last && offset + length == range.end { REPLY_FLAG_DONE } else { 0 };
        // A slice is far below 4 GiB.
        let short = u32::try_from(length).unwrap_or(u32::MAX);
        if hole {
            stretch.clear();
            asked.put_hole(flags, offset, short, output);
        } else {
            asked.put_data_header(flags, offset, short, output);
            stretch.drain(..).for_each(|piece| output.put_piece(piece));
        }
        offset += length;
    }
}

/// Answers a request that has no data in its reply.
pub(super) fn conclude(asked: Asked, result: Outcome<()>, output: &mut Output) {
    match result {
        Ok(()) => asked.succeed(output),
        Err(kind) => asked.fail(kind.into(), output),
    }
}

/// Cuts a slice off the front, at the border of a block.
fn slice(device: &Device, range: Range<u64>, most: u64) -> (Range<u64>, Range<u64>) {
    let border = (range.start + most) / most * most;
    debug_assert_eq!(border % device.overlay().block_size().bytes(), 0);
    let middle = border.min(range.end);
    (range.start..middle, middle..range.end)
}

/// What is left of a range that is to read as zeroes, without the holes it begins with: a device of many tebibytes is
/// mostly these, and so takes no more slices than one that is small.
fn without_holes(device: &Device, range: Range<u64>) -> Range<u64> {
    if range.end - range.start <= ZERO_SLICE {
        return range;
    }
    let hole = range.start + device.leading_hole(range.clone());
    // Not into a slice: its other end may be in the midst of a block.
    if hole == range.end { hole..hole } else { range.start.max(hole / ZERO_SLICE * ZERO_SLICE)..range.end }
}
