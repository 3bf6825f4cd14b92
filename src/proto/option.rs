//! Option haggling: the options that a client sends, the replies that it gets, and the payloads of both.

use super::constants::*;
use super::fields::{Fields, Malformed, clip, field, length_u32, put, wire_enum};
use super::greeting::TransmissionFlags;
use super::request::BadMagic;

wire_enum! {
    /// What an option is about ("Option types").
    OptionCode: u32 {
        ExportName = OPT_EXPORT_NAME,
        Abort = OPT_ABORT,
        List = OPT_LIST,
        PeekExport = OPT_PEEK_EXPORT,
        StartTls = OPT_STARTTLS,
        Info = OPT_INFO,
        Go = OPT_GO,
        StructuredReply = OPT_STRUCTURED_REPLY,
        ListMetaContext = OPT_LIST_META_CONTEXT,
        SetMetaContext = OPT_SET_META_CONTEXT,
        ExtendedHeaders = OPT_EXTENDED_HEADERS,
    }
}

/// The header of an option, client to server; `length` bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: OptionCode,
    /// Length of its payload in bytes.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire, without the payload.
    pub const SIZE: usize = 16;

    /// Reads the header of an option.
    ///
    /// # Errors
    /// The magic is wrong; nothing behind it can be trusted to be an option.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u64(OPTION_MAGIC, field(bytes, 0))?;
        Ok(Self {
            option: OptionCode::from(u32::from_be_bytes(field(bytes, 8))),
            length: u32::from_be_bytes(field(bytes, 12)),
        })
    }

    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &OPTION_MAGIC.to_be_bytes());
        put(&mut bytes, 8, &u32::from(self.option).to_be_bytes());
        put(&mut bytes, 12, &self.length.to_be_bytes());
        bytes
    }
}

wire_enum! {
    /// What an option reply says ("Option reply types").
    OptionReplyType: u32 {
        Ack = REP_ACK,
        Server = REP_SERVER,
        Info = REP_INFO,
        MetaContext = REP_META_CONTEXT,
        ErrUnsup = REP_ERR_UNSUP,
        ErrPolicy = REP_ERR_POLICY,
        ErrInvalid = REP_ERR_INVALID,
        ErrPlatform = REP_ERR_PLATFORM,
        ErrTlsReqd = REP_ERR_TLS_REQD,
        ErrUnknown = REP_ERR_UNKNOWN,
        ErrShutdown = REP_ERR_SHUTDOWN,
        ErrBlockSizeReqd = REP_ERR_BLOCK_SIZE_REQD,
        ErrTooBig = REP_ERR_TOO_BIG,
        ErrExtHeaderReqd = REP_ERR_EXT_HEADER_REQD,
    }
}

impl OptionReplyType {
    /// Whether the option failed; then the payload is a message for people.
    #[must_use]
    pub fn is_error(self) -> bool {
        u32::from(self) & REP_FLAG_ERROR != 0
    }
}

/// The header of an option reply, server to client; `length` bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that this replies to.
    pub option: OptionCode,
    /// What it says.
    pub reply: OptionReplyType,
    /// Length of its payload in bytes.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire, without the payload.
    pub const SIZE: usize = 20;

    /// Reads the header of an option reply.
    ///
    /// # Errors
    /// The magic is wrong.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u64(OPTION_REPLY_MAGIC, field(bytes, 0))?;
        Ok(Self {
            option: OptionCode::from(u32::from_be_bytes(field(bytes, 8))),
            reply: OptionReplyType::from(u32::from_be_bytes(field(bytes, 12))),
            length: u32::from_be_bytes(field(bytes, 16)),
        })
    }

    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &OPTION_REPLY_MAGIC.to_be_bytes());
        put(&mut bytes, 8, &u32::from(self.option).to_be_bytes());
        put(&mut bytes, 12, &u32::from(self.reply).to_be_bytes());
        put(&mut bytes, 16, &self.length.to_be_bytes());
        bytes
    }
}

