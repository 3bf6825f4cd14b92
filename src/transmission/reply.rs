//! How an answer looks: the one place that knows of simple replies, structured and extended chunks.

use super::output::Output;
use super::validate::Refused;
use crate::handshake::{KnownContext, Negotiated};
use crate::proto::{
    self, BlockDescriptor, Cookie, ExtendedBlockDescriptor, REPLY_FLAG_DONE, data_chunk_header, error_chunk,
    extended_data_chunk_header, extended_error_chunk, extended_hole_chunk, extended_none_chunk, hole_chunk,
    none_chunk, simple_reply,
};
use crate::session::Kind;
use std::time::Instant;

/// The kinds of reply; which of them a connection gets was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Simple replies only.
    Simple,
    /// Structured chunks, and simple replies where there is nothing to say.
    Structured,
    /// Extended chunks only.
    Extended,
}

impl Form {
    pub(super) fn of(negotiated: &Negotiated) -> Self {
        match negotiated {
            Negotiated { extended_headers: true, .. } => Self::Extended,
            Negotiated { structured_replies: true, .. } => Self::Structured,
            _ => Self::Simple,
        }
    }
}

/// A request, as far as the answer to it must know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) form: Form,
    pub(super) cookie: Cookie,
    /// Extended chunks repeat it.
    pub(super) offset: u64,
    /// For the counters: of which kind it is, and when it came.
    pub(super) kind: Kind,
    pub(super) began: Option<Instant>,
}

impl Asked {
    /// Whether the answer comes in chunks.
    pub(super) fn in_chunks(self) -> bool {
        self.form != Form::Simple
    }

    /// Success, and nothing more to say.
    pub(super) fn succeed(self, output: &mut Output) {
        output.note_answer(self);
        match self.form {
            // Shorter than a chunk, and allowed instead of one.
            Form::Simple | Form::Structured => output.put(&simple_reply(None, self.cookie)),
            Form::Extended => output.put(&extended_none_chunk(self.cookie, self.offset)),
        }
    }

    /// An error: in a chunk there is room for words.
    pub(super) fn fail(self, refused: Refused, output: &mut Output) {
        output.note_answer(self);
        output.note_error();
        match self.form {
            Form::Simple => output.put(&simple_reply(Some(refused.errno), self.cookie)),
            Form::Structured | Form::Extended => output.put(&self.error(refused)),
        }
    }

    /// The bytes of [`Asked::fail`].
    pub(super) fn error(self, Refused { errno, message }: Refused) -> Vec<u8> {
        let Self { form, cookie, offset, .. } = self;
        match form {
            Form::Simple => simple_reply(Some(errno), cookie).to_vec(),
            Form::Structured => error_chunk(REPLY_FLAG_DONE, cookie, errno, message),
            Form::Extended => extended_error_chunk(REPLY_FLAG_DONE, cookie, offset, errno, message),
        }
    }

    /// The answer to a read of no bytes, or the end of one.
    pub(super) fn put_end(self, output: &mut Output) {
        match self.form {
            Form::Simple => output.put(&simple_reply(None, self.cookie)),
            Form::Structured => output.put(&none_chunk(self.cookie)),
            Form::Extended => output.put(&extended_none_chunk(self.cookie, self.offset)),
        }
    }

    /// What goes before `length` bytes of data, not 0, that are at `at`.
    pub(super) fn put_data_header(self, flags: u16, at: u64, length: u32, output: &mut Output) {
        let Self { form, cookie, offset, .. } = self;
        match form {
            Form::Simple => output.put(&simple_reply(None, cookie)),
            Form::Structured => output.put(&data_chunk_header(flags, cookie, at, length)),
            Form::Extended => {
                output.put(&extended_data_chunk_header(flags, cookie, offset, at, u64::from(length)));
            }
        }
    }

    /// The chunk that says that `length` bytes, not 0, at `at` are zero. There is no such thing in a simple reply.
    pub(super) fn put_hole(self, flags: u16, at: u64, length: u32, output: &mut Output) {
        let Self { form, cookie, offset, .. } = self;
        debug_assert_ne!(form, Form::Simple);
        match form {
            Form::Simple | Form::Structured => output.put(&hole_chunk(flags, cookie, at, length)),
            Form::Extended => output.put(&extended_hole_chunk(flags, cookie, offset, at, length)),
        }
    }

    /// The chunk with the extents of a metadata context. There is no such thing in a simple reply.
    pub(super) fn put_status(
        self,
        flags: u16,
        context: KnownContext,
        extents: &[BlockState],
        output: &mut Output,
    ) {
        let Self { form, cookie, offset, .. } = self;
        let context = context.on_the_wire().id;
        let mut bytes = Vec::new();
        if form == Form::Extended {
            let extents: Vec<_> = extents
                .iter()
                .map(|extent| ExtendedBlockDescriptor { length: extent.length, flags: extent.flags.into() })
                .collect();
            proto::append_extended_block_status_chunk(&mut bytes, flags, cookie, offset, context, &extents);
        } else {
            // A compact request's range is below 4 GiB, and so is all that is told about it.
            let short = |length: u64| u32::try_from(length).unwrap_or(u32::MAX);
            let extents: Vec<_> = extents
                .iter()
                .map(|extent| BlockDescriptor { length: short(extent.length), flags: extent.flags })
                .collect();
            proto::append_block_status_chunk(&mut bytes, flags, cookie, context, &extents);
        }
        output.put(&bytes);
    }
}

/// One extent of a metadata context, whatever it looks like on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockState {
    /// Bytes, not 0.
    pub(super) length: u64,
    /// As the context defines them.
    pub(super) flags: u32,
}
