//! Every number of the NBD protocol, in the order of its specification (`doc/proto.md`), one line each.
//!
//! The names are the specification's without their `NBD_` prefix. Values that the specification reserves for an
//! extension are here too, so that they are recognised by name and answered as unsupported.

// Magic numbers.

/// First magic of the greeting, the letters `NBDMAGIC` (also called `INIT_PASSWD`).
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the newstyle greeting and first field of every option, the letters `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First field of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First field of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First field of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First field of every structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First field of a request with an extended header (extension).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First field of a reply chunk with an extended header (extension).
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

// Limits that the specification itself sets.

/// The IANA-registered TCP port.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest string (export name, description, message, query) in bytes.
pub const MAX_STRING: usize = 4096;
/// Zeroes behind the reply to `OPT_EXPORT_NAME`, in bytes, unless the client asked for none.
pub const EXPORT_NAME_PADDING: usize = 124;
/// Largest payload, in bytes, that a client may send or ask for when no other maximum was agreed on.
pub const DEFAULT_MAX_PAYLOAD: u32 = 1 << 25;
/// Longest read, in bytes, that must be answered in one content chunk when the client asks for it (DF).
pub const MIN_DF_READ: u32 = 1 << 16;
/// Most block descriptors that one chunk should carry.
pub const MAX_BLOCK_DESCRIPTORS: usize = 1 << 20;

// Metadata contexts.

/// The namespace that the specification defines, with its colon; alone it is a wildcard in a list query.
pub const META_NAMESPACE_BASE: &str = "base:";
/// The one metadata context that the specification defines.
pub const META_NAME_BASE_ALLOCATION: &str = "base:allocation";
/// The metadata context of memdev's own: what the session wrote.
pub const META_NAME_MEMDEV_DIRTY: &str = "memdev:dirty";
/// The number by which block status names `base:allocation` here; the specification leaves it to the server.
pub const META_CONTEXT_BASE_ALLOCATION: u32 = 1;
/// The number by which block status names `memdev:dirty`.
pub const META_CONTEXT_MEMDEV_DIRTY: u32 = 2;
/// `base:allocation`, bit 0: nothing is allocated behind this extent.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`, bit 1: this extent reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// `memdev:dirty`, bit 0: the session wrote these blocks; they are no longer the base image's.
pub const DIRTY_WRITTEN: u32 = 1 << 0;
/// `memdev:dirty`, bit 1, only beside bit 0: what it wrote reads as zeroes, and takes no memory.
pub const DIRTY_ZERO: u32 = 1 << 1;

// Handshake flags (16 bits, server to client).

/// The server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// The server can leave out the zeroes behind the reply to `OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

// Client flags (32 bits, client to server).

/// The client speaks fixed newstyle.
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// The client wants no zeroes behind the reply to `OPT_EXPORT_NAME`.
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

// Transmission flags (16 bits, server to client).

/// Always set.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Every write to the export will be refused.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// The server understands `CMD_FLUSH`.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// The server understands `CMD_FLAG_FUA`.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// The export behaves as a rotating medium.
pub const FLAG_ROTATIONAL: u16 = 1 << 4;
/// The server understands `CMD_TRIM`.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// The server understands `CMD_WRITE_ZEROES` and `CMD_FLAG_NO_HOLE`.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// The server understands `CMD_FLAG_DF`; only after structured replies were negotiated.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// What one connection flushed is seen by all connections to the same export.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// The server understands `CMD_RESIZE` (extension).
pub const FLAG_SEND_RESIZE: u16 = 1 << 9;
/// The server understands `CMD_CACHE`.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// The server understands `CMD_FLAG_FAST_ZERO`.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// The server understands `CMD_BLOCK_STATUS` with a payload (extended headers extension).
pub const FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

// Options (32 bits).

/// Choose an export and enter the transmission phase; cannot be refused but by hanging up.
pub const OPT_EXPORT_NAME: u32 = 1;
/// End the session.
pub const OPT_ABORT: u32 = 2;
/// List the exports.
pub const OPT_LIST: u32 = 3;
/// Withdrawn, not in use.
pub const OPT_PEEK_EXPORT: u32 = 4;
/// Upgrade the connection to TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Describe an export.
pub const OPT_INFO: u32 = 6;
/// Describe an export and enter the transmission phase.
pub const OPT_GO: u32 = 7;
/// Use structured replies in the transmission phase.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// List the metadata contexts of an export.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Select metadata contexts of an export.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Use extended headers in the transmission phase (extension).
pub const OPT_EXTENDED_HEADERS: u32 = 11;

