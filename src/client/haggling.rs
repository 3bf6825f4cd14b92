//! The handshake from the client's side: greeting and option haggling.

use std::io::{Read, Write};

use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::net::tls::ClientTls;
use crate::proto::{
    self, BlockSizes, ClientFlags, EXPORT_NAME_PADDING, ExportEntry, ExportNameReply, Greeting,
    HandshakeFlags, InfoItem, InfoPayload, InfoType, MetaContextPayload, OptionCode, OptionHeader,
    OptionReplyHeader, OptionReplyType, TransmissionFlags,
};

use super::socket::{Socket, broken};
use super::transmission::Client;

/// The longest option reply: two strings of the longest kind and some numbers, and room for servers that are generous.
const MAX_REPLY: u32 = 64 << 10;

/// The most replies to one option: an export each.
const MAX_REPLIES: usize = 100_000;

/// One export of a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name to ask for.
    pub name: String,
    /// What the server tells people about it; may be empty.
    pub description: String,
}

/// What a server says about one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its canonical name, or else the one that was asked for.
    pub name: String,
    /// What the server tells people about it, if it does.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// Its size constraints, if the server says any; else [`BlockSizes::default`] holds.
    pub block_sizes: Option<BlockSizes>,
}

/// A metadata context, and the number by which block status names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// The number; without meaning when the context was only listed.
    pub id: u32,
    /// As `base:allocation`.
    pub name: String,
}

/// A connection in the handshake phase, in which a client asks and chooses.
pub struct Haggling {
    socket: Socket,
    no_zeroes: bool,
    secure: bool,
    structured_replies: bool,
    contexts: Vec<MetaContext>,
}

impl Haggling {
    /// Connects to the server that `uri` names and agrees on fixed newstyle, on TLS if the URI demands it, and on
    /// structured replies if the server has them. The URI's export is not asked for yet.
    ///
    /// # Errors
    /// Nobody answers there, or it is no NBD server, or one that speaks an older protocol; it has no TLS, or is not who
    /// it should be, or demands TLS that the URI does not.
    pub fn connect(uri: &Uri) -> Result<Self> {
        // Its files first: nobody need be bothered when they are not there.
        let tls = uri.tls.as_ref().map(|tls| ClientTls::load(tls, &uri.address)).transpose()?;
        let socket = Socket::connect(&uri.address)?;
        Self::begin(socket, tls.as_ref())
            .map_err(|error| error.on(format!("({})", uri.address.uri(tls.is_some()))))
    }

    /// The same over `transport`, a connection that exists already.
    ///
    /// # Errors
    /// As [`Haggling::connect`].
    pub fn over(transport: impl Read + Write + Send + 'static) -> Result<Self> {
        Self::begin(Socket::new(transport), None)
    }

    /// The same over `transport`, without asking for structured replies: as the kernel's own client speaks.
    ///
    /// # Errors
    /// As [`Haggling::connect`].
    pub fn simple_over(transport: impl Read + Write + Send + 'static) -> Result<Self> {
        Self::greet(Socket::new(transport), None)
    }

    fn begin(socket: Socket, tls: Option<&ClientTls>) -> Result<Self> {
        let mut haggling = Self::greet(socket, tls)?;
        let answer = haggling.ask(OptionCode::StructuredReply, &[], |reply, _| Err(unexpected(reply)))?;
        haggling.structured_replies = match answer {
            Ok(()) => true,
            Err(refusal) if refusal.reply == OptionReplyType::ErrTlsReqd => return Err(refusal.into()),
            Err(_) => false,
        };
        Ok(haggling)
    }

