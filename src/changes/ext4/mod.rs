//! ext2, ext3 and ext4, read from the disks alone: no kernel mounts what a session has written, no right of root's is
//! needed, and what was not written to is known to be as it was.
//!
//! ```text
//!   layout     superblock: sizes, and where the descriptors of groups are
//!   journal    what a file system that is in use has not put in its place yet
//!   volume     blocks and inodes, of either disk
//!   inode      mapping: where its blocks are     directory: names     attributes
//!   pair       what is untouched: an inode whose bytes are the same, and none of whose blocks was written
//! ```
//!
//! All of it is written by whoever has the session. Every number is checked before it is used; where a chain could go
//! round, what was looked at is counted ([`volume`]), so that it ends; and what makes no sense is an error that says where.
//! Checksums are looked at in the journal alone, where they decide what counts: whoever writes the rest can write them, too.

mod attributes;
mod directory;
mod fields;
mod inode;
mod journal;
mod layout;
mod mapping;
mod pair;
mod volume;

pub use pair::{Ext4, Ext4Pair};
