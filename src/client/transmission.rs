//! The transmission phase from the client's side: one request at a time.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::{
    BlockSizes, CHUNK_HEADER_SIZE, Chunk, ChunkHeader, Command, CommandFlags, Cookie, DEFAULT_MAX_PAYLOAD,
    Errno, REPLY_TYPE_OFFSET_DATA, ReplyKind, Request, SIMPLE_REPLY_SIZE, SimpleReply, TransmissionFlags,
};

use super::haggling::{Export, MetaContext};
use super::socket::{Socket, broken};

/// The longest chunk that is not data: the most block descriptors that a reply may have.
const MAX_CHUNK: u32 = 4 + 8 * (1 << 20);

/// A part of the export in one state of one metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The number of the metadata context, see [`Client::contexts`].
    pub context: u32,
    /// First byte.
    pub offset: u64,
    /// Length in bytes, not 0. The last extent may reach beyond the range that was asked for.
    pub length: u64,
    /// For `base:allocation`, [`STATE_HOLE`](crate::proto::STATE_HOLE) and [`STATE_ZERO`](crate::proto::STATE_ZERO); for
    /// `memdev:dirty`, [`DIRTY_WRITTEN`](crate::proto::DIRTY_WRITTEN) and [`DIRTY_ZERO`](crate::proto::DIRTY_ZERO).
    pub flags: u32,
}

/// A connection to one export. Dropping it is a hard disconnect, which takes effect just as well.
pub struct Client {
    socket: Socket,
    export: Export,
    structured_replies: bool,
    contexts: Vec<MetaContext>,
    last_cookie: u64,
}

impl Client {
    pub(super) fn new(
        socket: Socket,
        export: Export,
        structured_replies: bool,
        contexts: Vec<MetaContext>,
    ) -> Self {
        Self { socket, export, structured_replies, contexts, last_cookie: 0 }
    }

    /// What the server said about the export.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// The metadata contexts that [`Client::block_status`] tells of.
    #[must_use]
    pub fn contexts(&self) -> &[MetaContext] {
        &self.contexts
    }

