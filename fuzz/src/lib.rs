//! The bodies of the fuzz targets: each takes any bytes and panics when a promise is broken.
//!
//! They are ordinary functions, so that the fuzzer runs them and the plain test `tests/fuzz_seeds.rs` too. A new target is
//! a module here, three lines in `fuzz_targets/`, a `[[bin]]`, and seeds in `seeds/<target>/`, named by what they hold;
//! `tools/fuzz` and the test find it by its seeds.

pub mod answers;
pub mod arguments;
pub mod client;
pub mod conversation;
pub mod ext4;
pub mod handshake;
pub mod option;
pub mod partition;
pub mod qcow2;
pub mod request;
pub mod steps;
pub mod uri;

/// What a target does with one input.
pub type Body = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Body)] = &[
    ("answers", answers::body),
    ("arguments", arguments::body),
    ("client", client::body),
    ("conversation", conversation::body),
    ("ext4", ext4::body),
    ("handshake", handshake::body),
    ("option", option::body),
    ("partition", partition::body),
    ("qcow2", qcow2::body),
    ("request", request::body),
    ("steps", steps::body),
    ("uri", uri::body),
];
