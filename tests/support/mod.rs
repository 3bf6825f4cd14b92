//! What the black-box tests are made of: a server process, images, a deliberately dumb NBD client and a model.
//!
//! Nothing here uses the library under test: the wire is a second, independent reading of the specification, so that
//! a misreading in `src/proto` cannot agree with itself.
//!
//! ```text
//!  Image ──> Server (the built binary) <── socket ── Peer (handshake) ── Client (transmission)
//!                                                                          Checked = Client + Model
//! ```

// Every test binary compiles this module and uses its own part of it.
#![allow(dead_code, unused_imports, unreachable_pub)]

pub mod client;
pub mod haggling;
pub mod image;
pub mod in_step;
pub mod model;
pub mod nbd;
pub mod peer;
pub mod receive;
pub mod request;
pub mod server;
pub mod tls;

pub use client::{Client, Style};
pub use image::Image;
pub use model::{Checked, Model, assert_bytes};
pub use peer::{Export, OptionReply, Peer, Stream};
pub use request::{Chunk, Reply, Request};
pub use server::{Server, Usage};

use std::time::{Duration, Instant};

/// The longest any single step may take. It only catches hangs: nothing is measured against it.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Polls `condition` until it holds; panics, naming `what`, when it never does.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A buffer length as the wire's length.
pub fn len32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a payload fits in 32 bits")
}

/// A 64-bit size as a buffer length.
pub fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the tests run on 64-bit machines")
}

/// A 64-bit length as the wire's length.
pub fn wire_len(length: u64) -> u32 {
    u32::try_from(length).expect("a request's length fits in 32 bits")
}

/// Runs `act` on a thread that has the user id `uid`, with the rights of nobody else. On Linux a user id belongs to a
/// thread; what it connects carries that id. `None` when this process may not do that (it is not root).
pub fn as_user<T: Send>(uid: u32, act: impl FnOnce() -> T + Send) -> Option<T> {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    std::thread::scope(|scope| {
        let user = scope.spawn(move || {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
            set_thread_groups(&[]).ok()?;
            set_thread_res_gid(gid, gid, gid).ok()?;
            set_thread_res_uid(uid, uid, uid).ok()?;
            Some(act())
        });
        user.join().expect("the other user's thread does not panic")
    })
}

/// A small, seeded generator (splitmix64): tests that fail can be run again with the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator whose whole sequence follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..bound`; `bound` is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.word() % bound
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// `length` random bytes.
    pub fn bytes(&mut self, length: u64) -> Vec<u8> {
        let length = size(length);
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.word().to_be_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// The finishing step of splitmix64: neighbouring inputs give unrelated outputs.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
