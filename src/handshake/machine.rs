//! The state machine: cuts the input into client flags, option headers and payloads, keeps the limits, drains what is too
//! long. What an option means is in [`super::haggling`].

use std::borrow::Cow;

use super::haggling::Negotiation;
use super::{
    Agreed, CloseReason, Environment, ExportInfo, Knobs, MAX_DRAINED_BYTES, MAX_OPTION_LENGTH, MAX_OPTIONS,
    MAX_REPLY_BYTES, Negotiated, Progress, Side,
};
use crate::proto::{ClientFlags, Greeting, HandshakeFlags, MAX_STRING, Malformed, OptionCode, OptionHeader};

/// Longest export name in bytes, as an option's length has it.
const MAX_NAME_LENGTH: u32 = 4096;
const _: () = assert!(MAX_NAME_LENGTH as usize == MAX_STRING && MAX_NAME_LENGTH <= MAX_OPTION_LENGTH);

/// What is being waited for.
#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Header,
    /// The payload of an option that will be read as a whole.
    Payload(OptionHeader),
    /// `left` more bytes of the payload of an option that is refused unread.
    Drain {
        option: OptionCode,
        left: u32,
    },
    /// Ready or closed; the machine takes no more input.
    Over,
}

/// What one piece of input led to.
pub(super) enum Outcome<E> {
    Continue,
    Ready { export: E, info: ExportInfo, negotiated: Negotiated },
    StartTls,
    Elsewhere(Side),
    Close(CloseReason),
}

/// One connection's handshake, server side.
#[derive(Debug)]
pub struct Handshake {
    pub(super) knobs: Knobs,
    pub(super) client: ClientFlags,
    pub(super) negotiation: Negotiation,
    pub(super) shutting_down: bool,
    /// TLS has begun.
    pub(super) secure: bool,
    /// Something was refused because TLS has not.
    pub(super) refused_plain: bool,
    /// An option came since TLS began, or since the beginning.
    pub(super) asked: bool,
    state: State,
    /// What came so far of the flags, header or payload being waited for; empty when it is found whole in the input.
    partial: Vec<u8>,
    /// The option in which the client has named what is another server's.
    named: Vec<u8>,
    /// What the server that has begun this has as its first image.
    first: Option<String>,
    options: u32,
    drained: u64,
    replied: usize,
    close_reason: Option<CloseReason>,
}

impl Handshake {
    /// A handshake at its beginning; [`Handshake::greeting`] is the first thing to send.
    #[must_use]
    pub fn new(knobs: Knobs) -> Self {
        Self {
            knobs,
            client: ClientFlags::NONE,
            negotiation: Negotiation::default(),
            shutting_down: false,
            secure: false,
            refused_plain: false,
            asked: false,
            state: State::ClientFlags,
            partial: Vec::new(),
            named: Vec::new(),
            first: None,
            options: 0,
            drained: 0,
            replied: 0,
            close_reason: None,
        }
    }

    /// A handshake that another server has begun; `None` if what was agreed on there is not offered here.
    #[must_use]
    pub fn resumed(knobs: Knobs, agreed: Agreed) -> Option<Self> {
        let mut handshake = Self::new(knobs);
        handshake.state = State::Header;
        handshake.client = ClientFlags(agreed.flags);
        handshake.first.clone_from(&agreed.first);
        let offered = ClientFlags(u32::from(handshake.offered().bits()));
        handshake.negotiation = Negotiation::resumed(knobs, agreed)?;
        handshake.client.without(offered).is_empty().then_some(handshake)
    }

    /// The image that the client came to as the first, if that was at another server.
    #[must_use]
    pub fn first(&self) -> Option<&str> {
        self.first.as_deref()
    }

    /// The first bytes for the client.
    #[must_use]
    pub fn greeting(&self) -> [u8; Greeting::SIZE] {
        Greeting { flags: self.offered() }.encode()
    }

    /// Takes bytes of the client, appends what is to be sent to `output`. Returns how many bytes of `input` it took, and
    /// where the handshake stands.
    ///
    /// With [`Progress::More`] all of `input` was taken; after [`Progress::Ready`] the rest belongs to the transmission
    /// phase; after [`Progress::StartTls`] it goes on with what comes through TLS, and the rest of `input` belongs to TLS;
    /// after [`Progress::Closed`] it belongs to nobody. Called again after `Ready` or `Closed`, it says `Closed` and
    /// takes nothing.
    pub fn receive<V: Environment>(
        &mut self,
        env: &V,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> (usize, Progress<V::Export>) {
        if matches!(self.state, State::Over) {
            return (0, Progress::Closed);
        }
        let mut rest = input;
        let progress = loop {
            let sent_before = output.len();
            let Some(outcome) = self.step(env, &mut rest, output) else { break Progress::More };
            self.replied = self.replied.saturating_add(output.len() - sent_before);
            match outcome {
                Outcome::Continue => {}
                Outcome::Ready { export, info, negotiated } => {
                    self.state = State::Over;
                    break Progress::Ready { export, info, negotiated };
                }
                Outcome::StartTls => break Progress::StartTls,
                Outcome::Elsewhere(side) => {
                    self.state = State::Over;
                    let mut agreed = self.negotiation.agreed(self.client.bits());
                    agreed.first = self.first.take();
                    break Progress::Elsewhere { side, agreed, option: std::mem::take(&mut self.named) };
                }
                Outcome::Close(reason) => {
                    self.state = State::Over;
                    self.partial = Vec::new();
                    self.close_reason = Some(reason);
                    break Progress::Closed;
                }
            }
        };
        (input.len() - rest.len(), progress)
    }

    /// From now on every option but `OPT_ABORT` is answered by an error that tells the client to leave.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Whether the client wanted something in plain text that it may have over TLS only, and has not begun TLS since.
    #[must_use]
    pub fn wanted_plain_text(&self) -> bool {
        self.refused_plain && !self.secure
    }

    /// Whether TLS has begun, and the client has asked for nothing since.
    #[must_use]
    pub fn is_silent_over_tls(&self) -> bool {
        self.secure && !self.asked
    }

    /// Why [`Handshake::receive`] said [`Progress::Closed`].
    #[must_use]
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.close_reason.as_ref()
    }

