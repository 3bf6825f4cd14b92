//! What each option does. Everything that options can change is one value, [`Negotiation`], so that what makes a client
//! start over (an upgrade to TLS) is to replace it.

use super::machine::{Handshake, Outcome};
use super::{
    Agreed, CloseReason, ContextSet, Environment, ExportInfo, Knobs, KnownContext, Negotiated, Refusal, Side,
    TlsPolicy,
};
use crate::proto::{
    self, ClientFlags, ExportEntry, ExportNameReply, InfoItem, InfoPayload, InfoType, MetaContext,
    MetaContextPayload, OptionCode, OptionReplyType, TransmissionFlags,
};

/// What options changed so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Negotiation {
    structured_replies: bool,
    contexts: Option<Selection>,
    extended_headers: bool,
}

/// The metadata contexts selected, which count only for the export name they were selected with.
#[derive(Clone, Debug)]
struct Selection {
    export_name: String,
    contexts: ContextSet,
}

impl Negotiation {
    /// What another server has to know to go on.
    pub(super) fn agreed(&self, flags: u32) -> Agreed {
        let Self { structured_replies, extended_headers, contexts } = self;
        let numbers =
            |selection: &Selection| selection.contexts.iter().map(|known| known.on_the_wire().id).collect();
        Agreed {
            flags,
            structured_replies: *structured_replies,
            extended_headers: *extended_headers,
            selected_for: contexts.as_ref().map(|selection| selection.export_name.clone()),
            contexts: contexts.as_ref().map(numbers).unwrap_or_default(),
            first: None,
        }
    }

    /// What was agreed on with another server, where all of it is offered here, too.
    pub(super) fn resumed(knobs: Knobs, agreed: Agreed) -> Option<Self> {
        let Agreed { structured_replies, extended_headers, selected_for, contexts, .. } = agreed;
        let contexts = contexts.into_iter().map(KnownContext::from_id).collect::<Option<ContextSet>>()?;
        let contexts = selected_for.map(|export_name| Selection { export_name, contexts });
        let resumed = Self { structured_replies, extended_headers, contexts };
        let is_offered = (knobs.structured_replies || !resumed.has_chunks())
            && (knobs.extended_headers || !extended_headers);
        is_offered.then_some(resumed)
    }

    pub(super) fn forget_contexts(&mut self) {
        self.contexts = None;
    }

    /// What the transmission phase gets to know, if it begins now with this name.
    fn conclude(&self, export_name: &str) -> Negotiated {
        let selection = self.contexts.as_ref().filter(|selection| selection.export_name == export_name);
        Negotiated {
            export_name: export_name.to_owned(),
            structured_replies: self.has_chunks(),
            extended_headers: self.extended_headers,
            contexts: selection.map(|selection| selection.contexts).unwrap_or_default(),
        }
    }

    /// Whether replies come in chunks, of either kind: extended headers take the place of structured replies.
    fn has_chunks(&self) -> bool {
        self.structured_replies || self.extended_headers
    }

    /// The flags of export `name` as they are with what was negotiated.
    fn final_flags(&self, flags: TransmissionFlags, name: &str) -> TransmissionFlags {
        use TransmissionFlags as Flags;
        let Negotiated { structured_replies, extended_headers, contexts, .. } = self.conclude(name);
        let conditional = [
            (Flags::SEND_DF, structured_replies),
            (Flags::BLOCK_STATUS_PAYLOAD, extended_headers && !contexts.is_empty()),
        ];
        conditional.into_iter().fold(flags.union(Flags::HAS_FLAGS), |flags, (flag, holds)| {
            if holds { flags.union(flag) } else { flags.without(flag) }
        })
    }
}

/// The replies to one option.
struct Replies<'o> {
    option: OptionCode,
    output: &'o mut Vec<u8>,
    /// A connection over TLS cannot be handed over.
    secure: bool,
    /// It is to be handed over instead of being answered.
    elsewhere: Option<Side>,
}

