//! One conversation, driven as a worker drives it: input in some pieces, output sent through a socket, pages brought in
//! when they are asked for.

use std::os::fd::AsFd;

use memdev::handshake::{ExportInfo, Handshake, Knobs, Negotiated, Progress};
use memdev::session::Attachment;
use memdev::sys::{Buffer, KernelSpanMut, MAX_SPANS, receive};
use memdev::transmission::{Context, Flushed, Output, Pause, Share, Transmission, Warm};

use super::plan::Plan;
use super::world::{Disk, Exports, World};

/// How the input is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Not at all.
    Whole,
    /// In the transmission phase, behind every request, which is then waited for.
    Requests,
    /// Anywhere, with payloads received to their places.
    Random,
}

/// How to have a conversation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    pub(crate) knobs: Knobs,
    pub(crate) cut: Cut,
    /// Replies are copied out, as for TLS, in pieces of so many bytes, and not sent from where they are.
    pub(crate) gathers: Option<usize>,
    /// After how many batches of replies the end of the torn image is cut off, if ever.
    pub(crate) tears_after: Option<u32>,
}

/// How the handshake ended.
#[derive(Debug, PartialEq)]
pub(crate) enum Greeted {
    More,
    Closed(String),
    Ready(Disk, ExportInfo, Negotiated),
}

/// What came of a handshake.
#[derive(Debug, PartialEq)]
pub(crate) struct Beginning {
    pub(crate) output: Vec<u8>,
    pub(crate) taken: usize,
    pub(crate) greeted: Greeted,
}

/// What came of a transmission phase.
#[derive(Debug, PartialEq)]
pub(crate) struct Replies {
    pub(crate) bytes: Vec<u8>,
    /// The connection was given up in the middle of a reply.
    pub(crate) is_lost: bool,
}

/// Lengths of pieces, of one byte and of many, drawn from a seed.
pub(crate) struct Lengths(u32);

impl Lengths {
    pub(crate) fn new(seed: u16) -> Self {
        Self(u32::from(seed) | 0x1_0000)
    }

    fn draw(&mut self) -> [u8; 4] {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0.to_be_bytes()
    }

    fn next(&mut self) -> usize {
        let [kind, high, low, _] = self.draw();
        let length = usize::from(u16::from_be_bytes([high, low]));
        match kind % 8 {
            0 => length % 3,
            1..=3 => length % 64,
            4..=6 => length % 6000,
            _ => length,
        }
    }

    fn toss(&mut self) -> bool {
        self.draw()[0] & 1 == 1
    }
}

/// The handshake, up to where the transmission phase begins.
pub(crate) fn greet(
    world: &World,
    client: &[u8],
    manner: Manner,
    lengths: &mut Lengths,
) -> (Beginning, Option<Attachment>) {
    let mut handshake = Handshake::new(manner.knobs);
    let (mut output, mut taken) = (Vec::new(), 0);
    let progress = loop {
        let rest = &client[taken..];
        let most = if manner.cut == Cut::Random { lengths.next() } else { usize::MAX };
        let piece = &rest[..rest.len().min(most)];
        let (used, progress) = handshake.receive(&Exports(world), piece, &mut output);
        taken += used;
        match progress {
            Progress::More => assert_eq!(used, piece.len(), "more is wanted, so everything was taken"),
            Progress::StartTls => {}
            progress => break progress,
        }
        if taken == client.len() {
            break Progress::More;
        }
    };
    let (greeted, attachment) = match progress {
        Progress::More | Progress::StartTls => (Greeted::More, None),
        Progress::Elsewhere { .. } => panic!("there is no other server"),
        Progress::Closed => (Greeted::Closed(handshake.close_reason().expect("a reason").to_string()), None),
        Progress::Ready { export: (disk, attachment), info, negotiated } => {
            (Greeted::Ready(disk, info, negotiated), Some(attachment))
        }
    };
    (Beginning { output, taken, greeted }, attachment)
}

/// A transmission phase, and what a worker would have for it.
struct Line<'w> {
    world: &'w World,
    transmission: Transmission,
    output: Output,
    plain: Buffer,
    orders: Vec<Warm>,
    rest: Vec<u8>,
    sent: Vec<u8>,
    gathers: Option<usize>,
    /// Flushes until the image is cut off.
    until_torn: Option<u32>,
}

/// The transmission phase: all that `plan` says, in the pieces that `manner` says.
pub(crate) fn transmit(
    world: &World,
    (disk, attachment): (Disk, Attachment),
    negotiated: Negotiated,
    plan: &Plan,
    manner: Manner,
    lengths: &mut Lengths,
) -> Replies {
    let mut line = Line {
        world,
        transmission: Transmission::new(attachment, negotiated),
        output: Output::default(),
        plain: Buffer::new(4096).expect("memory"),
        orders: Vec::new(),
        rest: Vec::new(),
        sent: Vec::new(),
        gathers: manner.gathers,
        until_torn: manner.tears_after.filter(|_| disk == Disk::Torn),
    };
    let is_lost = line.run(plan, manner.cut, lengths).is_err();
    assert!(!is_lost || disk == Disk::Torn, "only what cannot be read cannot be sent");
    line.close(is_lost);
    Replies { bytes: line.sent, is_lost }
}

/// The connection was given up.
struct Lost;