    /// Fills `buffer` from `offset` on, in several requests if it is longer than the server takes at once.
    ///
    /// # Errors
    /// What the server answers, or the connection fails.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut at = offset;
        for part in buffer.chunks_mut(self.maximum()) {
            let request = self.request(Command::Read, CommandFlags::NONE, at, length_of(part)?);
            self.socket.send(&request.encode())?;
            self.reply(&request, part)?;
            at += u64::from(request.length);
        }
        Ok(())
    }

    /// Writes `data` at `offset`, in several requests if it is longer than the server takes at once.
    ///
    /// # Errors
    /// What the server answers, or the connection fails. What of a long write was done is not known then.
    pub fn write(&mut self, offset: u64, data: &[u8], flags: CommandFlags) -> Result<()> {
        let mut at = offset;
        for part in data.chunks(self.maximum()) {
            let request = self.request(Command::Write, flags, at, length_of(part)?);
            self.socket.send(&request.encode())?;
            self.socket.send(part)?;
            self.reply(&request, &mut [])?;
            at += u64::from(request.length);
        }
        Ok(())
    }

    /// Makes what was written visible to every connection of the session.
    ///
    /// # Errors
    /// What the server answers, or the connection fails.
    pub fn flush(&mut self) -> Result<()> {
        if !self.export.flags.contains(TransmissionFlags::SEND_FLUSH) {
            return Ok(());
        }
        self.simple(Command::Flush, CommandFlags::NONE, 0, 0)
    }

    /// Gives up the content of a range of `length` bytes.
    ///
    /// # Errors
    /// What the server answers, or the connection fails.
    pub fn trim(&mut self, offset: u64, length: u32, flags: CommandFlags) -> Result<()> {
        self.simple(Command::Trim, flags, offset, length)
    }

    /// Makes a range of `length` bytes zero.
    ///
    /// # Errors
    /// What the server answers, or the connection fails.
    pub fn write_zeroes(&mut self, offset: u64, length: u32, flags: CommandFlags) -> Result<()> {
        self.simple(Command::WriteZeroes, flags, offset, length)
    }

    /// Announces that a range of `length` bytes will be read.
    ///
    /// # Errors
    /// What the server answers, or the connection fails.
    pub fn cache(&mut self, offset: u64, length: u32) -> Result<()> {
        self.simple(Command::Cache, CommandFlags::NONE, offset, length)
    }

    /// The extents from `offset` on, `length` bytes long or fewer, as many as the server likes to tell of at once: for
    /// each metadata context those that it has selected, in order, without a gap.
    ///
    /// # Errors
    /// No context was selected, or what the server answers, or the connection fails.
    pub fn block_status(&mut self, offset: u64, length: u32, flags: CommandFlags) -> Result<Vec<Extent>> {
        if self.contexts.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "No metadata context was selected for block status"));
        }
        let request = self.request(Command::BlockStatus, flags, offset, length);
        self.socket.send(&request.encode())?;
        self.reply(&request, &mut [])
    }

    /// A soft disconnect: the server finishes what it was asked, and closes.
    ///
    /// # Errors
    /// The connection fails before the server could be told.
    pub fn disconnect(mut self) -> Result<()> {
        let request = self.request(Command::Disc, CommandFlags::NONE, 0, 0);
        self.socket.send(&request.encode())
    }

    /// Bytes of data that one request may carry.
    fn maximum(&self) -> usize {
        let sizes = self.export.block_sizes.unwrap_or_default();
        // A server may say that it has no limit of its own, or nonsense.
        let maximum = sizes.maximum.clamp(BlockSizes::default().preferred, DEFAULT_MAX_PAYLOAD);
        usize::try_from(maximum).unwrap_or(usize::MAX)
    }

    fn request(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u32) -> Request {
        self.last_cookie += 1;
        Request { flags, command, cookie: Cookie(self.last_cookie), offset, length }
    }

    fn simple(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u32) -> Result<()> {
        let request = self.request(command, flags, offset, length);
        self.socket.send(&request.encode())?;
        self.reply(&request, &mut []).map(drop)
    }

    /// Receives the reply to `request`: fills `buffer` if it is a read, gives the extents if it is a block status.
    fn reply(&mut self, request: &Request, buffer: &mut [u8]) -> Result<Vec<Extent>> {
        let mut answer = Answer::new(request, buffer);
        loop {
            let magic: [u8; 4] = self.socket.receive_array()?;
            let kind = ReplyKind::parse(magic).map_err(|error| broken(format!("sends no reply: {error}")))?;
            match kind {
                ReplyKind::Simple => {
                    let mut header = [0; SIMPLE_REPLY_SIZE];
                    header[..4].copy_from_slice(&magic);
                    self.socket.receive(&mut header[4..])?;
                    let header = SimpleReply::parse(&header).map_err(broken)?;
                    let structured_only = self.structured_replies
                        && matches!(request.command, Command::Read | Command::BlockStatus);
                    if header.cookie != request.cookie || structured_only {
                        return Err(broken("sends a simple reply that does not belong here"));
                    }
                    answer.fail(header.error, "", None);
                    if header.error == 0 {
                        self.socket.receive(answer.buffer)?;
                        answer.missing.clear();
                    }
                    return answer.finish();
                }
                ReplyKind::Extended => {
                    return Err(broken("sends a chunk with an extended header, which was not agreed on"));
                }
                ReplyKind::Structured => {
                    let mut header = [0; CHUNK_HEADER_SIZE];
                    header[..4].copy_from_slice(&magic);
                    self.socket.receive(&mut header[4..])?;
                    let header = ChunkHeader::parse(&header).map_err(broken)?;
                    if header.cookie != request.cookie || !self.structured_replies {
                        return Err(broken("sends a chunk that does not belong here"));
                    }
                    self.chunk(&header, &mut answer)?;
                    if header.is_done() {
                        return answer.finish();
                    }
                }
            }
        }
    }

    fn chunk(&mut self, header: &ChunkHeader, answer: &mut Answer<'_>) -> Result<()> {
        if header.kind == REPLY_TYPE_OFFSET_DATA {
            // Straight to where it belongs.
            let length =
                header.length.checked_sub(8).ok_or_else(|| broken("sends a chunk that is too short"))?;
            let offset = u64::from_be_bytes(self.socket.receive_array()?);
            let part = answer.part(offset, length)?;
            return self.socket.receive(part);
        }
        let payload = self.socket.receive_vec(header.length, MAX_CHUNK)?;
        let chunk = Chunk::parse(header.kind, &payload)
            .map_err(|error| broken(format!("sends a bad chunk: {error}")))?;
        match chunk {
            Chunk::None => {}
            Chunk::OffsetHole { offset, length } => answer.part(offset, length)?.fill(0),
            Chunk::Error { error, message, offset } => answer.fail(error, message, offset),
            Chunk::BlockStatus { context, descriptors }
                if answer.request.command == Command::BlockStatus
                    && self.contexts.iter().any(|known| known.id == context) =>
            {
                if answer.extents.iter().any(|told| told.context == context) {
                    return Err(broken("tells of a metadata context twice"));
                }
                let mut offset = answer.request.offset;
                for descriptor in descriptors.iter() {
                    let length = u64::from(descriptor.length);
                    answer.extents.push(Extent { context, offset, length, flags: descriptor.flags });
                    offset =
                        offset.checked_add(length).ok_or_else(|| broken("tells of extents without end"))?;
                }
            }
            Chunk::OffsetData { .. }
            | Chunk::BlockStatus { .. }
            | Chunk::BlockStatusExt { .. }
            | Chunk::Other(..) => {
                return Err(broken(format!("sends a chunk that was not asked for (type {})", header.kind)));
            }
        }
        Ok(())
    }
}

