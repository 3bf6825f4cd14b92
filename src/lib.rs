//! memdev: for every NBD client its own writable copy, in memory, of one shared, mapped, untouched image.

pub mod error;
pub mod net;
mod sys;

pub use error::{Error, ErrorKind, Result};
