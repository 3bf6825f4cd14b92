//! memdev: for every NBD client its own writable copy, in memory, of one shared, mapped, untouched image.

pub mod base;
pub mod cow;
pub mod error;
pub mod net;
pub mod overlay;
pub mod proto;
pub mod sys;

pub use error::{Error, ErrorKind, Result};