    fn greet(mut socket: Socket, tls: Option<&ClientTls>) -> Result<Self> {
        let greeting = Greeting::parse(&socket.receive_array()?).map_err(|_| {
            Error::new(ErrorKind::Protocol, "This is no NBD server, or one of the oldstyle protocol")
        })?;
        if !greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(Error::new(ErrorKind::Unsupported, "The server does not speak fixed newstyle")
                .advise("use a newer server"));
        }
        let no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::FIXED_NEWSTYLE;
        if no_zeroes {
            flags = flags.union(ClientFlags::NO_ZEROES);
        }
        socket.send(&flags.bits().to_be_bytes())?;
        let mut haggling =
            Self { socket, no_zeroes, secure: false, structured_replies: false, contexts: Vec::new() };
        if let Some(tls) = tls {
            haggling.start_tls(tls)?;
        }
        Ok(haggling)
    }

    /// Before anything else, so that nobody on the way gets to hear or to say any of it.
    fn start_tls(&mut self, tls: &ClientTls) -> Result<()> {
        self.ask(OptionCode::StartTls, &[], |reply, _| Err(unexpected(reply)))??;
        self.socket.secure(tls)?;
        self.secure = true;
        Ok(())
    }

    /// Whether the connection is over TLS.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// Whether the server agreed on structured replies.
    #[must_use]
    pub fn structured_replies(&self) -> bool {
        self.structured_replies
    }

    /// The exports that the server lists.
    ///
    /// # Errors
    /// The server refuses (its policy may be to list nothing) or the connection fails.
    pub fn list(&mut self) -> Result<Vec<ListedExport>> {
        let mut exports = Vec::new();
        self.ask(OptionCode::List, &[], |reply, payload| {
            if reply != OptionReplyType::Server {
                return Err(unexpected(reply));
            }
            let entry =
                ExportEntry::parse(payload).map_err(|error| broken(format!("lists badly: {error}")))?;
            exports.push(ListedExport { name: entry.name.into(), description: entry.description.into() });
            Ok(())
        })??;
        Ok(exports)
    }

    /// What the server says about export `name`, which is not opened by that.
    ///
    /// # Errors
    /// `NotFound` if it has no such export, `Unsupported` if it cannot be asked; or the connection fails.
    pub fn info(&mut self, name: &str) -> Result<Export> {
        Ok(self.ask_export(OptionCode::Info, name)??)
    }

    /// The metadata contexts of export `name` that match `queries`; all that the server knows if there is no query.
    ///
    /// # Errors
    /// The server refuses or the connection fails.
    pub fn list_meta_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        self.ask_contexts(OptionCode::ListMetaContext, name, queries)
    }

    /// Selects metadata contexts of export `name`, for a [`Haggling::go`] to the same export; what was selected before
    /// is forgotten. Gives those that the server has.
    ///
    /// # Errors
    /// The server refuses or the connection fails.
    pub fn set_meta_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        self.contexts.clear();
        self.contexts = self.ask_contexts(OptionCode::SetMetaContext, name, queries)?;
        Ok(self.contexts.clone())
    }

    /// Opens export `name`. With a server too old for `GO` by `EXPORT_NAME`.
    ///
    /// # Errors
    /// `NotFound` if it has no such export, what else the server says, or the connection fails.
    pub fn go(mut self, name: &str) -> Result<Client> {
        let export = match self.ask_export(OptionCode::Go, name)? {
            Ok(export) => export,
            Err(refusal) if refusal.reply == OptionReplyType::ErrUnsup => self.export_name(name)?,
            Err(refusal) => return Err(refusal.into()),
        };
        Ok(Client::new(self.socket, export, self.structured_replies, self.contexts))
    }

    /// Ends the handshake without opening anything.
    ///
    /// # Errors
    /// The connection fails before the server could be told.
    pub fn abort(mut self) -> Result<()> {
        self.send_option(OptionCode::Abort, &[])?;
        // The acknowledgement is a courtesy: some servers hang up at once.
        let _ = self.socket.receive_array::<{ OptionReplyHeader::SIZE }>();
        Ok(())
    }

    fn export_name(&mut self, name: &str) -> Result<Export> {
        self.send_option(OptionCode::ExportName, name.as_bytes())?;
        let reply = self.socket.receive_array().map_err(|error| match error.kind() {
            // The only way this option has to say no is to hang up.
            ErrorKind::Io => Error::new(ErrorKind::NotFound, format!("The server has no export '{name}'")),
            _ => error,
        })?;
        let reply = ExportNameReply::parse(&reply);
        if !self.no_zeroes {
            self.socket.receive_array::<EXPORT_NAME_PADDING>()?;
        }
        let (size, flags) = (reply.size, reply.flags);
        Ok(Export { name: name.to_owned(), description: None, size, flags, block_sizes: None })
    }

    fn ask_export(&mut self, option: OptionCode, name: &str) -> Result<Result<Export, Refusal>> {
        check_name(name)?;
        let wanted = [InfoType::Name, InfoType::Description, InfoType::BlockSize];
        let mut canonical = None;
        let mut description = None;
        let mut block_sizes = None;
        let mut found = None;
        let answer = self.ask(option, &InfoPayload::build(name, &wanted), |reply, payload| {
            if reply != OptionReplyType::Info {
                return Err(unexpected(reply));
            }
            match InfoItem::parse(payload).map_err(|error| broken(format!("informs badly: {error}")))? {
                InfoItem::Export { size, flags } => found = Some((size, flags)),
                InfoItem::Name(name) => canonical = Some(name.to_owned()),
                InfoItem::Description(text) => description = Some(text.to_owned()),
                InfoItem::BlockSize(sizes) => block_sizes = Some(sizes),
                InfoItem::Other(..) => {}
            }
            Ok(())
        })?;
        if let Err(refusal) = answer {
            return Ok(Err(refusal));
        }
        let (size, flags) = found.ok_or_else(|| broken("says nothing about the export's size"))?;
        let name = canonical.unwrap_or_else(|| name.to_owned());
        Ok(Ok(Export { name, description, size, flags, block_sizes }))
    }

    fn ask_contexts(&mut self, option: OptionCode, name: &str, queries: &[&str]) -> Result<Vec<MetaContext>> {
        check_name(name)?;
        let mut contexts = Vec::new();
        self.ask(option, &MetaContextPayload::build(name, queries), |reply, payload| {
            if reply != OptionReplyType::MetaContext {
                return Err(unexpected(reply));
            }
            let context = proto::MetaContext::parse(payload)
                .map_err(|error| broken(format!("names contexts badly: {error}")))?;
            contexts.push(MetaContext { id: context.id, name: context.name.into() });
            Ok(())
        })??;
        Ok(contexts)
    }

    fn send_option(&mut self, option: OptionCode, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len())
            .map_err(|_| Error::new(ErrorKind::Invalid, "The option is too long"))?;
        let mut bytes = OptionHeader { option, length }.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.socket.send(&bytes)
    }

    /// Sends an option and hands each reply to `each` until the one that ends it: an acknowledgement or a refusal.
    fn ask(
        &mut self,
        option: OptionCode,
        payload: &[u8],
        mut each: impl FnMut(OptionReplyType, &[u8]) -> Result<()>,
    ) -> Result<Result<(), Refusal>> {
        self.send_option(option, payload)?;
        for _ in 0..MAX_REPLIES {
            let header = OptionReplyHeader::parse(&self.socket.receive_array()?)
                .map_err(|error| broken(format!("sends no option reply: {error}")))?;
            let payload = self.socket.receive_vec(header.length, MAX_REPLY)?;
            if header.option != option {
                return Err(broken("answers an option that was not asked"));
            }
            match header.reply {
                OptionReplyType::Ack => return Ok(Ok(())),
                reply if reply.is_error() => {
                    let message = String::from_utf8_lossy(&payload).replace(char::is_control, " ");
                    return Ok(Err(Refusal { option, reply, message: message.trim().to_owned() }));
                }
                reply => each(reply, &payload)?,
            }
        }
        Err(broken("does not stop to answer"))
    }
}

