//! The handshake: from the first byte of a connection to an immutable [`Negotiated`].
//!
//! ```text
//!   greeting >    < client flags    < option ... reply >  (any number)    < GO ... export information >    transmission
//!                                     < STARTTLS ... ack > makes the haggling begin anew, over TLS
//! ```
//!
//! [`Handshake`] is a state machine without I/O: bytes of the client go in, in whatever pieces they came, bytes for the
//! client come out. What came out is the same however the input was cut. It knows neither sockets nor sessions nor
//! images: what exports there are it asks an [`Environment`].
//!
//! Every option but those that end the handshake gets a final reply, an error if need be, and leaves the stream in step:
//! its payload has been read to the end, whatever its length. Memory is bounded by [`MAX_OPTION_LENGTH`] for what comes in
//! and [`MAX_REPLY_BYTES`] for what goes out, whatever a client says. A client that exceeds what one handshake may
//! reasonably need is hung up on.
//!
//! It uses [`crate::proto`] and nothing else of this crate.

mod contexts;
mod haggling;
mod machine;
#[cfg(test)]
mod tests;

pub use crate::proto::BlockSizes;
pub use contexts::{ContextSet, KnownContext};
pub use machine::Handshake;

use crate::proto::{BadMagic, ClientFlags, Malformed, OptionCode, TransmissionFlags};
use serde::{Deserialize, Serialize};

/// Longest payload, in bytes, of an option that is read as a whole: room for an export name and hundreds of queries.
/// A longer one is drained and refused.
pub const MAX_OPTION_LENGTH: u32 = 32 * 1024;
/// Most bytes of refused payloads that are drained in one handshake, before it is taken for an attack.
pub const MAX_DRAINED_BYTES: u64 = 64 * 1024 * 1024;
/// Most options in one handshake.
pub const MAX_OPTIONS: u32 = 1000;
/// Most bytes of replies in one handshake, beyond which no further option is answered.
pub const MAX_REPLY_BYTES: usize = 4 * 1024 * 1024;

/// What a client is told about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The canonical name, as the list has it.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// What the export can do. `SEND_DF` and `BLOCK_STATUS_PAYLOAD` are added here when what they need is negotiated, and
    /// taken away otherwise.
    pub flags: TransmissionFlags,
    /// The size constraints advertised.
    pub block_sizes: BlockSizes,
}

/// Why an export cannot be had. The text goes to the client, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such export.
    Unknown,
    /// There is, but not for this client, or not now.
    Policy(String),
    /// The server is shutting down.
    Shutdown,
    /// The name makes no sense.
    Invalid(String),
    /// It is another server's, to whom the connection is to be handed.
    Elsewhere(Side),
}

/// Which other server: see [`crate::takeover`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that was here before, and still has some sessions.
    Before,
    /// The one that has taken this one's place.
    After,
}

/// What a client that has opened no export yet has agreed on, for another server to go on with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The client's flags.
    pub flags: u32,
    /// Structured replies.
    pub structured_replies: bool,
    /// Extended headers.
    pub extended_headers: bool,
    /// The export for which metadata contexts were selected,
    pub selected_for: Option<String>,
    /// and their numbers.
    pub contexts: Vec<u32>,
    /// The image that the client came to as the first, so that `@ID` is the same session wherever the connection goes. Said by
    /// whoever hands it over.
    #[serde(default)]
    pub first: Option<String>,
}

/// What the handshake needs to know of the world.
pub trait Environment {
    /// What [`Environment::open`] gives, handed through in [`Progress::Ready`].
    type Export;

    /// The exports to tell a client of: names and descriptions.
    fn list(&self) -> Vec<(String, String)>;

    /// What would be told about the export that a client calls `name`; has no effect.
    ///
    /// # Errors
    /// Why the client may not have it.
    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal>;

    /// The export that a client calls `name`, for the transmission phase. Its information must be what
    /// [`Environment::describe`] says at the same moment.
    ///
    /// # Errors
    /// Why the client may not have it.
    fn open(&self, name: &str) -> Result<(ExportInfo, Self::Export), Refusal>;
}

/// What was agreed on. Made once, then immutable. The default is what holds for a client that asked for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The name by which the client asked for its export.
    pub export_name: String,
    /// Reads are answered by reply chunks, structured or extended; everything else may be.
    pub structured_replies: bool,
    /// All headers are extended, in requests and in replies; never without `structured_replies`.
    pub extended_headers: bool,
    /// The metadata contexts that block status tells of. Without any it may not be asked for.
    pub contexts: ContextSet,
}

