//! Sizes as people type and read them.

pub(crate) use memdev::size::{human, parse};
