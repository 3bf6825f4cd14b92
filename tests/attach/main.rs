//! `memdev attach` and `memdev detach` with this machine's own kernel: FUSE and a loop device.
//!
//! They need root, /dev/fuse and loop devices, so a plain `cargo test` leaves them out; `tools/test` runs them and lets
//! none be missing. Each test writes its attachments down in a directory of its own, so that none frees another's, and
//! takes away by its exact name what it has attached.

// Modules of one test binary share what they need.
#![allow(unreachable_pub)]

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../support/mod.rs"]
mod support;

mod crashes;
mod daemon;
mod devices;
mod file_systems;
mod frozen;
mod leaks;
mod machine;
