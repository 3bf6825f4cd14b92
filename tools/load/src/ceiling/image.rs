//! The image that the ceiling serves, and the one call that sends from it.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use memdev::proto::SIMPLE_REPLY_SIZE;
use memdev::sys::{KernelSpan, MAX_SPANS, Mapping, send};

/// A mapped image, which only the kernel reads.
#[derive(Debug)]
pub(super) struct Image {
    mapping: Mapping,
}

/// A reply that waits to be sent: a header, and the range of the image behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub(super) header: [u8; SIMPLE_REPLY_SIZE],
    pub(super) offset: usize,
    pub(super) length: usize,
}

impl Reply {
    /// Bytes on the wire.
    pub(super) fn size(&self) -> usize {
        self.header.len() + self.length
    }
}

impl Image {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { mapping: Mapping::new(&file, size)? })
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Whether `length` bytes from `offset` on lie inside.
    pub(super) fn holds(&self, offset: usize, length: usize) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.mapping.len())
    }

    /// Sends `replies` from byte `skip` of the first one on, as much as the socket takes; returns how much it took.
    pub(super) fn send(
        &self,
        stream: BorrowedFd<'_>,
        replies: &[Reply],
        mut skip: usize,
    ) -> io::Result<usize> {
        let mut spans = Vec::with_capacity((replies.len() * 2).min(MAX_SPANS));
        for reply in replies.iter().take(MAX_SPANS / 2) {
            for span in [KernelSpan::new(&reply.header), self.mapping.span(reply.offset, reply.length)] {
                let skipped = skip.min(span.len());
                skip -= skipped;
                if skipped < span.len() {
                    spans.push(span.skip(skipped));
                }
            }
        }
        send(stream, &spans)
    }
}