impl Replies<'_> {
    fn item(&mut self, kind: OptionReplyType, payload: &[u8]) {
        proto::append_option_reply(self.output, self.option, kind, payload);
    }

    fn ack(&mut self) {
        self.item(OptionReplyType::Ack, &[]);
    }

    fn error(&mut self, kind: OptionReplyType, message: &str) {
        debug_assert!(kind.is_error());
        self.item(kind, proto::clip(message).as_bytes());
    }

    fn invalid(&mut self, message: &str) {
        self.error(OptionReplyType::ErrInvalid, message);
    }

    fn refuse(&mut self, refusal: &Refusal) {
        let kind = match refusal {
            Refusal::Unknown => OptionReplyType::ErrUnknown,
            Refusal::Policy(_) => OptionReplyType::ErrPolicy,
            Refusal::Shutdown => OptionReplyType::ErrShutdown,
            Refusal::Invalid(_) => OptionReplyType::ErrInvalid,
            Refusal::Elsewhere(side) if !self.secure => {
                self.elsewhere = Some(*side);
                return;
            }
            Refusal::Elsewhere(Side::Before) => OptionReplyType::ErrPolicy,
            Refusal::Elsewhere(Side::After) => OptionReplyType::ErrShutdown,
        };
        self.error(kind, &refusal.to_string());
    }
}

impl Handshake {
    /// Acts on a whole option.
    pub(super) fn act<V: Environment>(
        &mut self,
        env: &V,
        option: OptionCode,
        payload: &[u8],
        output: &mut Vec<u8>,
    ) -> Outcome<V::Export> {
        let mut replies = Replies { option, output, secure: self.secure, elsewhere: None };
        if let Some(outcome) = self.refuse_plain(&mut replies) {
            return outcome;
        }
        match option {
            OptionCode::ExportName => return self.export_name(env, payload, &mut replies),
            OptionCode::Abort => {
                // Data is out of place here, and to be ignored.
                replies.ack();
                return Outcome::Close(CloseReason::Aborted);
            }
            _ if self.shutting_down => replies.refuse(&Refusal::Shutdown),
            OptionCode::List => list(env, payload, &mut replies),
            OptionCode::StartTls => return self.start_tls(payload.is_empty(), &mut replies),
            OptionCode::Info => self.info(env, payload, &mut replies),
            OptionCode::Go => {
                let outcome = self.go(env, payload, &mut replies);
                return replies.elsewhere.map_or(outcome, Outcome::Elsewhere);
            }
            OptionCode::StructuredReply => self.structured_reply(payload, &mut replies),
            OptionCode::ExtendedHeaders => self.extended_headers(payload, &mut replies),
            OptionCode::ListMetaContext => self.list_meta_context(env, payload, &mut replies),
            OptionCode::SetMetaContext => self.set_meta_context(env, payload, &mut replies),
            OptionCode::PeekExport | OptionCode::Other(_) => unsupported(&mut replies),
        }
        replies.elsewhere.map_or(Outcome::Continue, Outcome::Elsewhere)
    }

    /// Answers an option whose payload was too long to be read, now that it is drained.
    pub(super) fn act_on_oversized<E>(&mut self, option: OptionCode, output: &mut Vec<u8>) -> Outcome<E> {
        let mut replies = Replies { option, output, secure: self.secure, elsewhere: None };
        if let Some(outcome) = self.refuse_plain(&mut replies) {
            return outcome;
        }
        match option {
            OptionCode::Abort => {
                replies.ack();
                return Outcome::Close(CloseReason::Aborted);
            }
            _ if self.shutting_down => replies.refuse(&Refusal::Shutdown),
            OptionCode::ExtendedHeaders if !self.offers_extended_headers() => unsupported(&mut replies),
            OptionCode::StartTls => return self.start_tls(false, &mut replies),
            OptionCode::ExportName
            | OptionCode::List
            | OptionCode::Info
            | OptionCode::Go
            | OptionCode::StructuredReply
            | OptionCode::ExtendedHeaders
            | OptionCode::ListMetaContext
            | OptionCode::SetMetaContext => {
                replies.error(OptionReplyType::ErrTooBig, "option data is too long")
            }
            OptionCode::PeekExport | OptionCode::Other(_) => unsupported(&mut replies),
        }
        Outcome::Continue
    }

