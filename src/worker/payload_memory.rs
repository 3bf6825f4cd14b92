//! The memory that payload is in, blocks and what workers receive into, and that it stays out of swap.

use super::memory::available;
use super::sealed::RECORDS;
use super::{ServerConfig, default_budget};
use crate::error::{Error, ErrorKind, Result, plain};
use crate::limits::{INPUT_BYTES, SEALED_BYTES};
use crate::overlay::{OverflowFile, Pool};
use crate::size::human;
use crate::swap;
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
    /// Warnings, which are said when there is a server that they are of.
    pub(super) warnings: Vec<String>,
}

impl Memory {
    /// Reserves what a server with this configuration needs.
    ///
    /// # Errors
    /// When the address space for it cannot be had, and, with [`LockMemory::Require`], if it cannot be locked.
    pub fn reserve(config: &ServerConfig) -> Result<Self> {
        let limit = config.memory.unwrap_or_else(default_budget);
        let mut warnings = Vec::from_iter(too_much(limit, available()));
        let file =
            config.overflow.as_ref().map(|(dir, bytes)| OverflowFile::make(dir, *bytes)).transpose()?;
        let pool = Pool::with_overflow(limit, config.block_size, file)?;
        let buffers = (0..config.workers.max(1)).map(|_| Buffers::new()).collect::<Result<Vec<_>>>()?;
        let swaps = std::fs::read_to_string("/proc/swaps").ok();
        let may_swap = has_swap(swaps.as_deref());
        let unkept = [keep_out(config.lock_memory, &pool, &buffers)?, hide_keys(config, &pool)?];
        for warning in unkept.into_iter().flatten() {
            match may_swap {
                true => warnings.push(warning),
                false => tracing::info!("{warning} (there is no swap now)"),
            }
        }
        Ok(Self { limit, pool, buffers, warnings })
    }
}

/// Whether anything can be swapped out, by what the kernel tells of its swap areas, if it does.
fn has_swap(swaps: Option<&str>) -> bool {
    swaps.is_none_or(|text| swap::areas(text).next().is_some())
}

/// What is to be said of a limit beyond what there is.
fn too_much(limit: u64, available: u64) -> Option<String> {
    (limit > available).then(|| {
        format!(
            "Sessions may write {} (--memory), and this machine, or the server's control group, has {}; give less, or the \
             kernel may end the server",
            human(limit),
            human(available)
        )
    })
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

/// Makes the place for keys of sealed sessions, which anybody may ask for later. Returns what is to be said if they may be
/// swapped out.
///
/// # Errors
/// With [`LockMemory::Require`], if they may.
fn hide_keys(config: &ServerConfig, pool: &Pool) -> Result<Option<String>> {
    let hiding = pool.keys().map_err(|error| Error::io("Cannot get memory for keys", error))?.hiding();
    if hiding != Hiding::Swappable {
        tracing::debug!(?hiding, "memory for keys");
        return Ok(None);
    }
    const WHAT: &str = "Keys of sealed sessions may be swapped out";
    const HOW: &str = "raise ulimit -l (LimitMEMLOCK=), or start it as root";
    match config.lock_memory {
        LockMemory::Require => {
            Err(Error::new(ErrorKind::Denied, format!("{WHAT}: memory for them cannot be locked"))
                .advise(HOW))
        }
        LockMemory::Auto if config.seal => {
            Ok(Some(format!("{WHAT}: memory for them cannot be locked; {HOW}")))
        }
        LockMemory::Auto | LockMemory::Off => Ok(None),
    }
}

/// Locks the blocks and the buffers, all or none. Returns what is to be said if they cannot be locked.
///
/// # Errors
/// With [`LockMemory::Require`], then.
fn keep_out(mode: LockMemory, pool: &Pool, buffers: &[Buffers]) -> Result<Option<String>> {
    if mode == LockMemory::Off {
        return Ok(None);
    }
    // The smaller part first, so that what fails leaves little to be undone.
    let locked =
        buffers.iter().flat_map(Buffers::all).try_for_each(Buffer::lock).and_then(|()| pool.lock_memory());
    let Err(error) = locked else { return Ok(None) };
    let bytes = pool.address_space() + (buffers.len() * Buffers::BYTES) as u64;
    let (kind, how) = match error.kind() {
        io::ErrorKind::Unsupported => (ErrorKind::Unsupported, "it takes Linux 5.18"),
        _ => (ErrorKind::Denied, "raise ulimit -l (LimitMEMLOCK=), or start it as root"),
    };
    let why = format!("cannot lock {}: {}", human(bytes), plain(&error));
    if mode == LockMemory::Require {
        let why = format!("What sessions write would not stay out of swap: {why}");
        return Err(Error::new(kind, why).advise(how));
    }
    buffers.iter().flat_map(Buffers::all).try_for_each(Buffer::unlock).unwrap_or_else(|error| {
        tracing::info!(%error, "Cannot unlock memory");
    });
    Ok(Some(format!("What sessions write may be swapped out: {why}; {how}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_what_the_kernel_tells_of() {
        const HEAD: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!has_swap(Some(HEAD)) && !has_swap(Some("")));
        assert!(has_swap(Some(&format!("{HEAD}/dev/zram0 partition\t262140\t0\t-2\n"))));
        assert!(has_swap(None), "it may be");
    }

    #[test]
    fn a_limit_beyond_what_there_is_is_said() {
        assert_eq!(too_much(1 << 30, 1 << 30), None);
        let said = too_much(3 << 30, 2 << 30).unwrap();
        assert!(
            said.contains("may write 3 GiB (--memory)") && said.contains("has 2 GiB; give less"),
            "{said}"
        );
    }
}
