//! Blocks that are ciphertext wherever they lie: sealed sessions.
//!
//! ```text
//!   client ── plain ──> buffer ── seal(key, block number) ──> slot          slot ── open ──> buffer ── plain ──> client
//! ```
//!
//! A block is a data unit of XTS-AES-256, and its number on the device is the unit's number. A session that begins from an image
//! gets a key of its own; its checkpoints and forks share blocks with it, at the same numbers, and so the key. It is wiped with the
//! last of that family. What was sealed by it is noise from then on, wherever it lies.
//!
//! This room knows of no sessions and no memory but that for its keys.

mod xts;

use crate::sys::{Secret, Vault};
use ring::rand::{SecureRandom, SystemRandom};
use std::sync::Arc;
use xts::{KEY_BYTES, Xts};
use zeroize::{Zeroizing, zeroize_stack};

/// Keys that there is room for: as many sealed sessions that are no forks of each other.
const MOST_KEYS: usize = 16 << 10;
/// Stack that making a key may have left parts of it in.
const STACK: usize = 32 << 10;

/// Memory for the keys of a server.
#[derive(Clone, Debug)]
pub struct Keys(Arc<Vault>);

impl Keys {
    /// Reserves it. To be done while the process may lock memory.
    ///
    /// # Errors
    /// What the system says when the address space is limited.
    pub fn reserve() -> std::io::Result<Self> {
        Vault::reserve::<Xts>(MOST_KEYS).map(Self)
    }

    /// What keeps them from others.
    #[must_use]
    pub fn hiding(&self) -> crate::sys::Hiding {
        self.0.hiding()
    }

    /// A new key, random. `None` when there are as many as there is room for, or the system has no random bits.
    #[must_use]
    pub fn make(&self) -> Option<Arc<Seal>> {
        let made = self.make_here();
        // Keys are moved on their way to the vault.
        zeroize_stack::<STACK>();
        made
    }

    #[inline(never)]
    fn make_here(&self) -> Option<Arc<Seal>> {
        let mut bits = Zeroizing::new([0; KEY_BYTES]);
        SystemRandom::new().fill(&mut bits[..]).ok()?;
        self.0.put(|| Xts::new(&bits)).map(|key| Arc::new(Seal { key }))
    }
}

/// A key, by which blocks are sealed and opened.
#[derive(Debug)]
pub struct Seal {
    key: Secret<Xts>,
}

impl Seal {
    /// Seals all of a block, where it lies.
    ///
    /// # Panics
    /// If its length is no multiple of 16.
    pub fn seal(&self, block: u64, bytes: &mut [u8]) {
        self.key.encrypt(block, 0, bytes);
    }

    /// Writes `data` at byte `at` of a sealed block. Only the 16 bytes at either end that it covers in part are opened for that.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&self, block: u64, sealed: &mut [u8], at: usize, data: &[u8]) {
        self.key.write(block, sealed, at, data);
    }

    /// Puts what is at byte `at` of a sealed block into `out`, in plain.
    ///
    /// # Panics
    /// If there are not as many bytes.
    pub fn read(&self, block: u64, sealed: &[u8], at: usize, out: &mut [u8]) {
        self.key.read(block, sealed, at, out);
    }
}
