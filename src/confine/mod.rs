//! The process gives up what a server does not need once it is running, so that whoever takes it over has little.
//!
//! ```text
//!  main thread: listen ── enter ── open the images, start threads ── seal ── serve
//!                           │                                          │
//!                           ├ privileges  user, capabilities, core     └ filter  system calls, on every thread
//!                           │             files, no new privileges
//!                           └ files       landlock
//! ```
//!
//! It has two steps because of what belongs to a thread: user, capabilities and landlock do, and are inherited by what a
//! thread starts. So [`Confinement::enter`] comes before the first thread, and before the images are opened: what can be
//! opened then can be opened again when it is replaced. The filter of system calls can be put on all threads at once,
//! and once it is there none can be started any more: so [`Entered::seal`] comes when all are there, and before the first
//! client is served.
//!
//! Invariant: after `seal` returned, every thread of the process has all of it, except for what is said to be missing.
//!
//! A library must not do that to the program it is part of, so nothing here is done unless it is called.

mod calls;
mod files;
mod filter;
mod privileges;
mod user;

pub(crate) use privileges::{empty_cores, forbid_dumps};
pub use user::User;

use crate::error::{Error, ErrorKind, Result, plain};
use crate::sys;
use filter::Purpose;
use rustix::thread::{CapabilitySet, capabilities};
use std::fmt;
use std::path::PathBuf;

/// How much of it there must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// What this kernel can do; what it cannot is reported.
    #[default]
    Auto,
    /// All of it, or an error.
    Require,
    /// Nothing. A user is changed all the same.
    Off,
}

/// What a running server has to get at.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Absolute paths of images, which others may take the places of.
    pub images: Vec<PathBuf>,
    /// Absolute paths of unix sockets, to be removed at the end.
    pub sockets: Vec<PathBuf>,
}

/// What is to be given up.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// How much of it there must be.
    pub mode: Mode,
    /// Whom to be from then on; without it, who started the server, without root's capabilities.
    pub user: Option<User>,
    /// For tests: system calls that are neither allowed nor hostile kill instead of failing.
    pub strict: bool,
    /// For tests and debuggers: processes of the same user can look into this one.
    pub traceable: bool,
}

impl Confinement {
    /// The first step, for the main thread before it has started any other.
    ///
    /// # Errors
    /// When the user cannot be changed to or may not read an image, and, if everything is required, when something of it
    /// cannot be had.
    pub fn enter(&self, needs: &Needs) -> Result<Entered> {
        let mut entered = Entered {
            mode: self.mode,
            purpose: None,
            landlock: 0,
            kept: CapabilitySet::empty(),
            missing: Vec::new(),
        };
        if let Some(user) = &self.user {
            privileges::check(user, needs)?;
        }
        if self.mode == Mode::Off {
            self.user.as_ref().map_or(Ok(()), User::put_on)?;
            return Ok(entered);
        }
        if let Some(threads) = other_threads() {
            entered.missing.push(format!("{threads} threads were there before"));
        }
        let rules = files::Rules::new(needs);
        let keep = match self.user {
            Some(_) => CapabilitySet::empty(),
            None => privileges::needed(needs),
        };
        let emptied = privileges::empty_cores();
        let bounded = privileges::bound_capabilities();
        self.user.as_ref().map_or(Ok(()), User::put_on)?;
        entered.note("capabilities", bounded.and_then(|()| privileges::drop_capabilities(keep)));
        entered.kept = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
        entered.note("core files", emptied.and_then(|()| privileges::forbid_dumps(self.traceable)));
        entered.note("new privileges", privileges::forbid_new_privileges());
        let reached = rules.put_on();
        entered.landlock = reached.version;
        entered.missing.extend(reached.missing);
        entered.purpose = Some(Purpose {
            process: std::process::id(),
            unlinks: !needs.sockets.is_empty(),
            overflows: false,
            strict: self.strict,
        });
        entered.check()?;
        Ok(entered)
    }
}

/// Threads besides the calling one. They are not confined by what it does.
fn other_threads() -> Option<usize> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?.count();
    threads.checked_sub(1).filter(|&others| others > 0)
}

/// The first step is done.
#[derive(Debug)]
#[must_use = "the confinement is not complete before it is sealed"]
pub struct Entered {
    mode: Mode,
    purpose: Option<Purpose>,
    landlock: i32,
    kept: CapabilitySet,
    missing: Vec<String>,
}

impl Entered {
    /// Files that are open for writing may be written to by place: there is one that blocks go to.
    pub fn allow_overflow(&mut self) {
        if let Some(purpose) = &mut self.purpose {
            purpose.overflows = true;
        }
    }

    /// The second step, when all threads have been started: from now on none of them can make system calls that a
    /// server does not make. What was reached.
    ///
    /// # Errors
    /// When everything is required, and the kernel cannot do it.
    pub fn seal(mut self) -> Result<Report> {
        if let Some(purpose) = self.purpose {
            let sealed = match filter::program(purpose) {
                Ok(program) => sys::filter::install(&program),
                Err(error) => Err(std::io::Error::other(error)),
            };
            self.note("system calls", sealed);
            self.check()?;
        }
        let Self { mode, landlock, kept, missing, .. } = self;
        Ok(Report { is_off: mode == Mode::Off, landlock, kept, missing })
    }

    fn note(&mut self, what: &str, done: std::io::Result<()>) {
        if let Err(error) = done {
            self.missing.push(format!("{what} are not denied ({})", plain(&error)));
        }
    }

    fn check(&self) -> Result<()> {
        if self.mode != Mode::Require || self.missing.is_empty() {
            return Ok(());
        }
        let line = format!("Cannot confine the server: {}", self.missing.join("; "));
        Err(Error::new(ErrorKind::Unsupported, line).advise("use --confine auto to serve without that"))
    }
}

/// What was reached, for people.
#[derive(Debug)]
pub struct Report {
    is_off: bool,
    landlock: i32,
    kept: CapabilitySet,
    missing: Vec<String>,
}

impl Report {
    /// What could not be given up and why, in one line; `None` if nothing is missing.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        (!self.missing.is_empty()).then(|| self.missing.join("; "))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off {
            return f.write_str("nothing");
        }
        write!(f, "landlock ABI {}, ", self.landlock)?;
        f.write_str("no capabilities")?;
        let names: Vec<_> = self.kept.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
        if names.is_empty() { Ok(()) } else { write!(f, " but {}", names.join(", ")) }
    }
}
