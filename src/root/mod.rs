//! The private root: what a login or a command gets as its `/` instead of the host's.
//!
//! [`partition`] finds the file system in the image of a whole disk.

pub mod partition;