    /// Where TLS is demanded and has not begun: refuses everything but what leads there, or away.
    fn refuse_plain<E>(&mut self, replies: &mut Replies<'_>) -> Option<Outcome<E>> {
        if self.secure || self.knobs.tls != TlsPolicy::Require {
            return None;
        }
        match replies.option {
            OptionCode::StartTls | OptionCode::Abort => return None,
            OptionCode::ExportName => {
                self.refused_plain = true;
                return Some(Outcome::Close(CloseReason::PlainText));
            }
            _ => {}
        }
        self.refused_plain = true;
        replies.error(OptionReplyType::ErrTlsReqd, "this server speaks TLS only");
        Some(Outcome::Continue)
    }

    fn start_tls<E>(&mut self, is_empty: bool, replies: &mut Replies<'_>) -> Outcome<E> {
        if !is_empty {
            replies.invalid(NO_DATA);
        } else if self.secure {
            replies.invalid("TLS has begun already");
        } else if self.knobs.tls == TlsPolicy::Off {
            replies.error(OptionReplyType::ErrPolicy, "this server is not set up for TLS");
        } else {
            replies.ack();
            (self.secure, self.asked) = (true, false);
            // What was said before, anybody on the way may have said.
            self.negotiation = Negotiation::default();
            return Outcome::StartTls;
        }
        Outcome::Continue
    }

    fn export_name<V: Environment>(
        &mut self,
        env: &V,
        payload: &[u8],
        replies: &mut Replies<'_>,
    ) -> Outcome<V::Export> {
        let name = match proto::parse_string(payload) {
            Ok(name) => name,
            Err(why) => return Outcome::Close(CloseReason::MalformedExportName(why)),
        };
        if self.negotiation.extended_headers {
            return Outcome::Close(CloseReason::ExportNameWithExtendedHeaders);
        }
        match self.open(env, name) {
            Ok((info, export)) => {
                let padded = !self.client.contains(ClientFlags::NO_ZEROES);
                ExportNameReply { size: info.size, flags: info.flags }.append_to(replies.output, padded);
                Outcome::Ready { export, info, negotiated: self.negotiation.conclude(name) }
            }
            Err(Refusal::Elsewhere(side)) if !self.secure => Outcome::Elsewhere(side),
            Err(refusal) => Outcome::Close(CloseReason::ExportRefused { name: name.to_owned(), refusal }),
        }
    }

    fn info<V: Environment>(&mut self, env: &V, payload: &[u8], replies: &mut Replies<'_>) {
        let asked = match InfoPayload::parse(payload) {
            Ok(asked) => asked,
            Err(why) => return replies.invalid(&why.to_string()),
        };
        match env.describe(asked.name) {
            Ok(mut info) => {
                info.flags = self.negotiation.final_flags(info.flags, asked.name);
                describe(&info, &asked, replies);
            }
            Err(refusal) => replies.refuse(&refusal),
        }
    }

    fn go<V: Environment>(
        &mut self,
        env: &V,
        payload: &[u8],
        replies: &mut Replies<'_>,
    ) -> Outcome<V::Export> {
        let asked = match InfoPayload::parse(payload) {
            Ok(asked) => asked,
            Err(why) => {
                replies.invalid(&why.to_string());
                return Outcome::Continue;
            }
        };
        match self.open(env, asked.name) {
            Ok((info, export)) => {
                describe(&info, &asked, replies);
                Outcome::Ready { export, info, negotiated: self.negotiation.conclude(asked.name) }
            }
            Err(refusal) => {
                replies.refuse(&refusal);
                Outcome::Continue
            }
        }
    }

    fn open<V: Environment>(&self, env: &V, name: &str) -> Result<(ExportInfo, V::Export), Refusal> {
        if self.shutting_down {
            return Err(Refusal::Shutdown);
        }
        let (mut info, export) = env.open(name)?;
        info.flags = self.negotiation.final_flags(info.flags, name);
        Ok((info, export))
    }