/// A server's no to an option.
#[derive(Debug)]
struct Refusal {
    option: OptionCode,
    reply: OptionReplyType,
    message: String,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let (kind, why, advice) = match refusal.reply {
            OptionReplyType::ErrUnknown => (
                ErrorKind::NotFound,
                "there is no such export",
                Some("list what there is with 'memdev info'"),
            ),
            OptionReplyType::ErrPolicy => (ErrorKind::Denied, "its policy forbids it", None),
            OptionReplyType::ErrTlsReqd => {
                (ErrorKind::Unsupported, "it demands TLS", Some("use nbds:// in the URI"))
            }
            OptionReplyType::ErrUnsup => (ErrorKind::Unsupported, "it does not know this option", None),
            OptionReplyType::ErrInvalid => (ErrorKind::Invalid, "it finds the option invalid", None),
            OptionReplyType::ErrTooBig => (ErrorKind::Invalid, "it finds the option too big", None),
            OptionReplyType::ErrPlatform => (ErrorKind::Unsupported, "its platform cannot do it", None),
            OptionReplyType::ErrShutdown => (ErrorKind::Shutdown, "it is shutting down", None),
            _ => (ErrorKind::Io, "it gives no reason known here", None),
        };
        let what = match refusal.option {
            OptionCode::StartTls => "TLS",
            OptionCode::List => "to list its exports",
            OptionCode::Info => "to describe the export",
            OptionCode::Go => "the export",
            OptionCode::ListMetaContext | OptionCode::SetMetaContext => "metadata contexts",
            _ => "the handshake",
        };
        let said =
            if refusal.message.is_empty() { String::new() } else { format!(" ('{}')", refusal.message) };
        let error = Self::new(kind, format!("The server refuses {what}: {why}{said}"));
        match advice {
            Some(advice) => error.advise(advice),
            None => error,
        }
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.len() > proto::MAX_STRING || name.contains('\0') {
        return Err(Error::new(ErrorKind::Invalid, "The name of the export is too long, or holds a NUL"));
    }
    Ok(())
}

fn unexpected(reply: OptionReplyType) -> Error {
    broken(format!("sends a reply that does not belong here ({reply:?})"))
}