/// What has come of a reply so far.
struct Answer<'a> {
    request: Request,
    buffer: &'a mut [u8],
    /// The parts of the buffer that have not come: where each begins and ends.
    missing: BTreeMap<usize, usize>,
    extents: Vec<Extent>,
    error: Option<Error>,
}

impl<'a> Answer<'a> {
    fn new(request: &Request, buffer: &'a mut [u8]) -> Self {
        let missing = if buffer.is_empty() { BTreeMap::new() } else { BTreeMap::from([(0, buffer.len())]) };
        Self { request: *request, buffer, missing, extents: Vec::new(), error: None }
    }

    /// The part of the buffer for the `length` bytes at `offset` of the export: one that was asked for and has not come yet,
    /// since what comes twice is likely to be missing elsewhere.
    fn part(&mut self, offset: u64, length: u32) -> Result<&mut [u8]> {
        let out_of_range = || broken("sends data that was not asked for, or twice");
        let start = offset.checked_sub(self.request.offset).and_then(|start| usize::try_from(start).ok());
        let length = usize::try_from(length).ok();
        let (start, length) = start.zip(length).ok_or_else(out_of_range)?;
        let end = start.checked_add(length).ok_or_else(out_of_range)?;
        let gap = self.missing.range(..=start).next_back().map(|(&first, &last)| (first, last));
        let (first, last) = gap.filter(|&(_, last)| start < end && end <= last).ok_or_else(out_of_range)?;
        self.missing.remove(&first);
        self.missing.extend([(first, start), (end, last)].into_iter().filter(|(first, last)| first < last));
        self.buffer.get_mut(start..end).ok_or_else(out_of_range)
    }

    /// Notes an error (0 is none). The first one counts.
    fn fail(&mut self, error: u32, message: &str, offset: Option<u64>) {
        let Some(errno) = Errno::from_wire(error) else { return };
        if self.error.is_some() {
            return;
        }
        let (kind, why) = match errno {
            Errno::Perm => (ErrorKind::Denied, "operation not permitted"),
            Errno::Io => (ErrorKind::Io, "input/output error"),
            Errno::NoMem => (ErrorKind::OutOfSpace, "out of memory"),
            Errno::Inval => (ErrorKind::Invalid, "invalid argument"),
            Errno::NoSpc => (ErrorKind::OutOfSpace, "no space left on device"),
            Errno::Overflow => (ErrorKind::Invalid, "value too large"),
            Errno::NotSup => (ErrorKind::Unsupported, "operation not supported"),
            Errno::Shutdown => (ErrorKind::Shutdown, "the server is shutting down"),
        };
        let at = offset.unwrap_or(self.request.offset);
        let said = message.replace(char::is_control, " ");
        let said = if said.is_empty() { said } else { format!(" ('{said}')") };
        let command = format!("{:?}", self.request.command);
        self.error = Some(Error::new(kind, format!("The server failed a {command} at {at}: {why}{said}")));
    }

    fn finish(self) -> Result<Vec<Extent>> {
        match self.error {
            Some(error) => Err(error),
            None if !self.missing.is_empty() => Err(broken("sends less data than was asked for")),
            None if self.request.command == Command::BlockStatus && self.extents.is_empty() => {
                Err(broken("tells of no extent"))
            }
            None => Ok(self.extents),
        }
    }
}

fn length_of(part: &[u8]) -> Result<u32> {
    u32::try_from(part.len()).map_err(|_| Error::new(ErrorKind::Invalid, "The request is too long"))
}
