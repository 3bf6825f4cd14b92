//! What a session has changed, as files: its file system against that of its base.
//!
//! ```text
//!   disks: base, session, what was written ──> pair of trees ──> comparison ──> list of changes ──> lines, JSON
//!              Remote, Raw, Layered              Ext4Pair                                           layer, diff
//!   devices: copies of base and session ──────> MountedPair
//! ```
//!
//! Nothing is asked of the session's own kernel, and of ext4 nothing is mounted: the disks are read as they were at one
//! moment, and everything in them was written by somebody who may want to do harm.

mod compare;
pub mod diff;
mod disk;
mod ext4;
pub mod layer;
mod mounted;
mod quote;
mod tree;

pub use compare::{Change, Changes, Differences, LONGEST_PATH, Node, Pair, What, compare};
pub use disk::{Disk, Disks, Layered, Raw, Side, Written};
pub use ext4::{Ext4, Ext4Pair};
pub use mounted::{Mounted, MountedPair};
pub use quote::quoted;
pub use tree::{Kind, Name, Stat, Time, Tree, Xattrs};
