//! The only unsafe code: what the kernel offers and no safe crate wraps as it is needed here.
#![allow(unsafe_code)]

pub(crate) mod peer;
