//! Logins into private roots, on this machine's own kernel, with a real Debian root image.
//!
//! They need what `tests/root` needs. All of a test's daemons and clients live in a mount namespace of the test's own, where
//! the users that it makes up are in `/etc/passwd` and `/run` is empty: no file of the host's is changed.

// Modules of one test binary share what they need.
#![allow(unreachable_pub)]

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../support/mod.rs"]
mod support;

mod carried;
mod direct;
mod machine;
mod pam;
mod policies;
mod refusals;
mod ssh;
mod sshd;
