//! The transmission phase of one connection: requests in, replies out, no I/O of its own.
//!
//! ```text
//!   input ──> header ──> validate ──> act ──────────────> Output (sent by the worker, many replies a call)
//!               │                      ├─ needs cold base pages: set aside, a Warm order goes out, done on its return
//!               │                      └─ takes long (a huge read, trim ..): a Job, done slice by slice
//!               └ payload of a write: what has arrived is taken, the rest is received straight into block memory
//!
//!   replies look as was negotiated: see `reply`
//! ```
//!
//! Requests are acted on in the order they came, but for those set aside, which the specification allows to be
//! answered later. A refused request never takes the stream out of step: the payload of a refused write is thrown
//! away before the next header is looked for.

mod accounts;
mod act;
mod output;
mod reply;
mod status;
mod validate;

pub use output::{Flushed, Output};
pub use validate::MAX_PAYLOAD;

use crate::cow::{Incoming, Piece, Remainder};
use crate::error::ErrorKind;
use crate::handshake::Negotiated;
use crate::limits::{REQUESTS, TURN_BYTES, TURN_REQUESTS, WAITING_REQUESTS};
use crate::overlay::{LongRead, Magazine};
use crate::proto::{BadMagic, Command, ExtendedRequest, Request};
use crate::session::{Attachment, Kind, Reserved, Session};
use crate::sys::KernelSpanMut;
use act::conclude;
use arrayvec::ArrayVec;
use reply::{Asked, Form};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use validate::{Action, MAX_STATUS_PAYLOAD, Refused, payload_length, validate, validate_status};

/// What may be done for a connection before others have a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Requests.
    pub requests: usize,
    /// Bytes of replies, at the end of a request.
    pub bytes: u64,
    /// Slices of long requests, and requests that look at much.
    pub heavy: u32,
}

impl Share {
    /// Of a connection that has its worker for itself: batches as large as pays.
    pub const ALL: Self = Self { requests: usize::MAX, bytes: u64::MAX, heavy: 8 };
    /// Of one among others: some hundred microseconds, after which those are served who want little.
    pub const FAIR: Self = Self { requests: TURN_REQUESTS, bytes: TURN_BYTES, heavy: 1 };
}

/// What must be in memory before a request can be done.
#[derive(Clone, Debug)]
pub enum Need {
    /// Pages of the base.
    Base,
    /// Blocks of the session that are in a file, of what a long read sees if there is one.
    Blocks(Option<Arc<LongRead>>),
    /// Nothing: there must be room for more.
    Room,
}

/// What must be in memory before a request can be done: an order to whoever may wait for a disk.
#[derive(Debug)]
pub struct Warm {
    /// Of what.
    pub need: Need,
    /// Whose.
    pub session: Arc<Session>,
    /// Which bytes of it.
    pub range: Range<u64>,
    /// What to call the order when it is done: see [`Transmission::warmed`].
    pub ticket: u64,
    /// Set when nobody waits for it any more.
    pub cancelled: Arc<AtomicBool>,
}

/// What acting on requests takes from its surroundings.
pub struct Context<'a> {
    /// Free block memory.
    pub magazine: &'a mut Magazine,
    /// Replies.
    pub output: &'a mut Output,
    /// Orders for cold base pages.
    pub orders: &'a mut Vec<Warm>,
    /// Scratch for the read at hand; empty between reads.
    pub pieces: &'a mut Vec<Piece>,
    /// What may be done now.
    pub share: Share,
}

/// Why no more can be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// More input is needed.
    Input,
    /// The output should be sent first.
    Output,
    /// Others should have a turn; then go on.
    Turn,
    /// Requests that were set aside must come back first.
    Waiting,
    /// The next request must wait until then, as its session's caps have it.
    Paced(Instant),
    /// The client said goodbye and everything is answered, or the stream is out of step.
    Over,
}

/// The payload of a request, on its way.
#[derive(Debug)]
enum Payload {
    /// A write's: it goes to its blocks.
    Wanted { asked: Asked, incoming: Incoming },
    /// The request was refused: it goes nowhere.
    Unwanted { left: u64, asked: Asked, refused: Refused },
    /// A block status request's, `size` bytes long: it says what is wanted.
    Status { asked: Asked, one: bool, size: usize, bytes: ArrayVec<u8, MAX_STATUS_PAYLOAD> },
}

/// Something that is done slice by slice.
#[derive(Debug)]
enum Job {
    Read {
        asked: Asked,
        whole: Range<u64>,
        next: u64,
        dont_fragment: bool,
        view: Option<Arc<LongRead>>,
    },
    Trim {
        asked: Asked,
        left: Range<u64>,
    },
    /// `returns` is what the overlay said of itself when `left` was all of it, `whole`.
    WriteZeroes {
        asked: Asked,
        whole: Range<u64>,
        left: Range<u64>,
        allocate: bool,
        returns: u64,
    },
    Cache {
        asked: Asked,
        left: Range<u64>,
    },
}