/// What the server does about `OPT_STARTTLS`, and before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// There is no TLS: the specification's mode NOTLS.
    #[default]
    Off,
    /// Clients may have it: the mode SELECTIVETLS, with no export that demands it.
    Allow,
    /// Without it nothing is told and nothing served: the mode FORCEDTLS.
    Require,
}

/// What a server offers in the handshake; masking a feature lets tests see a client, or this server, do without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// Handshake flags that may be offered; all others are withheld.
    pub handshake_flags_mask: u16,
    /// Whether structured replies, and with them extended headers and metadata contexts, may be negotiated.
    pub structured_replies: bool,
    /// What to do about TLS.
    pub tls: TlsPolicy,
    /// Whether extended headers may be negotiated.
    pub extended_headers: bool,
}

impl Default for Knobs {
    /// Everything that is supported.
    fn default() -> Self {
        Self {
            handshake_flags_mask: u16::MAX,
            structured_replies: true,
            tls: TlsPolicy::Off,
            extended_headers: true,
        }
    }
}

/// Where the handshake stands after some input.
#[derive(Debug)]
pub enum Progress<E> {
    /// It goes on when more input comes.
    More,
    /// It is over: send the output, then the rest of the input belongs to the transmission phase.
    Ready {
        /// What [`Environment::open`] gave.
        export: E,
        /// What the client was told, final flags included.
        info: ExportInfo,
        /// What was agreed on.
        negotiated: Negotiated,
    },
    /// The client was told to begin TLS: send the output as it is, then have TLS, then go on. The rest of the input was
    /// sent before TLS was there, and must never be taken for something that came through it.
    StartTls,
    /// The client names what is another server's: send the output, then hand over the connection, with this and all of the input
    /// that was not taken. The handshake is over here.
    Elsewhere {
        /// Whose.
        side: Side,
        /// What was agreed on.
        agreed: Agreed,
        /// The option in which it was named.
        option: Vec<u8>,
    },
    /// It is over: send the output, then hang up. [`Handshake::close_reason`] says why.
    Closed,
}

/// Why the handshake ended without a transmission phase; a line for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client wanted no more.
    #[error("Client ended the handshake")]
    Aborted,
    /// An option does not begin with its magic: not an NBD client, or out of step.
    #[error(transparent)]
    BadMagic(#[from] BadMagic),
    /// The client set flags that were not offered.
    #[error("Client flags {0:?} were not offered")]
    ClientFlags(ClientFlags),
    /// A client without fixed newstyle may send nothing but an export name.
    #[error("Client without fixed newstyle sent option {0:?}")]
    NotFixedNewstyle(OptionCode),
    /// `OPT_EXPORT_NAME` cannot be refused but by hanging up.
    #[error("Export {name:?} refused: {refusal}")]
    ExportRefused {
        /// What the client asked for.
        name: String,
        /// Why it cannot have it.
        refusal: Refusal,
    },
    /// `OPT_EXPORT_NAME` after extended headers were agreed on, which the specification forbids.
    #[error("Client asked for an export by EXPORT_NAME after it agreed on extended headers")]
    ExportNameWithExtendedHeaders,
    /// `OPT_EXPORT_NAME` with something that is no name.
    #[error("Malformed export name: {0}")]
    MalformedExportName(Malformed),
    /// A client that names its export in plain text where TLS is demanded, which cannot be refused but by hanging up.
    #[error("Export asked for in plain text, and TLS is demanded")]
    PlainText,
    /// More than [`MAX_OPTIONS`].
    #[error("More than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// More than [`MAX_DRAINED_BYTES`].
    #[error("More than {MAX_DRAINED_BYTES} bytes in oversized options")]
    TooMuchData,
    /// More than [`MAX_REPLY_BYTES`].
    #[error("More than {MAX_REPLY_BYTES} bytes of replies")]
    TooManyReplies,
}

impl std::fmt::Display for Refusal {
    /// As the client is told.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => f.write_str("no such export"),
            Self::Shutdown => f.write_str("server is shutting down"),
            Self::Policy(why) | Self::Invalid(why) => f.write_str(why),
            Self::Elsewhere(Side::Before) => f.write_str(
                "this session is with a server that is being replaced, which can be entered by connections without TLS only; \
                 try again when it has ended",
            ),
            Self::Elsewhere(Side::After) => f.write_str("this server is being replaced; connect again"),
        }
    }
}
