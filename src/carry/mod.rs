//! Carrying files: what is changed in a directory of a private root is delivered to a destination while the session runs, and
//! the rest when it ends.
//!
//! ```text
//!  private root ── tree ──> watch, look ──> queue ──> several deliveries ──> store (a directory, a server)
//!                                             │                                     │
//!                       spool <── what is left at the end         fill, at the beginning
//! ```
//!
//! The carrier is a process of its own beside the private root, not inside it; it outlives the launcher, if that is
//! killed, and keeps the private root's device until all is delivered or in the spool. docs/carry.md says what that
//! guarantees. Where it takes what it reads from and where it leaves it are both made by somebody who is not trusted: see
//! `tree` and `stores`.

mod carrier;
mod delivery;
mod entry;
mod fill;
mod known;
mod queue;
mod report;
mod rules;
mod spool;
mod status;
mod stores;
mod together;
mod tree;
mod undelivered;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

pub(crate) use carrier::{Job, serve};
pub(crate) use delivery::CONFLICT;
pub(crate) use fill::place;
pub(crate) use known::KnownPaths;
pub(crate) use report::{Report, died};
pub use spool::{Spooled, forget, resume, spooled};
pub use status::{Running, running};
pub use undelivered::Undelivered;

/// Where the rest is kept that could not be delivered: [`Options::spool`] unless there is a reason.
pub const SPOOL: &str = "/var/spool/memdev";

/// Where carriers are written down that run: [`Options::state`] unless there is a reason.
pub const STATE: &str = "/run/memdev-carry";

/// The exit status of a session whose command succeeded, but not all of whose files were delivered: `EX_IOERR` of
/// `sysexits.h`.
pub const NOT_DELIVERED: u8 = 74;

/// How long deliveries may fail at the end, without one success, before the rest goes to the spool.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A directory of a private root, and where it is carried to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carry {
    /// The directory, from the private root's `/`. Made if it is not there.
    pub path: PathBuf,
    /// A directory of the host, absolute, or the URL of one on a server.
    pub destination: String,
}

/// What is carried of a session, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// What, and where to; nothing by default.
    pub carries: Vec<Carry>,
    /// Whether what is removed inside is removed there, too.
    pub deletes: bool,
    /// Files of rules, as a `.gitignore`.
    pub rules: Vec<PathBuf>,
    /// Patterns of what is left out.
    pub exclude: Vec<String>,
    /// Patterns of what is carried after all.
    pub include: Vec<String>,
    /// See [`PATIENCE`].
    pub patience: Duration,
    /// Whether everything is one person's: at the destination its owner's, inside that of the user whom the session is for,
    /// and nowhere with set-id bits; whatever is noted of files at the destination. Else owners are as they are inside.
    pub of_user: bool,
    /// Whom what goes to the spool is encrypted to: a recipient of age; not at all by default.
    pub recipient: Option<String>,
    /// A directory of root's.
    pub spool: PathBuf,
    /// A directory of root's.
    pub state: PathBuf,
    /// Is told, in a line each, what people should know: conflicts, and what a destination cannot hold.
    pub notice: fn(&str),
    /// Is told how many of how many bytes are delivered at the end; `None` when that is over.
    pub progress: fn(Option<(u64, u64)>),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            carries: Vec::new(),
            deletes: false,
            rules: Vec::new(),
            exclude: Vec::new(),
            include: Vec::new(),
            patience: PATIENCE,
            of_user: false,
            recipient: None,
            spool: SPOOL.into(),
            state: STATE.into(),
            notice: |_| {},
            progress: |_| {},
        }
    }
}

impl Carry {
    /// Checks what was asked for. Nothing is looked at.
    ///
    /// # Errors
    /// `Invalid` if the path is not absolute, or is in one of the directories that are in memory only.
    pub fn new(path: PathBuf, destination: String) -> Result<Self> {
        let wrong =
            |why: &str| Error::new(ErrorKind::Invalid, format!("Cannot carry {}: {why}", path.display()));
        let is_plain =
            |component| matches!(component, std::path::Component::RootDir | std::path::Component::Normal(_));
        if !path.is_absolute() || !path.components().all(is_plain) {
            return Err(wrong("it is no path from the private root's /, without '..'"));
        }
        if let Some(other) =
            ["/tmp", "/run", "/dev", "/proc", "/sys"].iter().find(|dir| path.starts_with(dir))
        {
            return Err(wrong(&format!("{other} is not on the private root's disk")));
        }
        if destination.is_empty() {
            return Err(wrong("it has no destination"));
        }
        Ok(Self { path, destination })
    }
}

impl Options {
    /// Checks that what goes to the spool can be encrypted, if it is to be, by having nothing encrypted.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn check_encryption(&self) -> Result<()> {
        self.recipient.as_deref().map_or(Ok(()), spool::try_recipient)
    }

    /// Checks that the rules can be understood, and the destinations be used together.
    ///
    /// # Errors
    /// `Invalid` if not.
    pub fn check(&self) -> Result<()> {
        rules::Rules::new(&self.rules, &self.exclude, &self.include)?;
        self.recipient.as_deref().map_or(Ok(()), spool::check_recipient)?;
        for (n, one) in self.carries.iter().enumerate() {
            for other in &self.carries[..n] {
                if one.path.starts_with(&other.path) || other.path.starts_with(&one.path) {
                    let why = format!("Cannot carry {} and {}", other.path.display(), one.path.display());
                    let error = Error::new(ErrorKind::Invalid, why);
                    return Err(error.advise("one of them is in the other: carry directories that are apart"));
                }
            }
        }
        Ok(())
    }
}

/// Has what a server may answer read by all that reads such. For the fuzzer: it panics if what is understood breaks a promise.
#[doc(hidden)]
pub fn try_answer(answer: &[u8]) {
    stores::try_answer(answer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_on_the_disk_can_be_carried() {
        let carry = |path: &str| Carry::new(path.into(), "/srv/x".into());
        assert!(carry("/home/u").is_ok());
        assert!(carry("/").is_ok());
        for bad in ["home", "", "/home/../etc", "/tmp", "/run/user/0", "/proc/1"] {
            assert!(carry(bad).is_err(), "{bad}");
        }
        assert!(Carry::new("/home".into(), String::new()).is_err());
    }

    #[test]
    fn nothing_is_carried_twice() {
        let of = |paths: &[&str]| {
            let carry = |path: &&str| Carry { path: path.into(), destination: "/srv".into() };
            Options { carries: paths.iter().map(carry).collect(), ..Options::default() }.check()
        };
        assert!(of(&["/home/a", "/home/ab"]).is_ok());
        let error = of(&["/home/a", "/home"]).unwrap_err().to_string();
        assert!(error.starts_with("Cannot carry /home/a and /home;"), "{error}");
    }
}
