//! The memory that payload is in, blocks and what workers receive into, and that it stays out of swap.

use super::{ServerConfig, default_budget};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::INPUT_BYTES;
use crate::overlay::Pool;
use memmap2::{Advice, MmapMut};
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
    /// One for each worker, to receive into.
    pub(super) buffers: Vec<MmapMut>,
}

impl Memory {
    /// Reserves what a server with this configuration needs.
    ///
    /// # Errors
    /// When the address space for it cannot be had, and, with [`LockMemory::Require`], if it cannot be locked.
    pub fn reserve(config: &ServerConfig) -> Result<Self> {
        let limit = config.memory.unwrap_or_else(default_budget);
        let pool = Pool::new(limit, config.block_size)?;
        let buffers = (0..config.workers.max(1)).map(|_| buffer()).collect::<Result<Vec<_>>>()?;
        keep_out(config.lock_memory, &pool, &buffers)?;
        Ok(Self { limit, pool, buffers })
    }
}

/// A worker's buffer to receive into, which neither a core file nor a child process has.
fn buffer() -> Result<MmapMut> {
    let failed = |error| Error::io("Cannot get memory to receive into", error);
    let buffer = MmapMut::map_anon(INPUT_BYTES).map_err(failed)?;
    buffer.advise(Advice::DontDump).map_err(failed)?;
    buffer.advise(Advice::DontFork).map_err(failed)?;
    Ok(buffer)
}

/// Locks the blocks and the buffers, all or none.
///
/// # Errors
/// With [`LockMemory::Require`], if they cannot be locked.
fn keep_out(mode: LockMemory, pool: &Pool, buffers: &[MmapMut]) -> Result<()> {
    if mode == LockMemory::Off {
        return Ok(());
    }
    // The smaller part first, so that what fails leaves little to be undone.
    let locked = buffers.iter().try_for_each(MmapMut::lock).and_then(|()| pool.lock_memory());
    let Err(error) = locked else { return Ok(()) };
    let bytes = pool.address_space() + (buffers.len() * INPUT_BYTES) as u64;
    let (kind, how) = match error.kind() {
        io::ErrorKind::Unsupported => (ErrorKind::Unsupported, "it takes Linux 5.18"),
        _ => (ErrorKind::Denied, "raise ulimit -l (LimitMEMLOCK=), or start it as root"),
    };
    let why = format!("cannot lock {} KiB: {error}", bytes.div_ceil(1 << 10));
    if mode == LockMemory::Require {
        let why = format!("What sessions write would not stay out of swap: {why}");
        return Err(Error::new(kind, why).advise(how));
    }
    buffers.iter().try_for_each(MmapMut::unlock).unwrap_or_else(|error| {
        tracing::info!(%error, "Cannot unlock memory");
    });
    tracing::warn!("What sessions write may be swapped out: {why}; {how}");
    Ok(())
}
