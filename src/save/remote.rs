//! An export of a server as what is saved.

use super::{Extent, Kind, Source};
use crate::client::{Client, Haggling};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::proto::{
    CommandFlags, DIRTY_WRITTEN, DIRTY_ZERO, META_NAME_BASE_ALLOCATION, META_NAME_MEMDEV_DIRTY, STATE_ZERO,
};

/// The longest range that is asked about at once: as much as a request can say, in whole blocks of any size.
const MOST: u32 = !0xf_ffff;

/// An export that nobody writes to meanwhile: a session that is at rest, or a fork of one.
pub struct Remote {
    client: Client,
    /// The numbers of the metadata contexts.
    allocation: Option<u32>,
    dirty: Option<u32>,
}

impl Remote {
    /// Opens the export that `uri` names.
    ///
    /// # Errors
    /// Nobody answers, the server refuses, or there is no such export.
    pub fn open(uri: &Uri) -> Result<Self> {
        let mut server = Haggling::connect(uri)?;
        let wanted = [META_NAME_BASE_ALLOCATION, META_NAME_MEMDEV_DIRTY];
        let contexts = if server.structured_replies() {
            server.set_meta_contexts(&uri.export, &wanted)?
        } else {
            Vec::new()
        };
        let number =
            |name: &str| contexts.iter().find(|context| context.name == name).map(|context| context.id);
        let (allocation, dirty) = (number(wanted[0]), number(wanted[1]));
        Ok(Self { client: server.go(&uri.export)?, allocation, dirty })
    }
}

impl Source for Remote {
    fn size(&self) -> u64 {
        self.client.size()
    }

    fn extents(&mut self, written: bool) -> Result<Vec<Extent>> {
        let (context, name) = if written {
            (self.dirty, META_NAME_MEMDEV_DIRTY)
        } else {
            (self.allocation, META_NAME_BASE_ALLOCATION)
        };
        let context = context.ok_or_else(|| {
            let why =
                format!("The server cannot tell what is to be saved: it has no metadata context {name}");
            Error::new(ErrorKind::Unsupported, why)
        })?;
        let size = self.size();
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < size {
            let length = u32::try_from(size - at).unwrap_or(MOST).min(MOST);
            let told = self.client.block_status(at, length, CommandFlags::NONE)?;
            let before = at;
            for extent in told.iter().filter(|extent| extent.context == context) {
                let kind = match (written, extent.flags) {
                    (true, flags) if flags & DIRTY_WRITTEN == 0 => Kind::Nothing,
                    (true, flags) if flags & DIRTY_ZERO != 0 => Kind::Zero,
                    (false, flags) if flags & STATE_ZERO != 0 => Kind::Zero,
                    _ => Kind::Data,
                };
                let end = (extent.offset + extent.length).min(size);
                match extents.last_mut() {
                    Some(last) if last.kind == kind => last.range.end = end,
                    _ => extents.push(Extent { range: at..end, kind }),
                }
                at = end;
            }
            if at == before {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "The server told of nothing when asked what is where",
                ));
            }
        }
        Ok(extents)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.client.read(offset, buffer)
    }
}