/// A request that was set aside.
#[derive(Debug)]
enum Aside {
    Read { asked: Asked, range: Range<u64>, dont_fragment: bool },
    Write { asked: Asked, rest: Remainder },
    WriteZeroes { asked: Asked, range: Range<u64>, allocate: bool },
    Cache { asked: Asked, left: Range<u64> },
}

/// The transmission phase of one connection.
#[derive(Debug)]
pub struct Transmission {
    attachment: Attachment,
    negotiated: Negotiated,
    form: Form,
    payload: Option<Payload>,
    job: Option<Job>,
    waiting: Vec<(u64, Aside)>,
    /// What everything waits for: the request at hand cannot be put aside.
    awaited: Option<u64>,
    /// It has come to nothing.
    is_lost: bool,
    /// Those whose pages have come, and whether they could be read.
    back: VecDeque<(Aside, bool)>,
    next_ticket: u64,
    /// Requests in flight, at most.
    most: usize,
    /// For the next request, which waits.
    reserved: Option<Reserved>,
    /// Tells those who carry out its orders that it has ended.
    cancelled: Arc<AtomicBool>,
    /// The last write was a large one: the next probably is, too.
    bulk: bool,
    over: bool,
}

impl Transmission {
    /// Writes from this length on are large: worth receiving straight into their blocks.
    const BULK: u64 = 16 << 10;

    /// The phase that begins when the handshake has ended.
    #[must_use]
    pub fn new(attachment: Attachment, negotiated: Negotiated) -> Self {
        let form = Form::of(&negotiated);
        let Negotiated { export_name, contexts, .. } = &negotiated;
        tracing::debug!(export = export_name, replies = ?form, ?contexts, "negotiated");
        Self {
            attachment,
            form,
            negotiated,
            payload: None,
            job: None,
            waiting: Vec::new(),
            awaited: None,
            is_lost: false,
            back: VecDeque::new(),
            next_ticket: 0,
            most: REQUESTS,
            reserved: None,
            cancelled: Arc::default(),
            bulk: false,
            over: false,
        }
    }

    /// With at most so many requests in flight, one at least: acted on, and their replies not given to the kernel yet.
    #[must_use]
    pub fn with_most_requests(mut self, most: usize) -> Self {
        self.most = most.max(1);
        self
    }

    /// The session it is about.
    #[must_use]
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// Whether to receive little beyond what [`Transmission::payload_spans`] takes, as the next payload would only be
    /// copied from there.
    #[must_use]
    pub fn prefers_small_input(&self) -> bool {
        self.bulk
    }

    /// Acts on `input` as far as possible. Returns the bytes used, and why it stopped.
    pub fn consume(&mut self, input: &[u8], cx: &mut Context<'_>) -> (usize, Pause) {
        let mut used = 0;
        // The base's length is asked for once a batch, when first needed: see `act`.
        let mut base_length = None;
        let (mut heavy, mut begun, waiting) = (0, 0, self.waiting.len());
        let capped = self.attachment.session().pace().is_capped();
        let pause = loop {
            if heavy >= cx.share.heavy || begun >= cx.share.requests || cx.output.queued() >= cx.share.bytes {
                break Pause::Turn;
            }
            if cx.output.is_full() {
                break Pause::Output;
            }
            if self.awaited.is_some() {
                break Pause::Waiting;
            }
            if let Some(job) = self.job.take() {
                heavy += 1;
                if let Some(rest) = self.work_on(job, &mut base_length, cx) {
                    if self.awaited.is_some() {
                        self.job = Some(rest);
                        break Pause::Waiting;
                    }
                    let pause = if matches!(rest, Job::Read { .. }) { Pause::Output } else { Pause::Turn };
                    self.job = Some(rest);
                    break pause;
                }
                continue;
            }
            if let Some((aside, readable)) = self.back.pop_front() {
                self.take_up(aside, readable, &mut base_length, cx);
                continue;
            }
            if matches!(self.payload, Some(Payload::Wanted { .. })) && self.waits_for_room(cx) {
                break Pause::Waiting;
            }
            if let Some(payload) = self.payload.take() {
                used += self.receive(payload, &input[used..], cx);
                if self.payload.is_some() && used == input.len() {
                    break Pause::Input;
                }
                continue;
            }
            if self.over {
                break if self.waiting.is_empty() { Pause::Over } else { Pause::Waiting };
            }
            if self.waiting.len() >= WAITING_REQUESTS.min(self.most) {
                break Pause::Waiting;
            }
            // What was begun in this turn is answered or waits, too; what was answered before has been sent.
            if begun > 0 && begun + waiting >= self.most {
                break Pause::Output;
            }
            let Some((request, rest)) = self.next_request(&input[used..]) else { break Pause::Input };
            let Ok(request) = request else {
                tracing::debug!("request without magic: the stream is out of step");
                self.over = true;
                self.abandon_waiting();
                break Pause::Over;
            };
            if (capped || self.reserved.is_some())
                && let Some(until) = self.must_wait(&request)
            {
                break Pause::Paced(until);
            }
            begun += 1;
            used = input.len() - rest.len();
            heavy += u32::from(request.command == Command::BlockStatus);
            used += self.begin(&request, rest, &mut base_length, cx);
        };
        (used, pause)
    }

