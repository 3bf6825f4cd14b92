//! What could not be delivered when a session ended: kept on the host, whole, until it can be.
//!
//! ```text
//! SPOOL/ID/about.json     whose it is and where to it goes
//!          entries.json   what there is, in the order of delivery
//!          data/N         the content of the Nth entry, if it is a file
//!          rest.age       instead of these two, where it is to be encrypted: see `encrypted`
//!          done           the numbers of those that were delivered since, a line each, which ends with ';'
//! ```
//!
//! A directory appears under its name only when everything in it is on the disk.

mod age;
mod encrypted;
mod rest;
mod resume;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde_json::{Value, json};

pub(crate) use self::age::{check as check_recipient, try_out as try_recipient};
pub(crate) use self::rest::Rest;
pub use self::resume::resume;
use crate::error::{Error, ErrorKind, Result};

/// What was left of one carried directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spooled {
    /// What it is called.
    pub id: String,
    /// The session that it is of.
    pub session: String,
    /// The carried directory.
    pub path: String,
    /// Where it is to be delivered.
    pub destination: String,
    /// How many things there are: files, directories, links, removals.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// When it was left, in seconds since 1970.
    pub since: i64,
    /// Whom it is encrypted to, if it is.
    pub recipient: Option<String>,
}

impl Spooled {
    /// As JSON has it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "session": self.session,
            "path": self.path,
            "destination": self.destination,
            "entries": self.entries,
            "bytes": self.bytes,
            "since": self.since,
            "recipient": self.recipient,
        })
    }

    fn from_json(id: &str, value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        Some(Self {
            id: id.to_owned(),
            session: text("session")?,
            path: text("path")?,
            destination: text("destination")?,
            entries: value["entries"].as_u64()?,
            bytes: value["bytes"].as_u64()?,
            since: value["since"].as_i64()?,
            recipient: text("recipient"),
        })
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The spool, made if it is not there: a directory that nobody else can write to.
fn trusted(path: &Path) -> Result<OwnedFd> {
    let failed = |error: io::Error| {
        let denied = error.kind() == io::ErrorKind::PermissionDenied;
        let error = Error::io("Cannot use the spool", error).on_path(path);
        if denied { error.advise("run it as root") } else { error }
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| failed(error.into()))?;
    let others = stat.st_mode & 0o077 != 0;
    if others || stat.st_uid != rustix::process::geteuid().as_raw() {
        let why = format!("Cannot trust the spool {}: it is open to others", path.display());
        return Err(Error::new(ErrorKind::Denied, why).advise("chmod 700 it, and give it to root"));
    }
    Ok(fd)
}

/// What is in the spool, the oldest first.
///
/// # Errors
/// It cannot be read.
pub fn spooled(spool: &Path) -> Result<Vec<Spooled>> {
    let failed = |error: io::Error| Error::io("Cannot read the spool", error).on_path(spool);
    let entries = match fs::read_dir(spool) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let Some(id) = entry.file_name().to_str().filter(|id| is_id(id)).map(str::to_owned) else { continue };
        let about = fs::read(entry.path().join("about.json"));
        let about = about.ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        all.extend(about.and_then(|about| Spooled::from_json(&id, &about)));
    }
    all.sort_by(|a, b| (a.since, &a.id).cmp(&(b.since, &b.id)));
    Ok(all)
}

fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn find(spool: &Path, id: &str) -> Result<Spooled> {
    let all = spooled(spool)?;
    let mut matching = all.into_iter().filter(|one| one.id.starts_with(id));
    match (matching.next(), matching.next()) {
        (Some(one), None) if !id.is_empty() => Ok(one),
        (Some(_), Some(_)) => {
            Err(Error::new(ErrorKind::Invalid, format!("More than one in the spool begins with '{id}'")))
        }
        _ => Err(Error::new(ErrorKind::NotFound, format!("Nothing in the spool is called '{id}'"))
            .advise("see 'memdev carry status'")),
    }
}

/// Forgets what is called so, or the one thing whose name begins so: what it holds is lost.
///
/// # Errors
/// `NotFound` if there is none; it cannot be removed.
pub fn forget(spool: &Path, id: &str) -> Result<Spooled> {
    let one = find(spool, id)?;
    let directory = spool.join(&one.id);
    let _lock = lock(&directory)?;
    fs::remove_dir_all(&directory)
        .map_err(|error| Error::io("Cannot remove from the spool", error).on(&one.id))?;
    Ok(one)
}

/// One at a time delivers it.
fn lock(directory: &Path) -> Result<File> {
    let failed = |error| Error::io("Cannot read the spool", error).on_path(directory);
    let file = File::open(directory).map_err(failed)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| Error::new(ErrorKind::InUse, "Somebody delivers it already:").on_path(directory))?;
    Ok(file)
}
