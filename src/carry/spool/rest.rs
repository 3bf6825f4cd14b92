//! What is left at the end of a session is written down.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{create, encrypted, trusted, write_file};
use crate::attach::random_name;
use crate::carry::entry::{Kind, Time, escape};
use crate::carry::known::Known;
use crate::carry::stores::{self, Session};
use crate::carry::tree::{Source, Tree};
use crate::error::{Error, Result, plain};

/// What is to be written.
pub(crate) struct Rest<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) session: &'a Session,
    pub(crate) destination: &'a str,
    pub(crate) deletes: bool,
    /// Whether everything belongs to the destination's owner.
    pub(crate) of_user: bool,
    /// Whom it is encrypted to, if it is to be.
    pub(crate) recipient: Option<&'a str>,
    pub(crate) known: &'a dyn Fn(&Path) -> Option<Known>,
}

impl Rest<'_> {
    /// Writes down what is at these paths, in their order: what that is called, how many bytes it has, and what could not
    /// be read.
    ///
    /// # Errors
    /// The spool cannot be written; then nothing of it stays.
    pub(crate) fn write(&self, spool: &Path, paths: &[PathBuf]) -> Result<(String, u64, Vec<String>)> {
        let failed = |error: io::Error| Error::io("Cannot write to the spool", error).on_path(spool);
        let spool_fd = trusted(spool)?;
        let id = random_name()?[..12].to_owned();
        let hidden = spool.join(format!(".{id}"));
        let written = self.write_to(&hidden, paths).and_then(|(bytes, missing)| {
            fs::rename(&hidden, spool.join(&id))?;
            rustix::fs::fsync(&spool_fd)?;
            Ok((id, bytes, missing))
        });
        if written.is_err() {
            let _ = fs::remove_dir_all(&hidden);
        }
        written.map_err(failed)
    }

    fn write_to(&self, directory: &Path, paths: &[PathBuf]) -> io::Result<(u64, Vec<String>)> {
        fs::DirBuilder::new().mode(0o700).create(directory)?;
        let written = match self.recipient {
            None => self.write_plain(directory, paths)?,
            Some(recipient) => encrypted::write(self, directory, paths, recipient)?,
        };
        let about = json!({
            "session": self.session.name,
            "session_id": self.session.id,
            "path": format!("/{}", escape(self.tree.place())),
            "destination": self.destination,
            "of_user": self.of_user,
            "entries": written.entries,
            "bytes": written.bytes,
            "since": Time::now().seconds,
            "recipient": self.recipient,
        });
        write_file(&directory.join("about.json"), format!("{about:#}\n").as_bytes())?;
        File::open(directory)?.sync_all()?;
        Ok((written.bytes, written.missing))
    }

    fn write_plain(&self, directory: &Path, paths: &[PathBuf]) -> io::Result<Written> {
        let data = directory.join("data");
        fs::DirBuilder::new().mode(0o700).create(&data)?;
        let (mut entries, mut written) = (Vec::new(), Written::default());
        for path in paths {
            let file = data.join(entries.len().to_string());
            match self.keep(path, &file) {
                Ok(Some((entry, size))) => {
                    written.bytes += size;
                    entries.push(entry);
                }
                Ok(None) => {}
                // Of the spool there must be room; of what cannot be read the rest is saved.
                Err(Failed::There(error)) => return Err(error),
                Err(Failed::Here(error)) => {
                    let _ = fs::remove_file(&file);
                    written.miss(path, &error);
                }
            }
        }
        written.entries = entries.len() as u64;
        write_file(&directory.join("entries.json"), json!(entries).to_string().as_bytes())?;
        File::open(&data)?.sync_all()?;
        Ok(written)
    }

    /// One entry, its content in `data`, and how long that is.
    fn keep(&self, path: &Path, data: &Path) -> std::result::Result<Option<(Value, u64)>, Failed> {
        let Some((entry, source)) = self.describe(path).map_err(Failed::Here)? else { return Ok(None) };
        let Some(mut source) = source else { return Ok(Some((entry, 0))) };
        let file = create(data).map_err(Failed::There)?;
        stores::copy(&mut source, &file).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failed::There(error),
            _ => Failed::Here(error),
        })?;
        file.sync_all().map_err(Failed::There)?;
        Ok(Some((entry, source.version.size)))
    }

    /// One entry, and its content if it is a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn describe(&self, path: &Path) -> io::Result<Option<(Value, Option<Source>)>> {
        let known = (self.known)(path);
        let mut entry = json!({ "path": escape(path), "known": known.as_ref().map(Known::to_json) });
        let Some(mut version) = self.tree.version(path)? else {
            let is_there = known.as_ref().is_some_and(Known::is_there);
            return Ok((self.deletes && is_there).then_some((entry, None)));
        };
        let mut source = None;
        match version.kind {
            Kind::Other => return Ok(None),
            Kind::Link => entry["target"] = escape(Path::new(&self.tree.target(path)?)).into(),
            Kind::Directory => {}
            Kind::File => {
                let file = self.tree.read(path, true)?;
                version = file.version.clone();
                source = Some(file);
            }
        }
        if version.kind != Kind::Link {
            let attributes = self.tree.attributes(path)?;
            let attributes: Vec<_> =
                attributes.iter().map(|(name, value)| json!([name.as_bytes(), value])).collect();
            entry["attributes"] = attributes.into();
        }
        entry["version"] = version.to_json();
        Ok(Some((entry, source)))
    }
}

/// What there is in the spool now.
#[derive(Default)]
pub(super) struct Written {
    pub(super) entries: u64,
    pub(super) bytes: u64,
    /// What people are to be told that could not be read.
    pub(super) missing: Vec<String>,
}

impl Written {
    pub(super) fn miss(&mut self, path: &Path, error: &io::Error) {
        self.missing.push(format!("{} is LOST: it cannot be read: {}", escape(path), plain(error)));
    }
}

enum Failed {
    Here(io::Error),
    There(io::Error),
}