    /// Reads the header that `input` begins with, if it is all there; gives what is behind it, too.
    fn next_request<'i>(&self, input: &'i [u8]) -> Option<(Result<ExtendedRequest, BadMagic>, &'i [u8])> {
        if self.form == Form::Extended {
            let (header, rest) = input.split_first_chunk()?;
            Some((ExtendedRequest::parse(header), rest))
        } else {
            let (header, rest) = input.split_first_chunk()?;
            Some((Request::parse(header).map(ExtendedRequest::from), rest))
        }
    }

    /// Until when the request must wait, as its session's caps have it.
    fn must_wait(&mut self, request: &ExtendedRequest) -> Option<Instant> {
        let session = self.attachment.session();
        let bytes = match validate(request, session.device().size(), &self.negotiated) {
            Ok(Action::Read { range, .. } | Action::Write { range }) => range.end - range.start,
            // What waits before it has waited.
            Ok(Action::Disconnect) => return None,
            _ => 0,
        };
        session.pace().ask(bytes, &mut self.reserved, Instant::now())
    }

    /// Decides about a request and acts on it; returns the bytes of `rest`, what came behind its header, that it used.
    fn begin(
        &mut self,
        request: &ExtendedRequest,
        rest: &[u8],
        base_length: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) -> usize {
        let kind = match request.command {
            Command::Read => Kind::Read,
            Command::Write => Kind::Write,
            _ => Kind::Other,
        };
        let began = cx.output.now();
        let asked = Asked { form: self.form, cookie: request.cookie, offset: request.offset, kind, began };
        let payload = payload_length(request, &self.negotiated);
        if self.form == Form::Extended && payload > u64::from(MAX_PAYLOAD) {
            tracing::debug!(payload, "payload is longer than any may be: hanging up");
            self.over = true;
            return 0;
        }
        self.bulk = request.command == Command::Write && request.length >= Self::BULK;
        let action = validate(request, self.attachment.session().device().size(), &self.negotiated);
        if let Ok(action) = &action {
            accounts::count(self.attachment.line().traffic(), action);
        }
        match action {
            Ok(Action::Write { range }) => return self.begin_write(asked, range, rest, cx),
            Ok(Action::ChosenStatus { payload: size, one }) => {
                self.payload = Some(Payload::Status { asked, one, size, bytes: ArrayVec::new() });
            }
            Ok(action) => self.act(asked, action, base_length, cx),
            Err(refused) if payload > 0 => {
                self.payload = Some(Payload::Unwanted { left: payload, asked, refused });
            }
            Err(refused) => asked.fail(refused, cx.output),
        }
        0
    }

    /// A write: at once where the payload is there already, else its payload is waited for.
    fn begin_write(&mut self, asked: Asked, range: Range<u64>, rest: &[u8], cx: &mut Context<'_>) -> usize {
        let device = self.attachment.session().device();
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        match rest.get(..length) {
            Some(payload) if device.write_needs(&range).is_none() && !device.overlay().is_short() => {
                match device.write(range.start, payload, cx.magazine) {
                    // As a write whose payload is still to come, whose edges can wait for what they need.
                    Err(ErrorKind::Away) => {
                        self.payload = Some(Payload::Wanted { asked, incoming: Incoming::new(range) });
                        0
                    }
                    result => {
                        conclude(asked, result, cx.output);
                        length
                    }
                }
            }
            _ => {
                self.payload = Some(Payload::Wanted { asked, incoming: Incoming::new(range) });
                0
            }
        }
    }

    /// The memory that the next bytes of the payload belong in, if one is on its way.
    pub fn payload_spans(&mut self) -> impl Iterator<Item = KernelSpanMut<'_>> {
        let device = self.attachment.session().device();
        let incoming = match &mut self.payload {
            Some(Payload::Wanted { incoming, .. }) => Some(incoming),
            _ => None,
        };
        incoming.into_iter().flat_map(|incoming| incoming.spans(device))
    }

    /// Notes that `count` bytes were received into [`Transmission::payload_spans`].
    pub fn payload_received(&mut self, count: u64) {
        if let Some(Payload::Wanted { incoming, .. }) = &mut self.payload {
            incoming.advance(count);
        }
    }

    /// Takes up the payload; returns how much of `input` belonged to it. It stays if more is to come.
    fn receive(&mut self, payload: Payload, input: &[u8], cx: &mut Context<'_>) -> usize {
        let device = self.attachment.session().device();
        match payload {
            Payload::Unwanted { left, asked, refused } => {
                let used = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                match left - used as u64 {
                    0 => asked.fail(refused, cx.output),
                    left => self.payload = Some(Payload::Unwanted { left, asked, refused }),
                }
                used
            }
            Payload::Status { asked, one, size, mut bytes } => {
                let used = (size - bytes.len()).min(input.len());
                bytes.extend(input[..used].iter().copied());
                if bytes.len() < size {
                    self.payload = Some(Payload::Status { asked, one, size, bytes });
                    return used;
                }
                match validate_status(&bytes, asked.offset, one, device.size(), &self.negotiated) {
                    Ok(query) => status::answer(device, asked, query, cx.output),
                    Err(refused) => asked.fail(refused, cx.output),
                }
                used
            }
            Payload::Wanted { asked, mut incoming } => {
                let mut used = 0;
                loop {
                    let step = incoming
                        .close_window(device, cx.magazine)
                        .and_then(|()| incoming.open_window(device, cx.magazine));
                    if let Err(error) = step {
                        let (left, refused) = (incoming.missing(), Refused::from(error));
                        incoming.abandon(device, cx.magazine);
                        let unwanted = Payload::Unwanted { left, asked, refused };
                        return used + self.receive(unwanted, &input[used..], cx);
                    }
                    if incoming.missing() == 0 {
                        self.end_write(asked, incoming.finish(), cx);
                        return used;
                    }
                    let taken = incoming.take(&input[used..], device);
                    used += taken;
                    if taken == 0 {
                        self.payload = Some(Payload::Wanted { asked, incoming });
                        return used;
                    }
                }
            }
        }
    }

    /// Whether it is in the middle of a payload.
    #[must_use]
    pub fn in_payload(&self) -> bool {
        self.payload.is_some()
    }

    /// Takes note that the order `ticket` was carried out, and whether the pages could be read.
    pub fn warmed(&mut self, ticket: u64, readable: bool) {
        if self.awaited == Some(ticket) {
            self.awaited = None;
            self.is_lost = !readable;
        } else if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == ticket) {
            let (_, aside) = self.waiting.swap_remove(at);
            self.back.push_back((aside, readable));
        }
    }

    fn set_aside(&mut self, need: Need, range: Range<u64>, aside: Aside, cx: &mut Context<'_>) {
        let ticket = self.order(need, range, cx);
        self.waiting.push((ticket, aside));
    }

    /// Has the connection wait, where the request at hand cannot be put aside.
    fn wait_for(&mut self, need: Need, range: Range<u64>, cx: &mut Context<'_>) {
        self.awaited = Some(self.order(need, range, cx));
    }

    /// Has it wait for room, if more memory is to be taken and it is short.
    fn waits_for_room(&mut self, cx: &mut Context<'_>) -> bool {
        let is_short = self.attachment.session().device().overlay().is_short();
        if is_short {
            self.wait_for(Need::Room, 0..0, cx);
        }
        is_short
    }

    fn order(&mut self, need: Need, range: Range<u64>, cx: &mut Context<'_>) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let (session, cancelled) = (Arc::clone(self.attachment.session()), Arc::clone(&self.cancelled));
        cx.orders.push(Warm { need, session, range, ticket, cancelled });
        ticket
    }

    fn abandon_waiting(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.waiting.clear();
        self.back.clear();
        self.awaited = None;
    }

    /// Takes note that the client sends no more: what it has asked for is still answered, but for a write whose payload
    /// is not complete.
    pub fn end_of_input(&mut self, magazine: &mut Magazine) {
        self.drop_payload(magazine);
        self.over = true;
    }

    fn drop_payload(&mut self, magazine: &mut Magazine) {
        if let Some(Payload::Wanted { incoming, .. }) = self.payload.take() {
            incoming.abandon(self.attachment.session().device(), magazine);
        }
    }

    /// Gives back what an unfinished write holds. What was not acted on never happened.
    pub fn close(&mut self, magazine: &mut Magazine) {
        self.drop_payload(magazine);
        self.abandon_waiting();
        self.job = None;
        if let Some(reserved) = self.reserved.take() {
            self.attachment.session().pace().give_back(&reserved);
        }
    }
}
