//! memdev: for every NBD client its own writable copy, in memory, of one shared, mapped, untouched image.

pub mod attach;
pub mod base;
pub mod carry;
pub mod changes;
pub mod client;
pub mod confine;
pub mod control;
pub mod cow;
pub mod duration;
pub mod error;
pub mod handshake;
pub mod limits;
pub mod load;
pub mod login;
pub mod net;
pub mod overlay;
pub mod proto;
pub mod root;
pub mod save;
pub mod seal;
pub mod session;
pub mod size;
mod swap;
mod sync;
pub mod sys;
pub mod takeover;
pub mod transmission;
pub mod worker;

pub use error::{Error, ErrorKind, Result};