/// Appends a whole option reply. An error's `payload` is its message, fit to be shown to a person.
///
/// # Panics
/// `payload` is 4 GiB or longer.
pub fn append_option_reply(out: &mut Vec<u8>, option: OptionCode, reply: OptionReplyType, payload: &[u8]) {
    out.extend_from_slice(&OptionReplyHeader { option, reply, length: length_u32(payload.len()) }.encode());
    out.extend_from_slice(payload);
}

/// The payload of `REP_SERVER`: one export of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportEntry<'a> {
    /// The name by which it can be asked for.
    pub name: &'a str,
    /// What to tell people about it; may be empty.
    pub description: &'a str,
}

impl<'a> ExportEntry<'a> {
    /// Reads the payload.
    ///
    /// # Errors
    /// The name does not fit in the payload, or one of the strings is none.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let name = fields.counted_string()?;
        let length = payload.len() - 4 - name.len();
        Ok(Self { name, description: fields.string(length)? })
    }

    /// Its bytes on the wire; strings are clipped to what the specification allows.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        append_counted_string(&mut out, self.name);
        out.extend_from_slice(clip(self.description).as_bytes());
        out
    }
}

wire_enum! {
    /// What a piece of information is about ("NBD_REP_INFO").
    InfoType: u16 {
        Export = INFO_EXPORT,
        Name = INFO_NAME,
        Description = INFO_DESCRIPTION,
        BlockSize = INFO_BLOCK_SIZE,
    }
}

/// The payload of `OPT_INFO` and `OPT_GO`: an export's name and what the client wants to know about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoPayload<'a> {
    /// The export asked for; empty for the default one.
    pub name: &'a str,
    requests: &'a [u8],
}

impl<'a> InfoPayload<'a> {
    /// Reads the payload.
    ///
    /// # Errors
    /// It is shorter or longer than its contents, or the name is no string.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let name = fields.counted_string()?;
        let count = fields.u16()?;
        let requests = fields.bytes(usize::from(count) * 2)?;
        fields.end()?;
        Ok(Self { name, requests })
    }

    /// What is asked for, in the client's order, unknown types too.
    pub fn requests(&self) -> impl Iterator<Item = InfoType> + use<'a> {
        self.requests.chunks_exact(2).map(|bytes| InfoType::from(u16::from_be_bytes(field(bytes, 0))))
    }

    /// Whether `wanted` is asked for.
    #[must_use]
    pub fn requests_info(&self, wanted: InfoType) -> bool {
        self.requests().any(|request| request == wanted)
    }

    /// The bytes of such a payload; the name is clipped, and at most 65,535 requests are sent.
    #[must_use]
    pub fn build(name: &str, requests: &[InfoType]) -> Vec<u8> {
        let count = u16::try_from(requests.len()).unwrap_or(u16::MAX);
        let mut out = Vec::new();
        append_counted_string(&mut out, name);
        out.extend_from_slice(&count.to_be_bytes());
        for &request in &requests[..usize::from(count)] {
            out.extend_from_slice(&u16::from(request).to_be_bytes());
        }
        out
    }
}

/// The size constraints of an export ("Size constraints"), all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest unit and alignment of a request: a power of two, 1 to 65,536.
    pub minimum: u32,
    /// Unit of efficient requests: a power of two, at least 512 and `minimum`.
    pub preferred: u32,
    /// Largest payload of one request: at least `preferred`.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What holds when nothing was agreed on.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: DEFAULT_MAX_PAYLOAD }
    }
}