impl Line<'_> {
    fn run(&mut self, plan: &Plan, cut: Cut, lengths: &mut Lengths) -> Result<(), Lost> {
        let wire = &plan.wire;
        let mut borders = plan.requests.iter().map(|request| request.wire.end);
        let (mut at, mut ended, mut turns) = (0, false, 0);
        // Each turn takes input, does a slice of a request, sends, or carries out an order.
        let most_turns = 1000 + 8 * wire.len() + 64 * plan.requests.len();
        loop {
            turns += 1;
            assert!(turns < most_turns, "it goes round in circles");
            let pause = self.consume();
            self.flush()?;
            match pause {
                Pause::Output | Pause::Turn => {}
                Pause::Paced(_) => unreachable!("no session has a cap"),
                Pause::Over => return Ok(()),
                Pause::Waiting => {
                    assert!(!self.orders.is_empty(), "it waits for something that it has asked for");
                    self.carry_out(lengths);
                }
                // One at a time, and done before the next is heard of.
                Pause::Input if cut == Cut::Requests && !self.orders.is_empty() => self.carry_out(lengths),
                Pause::Input if cut == Cut::Random && !self.orders.is_empty() && lengths.toss() => {
                    self.carry_out(lengths);
                }
                Pause::Input if at < wire.len() => {
                    let end = match cut {
                        Cut::Whole => wire.len(),
                        Cut::Requests => borders.next().unwrap_or(wire.len()),
                        Cut::Random => wire.len().min(at + lengths.next()),
                    };
                    let piece = &wire[at..end];
                    if cut == Cut::Random {
                        self.receive(piece)
                    } else {
                        self.rest.extend_from_slice(piece)
                    }
                    at = end;
                }
                Pause::Input => {
                    assert!(!ended, "it wants more than there is");
                    ended = true;
                    self.transmission.end_of_input(&mut self.world.magazine.borrow_mut());
                }
            }
        }
    }

    fn consume(&mut self) -> Pause {
        let mut pieces = Vec::new();
        let mut cx = Context {
            magazine: &mut self.world.magazine.borrow_mut(),
            output: &mut self.output,
            orders: &mut self.orders,
            pieces: &mut pieces,
            share: Share::ALL,
        };
        let (used, pause) = self.transmission.consume(&self.rest, &mut cx);
        assert!(pieces.is_empty(), "scratch is left as it was found");
        self.rest.drain(..used);
        pause
    }

    /// Receives as a worker does: the payload that is waited for to its place, all else behind it.
    fn receive(&mut self, piece: &[u8]) {
        self.world.say(piece);
        let mut behind = vec![0; piece.len()];
        let mut spans: Vec<KernelSpanMut<'_>> =
            self.transmission.payload_spans().take(MAX_SPANS - 1).collect();
        let payload: usize = spans.iter().map(KernelSpanMut::len).sum();
        assert!(payload == 0 || self.rest.is_empty(), "what came before a payload is used before it");
        spans.push(KernelSpanMut::new(&mut behind));
        let count = if piece.is_empty() {
            0
        } else {
            receive(self.world.requests.1.as_fd(), &mut spans).expect("what was just sent")
        };
        drop(spans);
        assert_eq!(count, piece.len(), "all that was just sent");
        self.transmission.payload_received(count.min(payload) as u64);
        self.rest.extend_from_slice(&behind[..count.saturating_sub(payload)]);
    }

    /// Brings in the pages of an order, or finds that they cannot be had.
    fn carry_out(&mut self, lengths: &mut Lengths) {
        let which = if lengths.toss() { 0 } else { self.orders.len() - 1 };
        let order = self.orders.remove(which);
        let readable = order.session.device().image().warm(order.range).is_ok();
        self.transmission.warmed(order.ticket, readable);
    }

    fn flush(&mut self) -> Result<(), Lost> {
        if self.output.is_empty() {
            return Ok(());
        }
        self.until_torn = match self.until_torn {
            Some(0) => {
                self.world.tear();
                None
            }
            left => left.map(|left| left - 1),
        };
        let device = Some(self.transmission.attachment().session().device());
        let magazine = &mut self.world.magazine.borrow_mut();
        if let Some(size) = self.gathers {
            let mut buffer = vec![0; size];
            while !self.output.is_empty() {
                let count = self.output.gather(device, &mut buffer, magazine).map_err(|_| Lost)?;
                assert!(count > 0, "there is something, and room for it");
                self.sent.extend_from_slice(&buffer[..count]);
                self.output.advance(count, device, magazine);
            }
            self.output.clear(device, magazine);
            return Ok(());
        }
        loop {
            let flushed = self.output.flush(self.world.replies.0.as_fd(), device, magazine, &mut self.plain);
            self.world.drain(&self.world.replies.1, &mut self.sent);
            match flushed {
                Ok(Flushed::All) => return Ok(()),
                Ok(Flushed::Blocked) => {}
                Err(_) => return Err(Lost),
            }
        }
    }

    fn close(&mut self, is_lost: bool) {
        let magazine = &mut self.world.magazine.borrow_mut();
        let device = self.transmission.attachment().session().device();
        self.output.clear(Some(device), magazine);
        self.transmission.close(magazine);
        let all_cancelled =
            self.orders.iter().all(|order| order.cancelled.load(std::sync::atomic::Ordering::Relaxed));
        assert!(all_cancelled, "nobody waits for these orders (lost: {is_lost})");
    }
}
