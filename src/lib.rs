//! memdev: for every NBD client its own writable copy, in memory, of one shared, mapped, untouched image.

pub mod error;
pub mod handshake;
pub mod proto;

pub use error::{Error, ErrorKind, Result};
