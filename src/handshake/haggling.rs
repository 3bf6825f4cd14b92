//! What each option does. Everything that options can change is one value, [`Negotiation`], so that what makes a client
//! start over (an upgrade to TLS) is to replace it.

use super::machine::{Handshake, Outcome};
use super::{CloseReason, Environment, ExportInfo, Negotiated, Refusal, TlsPolicy};
use crate::proto::{
    self, ClientFlags, ExportEntry, ExportNameReply, InfoItem, InfoPayload, InfoType, MetaContext,
    MetaContextPayload, OptionCode, OptionReplyType, TransmissionFlags,
};

/// The metadata contexts that can be selected, with their numbers.
const CONTEXTS: [MetaContext<'static>; 1] =
    [MetaContext { id: proto::META_CONTEXT_BASE_ALLOCATION, name: proto::META_NAME_BASE_ALLOCATION }];

/// What options changed so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Negotiation {
    structured_replies: bool,
    contexts: Option<Selection>,
}

/// The metadata contexts selected, which count only for the export name they were selected with.
#[derive(Clone, Debug)]
struct Selection {
    export_name: String,
    base_allocation: bool,
}

impl Negotiation {
    pub(super) fn forget_contexts(&mut self) {
        self.contexts = None;
    }

    fn conclude(&self, export_name: &str) -> Negotiated {
        let selection = self.contexts.as_ref().filter(|selection| selection.export_name == export_name);
        Negotiated {
            export_name: export_name.to_owned(),
            structured_replies: self.structured_replies,
            base_allocation: selection.is_some_and(|selection| selection.base_allocation),
        }
    }

    /// The flags of an export as they are with what was negotiated.
    fn final_flags(&self, flags: TransmissionFlags) -> TransmissionFlags {
        let flags = flags.union(TransmissionFlags::HAS_FLAGS);
        if self.structured_replies {
            flags.union(TransmissionFlags::SEND_DF)
        } else {
            flags.without(TransmissionFlags::SEND_DF)
        }
    }
}

/// The replies to one option.
struct Replies<'o> {
    option: OptionCode,
    output: &'o mut Vec<u8>,
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
            Refusal::TooBig(_) => OptionReplyType::ErrTooBig,
            Refusal::Invalid(_) => OptionReplyType::ErrInvalid,
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
        let mut replies = Replies { option, output };
        match option {
            OptionCode::ExportName => return self.export_name(env, payload, replies.output),
            OptionCode::Abort => {
                // Data is out of place here, and to be ignored.
                replies.ack();
                return Outcome::Close(CloseReason::Aborted);
            }
            _ if self.shutting_down => replies.refuse(&Refusal::Shutdown),
            OptionCode::List => list(env, payload, &mut replies),
            OptionCode::StartTls => match self.knobs.tls {
                TlsPolicy::Off => unsupported(&mut replies),
            },
            OptionCode::Info => self.info(env, payload, &mut replies),
            OptionCode::Go => return self.go(env, payload, &mut replies),
            OptionCode::StructuredReply => self.structured_reply(payload, &mut replies),
            OptionCode::ListMetaContext => self.list_meta_context(env, payload, &mut replies),
            OptionCode::SetMetaContext => self.set_meta_context(env, payload, &mut replies),
            OptionCode::PeekExport | OptionCode::ExtendedHeaders | OptionCode::Other(_) => {
                unsupported(&mut replies)
            }
        }
        Outcome::Continue
    }

    /// Answers an option whose payload was too long to be read, now that it is drained.
    pub(super) fn act_on_oversized<E>(&mut self, option: OptionCode, output: &mut Vec<u8>) -> Outcome<E> {
        let mut replies = Replies { option, output };
        match option {
            OptionCode::Abort => {
                replies.ack();
                return Outcome::Close(CloseReason::Aborted);
            }
            _ if self.shutting_down => replies.refuse(&Refusal::Shutdown),
            OptionCode::ExportName
            | OptionCode::List
            | OptionCode::Info
            | OptionCode::Go
            | OptionCode::StructuredReply
            | OptionCode::ListMetaContext
            | OptionCode::SetMetaContext => {
                replies.error(OptionReplyType::ErrTooBig, "option data is too long")
            }
            OptionCode::StartTls
            | OptionCode::PeekExport
            | OptionCode::ExtendedHeaders
            | OptionCode::Other(_) => unsupported(&mut replies),
        }
        Outcome::Continue
    }

    fn export_name<V: Environment>(
        &mut self,
        env: &V,
        payload: &[u8],
        output: &mut Vec<u8>,
    ) -> Outcome<V::Export> {
        let name = match proto::parse_string(payload) {
            Ok(name) => name,
            Err(why) => return Outcome::Close(CloseReason::MalformedExportName(why)),
        };
        match self.open(env, name) {
            Ok((info, export)) => {
                let padded = !self.client.contains(ClientFlags::NO_ZEROES);
                ExportNameReply { size: info.size, flags: info.flags }.append_to(output, padded);
                Outcome::Ready { export, info, negotiated: self.negotiation.conclude(name) }
            }
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
                info.flags = self.negotiation.final_flags(info.flags);
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
        info.flags = self.negotiation.final_flags(info.flags);
        Ok((info, export))
    }

    fn structured_reply(&mut self, payload: &[u8], replies: &mut Replies<'_>) {
        if !self.knobs.structured_replies {
            return unsupported(replies);
        }
        if !payload.is_empty() {
            return replies.invalid(NO_DATA);
        }
        self.negotiation.structured_replies = true;
        replies.ack();
    }

    fn list_meta_context<V: Environment>(&mut self, env: &V, payload: &[u8], replies: &mut Replies<'_>) {
        let Some(asked) = self.meta_context(env, payload, replies) else { return };
        for context in CONTEXTS {
            if asked.is_empty() || asked.queries().any(|query| lists(query, context.name)) {
                // The number is reserved in this reply.
                replies.item(OptionReplyType::MetaContext, &MetaContext { id: 0, ..context }.encode());
            }
        }
        replies.ack();
    }

    fn set_meta_context<V: Environment>(&mut self, env: &V, payload: &[u8], replies: &mut Replies<'_>) {
        // Contexts selected before were forgotten when this option's header came.
        let Some(asked) = self.meta_context(env, payload, replies) else { return };
        let mut selection = Selection { export_name: asked.export_name.to_owned(), base_allocation: false };
        for context in CONTEXTS {
            if asked.queries().any(|query| query == context.name) {
                selection.base_allocation |= context.id == proto::META_CONTEXT_BASE_ALLOCATION;
                replies.item(OptionReplyType::MetaContext, &context.encode());
            }
        }
        self.negotiation.contexts = Some(selection);
        replies.ack();
    }

    /// What both metadata context options have in common: nothing, when an error was replied.
    fn meta_context<'p, V: Environment>(
        &self,
        env: &V,
        payload: &'p [u8],
        replies: &mut Replies<'_>,
    ) -> Option<MetaContextPayload<'p>> {
        if !self.negotiation.structured_replies {
            replies.invalid("structured replies must be negotiated first");
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

/// Whether a list query finds a context: by its name, or by its namespace alone.
fn lists(query: &str, context: &str) -> bool {
    query == context
        || query.strip_suffix(':').is_some_and(|namespace| context.split(':').next() == Some(namespace))
}
