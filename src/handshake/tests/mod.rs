//! The handshake against whole conversations, one file a theme. What all of them need is here: a world with a few
//! exports, a client that writes options, a reader of what came back.

mod elsewhere;
mod export_name;
mod extended_headers;
mod greeting;
mod info_go;
mod limits;
mod list;
mod meta_context;
mod pieces;
mod refusals;
mod structured_reply;
mod tls;

use std::cell::RefCell;

use super::*;
use crate::proto::{InfoItem, InfoPayload, MetaContext, MetaContextPayload, OptionHeader, OptionReplyHeader};
use crate::proto::{InfoType, OptionReplyType as Reply};

/// Size of every export of [`World`]: no multiple of anything.
const SIZE: u64 = (1 << 20) + 17;
const FLAGS: TransmissionFlags =
    TransmissionFlags::SEND_FLUSH.union(TransmissionFlags::SEND_FUA).union(TransmissionFlags::SEND_TRIM);
/// [`FLAGS`] as a client without structured replies is told them.
const TOLD_FLAGS: TransmissionFlags = FLAGS.union(TransmissionFlags::HAS_FLAGS);

/// Two images, `vm` (also the default export) and `größe`, sessions of `vm`, and a name for every refusal.
#[derive(Default)]
struct World {
    opened: RefCell<Vec<String>>,
}

impl Environment for World {
    type Export = String;

    fn list(&self) -> Vec<(String, String)> {
        vec![("vm".into(), "A machine".into()), ("größe".into(), String::new())]
    }

    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal> {
        let (canonical, description) = match name {
            "" | "vm" => ("vm", "A machine"),
            "größe" => ("größe", ""),
            "vm@shared" => ("vm@shared", "A machine"),
            "forbidden" => return Err(Refusal::Policy("not yours".into())),
            "closing" => return Err(Refusal::Shutdown),
            "vm@before" => return Err(Refusal::Elsewhere(Side::Before)),
            "vm@after" => return Err(Refusal::Elsewhere(Side::After)),
            "vm@?" => return Err(Refusal::Invalid("not a session name".into())),
            _ => return Err(Refusal::Unknown),
        };
        Ok(ExportInfo {
            name: canonical.into(),
            description: description.into(),
            size: SIZE,
            // One export claims DF, the others do not; what the client is told depends on neither.
            flags: if canonical == "größe" { FLAGS.union(TransmissionFlags::SEND_DF) } else { FLAGS },
            block_sizes: BlockSizes::default(),
        })
    }

    fn open(&self, name: &str) -> Result<(ExportInfo, String), Refusal> {
        let info = self.describe(name)?;
        self.opened.borrow_mut().push(name.into());
        Ok((info, format!("opened {name}")))
    }
}

/// What a client sends, byte by byte.
#[derive(Clone, Default)]
struct Client(Vec<u8>);

impl Client {
    /// A client of today: fixed newstyle, no zeroes.
    fn new() -> Self {
        Self::with_flags(3)
    }

    fn with_flags(flags: u32) -> Self {
        Self(flags.to_be_bytes().to_vec())
    }

    fn option(mut self, option: OptionCode, payload: &[u8]) -> Self {
        let length = u32::try_from(payload.len()).unwrap();
        self.0.extend_from_slice(&OptionHeader { option, length }.encode());
        self.0.extend_from_slice(payload);
        self
    }

    fn go(self, name: &str) -> Self {
        self.option(OptionCode::Go, &InfoPayload::build(name, &[]))
    }

    fn structured(self) -> Self {
        self.option(OptionCode::StructuredReply, &[])
    }

    fn extended(self) -> Self {
        self.option(OptionCode::ExtendedHeaders, &[])
    }

    fn set_meta_context(self, name: &str, queries: &[&str]) -> Self {
        self.option(OptionCode::SetMetaContext, &MetaContextPayload::build(name, queries))
    }

