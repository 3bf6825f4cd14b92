//! The memory that payload is in, blocks and what workers receive into, and that it stays out of swap.

use super::sealed::RECORDS;
use super::{ServerConfig, default_budget};
use crate::error::{Error, ErrorKind, Result, plain};
use crate::limits::{INPUT_BYTES, SEALED_BYTES};
use crate::overlay::{OverflowFile, Pool};
use crate::sys::{Buffer, Hiding};
use std::io;
use std::sync::Arc;

/// Whether what sessions write is kept out of swap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMemory {
    /// Where the system lets it be; where not, that is said in the log.
    #[default]
    Auto,
    /// It is, or the server does not start.
    Require,
    /// It may be swapped out.
    Off,
}

/// What a server holds payload in, reserved and, if it is to be, locked: while the process may still do that.
#[derive(Debug)]
pub struct Memory {
    /// Bytes for all overlays.
    pub(super) limit: u64,
    pub(super) pool: Arc<Pool>,
    /// For each worker.
    pub(super) buffers: Vec<Buffers>,
}

impl Memory {
    /// Reserves what a server with this configuration needs.
    ///
    /// # Errors
    /// When the address space for it cannot be had, and, with [`LockMemory::Require`], if it cannot be locked.
    pub fn reserve(config: &ServerConfig) -> Result<Self> {
        let limit = config.memory.unwrap_or_else(default_budget);
        let file =
            config.overflow.as_ref().map(|(dir, bytes)| OverflowFile::make(dir, *bytes)).transpose()?;
        let pool = Pool::with_overflow(limit, config.block_size, file)?;
        let buffers = (0..config.workers.max(1)).map(|_| Buffers::new()).collect::<Result<Vec<_>>>()?;
        keep_out(config.lock_memory, &pool, &buffers)?;
        hide_keys(config, &pool)?;
        Ok(Self { limit, pool, buffers })
    }
}

/// What a worker lends to the connection at hand. None of it takes memory before it is used.
#[derive(Debug)]
pub(super) struct Buffers {
    /// To receive into.
    pub(super) input: Buffer,
    /// Records of TLS, which are opened where they lie.
    pub(super) records: Buffer,
    /// Replies in plain, before they are sealed.
    pub(super) plain: Buffer,
}

impl Buffers {
    /// Bytes of all of them.
    const BYTES: usize = INPUT_BYTES + RECORDS + SEALED_BYTES;

    fn new() -> Result<Self> {
        let buffer =
            |len| Buffer::new(len).map_err(|error| Error::io("Cannot get memory to receive into", error));
        Ok(Self { input: buffer(INPUT_BYTES)?, records: buffer(RECORDS)?, plain: buffer(SEALED_BYTES)? })
    }

    fn all(&self) -> [&Buffer; 3] {
        [&self.input, &self.records, &self.plain]
    }
}

/// Makes the place for keys of sealed sessions, which anybody may ask for later.
///
/// # Errors
/// With [`LockMemory::Require`], if it may be swapped out.
fn hide_keys(config: &ServerConfig, pool: &Pool) -> Result<()> {
    let hiding = pool.keys().map_err(|error| Error::io("Cannot get memory for keys", error))?.hiding();
    if hiding != Hiding::Swappable {
        tracing::debug!(?hiding, "memory for keys");
        return Ok(());
    }
    const WHAT: &str = "Keys of sealed sessions may be swapped out";
    const HOW: &str = "raise ulimit -l (LimitMEMLOCK=), or start it as root";
    match config.lock_memory {
        LockMemory::Require => {
            Err(Error::new(ErrorKind::Denied, format!("{WHAT}: memory for them cannot be locked"))
                .advise(HOW))
        }
        LockMemory::Auto if config.seal => {
            tracing::warn!("{WHAT}: memory for them cannot be locked; {HOW}");
            Ok(())
        }
        LockMemory::Auto | LockMemory::Off => Ok(()),
    }
}

/// Locks the blocks and the buffers, all or none.
///
/// # Errors
/// With [`LockMemory::Require`], if they cannot be locked.
fn keep_out(mode: LockMemory, pool: &Pool, buffers: &[Buffers]) -> Result<()> {
    if mode == LockMemory::Off {
        return Ok(());
    }
    // The smaller part first, so that what fails leaves little to be undone.
    let locked =
        buffers.iter().flat_map(Buffers::all).try_for_each(Buffer::lock).and_then(|()| pool.lock_memory());
    let Err(error) = locked else { return Ok(()) };
    let bytes = pool.address_space() + (buffers.len() * Buffers::BYTES) as u64;
    let (kind, how) = match error.kind() {
        io::ErrorKind::Unsupported => (ErrorKind::Unsupported, "it takes Linux 5.18"),
        _ => (ErrorKind::Denied, "raise ulimit -l (LimitMEMLOCK=), or start it as root"),
    };
    let why = format!("cannot lock {} KiB: {}", bytes.div_ceil(1 << 10), plain(&error));
    if mode == LockMemory::Require {
        let why = format!("What sessions write would not stay out of swap: {why}");
        return Err(Error::new(kind, why).advise(how));
    }
    buffers.iter().flat_map(Buffers::all).try_for_each(Buffer::unlock).unwrap_or_else(|error| {
        tracing::info!(%error, "Cannot unlock memory");
    });
    tracing::warn!("What sessions write may be swapped out: {why}; {how}");
    Ok(())
}
