//! The private root: what a login or a command gets as its `/` instead of the host's.
//!
//! [`partition`] finds the file system in the image of a whole disk; [`ns`] is the other half alone, a copy of the
//! caller's mount table without a device.

pub mod ns;
pub mod partition;
