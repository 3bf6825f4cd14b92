//! What must not be possible from inside a private root, and what must: a red team's table, each line a test, in both
//! modes. `docs/private-root-redteam.md` is the table.
//!
//! An attack is a small Perl program: Perl is in every Debian root, and makes any system call. It prints a line for each
//! attempt, `OK` when it got through. The same program runs outside, as root, wherever that does no harm: it must get
//! through there, or what is refused inside would prove nothing.
//!
//! They need root and a Debian root image, so a plain `cargo test` leaves them out; `tools/test` runs them.

// Modules of one test binary share what they need.
#![allow(unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod devices;
mod from_outside;
mod groups;
mod kernel;
mod machine;
mod mknod;
mod processes;
mod visible;
mod works;
