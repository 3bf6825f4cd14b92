//! A directory of an SFTP server (`sftp://[USER@]HOST[:PORT]/PATH`), by connections that the system's own `ssh` makes.
//!
//! A file gets a temporary name, is written, dressed and synced there, and then renamed: to a name that nothing has by a
//! rename that fails if something has it by then, else by one that replaces. That takes five round trips or more: many files are on
//! their way at once, over few connections ([`pool`]).
//!
//! The protocol has no way to stay below a directory whatever others do there. That what is above a path are directories, and no
//! links, is looked at in the same round trip before each step; the account's rights on the server are what bounds the
//! rest.

mod connection;
mod message;
mod pool;
mod requests;

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use self::message::{Attributes, Reply};
use self::pool::{Failure, Pool};
use self::requests::{Reading, Requests};
use super::address::Address;
use super::names::Names;
use super::{
    Aside, Content, Found, Properties, Store, if_there, is_abandoned, is_temporary, parts, temporary,
};
use crate::carry::entry::{Kind, Meta, Stamp, Time, is_inner};
use crate::error::{Error, ErrorKind, Result};

/// How many files are on their way at the same time.
const AT_ONCE: usize = 64;

/// The store.
pub(super) struct Sftp {
    address: Address,
    pool: Pool,
    tag: String,
    count: AtomicU64,
    server: OnceLock<Server>,
    /// A rename fails where something has the name, as the protocol wants it: not all servers do. Tried out when it is wanted.
    refuses: OnceLock<bool>,
    /// That it could not be tried out last what the server can keep.
    trying: Mutex<Option<Failure>>,
}

/// What is known of the server.
struct Server {
    /// The destination, absolute.
    root: Vec<u8>,
    /// Who owns it, and so what is root's inside.
    owner: (u32, u32),
    has_owners: bool,
    has_links: bool,
    has_sync: bool,
}

