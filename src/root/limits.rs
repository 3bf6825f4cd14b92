//! What the processes of a private root may use of the machine, and whether they may be swapped out.

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};

/// The fewest processes that a session can be limited to: process 1 and the command.
pub const PIDS_MIN: u64 = 2;

/// The least memory that a session can be limited to, in bytes: with less it would not get as far as its command.
pub const MEMORY_MIN: u64 = 4 << 20;

/// What all processes of a private root together may use. The daemon of its device is not one of them: what is written to the
/// device is limited by [`Run::memory`](super::Run::memory).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// How many processes and threads there may be, process 1 among them, from [`PIDS_MIN`] on.
    pub pids: Option<u64>,
    /// Bytes of memory, with what is on `/tmp`, `/run` and `/dev/shm` and the kernel's cache of files, from [`MEMORY_MIN`] on.
    /// When there are no more, the kernel kills a process inside.
    pub memory: Option<u64>,
    /// Whether what they have in memory may be swapped out.
    pub swap: Swap,
}

/// Whether what processes have in memory may be swapped out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swap {
    /// Not if it can be helped.
    #[default]
    Avoid,
    /// No; where the kernel cannot promise it, the session does not start.
    Never,
    /// As everybody's.
    Allow,
}

impl Limits {
    /// Looks whether a session can live within them.
    ///
    /// # Errors
    /// `Invalid` if not.
    pub(crate) fn check(&self) -> Result<()> {
        let too_few = |what: String| Err(Error::new(ErrorKind::Invalid, what));
        if self.pids.is_some_and(|pids| pids < PIDS_MIN) {
            return too_few(format!(
                "A session has {PIDS_MIN} processes at least: process 1 and the command"
            ));
        }
        if self.memory.is_some_and(|memory| memory < MEMORY_MIN) {
            return too_few(format!(
                "A session does not start in less than {} MiB of memory",
                MEMORY_MIN >> 20
            ));
        }
        Ok(())
    }

    /// For people; empty if there is nothing to say.
    pub(crate) fn describe(&self) -> String {
        let mut all = Vec::new();
        all.extend(self.pids.map(|pids| format!("at most {pids} processes")));
        all.extend(self.memory.map(|bytes| format!("at most {bytes} bytes of memory")));
        match self.swap {
            Swap::Avoid => all.push("no swap, as far as the kernel can".to_owned()),
            Swap::Never => all.push("no swap, or it is not started".to_owned()),
            Swap::Allow => {}
        }
        all.join(", ")
    }

    pub(super) fn to_json(self) -> Value {
        let swap = match self.swap {
            Swap::Avoid => "avoid",
            Swap::Never => "never",
            Swap::Allow => "allow",
        };
        json!({ "pids": self.pids, "memory": self.memory, "swap": swap })
    }

    pub(super) fn from_json(value: &Value) -> Option<Self> {
        let swap = match value["swap"].as_str()? {
            "avoid" => Swap::Avoid,
            "never" => Swap::Never,
            "allow" => Swap::Allow,
            _ => return None,
        };
        Some(Self { pids: value["pids"].as_u64(), memory: value["memory"].as_u64(), swap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_read_as_they_were_written() {
        for swap in [Swap::Avoid, Swap::Never, Swap::Allow] {
            let limits = Limits { pids: Some(7), memory: None, swap };
            assert_eq!(Limits::from_json(&limits.to_json()), Some(limits));
        }
        assert_eq!(Limits::from_json(&json!({ "swap": "perhaps" })), None);
    }

    #[test]
    fn what_nobody_could_live_within_is_refused() {
        let limits = |pids, memory| Limits { pids, memory, swap: Swap::Avoid }.check();
        assert!(limits(None, None).is_ok() && limits(Some(2), Some(4 << 20)).is_ok());
        assert!(limits(Some(1), None).is_err() && limits(None, Some((4 << 20) - 1)).is_err());
    }
}
