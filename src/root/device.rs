//! The disk of one private root: attached as a block device, or without root served as a tree; handed over to be mounted,
//! and seen to the end.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions};

use super::Run;
use super::filesystem::{self, Kind};
use super::freeze;
use super::ids::Ids;
use super::partition::Table;
use super::record::Session;
use super::signals::Signals;
use super::tree::Tree;
use crate::attach::{self, Attached, Backend, Keeper, Options, Source};
use crate::control::Client;
use crate::control::model::{Change, Fork};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;

/// How long a copy that nobody will see again may take to be written back before its daemon is killed. What is left of it
/// is gone either way.
const PATIENCE: Duration = Duration::from_millis(500);

/// The same for a named session, which somebody may want to go on with.
const PATIENCE_FOR_SESSIONS: Duration = Duration::from_secs(30);

/// How long a daemon may take to hear that a disk has been given up.
const AFTER_WORD: Duration = Duration::from_millis(500);

/// What is to be mounted.
pub(super) enum Medium {
    /// The file system on a block device: its node, and what is on it.
    Device { path: PathBuf, kind: Kind },
    /// A mount that is there already, in no tree.
    Tree(OwnedFd),
}

/// Something to be mounted, that lives as long as it is used, and a daemon that lives as long as that.
pub(super) struct Disk {
    /// What it is written down under, if it is a device.
    pub(super) id: String,
    /// What it is a fork of.
    pub(super) original: Option<Original>,
    /// Until it is mounted.
    pub(super) medium: Option<Medium>,
    pub(super) read_only: bool,
    /// Keeps the device until its file system is mounted.
    file: Option<File>,
    // Empty once it is over.
    keeper: Option<Keeper>,
    /// Whether it has been given up.
    given_up: bool,
    /// Who serves the tree.
    server: Option<Pid>,
    attachments: PathBuf,
    patience: Duration,
}

impl Disk {
    /// Attaches what `run`, which is called `name`, is to have as its root.
    ///
    /// # Errors
    /// What attaching says; `Unsupported` if what is on the device cannot be a root.
    pub(super) fn attach(run: &Run, name: &str, signals: &Signals) -> Result<Self> {
        let (attached, original) = match &run.of {
            None => (attach::attach(&options(run, name))?, None),
            Some(of) => {
                let (attached, original) = Original::fork(run, name, of, signals)?;
                (attached, Some(original))
            }
        };
        let id = attached.id().to_owned();
        let (path, read_only) = (attached.device().path(), attached.record().read_only);
        let open = || File::open(&path).map_err(|error| Error::io("Cannot read", error).on_path(&path));
        let mut device = open()?;
        if let Some(number) = run.partition {
            let part = Table::of_file(&device)?.find(number)?;
            drop(device);
            attached.narrow(part.offset, part.length)?;
            device = open()?;
        }
        let kind =
            filesystem::on(&device, 0).map_err(|error| Error::io("Cannot read", error).on_path(&path))?;
        let kind = kind.ok_or_else(|| {
            filesystem::none(&match &run.source {
                Source::Image { path, .. } => path.display().to_string(),
                Source::Export(uri) => uri.to_string(),
            })
        })?;
        drop(device);
        let (file, keeper) = attached.keep_while_used()?;
        let medium = Medium::Device { path, kind };
        let mut disk = Self::with(run, medium, read_only, (Some(file), keeper, None));
        (disk.id, disk.original) = (id, original);
        Ok(disk)
    }

    /// The same without a block device, in `ids`.
    ///
    /// # Errors
    /// As [`Tree::serve`].
    pub(super) fn serve(run: &Run, name: &str, ids: &Ids) -> Result<Self> {
        let Tree { mount, read_only, server, keeper } = Tree::serve(run, &options(run, name), ids)?;
        Ok(Self::with(run, Medium::Tree(mount), read_only, (None, keeper, Some(server))))
    }

    fn with(
        run: &Run,
        medium: Medium,
        read_only: bool,
        (file, keeper, server): (Option<File>, Keeper, Option<Pid>),
    ) -> Self {
        let patience = match run.source {
            Source::Image { .. } => PATIENCE,
            Source::Export(_) => PATIENCE_FOR_SESSIONS,
        };
        let attachments = run.attachments.clone();
        let (medium, keeper) = (Some(medium), Some(keeper));
        let (id, original) = (String::new(), None);
        Self { id, original, medium, read_only, file, keeper, given_up: false, server, attachments, patience }
    }

    /// From now on only what is mounted keeps it.
    pub(super) fn let_go(&mut self) {
        self.file = None;
        self.medium = None;
    }