impl Sftp {
    /// The store at `destination`, which is `sftp://` and `rest`.
    pub(super) fn open(destination: &str, rest: &str, tag: &str, at_once: bool) -> Result<Self> {
        let address = Address::parse(rest).map_err(|why| {
            Error::new(ErrorKind::Invalid, format!("Cannot carry to '{destination}': {why}"))
                .advise("write sftp://[USER@]HOST[:PORT]/PATH")
        })?;
        let this = Self {
            address,
            pool: Pool::default(),
            tag: tag.to_owned(),
            count: AtomicU64::new(0),
            server: OnceLock::new(),
            refuses: OnceLock::new(),
            trying: Mutex::default(),
        };
        if at_once {
            this.server().map_err(|error| {
                Error::io("Cannot carry to", error).on(destination).advise(
                    "make the directory there; 'sftp' has to get there without a question, as this user",
                )
            })?;
        }
        Ok(this)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Requests) -> io::Result<T>) -> io::Result<T> {
        let mut requests = self.pool.requests(&self.address)?;
        work(&mut requests).map_err(|error| requests.explain(error))
    }

    fn server(&self) -> io::Result<&Server> {
        if let Some(server) = self.server.get() {
            return Ok(server);
        }
        let asked = Instant::now();
        let mut failed = self.trying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = self.server.get() {
            return Ok(server);
        }
        // Who has waited for another's attempt makes none of its own.
        if let Some(error) = failed.as_ref().and_then(|failed| failed.since(asked)) {
            return Err(error);
        }
        let server = self.with(|requests| self.try_out(requests));
        let server = server.inspect_err(|error| *failed = Some(Failure::new(error)))?;
        Ok(self.server.get_or_init(|| server))
    }

    /// Finds out what the server can keep.
    fn try_out(&self, requests: &mut Requests) -> io::Result<Server> {
        if !requests.has("posix-rename@openssh.com") {
            let why = "the server cannot replace a file in one step (posix-rename@openssh.com)";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let root = requests.real_path(start(&self.address.path))?;
        let attributes = requests.stat(&root)?;
        if kind(&attributes) != Kind::Directory {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let path = [&root[..], b"/", self.temporary().as_bytes()].concat();
        let handle = requests.create(&path)?;
        let somebody = Attributes { owner: Some((1, 1)), ..Attributes::default() };
        let has_owners = requests.fsetstat(&handle, &somebody).is_ok();
        let has_sync = requests.has("fsync@openssh.com") && requests.sync(&handle).is_ok();
        let closed = requests.close(&handle);
        requests.remove(&path).and(closed)?;
        // Some servers have the two names in the other order: what was made says which.
        let has_links = requests.symlink(b"x", &path).is_ok()
            && requests.read_link(&path).is_ok_and(|target| target == "x");
        if has_links {
            requests.remove(&path)?;
        }
        let owner = attributes.owner.unwrap_or_default();
        Ok(Server { root, owner, has_owners, has_links, has_sync })
    }

    /// Whether a rename of a file does nothing where something has the name, be it a link that leads nowhere, and else does what
    /// it is to.
    fn try_renames(&self) -> io::Result<bool> {
        let server = self.server()?;
        let [one, other, link] =
            [(); 3].map(|()| [&server.root[..], b"/", self.temporary().as_bytes()].concat());
        self.with(|requests| {
            let refuses = (|| {
                for path in [&one, &other] {
                    let handle = requests.create(path)?;
                    requests.close(&handle)?;
                }
                let mut refused =
                    requests.rename(&one, &other).is_err() && requests.rename(&other, &one).is_err();
                if server.has_links {
                    requests.symlink(b"x", &link)?;
                    refused &= requests.rename(&other, &link).is_err();
                    refused &= requests.read_link(&link).is_ok();
                    requests.remove(&link)?;
                }
                // It was not for another reason.
                Ok(refused && requests.rename(&one, &link).is_ok() && requests.lstat(&other).is_ok())
            })();
            for path in [&one, &other, &link] {
                let _ = requests.remove(path);
            }
            refuses
        })
    }

    /// The whole path there. What is above it is asked to be directories.
    fn whole(&self, server: &Server, requests: &mut Requests, path: &Path) -> io::Result<Vec<u8>> {
        let (whole, above) = Self::paths(server, path)?;
        Self::expect_directories(requests.lstat_all(&above)?)?;
        Ok(whole)
    }

    /// The whole path there, and those of what is above it.
    fn paths(server: &Server, path: &Path) -> io::Result<(Vec<u8>, Vec<Vec<u8>>)> {
        if path.as_os_str().is_empty() {
            return Ok((server.root.clone(), Vec::new()));
        }
        if !is_inner(path) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let below = |path: &Path| [&server.root[..], b"/", path.as_os_str().as_bytes()].concat();
        let above = path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
        Ok((below(path), above.map(below).collect()))
    }

    /// What is there.
    fn look(&self, path: &Path) -> io::Result<Found> {
        let server = self.server()?;
        let (_, attributes) = self.with(|requests| self.look_at(requests, server, path))?;
        Ok(self.found(server, &attributes))
    }

    /// The whole path there, and what it is. What is above it is asked to be directories in the same round trip.
    fn look_at(
        &self,
        requests: &mut Requests,
        server: &Server,
        path: &Path,
    ) -> io::Result<(Vec<u8>, Attributes)> {
        let (whole, mut all) = Self::paths(server, path)?;
        all.push(whole.clone());
        let mut all = requests.lstat_all(&all)?;
        let last = all.pop().ok_or(io::ErrorKind::InvalidData)?;
        Self::expect_directories(all)?;
        Ok((whole, last?))
    }

    fn expect_directories(all: Vec<io::Result<Attributes>>) -> io::Result<()> {
        for above in all {
            if kind(&above?) != Kind::Directory {
                return Err(io::ErrorKind::NotADirectory.into());
            }
        }
        Ok(())
    }

    /// Does something with the whole path.
    fn at<T>(
        &self,
        path: &Path,
        work: impl FnOnce(&mut Requests, &[u8], &Server) -> io::Result<T>,
    ) -> io::Result<T> {
        let server = self.server()?;
        self.with(|requests| {
            let path = self.whole(server, requests, path)?;
            work(requests, &path, server)
        })
    }

    /// Whose it is to be, where that can be said.
    fn owner(server: &Server, properties: &Properties) -> Option<Attributes> {
        let Meta { uid, gid, .. } = properties.meta;
        let of = |id, owner| if id == 0 { owner } else { id };
        let owner = Some((of(uid, server.owner.0), of(gid, server.owner.1)));
        server.has_owners.then(|| Attributes { owner, ..Attributes::default() })
    }

    fn found(&self, server: &Server, attributes: &Attributes) -> Found {
        let of = |id, owner| if id == owner { 0 } else { id };
        let mode = attributes.mode.unwrap_or_default() & 0o1777;
        let meta = attributes.owner.filter(|_| server.has_owners).map(|(uid, gid)| Meta {
            mode,
            uid: of(uid, server.owner.0),
            gid: of(gid, server.owner.1),
        });
        Found { kind: kind(attributes), stamp: stamp(attributes), meta, mode: Some(mode), session: None }
    }
}

/// The path as the server is asked: `/~/PATH` is from where it leads those who log in.
fn start(path: &[u8]) -> &[u8] {
    match path.strip_prefix(b"/~") {
        Some(b"" | b"/") => b".",
        Some([b'/', rest @ ..]) => rest,
        _ => path,
    }
}

fn kind(attributes: &Attributes) -> Kind {
    attributes.mode.map_or(Kind::Other, Kind::of_mode)
}

fn modified(attributes: &Attributes) -> Time {
    Time::new(attributes.times.map_or(0, |times| times.1).into(), 0_u32)
}

fn stamp(attributes: &Attributes) -> Stamp {
    if kind(attributes) == Kind::Directory {
        return Stamp { size: 0, modified: Time::default(), tag: None };
    }
    Stamp { size: attributes.size.unwrap_or(0), modified: modified(attributes), tag: None }
}

/// What the protocol has room for: seconds of 1970 to 2106.
fn times(modified: Time) -> Attributes {
    let seconds = u32::try_from(modified.seconds.max(0)).unwrap_or(u32::MAX);
    Attributes { times: Some((seconds, seconds)), ..Attributes::default() }
}

impl Store for Sftp {
    fn at_once(&self) -> usize {
        AT_ONCE
    }

    fn lacks(&self) -> Vec<&'static str> {
        let mut all = vec!["extended attributes, set-id bits, fractions of seconds"];
        let Some(server) = self.server.get() else { return all };
        if !server.has_links {
            all.push("symbolic links");
        }
        if !server.has_owners {
            all.push("owners");
        }
        if !server.has_sync {
            all.push("promise that what it has taken is on its disk");
        }
        all
    }

    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        if_there(self.look(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>> {
        let server = self.server()?;
        let all = self.with(|requests| {
            let (whole, attributes) = self.look_at(requests, server, path)?;
            // The destination itself may be a link, where a server does not tell where that leads.
            match kind(&attributes) {
                Kind::Directory => requests.list(&whole),
                _ if path.as_os_str().is_empty() => requests.list(&whole),
                _ => Err(io::ErrorKind::NotADirectory.into()),
            }
        })?;
        let all = all.into_iter().filter(|(name, _)| !is_temporary(name));
        Ok(all.map(|(name, attributes)| (name, self.found(server, &attributes))).collect())
    }

    fn get(&self, path: &Path) -> io::Result<Box<dyn Content + '_>> {
        let server = self.server()?;
        let mut requests = self.pool.requests(&self.address)?;
        let opened = self.look_at(&mut requests, server, path).and_then(|(whole, attributes)| {
            match kind(&attributes) {
                Kind::File => Ok((requests.open(&whole)?, attributes.size.unwrap_or(0))),
                // A pipe would be waited for.
                _ => Err(io::ErrorKind::NotFound.into()),
            }
        });
        let (handle, size) = opened.map_err(|error| requests.explain(error))?;
        Ok(Box::new(Download { requests, reading: Reading::new(handle, size), size }))
    }

    fn target(&self, path: &Path) -> io::Result<OsString> {
        self.at(path, |requests, whole, _| requests.read_link(whole))
    }

    fn put(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        self.leave(path, Kind::File, aside, |temporary| {
            self.at(temporary, |requests, whole, server| {
                let handle = requests.create(whole)?;
                // What is asked for of one file is done in the order in which it is asked for: nothing is waited for in between.
                let sent = (|| {
                    parts(content, &mut |at, part| requests.write_at(&handle, at, part))?;
                    if content.has_holes() {
                        let size = Attributes { size: Some(content.size()), ..Attributes::default() };
                        requests.fsetstat_later(&handle, &size)?;
                    }
                    let attributes = Attributes {
                        mode: Some(properties.meta.mode & 0o777),
                        times: times(properties.modified).times,
                        ..Self::owner(server, properties).unwrap_or_default()
                    };
                    requests.fsetstat_later(&handle, &attributes)?;
                    if server.has_sync {
                        requests.sync_later(&handle)?;
                    }
                    Ok(())
                })();
                // What was sent is answered, whatever became of the rest; and closed.
                let (done, attributes) = requests.finish(&handle);
                sent.and(done)?;
                let attributes = attributes?;
                if attributes.size != Some(content.size()) {
                    return Err(io::Error::other("it has another size there than what was written"));
                }
                Ok(stamp(&attributes))
            })
        })
    }

    fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        self.leave(path, Kind::Link, aside, |temporary| {
            self.at(temporary, |requests, whole, server| {
                if !server.has_links {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "the server makes no symbolic links",
                    ));
                }
                requests.symlink(target.as_bytes(), whole)?;
                if requests.has("lsetstat@openssh.com") {
                    // Links have no mode.
                    let owner = Self::owner(server, properties);
                    for attributes in owner.into_iter().chain([times(properties.modified)]) {
                        let _ = requests.lsetstat(whole, &attributes);
                    }
                }
                Ok(stamp(&requests.lstat(whole)?))
            })
        })
    }

    fn make_directory(&self, path: &Path, properties: &Properties, aside: Aside<'_>) -> io::Result<Stamp> {
        self.clear_for_directory(path, aside)?;
        self.at(path, |requests, whole, server| {
            let made = requests.make_directory(whole);
            let attributes = requests.lstat(whole);
            // Somebody else may have been faster.
            if !attributes.is_ok_and(|attributes| kind(&attributes) == Kind::Directory) {
                made?;
                return Err(io::ErrorKind::NotADirectory.into());
            }
            let owner = Self::owner(server, properties);
            let mode = Attributes { mode: Some(properties.meta.mode & 0o1777), ..Attributes::default() };
            // After the owner, which may clear some of it.
            for attributes in owner.into_iter().chain([mode]) {
                match requests.setstat(whole, &attributes) {
                    // It is another account's, which lets this one write.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    result => result?,
                }
            }
            Ok(stamp(&requests.lstat(whole)?))
        })
    }

    fn remove(&self, path: &Path, kind: Kind) -> io::Result<()> {
        let removed = self.at(path, |requests, whole, _| {
            if kind != Kind::Directory {
                return requests.remove(whole);
            }
            requests.remove_directory(whole).map_err(|error| match requests.list(whole) {
                // The protocol has no word for it.
                Ok(all) if !all.is_empty() => io::ErrorKind::DirectoryNotEmpty.into(),
                _ => error,
            })
        });
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn sweep(&self, directory: &Path) -> io::Result<()> {
        let all = self.at(directory, |requests, whole, _| requests.list(whole))?;
        for (name, attributes) in all {
            if is_abandoned(&name, &self.tag) {
                self.remove(&directory.join(&name), kind(&attributes))?;
            }
        }
        Ok(())
    }
}

