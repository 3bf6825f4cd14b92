//! The only rooms with `unsafe` in them: memory that somebody else may change, and the calls that move it.
//!
//! # Safety
//!
//! Three invariants carry everything here; each file's front page says which of them it keeps.
//!
//! 1. **The base is the kernel's to read.** A file mapping may change or shrink under us at any moment, so no Rust
//!    reference to its bytes ever exists: a [`KernelSpan`] is an address and a length that only a system call reads.
//!    A page that cannot be had makes the call fail (`EFAULT`), never the process (`SIGBUS`).
//! 2. **A slot is owned like an `Arc`.** The bytes of an [`Arena`] slot are reachable through [`Slot`] and
//!    [`Loan`] handles only, shared while several exist, mutable while exactly one does, and that is a [`Slot`].
//! 3. **A span lives no longer than what it points into**; the borrow checker keeps that, through its lifetime.
#![allow(unsafe_code)]

mod arena;
pub(crate) mod fanotify;
pub(crate) mod filter;
pub(crate) mod freeze;
pub(crate) mod heap;
pub(crate) mod inherited;
mod ledger;
pub(crate) mod loop_device;
mod mapping;
pub(crate) mod mount;
pub(crate) mod network;
pub mod peer;
pub mod process;
mod secret;
mod span;
pub(crate) mod tcp;
pub(crate) mod vsock;
mod wiping;

pub(crate) use arena::Left;
pub use arena::{Arena, Loan, Slot, SlotRun};
pub use mapping::Mapping;
pub use secret::{Hiding, Secret, Vault};
pub use span::{KernelSpan, KernelSpanMut, MAX_SPANS, receive, send};
pub use wiping::{Buffer, WipingAllocator};