/// The payload of `REP_INFO`: one piece of information on an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InfoItem<'a> {
    /// What every client must know.
    Export {
        /// Size in bytes.
        size: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(&'a str),
    /// What to tell people about it.
    Description(&'a str),
    /// Its size constraints.
    BlockSize(BlockSizes),
    /// A type that the specification does not define, and its data.
    Other(u16, &'a [u8]),
}

impl<'a> InfoItem<'a> {
    /// Reads the payload.
    ///
    /// # Errors
    /// It is not as long as its type demands, or a string is none.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let kind = InfoType::from(fields.u16()?);
        match kind {
            InfoType::Name => Ok(Self::Name(fields.string(payload.len() - 2)?)),
            InfoType::Description => Ok(Self::Description(fields.string(payload.len() - 2)?)),
            InfoType::Other(kind) => Ok(Self::Other(kind, fields.rest())),
            InfoType::Export => {
                let item = Self::Export { size: fields.u64()?, flags: TransmissionFlags(fields.u16()?) };
                fields.end().map(|()| item)
            }
            InfoType::BlockSize => {
                let sizes =
                    BlockSizes { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? };
                fields.end().map(|()| Self::BlockSize(sizes))
            }
        }
    }

    /// Its bytes on the wire; strings are clipped to what the specification allows.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match *self {
            Self::Export { size, flags } => {
                out.extend_from_slice(&INFO_EXPORT.to_be_bytes());
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&flags.0.to_be_bytes());
            }
            Self::Name(name) => {
                out.extend_from_slice(&INFO_NAME.to_be_bytes());
                out.extend_from_slice(clip(name).as_bytes());
            }
            Self::Description(description) => {
                out.extend_from_slice(&INFO_DESCRIPTION.to_be_bytes());
                out.extend_from_slice(clip(description).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
                for size in [sizes.minimum, sizes.preferred, sizes.maximum] {
                    out.extend_from_slice(&size.to_be_bytes());
                }
            }
            Self::Other(kind, data) => {
                out.extend_from_slice(&kind.to_be_bytes());
                out.extend_from_slice(data);
            }
        }
        out
    }
}

/// The payload of `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`: an export's name and queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaContextPayload<'a> {
    /// The export asked for; empty for the default one.
    pub export_name: &'a str,
    /// Every query was read once, so that they can be handed out without an error.
    queries: &'a [u8],
}

impl<'a> MetaContextPayload<'a> {
    /// Reads the payload.
    ///
    /// # Errors
    /// It is shorter or longer than its contents, or one of the strings is none.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let export_name = fields.counted_string()?;
        let count = fields.u32()?;
        let queries = fields.clone().rest();
        // A count of billions ends here as soon as the payload does: a query takes four bytes at least.
        for _ in 0..count {
            fields.counted_string()?;
        }
        fields.end()?;
        Ok(Self { export_name, queries })
    }

    /// The queries in the client's order, whatever their namespace; empty when there are none.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut fields = Fields::new(self.queries);
        std::iter::from_fn(move || fields.counted_string().ok())
    }

    /// Whether there is no query at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    /// The bytes of such a payload; strings are clipped.
    #[must_use]
    pub fn build(export_name: &str, queries: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        append_counted_string(&mut out, export_name);
        out.extend_from_slice(&length_u32(queries.len()).to_be_bytes());
        for query in queries {
            append_counted_string(&mut out, query);
        }
        out
    }
}

/// The payload of `REP_META_CONTEXT`: one metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaContext<'a> {
    /// By which number block status names it; 0 when only listed.
    pub id: u32,
    /// Namespace, colon, leaf name.
    pub name: &'a str,
}

impl<'a> MetaContext<'a> {
    /// Reads the payload.
    ///
    /// # Errors
    /// It is too short, or the name is no string.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let id = fields.u32()?;
        Ok(Self { id, name: fields.string(payload.len() - 4)? })
    }

    /// Its bytes on the wire; the name is clipped.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.id.to_be_bytes().to_vec();
        out.extend_from_slice(clip(self.name).as_bytes());
        out
    }
}

fn append_counted_string(out: &mut Vec<u8>, text: &str) {
    let text = clip(text);
    out.extend_from_slice(&length_u32(text.len()).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
#[path = "option_tests.rs"]
mod tests;
