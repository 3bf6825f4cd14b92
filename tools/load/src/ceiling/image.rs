//! The image that the ceiling serves, and the one call that sends from it.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

/// The kernel's limit of parts a send (`UIO_MAXIOV`).
const MAX_PARTS: usize = 1024;

/// The bytes of an image, where a send can take them from.
#[derive(Debug)]
pub(super) struct Image {
    bytes: Vec<u8>,
}

/// A reply that waits to be sent: a header, and the range of the image behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub(super) header: [u8; 16],
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
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        Ok(Self { bytes })
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether `length` bytes from `offset` on lie inside.
    pub(super) fn holds(&self, offset: usize, length: usize) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.bytes.len())
    }

    /// Sends `replies` from byte `skip` of the first one on, as much as the socket takes; returns how much it took.
    pub(super) fn send(
        &self,
        stream: BorrowedFd<'_>,
        replies: &[Reply],
        mut skip: usize,
    ) -> rustix::io::Result<usize> {
        let mut parts = Vec::with_capacity((replies.len() * 2).min(MAX_PARTS));
        for reply in replies.iter().take(MAX_PARTS / 2) {
            for part in [&reply.header[..], &self.bytes[reply.offset..reply.offset + reply.length]] {
                let skipped = skip.min(part.len());
                skip -= skipped;
                if skipped < part.len() {
                    parts.push(IoSlice::new(&part[skipped..]));
                }
            }
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(stream, &parts, &mut SendAncillaryBuffer::default(), flags)
    }
}
