//! Logins into private roots: whoever logs in gets one, and never the host's.
//!
//! ```text
//!   sshd, su ── client (the user's) ── socket ──┐
//!                                               daemon ── worker (root's) ── launcher ── process 1 ── the user's shell
//!   sshd, su ── PAM module (root's) ─── socket ─┘              └ settings, policy
//! ```
//!
//! `settings` says who gets what; the `daemon` starts a `worker` for each login, which knows by the kernel who it is; the
//! `client` hands over its terminal and waits. By `pam` a login program is put inside itself. Whatever fails, fails closed:
//! the client has nothing to fall back to, and no right to anything. docs/login.md has the recipes.

mod carried;
mod client;
mod daemon;
pub mod pam;
mod person;
mod policy;
mod settings;
mod talk;
mod trust;
mod worker;

pub use client::{LoggedOut, Login};
pub use daemon::Daemon;
pub use person::Person;
pub use settings::{FILE, Grant, Second, Settings};
pub use talk::SOCKET;

/// Does `body` without a log: standard error is the user's then, and the log is not for the user.
fn quiet<T>(body: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), body)
}