    fn structured_reply(&mut self, payload: &[u8], replies: &mut Replies<'_>) {
        if !self.knobs.structured_replies {
            return unsupported(replies);
        }
        if !payload.is_empty() {
            return replies.invalid(NO_DATA);
        }
        if self.negotiation.extended_headers {
            let message = "extended headers, which were agreed on, take the place of structured replies";
            return replies.error(OptionReplyType::ErrExtHeaderReqd, message);
        }
        self.negotiation.structured_replies = true;
        replies.ack();
    }

    fn offers_extended_headers(&self) -> bool {
        self.knobs.extended_headers && self.knobs.structured_replies
    }

    fn extended_headers(&mut self, payload: &[u8], replies: &mut Replies<'_>) {
        if !self.offers_extended_headers() {
            return unsupported(replies);
        }
        if !payload.is_empty() {
            return replies.invalid(NO_DATA);
        }
        self.negotiation.extended_headers = true;
        replies.ack();
    }

    fn list_meta_context<V: Environment>(&mut self, env: &V, payload: &[u8], replies: &mut Replies<'_>) {
        let Some(asked) = self.meta_context(env, payload, replies) else { return };
        for context in KnownContext::ALL {
            if asked.is_empty() || asked.queries().any(|query| context.is_listed_by(query)) {
                // The number is reserved in this reply.
                let listed = MetaContext { id: 0, ..context.on_the_wire() };
                replies.item(OptionReplyType::MetaContext, &listed.encode());
            }
        }
        replies.ack();
    }

    fn set_meta_context<V: Environment>(&mut self, env: &V, payload: &[u8], replies: &mut Replies<'_>) {
        // Contexts selected before were forgotten when this option's header came.
        let Some(asked) = self.meta_context(env, payload, replies) else { return };
        let wanted =
            |context: &KnownContext| asked.queries().any(|query| query == context.on_the_wire().name);
        let contexts: ContextSet = KnownContext::ALL.into_iter().filter(wanted).collect();
        for context in contexts.iter() {
            replies.item(OptionReplyType::MetaContext, &context.on_the_wire().encode());
        }
        self.negotiation.contexts = Some(Selection { export_name: asked.export_name.to_owned(), contexts });
        replies.ack();
    }

    /// What both metadata context options have in common: nothing, when an error was replied.
    fn meta_context<'p, V: Environment>(
        &self,
        env: &V,
        payload: &'p [u8],
        replies: &mut Replies<'_>,
    ) -> Option<MetaContextPayload<'p>> {
        if !self.negotiation.has_chunks() {
            replies.invalid("structured replies or extended headers must be negotiated first");
            return None;
        }
        let asked =
            MetaContextPayload::parse(payload).map_err(|why| replies.invalid(&why.to_string())).ok()?;
        env.describe(asked.export_name).map_err(|refusal| replies.refuse(&refusal)).ok()?;
        Some(asked)
    }
}

const NO_DATA: &str = "option takes no data";

fn unsupported(replies: &mut Replies<'_>) {
    replies.error(OptionReplyType::ErrUnsup, "option is not supported");
}

fn list<V: Environment>(env: &V, payload: &[u8], replies: &mut Replies<'_>) {
    if !payload.is_empty() {
        return replies.invalid(NO_DATA);
    }
    for (name, description) in env.list() {
        let entry = ExportEntry { name: &name, description: &description };
        replies.item(OptionReplyType::Server, &entry.encode());
    }
    replies.ack();
}

/// The successful reply to INFO and GO. Block sizes are sent unasked, as a server with limits should.
fn describe(info: &ExportInfo, asked: &InfoPayload<'_>, replies: &mut Replies<'_>) {
    let mut item = |item: InfoItem<'_>| replies.item(OptionReplyType::Info, &item.encode());
    item(InfoItem::Export { size: info.size, flags: info.flags });
    if asked.requests_info(InfoType::Name) {
        item(InfoItem::Name(&info.name));
    }
    if asked.requests_info(InfoType::Description) {
        item(InfoItem::Description(&info.description));
    }
    item(InfoItem::BlockSize(info.block_sizes));
    replies.ack();
}
