//! What the handshake of one connection gets to know: the registry, seen from that client.

use super::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::{BlockSizes, Environment, ExportInfo, Refusal};
use crate::net::Stream;
use crate::proto::TransmissionFlags;
use crate::session::{Attachment, Description};
use crate::transmission::MAX_PAYLOAD;
use std::sync::Arc;

/// The exports as the client of `stream` sees them.
pub(super) struct Exports<'a> {
    pub(super) shared: &'a Shared,
    pub(super) stream: &'a Arc<Stream>,
    /// The first image, if it came in at another server: see [`Registry::resolve`](crate::session::Registry::resolve).
    pub(super) first: Option<&'a str>,
}

impl Exports<'_> {
    /// Asks, and once more where what is another server's has just ceased to be.
    fn asked<T>(&self, name: &str, ask: impl Fn() -> Result<T>) -> Result<T, Refusal> {
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) if error.kind() == ErrorKind::Elsewhere => {
                    if let Some(side) = self.shared.registry.whose(name) {
                        return Err(Refusal::Elsewhere(side));
                    }
                }
                Err(error) => return Err(refusal(&error)),
            }
        }
    }

    fn info(&self, description: Description) -> ExportInfo {
        use TransmissionFlags as Flags;
        let mut flags = [
            Flags::HAS_FLAGS,
            Flags::SEND_FLUSH,
            Flags::SEND_FUA,
            Flags::SEND_TRIM,
            Flags::SEND_WRITE_ZEROES,
            Flags::SEND_FAST_ZERO,
            Flags::SEND_CACHE,
        ]
        .into_iter()
        .fold(Flags::NONE, Flags::union);
        if description.shared {
            flags = flags.union(Flags::CAN_MULTI_CONN);
        }
        let preferred = u32::try_from(self.shared.block_size.bytes()).unwrap_or(4096);
        ExportInfo {
            name: description.name,
            description: description.text,
            size: description.size,
            flags,
            // Any offset and length is served: clients exist that ignore a larger minimum.
            block_sizes: BlockSizes { minimum: 1, preferred, maximum: MAX_PAYLOAD },
        }
    }
}

impl Environment for Exports<'_> {
    type Export = Attachment;

    fn list(&self) -> Vec<(String, String)> {
        self.shared.registry.list().collect()
    }

    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal> {
        let registry = &self.shared.registry;
        let name = &*registry.resolve(name, self.first);
        let description = self.asked(name, || registry.describe(name, self.stream))?;
        Ok(self.info(description))
    }

    fn open(&self, name: &str) -> Result<(ExportInfo, Attachment), Refusal> {
        let registry = &self.shared.registry;
        let name = &*registry.resolve(name, self.first);
        let (description, attachment) = self.asked(name, || registry.attach(name, self.stream))?;
        Ok((self.info(description), attachment))
    }
}

fn refusal(error: &Error) -> Refusal {
    match error.kind() {
        ErrorKind::NotFound => Refusal::Unknown,
        ErrorKind::Shutdown => Refusal::Shutdown,
        ErrorKind::Invalid => Refusal::Invalid(error.to_string()),
        _ => Refusal::Policy(error.to_string()),
    }
}
