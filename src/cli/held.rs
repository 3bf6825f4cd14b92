//! A session that a command makes for its own ends.

use std::fs;
use std::path::Path;

use memdev::base::Identity;
use memdev::control::Client;
use memdev::control::model::{Change, SessionDetail};
use memdev::net::{Address, Uri};
use memdev::{Error, ErrorKind, Result};

/// A session that ends when this does, or this process, in whatever way: unless it is kept.
pub(super) struct HeldSession {
    client: Client,
    session: SessionDetail,
}

impl HeldSession {
    /// Makes one, by asking that it be held.
    pub(super) fn new(
        mut client: Client,
        make: impl FnOnce(&mut Client) -> Result<SessionDetail>,
    ) -> Result<Self> {
        let session = make(&mut client)?;
        Ok(Self { client, session })
    }

    pub(super) fn session(&self) -> &SessionDetail {
        &self.session
    }

    /// Makes it what its image was when it, or what it was made of, began: whatever has the image's name by now.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.client.reset(&self.session.session.name).map(drop)
    }

    /// The way to it, on this machine if there is one. Whoever goes it only looks: it is still for the first who comes.
    pub(super) fn uri(&self) -> Result<Uri> {
        let uris = self.session.session.uris.iter().map(|uri| uri.parse::<Uri>());
        let mut uris = uris.collect::<Result<Vec<_>>>()?;
        uris.sort_by_key(|uri| !matches!(uri.address, Address::Unix(_)));
        let mut uri = uris.into_iter().next().ok_or_else(|| {
            let error = Error::new(ErrorKind::Unsupported, "The server listens nowhere: no way to");
            error.on(&self.session.session.name).advise("start it with --unix or --tcp")
        })?;
        uri.export.push('?');
        Ok(uri)
    }

    /// Checks that the file at `path` is the one that it, or `session`, which it was made of, is on.
    pub(super) fn check_base(&self, path: &Path, session: &str) -> Result<()> {
        let failed = |error| Error::io("Cannot look at the base", error).on_path(path);
        let base = &self.session.session.base;
        if Identity::of(&fs::metadata(path).map_err(failed)?)
            == (Identity { device: base.device, inode: base.inode })
        {
            return Ok(());
        }
        let (age, advice) = if base.current {
            ("", "give the image that is served")
        } else {
            (", as it was before it was replaced", "save it without --base")
        };
        let message = format!("{session} is on {}{age}, and not on", base.path);
        Err(Error::new(ErrorKind::Invalid, message).on_path(path).advise(advice))
    }

    /// Has it stay, under another id if one is given.
    pub(super) fn keep(mut self, id: Option<String>) -> Result<SessionDetail> {
        let change = Change { id, held: Some(false), ..Change::default() };
        let kept = self.client.change(&self.session.session.name, &change)?;
        self.session.session.name.clear();
        Ok(kept)
    }
}

impl Drop for HeldSession {
    fn drop(&mut self) {
        if !self.session.session.name.is_empty() {
            // It fails where the server has gone, and the session with it.
            let _ = self.client.end(&self.session.session.name);
        }
    }
}
