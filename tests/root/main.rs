//! `memdev run` and `memdev enter` on this machine's own kernel, with a real Debian root image.
//!
//! They need root, /dev/fuse, loop devices and the image whose path is in MEMDEV_ROOT_IMAGE, so a plain `cargo test` leaves
//! them out; `tools/test` runs them and lets none be missing. Each test writes its sessions down in a directory of its own;
//! when it ends, nothing of them may be left.

// Modules of one test binary share what they need.
#![allow(unreachable_pub)]

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../support/mod.rs"]
mod support;

mod basics;
mod ends;
mod entering;
mod footprints;
mod forks;
mod inside;
mod limits;
mod machine;
mod ordinary;
mod sessions;
mod terminals;
