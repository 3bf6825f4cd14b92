//! `memdev run --carry` and `memdev carry`, on this machine's own kernel, with a real Debian root image and real
//! destinations.
//!
//! They need root, /dev/fuse, loop devices and the image whose path is in MEMDEV_ROOT_IMAGE, so a plain `cargo test` leaves
//! them out; `tools/test` runs them and lets none be missing.

// Modules of one test binary share what they need.
#![allow(unreachable_pub)]

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../root/machine.rs"]
#[expect(dead_code, reason = "what only the other tests of private roots need")]
mod machine;
#[path = "../support/mod.rs"]
mod support;

mod conflicts;
mod encrypted;
mod ends;
mod files;
mod hostile;
mod house;
mod remote;
mod s3;
mod servers;
mod sftp;
mod shown;
mod spool;
mod troubles;
mod webdav;