    fn list_meta_context(self, name: &str, queries: &[&str]) -> Self {
        self.option(OptionCode::ListMetaContext, &MetaContextPayload::build(name, queries))
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The conversation with a server that offers everything.
    fn talk(&self) -> Talk {
        self.talk_to(Knobs::default())
    }

    fn talk_to(&self, knobs: Knobs) -> Talk {
        self.talk_in_pieces(knobs, std::iter::repeat(usize::MAX))
    }

    /// The conversation with its input cut into pieces of these lengths.
    fn talk_in_pieces(&self, knobs: Knobs, lengths: impl IntoIterator<Item = usize>) -> Talk {
        let world = World::default();
        let mut handshake = Handshake::new(knobs);
        let mut lengths = lengths.into_iter();
        let (mut output, mut taken) = (Vec::new(), 0);
        let progress = loop {
            let rest = &self.0[taken..];
            let piece = &rest[..rest.len().min(lengths.next().unwrap_or(usize::MAX))];
            let (consumed, progress) = handshake.receive(&world, piece, &mut output);
            assert!(consumed <= piece.len());
            taken += consumed;
            if !matches!(progress, Progress::More) {
                break progress;
            }
            assert_eq!(consumed, piece.len(), "more is wanted, so everything was taken");
            if taken == self.0.len() {
                break progress;
            }
        };
        let ending = match progress {
            Progress::More => Ending::More,
            Progress::StartTls => Ending::StartTls,
            Progress::Closed => Ending::Closed(handshake.close_reason().unwrap().clone()),
            Progress::Ready { export, info, negotiated } => Ending::Ready { export, info, negotiated },
            Progress::Elsewhere { side, agreed, option } => Ending::Elsewhere { side, agreed, option },
        };
        if !matches!(ending, Ending::More | Ending::StartTls) {
            let again = handshake.receive(&world, b"IHAVEOPT", &mut output);
            assert!(matches!(again, (0, Progress::Closed)), "what is over stays over");
        }
        Talk { output, taken, ending, opened: world.opened.into_inner() }
    }
}

/// A conversation that was had.
#[derive(Debug, PartialEq)]
struct Talk {
    output: Vec<u8>,
    taken: usize,
    ending: Ending,
    opened: Vec<String>,
}

#[derive(Debug, PartialEq)]
enum Ending {
    More,
    StartTls,
    Closed(CloseReason),
    Ready { export: String, info: ExportInfo, negotiated: Negotiated },
    Elsewhere { side: Side, agreed: Agreed, option: Vec<u8> },
}

impl Talk {
    /// Everything that came back, as option replies.
    fn replies(&self) -> Vec<(OptionCode, Reply, Vec<u8>)> {
        let mut replies = Vec::new();
        let mut rest = &self.output[..];
        while !rest.is_empty() {
            let (header, behind) = rest.split_first_chunk().expect("a whole header");
            let header = OptionReplyHeader::parse(header).unwrap();
            let (payload, behind) = behind.split_at(header.length.try_into().unwrap());
            replies.push((header.option, header.reply, payload.to_vec()));
            rest = behind;
        }
        replies
    }

    /// The types of everything that came back.
    fn types(&self) -> Vec<Reply> {
        self.replies().into_iter().map(|(_, reply, _)| reply).collect()
    }

    /// The text of the last reply, which must be an error.
    fn message(&self) -> String {
        let (_, reply, payload) = self.replies().pop().unwrap();
        assert!(reply.is_error());
        String::from_utf8(payload).unwrap()
    }

    fn negotiated(&self) -> &Negotiated {
        let Ending::Ready { negotiated, .. } = &self.ending else { panic!("not ready: {self:?}") };
        negotiated
    }

    fn reason(&self) -> &CloseReason {
        let Ending::Closed(reason) = &self.ending else { panic!("not closed: {self:?}") };
        reason
    }

    /// Asserts that the connection would still answer options.
    fn assert_usable(&self) {
        assert_eq!(self.ending, Ending::More);
    }
}
