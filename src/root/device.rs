//! The block device of one private root: attached, handed to its file system, and seen to the end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

use super::Run;
use super::filesystem::{self, Kind};
use super::partition::Table;
use crate::attach::{self, Backend, Options, Source};
use crate::error::{Error, ErrorKind, Result};

/// How long a copy that nobody will see again may take to be written back before its daemon is killed. What is left of it
/// is gone either way.
const PATIENCE: Duration = Duration::from_millis(500);

/// The same for a named session, which somebody may want to go on with.
const PATIENCE_FOR_SESSIONS: Duration = Duration::from_secs(30);

/// A device that lives as long as it is used, and a daemon that lives as long as the device.
pub(super) struct Disk {
    /// Its node.
    pub(super) path: PathBuf,
    /// What is on it.
    pub(super) kind: Kind,
    pub(super) read_only: bool,
    /// Keeps the device until its file system is mounted.
    file: Option<File>,
    daemon: Child,
    /// The same process, for waiting together with others.
    watch: OwnedFd,
    attachments: PathBuf,
    patience: Duration,
}

impl Disk {
    /// Attaches what `run` is to have as its root.
    ///
    /// # Errors
    /// What attaching says; `Unsupported` if what is on the device cannot be a root.
    pub(super) fn attach(run: &Run) -> Result<Self> {
        let options = Options {
            source: run.source.clone(),
            device: None,
            connections: 1,
            memory: run.memory,
            read_only: false,
            // Only a loop device can be a part of what is attached.
            backend: match run.backend {
                Backend::Auto if run.partition.is_some() => Backend::Fuse,
                backend => backend,
            },
            state: run.attachments.clone(),
            log: run.log.clone(),
            program: run.program.clone(),
            die_with_parent: true,
        };
        let attached = attach::attach(&options)?;
        let (path, read_only) = (attached.device().path(), attached.record().read_only);
        let open = || File::open(&path).map_err(|error| Error::io("Cannot read", error).on_path(&path));
        let mut device = open()?;
        if let Some(number) = run.partition {
            let part = Table::of_file(&device)?.find(number)?;
            drop(device);
            attached.narrow(part.offset, part.length)?;
            device = open()?;
        }
        let kind = filesystem::on(&device).map_err(|error| Error::io("Cannot read", error).on_path(&path))?;
        let kind = kind.ok_or_else(|| {
            let what = match &run.source {
                Source::Image { path, .. } => path.display().to_string(),
                Source::Export(uri) => uri.to_string(),
            };
            Error::new(ErrorKind::Unsupported, "No file system that can be a root is on")
                .on(what)
                .advise("make one of ext4 or XFS")
        })?;
        drop(device);
        let (file, daemon) = attached.keep_while_used()?;
        let watch = i32::try_from(daemon.id())
            .ok()
            .and_then(Pid::from_raw)
            .map_or(Err(rustix::io::Errno::SRCH), |pid| {
                rustix::process::pidfd_open(pid, PidfdFlags::empty())
            });
        let watch = watch.map_err(|error| Error::io("Cannot watch the device's daemon", error))?;
        let patience = match run.source {
            Source::Image { .. } => PATIENCE,
            Source::Export(_) => PATIENCE_FOR_SESSIONS,
        };
        let attachments = run.attachments.clone();
        Ok(Self { path, kind, read_only, file: Some(file), daemon, watch, attachments, patience })
    }

    /// From now on only what is mounted keeps the device.
    pub(super) fn let_go(&mut self) {
        self.file = None;
    }

    /// Readable when its daemon has ended.
    pub(super) fn watch(&self) -> &OwnedFd {
        &self.watch
    }

    /// How long it may take until what the session has written is where it belongs.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Makes all that still waits for the device fail.
    pub(super) fn kill_daemon(&mut self) {
        let _ = self.daemon.kill();
    }

    fn ends_within(&self, time: Duration) -> bool {
        let timeout = Timespec::try_from(time).unwrap_or_default();
        let mut fds = [PollFd::new(&self.watch, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&timeout)), Ok(1..))
    }
}

impl Drop for Disk {
    /// Nobody uses it any more: the kernel lets go of it when it has written back what it had in its cache, and the daemon
    /// ends. Where that takes too long, the daemon is killed, and the kernel's writes fail.
    fn drop(&mut self) {
        self.file = None;
        if !self.ends_within(self.patience) {
            let _ = self.daemon.kill();
        }
        let _ = self.daemon.wait();
        if let Err(error) = attach::clean_up_state(&self.attachments) {
            tracing::debug!(%error, "Cannot look for what is left of the device");
        }
    }
}