    /// Bytes of memory held for input that is not whole yet.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.partial.capacity()
    }

    fn offered(&self) -> HandshakeFlags {
        let all = HandshakeFlags::FIXED_NEWSTYLE.union(HandshakeFlags::NO_ZEROES);
        HandshakeFlags(all.bits() & self.knobs.handshake_flags_mask)
    }

    /// Takes the next whole piece of input and acts on it; nothing, when it is not whole yet.
    fn step<V: Environment>(
        &mut self,
        env: &V,
        rest: &mut &[u8],
        output: &mut Vec<u8>,
    ) -> Option<Outcome<V::Export>> {
        match self.state {
            State::ClientFlags => {
                let bytes = self.piece(4, rest)?;
                let flags = ClientFlags(u32::from_be_bytes(*bytes.first_chunk()?));
                self.state = State::Header;
                self.client = flags;
                // Client flags and handshake flags have the same bits: none may be set that was not offered.
                let unknown = flags.without(ClientFlags(u32::from(self.offered().bits())));
                Some(if unknown.is_empty() {
                    Outcome::Continue
                } else {
                    Outcome::Close(CloseReason::ClientFlags(unknown))
                })
            }
            State::Header => {
                let bytes = self.piece(OptionHeader::SIZE, rest)?;
                let header = OptionHeader::parse(bytes.first_chunk()?);
                Some(match header.map_err(CloseReason::from).and_then(|header| self.begin_option(header)) {
                    Ok(()) => Outcome::Continue,
                    Err(reason) => Outcome::Close(reason),
                })
            }
            State::Payload(header) => {
                // At most MAX_OPTION_LENGTH, so it fits.
                let payload = self.piece(usize::try_from(header.length).ok()?, rest)?;
                self.state = State::Header;
                let outcome = self.act(env, header.option, &payload, output);
                if let Outcome::Elsewhere(_) = outcome {
                    self.named = [&header.encode()[..], &payload].concat();
                }
                Some(outcome)
            }
            State::Drain { option, left } => {
                let available = u32::try_from(rest.len()).unwrap_or(u32::MAX);
                let now = left.min(available);
                *rest = &rest[usize::try_from(now).ok()?..];
                if now < left {
                    self.state = State::Drain { option, left: left - now };
                    return None;
                }
                self.state = State::Header;
                Some(self.act_on_oversized(option, output))
            }
            State::Over => None,
        }
    }

    /// Decides, by an option's header alone, what becomes of its payload.
    fn begin_option(&mut self, header: OptionHeader) -> Result<(), CloseReason> {
        self.asked = true;
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(CloseReason::TooManyOptions);
        }
        if self.replied > MAX_REPLY_BYTES {
            return Err(CloseReason::TooManyReplies);
        }
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) && header.option != OptionCode::ExportName {
            return Err(CloseReason::NotFixedNewstyle(header.option));
        }
        if header.option == OptionCode::SetMetaContext {
            // Whatever becomes of this option, the contexts selected before are gone.
            self.negotiation.forget_contexts();
        }
        if header.option == OptionCode::ExportName && header.length > MAX_NAME_LENGTH {
            // It can be neither granted nor refused, so there is nothing to stay in step for.
            return Err(CloseReason::MalformedExportName(Malformed::StringTooLong));
        }
        self.state = if header.length <= MAX_OPTION_LENGTH {
            State::Payload(header)
        } else {
            self.drained += u64::from(header.length);
            if self.drained > MAX_DRAINED_BYTES {
                return Err(CloseReason::TooMuchData);
            }
            State::Drain { option: header.option, left: header.length }
        };
        Ok(())
    }

    /// The next `size` bytes of input, borrowed from it when they are all there, else collected over several calls.
    fn piece<'i>(&mut self, size: usize, rest: &mut &'i [u8]) -> Option<Cow<'i, [u8]>> {
        if self.partial.is_empty()
            && let Some((piece, behind)) = rest.split_at_checked(size)
        {
            *rest = behind;
            return Some(Cow::Borrowed(piece));
        }
        let missing = size - self.partial.len();
        let (piece, behind) = rest.split_at(missing.min(rest.len()));
        self.partial.extend_from_slice(piece);
        *rest = behind;
        (self.partial.len() == size).then(|| Cow::Owned(std::mem::take(&mut self.partial)))
    }
}