impl Names for Sftp {
    fn refuses_to_replace(&self) -> bool {
        *self.refuses.get_or_init(|| self.try_renames().unwrap_or(false))
    }

    fn temporary(&self) -> OsString {
        temporary(&self.tag, self.count.fetch_add(1, Ordering::Relaxed))
    }

    fn rename(&self, from: &Path, to: &Path, _kind: Kind) -> io::Result<()> {
        self.at(from, |requests, whole, _| requests.rename(whole, &beside(whole, from, to)))
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.at(from, |requests, whole, _| requests.replace(whole, &beside(whole, from, to)))
    }
}

/// See [`crate::carry::try_answer`].
pub(super) fn try_answer(message: &[u8]) {
    if let Some((id, reply)) = Reply::parse(message) {
        assert_eq!(Reply::head(message).map(|head| head.1), Some(id));
        assert!(reply.count() <= message.len(), "{reply:?}");
    }
}

/// The whole path of `to`, which is in the same directory as `from`, whose whole path is `whole`.
fn beside(whole: &[u8], from: &Path, to: &Path) -> Vec<u8> {
    let name = |path: &Path| path.file_name().unwrap_or_default().as_bytes().to_vec();
    [&whole[..whole.len() - name(from).len()], &name(to)].concat()
}

/// A file that is being read.
struct Download {
    requests: Requests,
    reading: Reading,
    size: u64,
}

impl Content for Download {
    fn size(&self) -> u64 {
        self.size
    }
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reading.read(&mut self.requests, buffer).map_err(|error| self.requests.explain(error))
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.reading.end(&mut self.requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_begin_at_home() {
        for (path, asked) in
            [("/srv/x", "/srv/x"), ("/~/files", "files"), ("/~", "."), ("/~/", "."), ("/~x", "/~x")]
        {
            assert_eq!(start(path.as_bytes()), asked.as_bytes(), "{path}");
        }
    }
}