// Option reply types (32 bits).

/// Accepted, nothing more to say.
pub const REP_ACK: u32 = 1;
/// One export of the list.
pub const REP_SERVER: u32 = 2;
/// One piece of information on an export.
pub const REP_INFO: u32 = 3;
/// One metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Bit 31: set in every error.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// The server does not know this option.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR + 1;
/// The server is told not to do this.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR + 2;
/// The option's data is malformed, or the option makes no sense here.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR + 3;
/// The server cannot do this on its platform.
pub const REP_ERR_PLATFORM: u32 = REP_FLAG_ERROR + 4;
/// Nothing goes on without TLS.
pub const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR + 5;
/// The export does not exist.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR + 6;
/// The server is shutting down.
pub const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR + 7;
/// The client must ask for the block sizes first.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_FLAG_ERROR + 8;
/// The request, or its reply, is too large.
pub const REP_ERR_TOO_BIG: u32 = REP_FLAG_ERROR + 9;
/// The client must negotiate extended headers first (extension).
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_FLAG_ERROR + 10;

// Information types (16 bits), asked for in `OPT_INFO` and `OPT_GO`, given in `REP_INFO`.

/// Size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// The canonical name.
pub const INFO_NAME: u16 = 1;
/// The description.
pub const INFO_DESCRIPTION: u16 = 2;
/// Minimum and preferred block size, maximum payload.
pub const INFO_BLOCK_SIZE: u16 = 3;

// Command flags (16 bits).

/// Reply only when what was written is as lasting as a flush makes it.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Write zeroes without making a hole.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Answer a read with one content chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Answer with one extent for each metadata context.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Fail rather than write zeroes no faster than a plain write would.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// A payload follows the request (extended headers extension).
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

// Structured reply flags (16 bits).

/// The last chunk of this reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

// Structured reply types (16 bits).

/// No payload; the last chunk of a reply that has nothing more to say.
pub const REPLY_TYPE_NONE: u16 = 0;
/// Content: an offset and the bytes there.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Content: an offset and how many bytes there are zero.
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Block descriptors of one metadata context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Block descriptors with 64-bit lengths (extended headers extension).
pub const REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Bit 15: set in every error chunk.
pub const REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// An error of the whole request.
pub const REPLY_TYPE_ERROR: u16 = REPLY_TYPE_FLAG_ERROR + 1;
/// An error at an offset.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = REPLY_TYPE_FLAG_ERROR + 2;

// Request types (16 bits).

/// Read `length` bytes at `offset`.
pub const CMD_READ: u16 = 0;
/// Write the `length` bytes that follow at `offset`.
pub const CMD_WRITE: u16 = 1;
/// Soft disconnect; there is no reply.
pub const CMD_DISC: u16 = 2;
/// Make all writes that were replied to lasting.
pub const CMD_FLUSH: u16 = 3;
/// The range is no longer needed.
pub const CMD_TRIM: u16 = 4;
/// The range will be needed soon.
pub const CMD_CACHE: u16 = 5;
/// Write zeroes without sending them.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Ask for the selected metadata contexts of a range.
pub const CMD_BLOCK_STATUS: u16 = 7;
/// Change the size of the export (extension).
pub const CMD_RESIZE: u16 = 8;

// Error values (32 bits).

/// Operation not permitted.
pub const EPERM: u32 = 1;
/// Input/output error.
pub const EIO: u32 = 5;
/// Cannot allocate memory.
pub const ENOMEM: u32 = 12;
/// Invalid argument.
pub const EINVAL: u32 = 22;
/// No space left on device.
pub const ENOSPC: u32 = 28;
/// Value too large.
pub const EOVERFLOW: u32 = 75;
/// Operation not supported.
pub const ENOTSUP: u32 = 95;
/// Server is in the process of being shut down.
pub const ESHUTDOWN: u32 = 108;