    /// The mount that is there already, if it is one.
    pub(super) fn tree(&self) -> Option<BorrowedFd<'_>> {
        match &self.medium {
            Some(Medium::Tree(mount)) => Some(mount.as_fd()),
            _ => None,
        }
    }

    /// Readable when it is not served any more.
    pub(super) fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.keeper.as_ref().map(Keeper::watch)
    }

    /// How long it may take until what the session has written is where it belongs.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Makes all that still waits for it fail: first by a word to its daemon, which may have others to serve; if that was
    /// not enough, by the daemon's death. How long the word may take.
    pub(super) fn give_up(&mut self) -> Option<Duration> {
        let keeper = self.keeper.as_ref()?;
        // A daemon for this one alone dies in either case.
        if !self.given_up && self.server.is_none() {
            self.given_up = true;
            keeper.give_up();
            return Some(AFTER_WORD);
        }
        // First, since the other may wait for it, and so not die.
        keeper.kill();
        if let Some(server) = self.server {
            let _ = rustix::process::kill_process(server, Signal::KILL);
        }
        None
    }
}

/// The session that this one is a fork of, as it was when its disk was forked.
pub(super) struct Original {
    /// Its process 1.
    pub(super) init: OwnedFd,
    /// Its mount table.
    pub(super) table: String,
    /// What the fork of its disk is, if it is another session of a server.
    pub(super) source: Option<Uri>,
}

impl Original {
    /// Forks the disk of `of` while its file system stands still.
    fn fork(run: &Run, name: &str, of: &Session, signals: &Signals) -> Result<(Attached, Self)> {
        let gone = || Error::new(ErrorKind::NotFound, "The session has just ended").on(&of.name);
        let init = of.process().ok_or_else(gone)?;
        let root = freeze::root_of(of.init)?;
        let mut table = String::new();
        let mut still = |act: &mut dyn FnMut() -> Result<()>| {
            freeze::while_frozen(&root, signals, || {
                act()?;
                table = fs::read_to_string(format!("/proc/{}/mountinfo", of.init))
                    .map_err(|error| Error::io("Cannot read what is mounted in the session", error))?;
                Ok(())
            })
        };
        let (attached, source) = match &run.source {
            Source::Image { .. } => (attach::fork(&options(run, name), &of.attachment, &mut still)?, None),
            Source::Export(uri) => {
                let (attached, uri) = fork_of_server(run, name, uri, &mut still)?;
                (attached, Some(uri))
            }
        };
        Ok((attached, Self { init, table, source }))
    }
}

/// A fork of a server's session, by the server.
fn fork_of_server(
    run: &Run,
    name: &str,
    uri: &Uri,
    still: attach::AtThatMoment<'_>,
) -> Result<(Attached, Uri)> {
    if !uri.export.contains('@') {
        let why = format!("A session that belongs to one connection cannot be forked: {uri}");
        return Err(Error::new(ErrorKind::Unsupported, why).advise("run a named one, NAME@ID"));
    }
    let Some(control) = &run.control else {
        let why = format!("Its disk is a session of a server, which has to fork it: {uri}");
        return Err(
            Error::new(ErrorKind::Invalid, why).advise("say where its control socket is: --control PATH")
        );
    };
    let mut server = Client::connect(control)?;
    let mut made = None;
    still(&mut || {
        // It ends with this process, until there is a device of it.
        let wanted = Fork { id: None, unclaimed: false, held: true };
        made = Some(server.fork(&uri.export, &wanted)?.session.name);
        Ok(())
    })?;
    let export = made.unwrap_or_default();
    let uri = Uri { export, ..uri.clone() };
    let attached = attach::attach(&Options { source: Source::Export(uri.clone()), ..options(run, name) })?;
    server.change(&uri.export, &Change { held: Some(false), ..Change::default() })?;
    Ok((attached, uri))
}

/// How it is attached.
fn options(run: &Run, name: &str) -> Options {
    Options {
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
        // Who carries needs it after the launcher, if that is killed; it ends with both.
        die_with_parent: run.carrying.carries.is_empty(),
        while_used: true,
        root: Some(name.to_owned()),
        warn: run.warn,
    }
}

impl Drop for Disk {
    /// Nobody uses it any more: the kernel lets go of it when it has written back what it had in its cache, and it is over.
    /// Where that takes too long, it is given up, and the kernel's writes fail.
    fn drop(&mut self) {
        self.let_go();
        let mut patience = Some(self.patience);
        while let Some(time) = patience {
            if self.keeper.as_ref().is_none_or(|keeper| keeper.is_over_within(time)) {
                break;
            }
            patience = self.give_up();
        }
        if let Some(keeper) = self.keeper.take()
            && let Err(error) = keeper.wait()
        {
            tracing::debug!(%error, "Cannot wait for the daemon of the disk");
        }
        if let Some(server) = self.server {
            // It ends before the daemon, unless it was killed.
            let _ = rustix::process::waitpid(Some(server), WaitOptions::empty());
        }
        if let Err(error) = attach::clean_up_state(&self.attachments) {
            tracing::debug!(%error, "Cannot look for what is left of the device");
        }
    }
}
