//! A file system's tree as the comparison sees it, whoever reads it.

use crate::error::Result;
use std::collections::BTreeMap;
use std::hash::Hash;
use std::ops::Range;

/// A tree of files that can be looked at, and does not change meanwhile.
pub trait Tree {
    /// What a name leads to.
    type Node: Clone + Eq + Hash;

    /// The root directory.
    ///
    /// # Errors
    /// It cannot be read.
    fn root(&mut self) -> Result<Self::Node>;

    /// What is in a directory, by name, without `.` and `..`.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense.
    fn entries(&mut self, directory: &Self::Node) -> Result<Vec<(Name, Self::Node)>>;

    /// What is said of it.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense.
    fn stat(&mut self, node: &Self::Node) -> Result<Stat>;

    /// Its extended attributes as a program sees them, by their full names.
    ///
    /// # Errors
    /// They cannot be read, or make no sense.
    fn xattrs(&mut self, node: &Self::Node) -> Result<Xattrs>;

    /// Where a symbolic link leads to.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense.
    fn target(&mut self, link: &Self::Node) -> Result<Vec<u8>>;

    /// The parts of a file that are data, in order and apart; all else of it is zero.
    ///
    /// # Errors
    /// It cannot be told.
    fn data(&mut self, file: &Self::Node) -> Result<Vec<Range<u64>>>;

    /// Fills `buffer` with what a file holds from `offset` on. It has as much.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, file: &Self::Node, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// A file's name in its directory: any bytes but `/` and 0, not empty, neither `.` nor `..`.
pub type Name = Box<[u8]>;

/// Extended attributes by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// What its bits in a mode say.
    #[must_use]
    pub fn of_mode(mode: u32) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o100_000 => Self::File,
            0o040_000 => Self::Directory,
            0o120_000 => Self::Symlink,
            0o060_000 => Self::Block,
            0o020_000 => Self::Character,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }

    /// Its name in JSON and for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
            Self::Block => "block device",
            Self::Character => "character device",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }

    /// Whether it is a device.
    #[must_use]
    pub fn is_device(self) -> bool {
        matches!(self, Self::Block | Self::Character)
    }
}

/// A moment, from 1970 on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time {
    /// Seconds, rounded down.
    pub seconds: i64,
    /// Nanoseconds to be added, less than a second.
    pub nanoseconds: u32,
}

/// What a file system says of a file of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Who may what: the lowest twelve bits.
    pub mode: u32,
    /// The owner.
    pub user: u32,
    /// The owning group.
    pub group: u32,
    /// Bytes, of a file or a link's target.
    pub size: u64,
    /// When its content was last changed.
    pub mtime: Time,
    /// Major and minor number, of a device.
    pub device: Option<(u32, u32)>,
    /// How many names it has.
    pub links: u32,
    /// Its number: all names of one file lead to the same.
    pub number: u64,
    /// When it was made, where that is known. Numbers are used again, and this tells one use from another.
    pub born: Option<Time>,
}
