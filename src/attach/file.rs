//! A file instead of a device, for who may not have devices: the daemon answers for a FUSE file system that somebody else
//! has mounted, in a user namespace in which this user is root.
//!
//! It is written down as attachments are, without a device: nothing of it can be left but its record.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::plan::{self, Opened, Plan};
use super::process::Daemon;
use super::record::{Directory, Entry};
use super::{Keeper, Options, clean_up, random_name, shared};
use crate::error::{Error, Result};

/// A file that is served, and does not stay unless it is [kept](Served::keep).
pub(crate) struct Served {
    read_only: bool,
    // The option is empty once it is kept.
    undo: Option<(Daemon, Entry, Directory)>,
}

impl Served {
    /// Starts a daemon for what `options` name, in the user namespace `ids`. The file is called `name`; what the kernel asks
    /// of it comes by `requests`.
    ///
    /// # Errors
    /// Whatever goes wrong with the image, the server or the system.
    pub(crate) fn start(
        options: &Options,
        name: &str,
        requests: OwnedFd,
        ids: BorrowedFd<'_>,
    ) -> Result<Self> {
        let directory = Directory::open(&options.state)?;
        clean_up(&directory)?;
        let Opened { source, export, told, image, sockets } = plan::open(options)?;
        let entry = directory.create(&random_name()?)?;
        let plan =
            Plan { options, directory: &directory, entry: &entry, wanted: None, source, export, told, image };
        let daemon = Daemon::start(&plan)?;
        let started = daemon
            .instruct(&plan, Some((name, requests.as_fd())), Some(ids), &sockets)
            .and_then(|()| daemon.answer())
            .and_then(|(told, _)| plan.record("file", told, daemon.number()))
            .and_then(|record| entry.write(&record).map(|()| record));
        // Nobody but the daemon has these from now on: when it dies, the file and the session are to know.
        drop((requests, sockets));
        let is_shared = plan.is_shared();
        drop(plan);
        let warning = started.as_ref().ok().filter(|_| is_shared);
        let warning = warning.and_then(|record| shared::warning(&directory, entry.id(), record));
        let undo = Some((daemon, entry, directory));
        let mut served = Self { read_only: true, undo };
        served.read_only = started?.read_only;
        if let Some(warning) = warning {
            (options.warn)(&warning);
        }
        Ok(served)
    }

    /// Whether the file refuses writes.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// From now on the file is served until nobody has its file system any more, as long as whoever has the [`Keeper`] looks
    /// after it.
    ///
    /// # Errors
    /// The daemon died in the meantime.
    pub(crate) fn keep(mut self) -> Result<Keeper> {
        let died = |error| Error::io("The daemon of the new file has died", error);
        let (daemon, entry, directory) =
            self.undo.take().ok_or_else(|| died(std::io::ErrorKind::NotFound.into()))?;
        daemon.look_after().map_err(|(error, daemon)| {
            self.undo = Some((daemon, entry, directory));
            died(error)
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some((daemon, entry, directory)) = self.undo.take() {
            directory.remove(entry.id());
            drop(entry);
            daemon.end();
        }
    }
}
