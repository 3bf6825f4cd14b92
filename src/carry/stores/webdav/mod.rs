//! A directory of a WebDAV server (`webdav://` and `webdavs://[USER@]HOST[:PORT]/PATH`).
//!
//! A file gets a temporary name, is sent, its size is looked at, and it gets its name by MOVE: one that fails if something has
//! the name, or one that replaces. The protocol has a server replace by removing and renaming, so there may be a moment in
//! which nothing has it; never half of it.
//!
//! What the protocol has no room for (mode, owners, times, whose version it is, symbolic links) is in a property of the file
//! that the server keeps for us, if it keeps such, together with the server's name for this version: whoever edits the file
//! later has another one made, and so the rest is not taken for theirs.

mod inside;
mod multistatus;
mod wire;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use self::inside::{Inside, NO_VERSION, found, stamp, version};
use self::multistatus::Resource;
use self::wire::{Depth, Server};
use super::address::Address;
use super::beside::{
    DIRECTORY, FILE, LINK, Listed, NOT_KEPT, read_attributes, read_target, write_attributes,
};
use super::http::{self, not_understood};
use super::names::Names;
use super::{
    Aside, Attributes, Content, Found, Properties, Store, Text, if_there, is_abandoned, is_name,
    is_temporary, temporary,
};
use crate::carry::entry::{Kind, Stamp, Time, is_inner};
use crate::error::{Error, ErrorKind, Result};

/// The store.
pub(super) struct WebDav {
    server: Server,
    tag: String,
    count: AtomicU64,
    abilities: OnceLock<Abilities>,
    /// Symbolic links that were left out, as the server keeps none, and their targets. They are taken to be there.
    left_out: Mutex<HashMap<PathBuf, (Found, OsString)>>,
    listed: Listed,
}

/// What is known of the server.
struct Abilities {
    /// It keeps properties, also of what is renamed.
    has_properties: bool,
    /// A version is the same one when it is renamed.
    has_steady_versions: bool,
}

impl WebDav {
    /// The store at `destination`, which is a scheme and `rest`.
    pub(super) fn open(
        destination: &str,
        is_secret: bool,
        rest: &str,
        tag: &str,
        at_once: bool,
    ) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("Cannot carry to '{destination}': {why}"))
                .advise("write webdavs://[USER@]HOST[:PORT]/PATH, with the password in ~/.netrc")
        };
        let address = Address::parse(rest).map_err(wrong)?;
        let is_plain = |part: &[u8]| !matches!(part, b"." | b"..");
        if !address.path.split(|byte| *byte == b'/').all(is_plain) {
            return Err(wrong("its path has '.' or '..'"));
        }
        let failed = |error: io::Error| {
            Error::io("Cannot carry to", error)
                .on(destination)
                .advise("see that the directory is there, and that ~/.netrc has who may write to it")
        };
        let this = Self {
            server: Server::new(&address, is_secret).map_err(failed)?,
            tag: tag.to_owned(),
            count: AtomicU64::new(0),
            abilities: OnceLock::new(),
            left_out: Mutex::default(),
            listed: Listed::default(),
        };
        if at_once {
            this.abilities().map_err(failed)?;
        }
        Ok(this)
    }

    fn abilities(&self) -> io::Result<&Abilities> {
        if let Some(abilities) = self.abilities.get() {
            return Ok(abilities);
        }
        let abilities = self.try_out()?;
        Ok(self.abilities.get_or_init(|| abilities))
    }

    /// Finds out what the server can keep.
    fn try_out(&self) -> io::Result<Abilities> {
        if !self.resource(Path::new(""))?.is_directory {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let (first, second) = (PathBuf::from(self.temporary()), PathBuf::from(self.temporary()));
        let tried = (|| {
            self.server.put(&first, &mut Text(b"memdev"))?;
            let before = self.resource(&first)?;
            let is_set = self.server.set(&first, false, &[("inside", "x & y")])?;
            self.server.rename(&first, &second, false, false)?;
            let after = self.resource(&second)?;
            let has_steady_versions = version(&before).is_some() && version(&before) == version(&after);
            let is_kept = is_set && after.inside.as_deref() == Some("x & y");
            Ok(Abilities { has_properties: is_kept && has_steady_versions, has_steady_versions })
        })();
        // Where the second name is not had the first is.
        if self.server.remove(&second, false).is_err() {
            let _ = self.server.remove(&first, false);
        }
        tried
    }

    /// What the server tells of one file or directory.
    fn resource(&self, path: &Path) -> io::Result<Resource> {
        let whole = self.server.whole(path);
        let all = self.server.look(checked(path)?, Depth::Itself)?;
        let found = all.into_iter().find(|resource| resource.path == whole);
        found.ok_or_else(|| not_understood("it tells of something else than it was asked"))
    }

    /// Everything in a directory, also what is not whole.
    fn entries(&self, path: &Path) -> io::Result<Vec<(OsString, Resource)>> {
        let whole = self.server.whole(path);
        let mut all = Vec::new();
        let mut is_itself_there = false;
        for resource in self.server.look(checked(path)?, Depth::Within)? {
            if resource.path == whole {
                is_itself_there = resource.is_directory;
                continue;
            }
            // What is missed here would be taken for removed.
            let name = name_below(&whole, &resource.path)
                .ok_or_else(|| not_understood("it lists what is not in the directory"))?;
            all.push((name, resource));
        }
        if is_itself_there { Ok(all) } else { Err(io::ErrorKind::NotADirectory.into()) }
    }

    fn send(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        kind: u32,
    ) -> io::Result<Stamp> {
        let size = content.size();
        self.server.put(path, content)?;
        let resource = self.resource(path)?;
        if resource.is_directory || resource.size != Some(size) {
            return Err(io::Error::other("it has another size there than what was sent"));
        }
        if !self.abilities()?.has_properties {
            return Ok(stamp(&resource, None));
        }
        let inside =
            Inside::new(properties, kind, version(&resource).unwrap_or_else(|| NO_VERSION.to_owned()));
        self.set_properties(path, false, &inside, properties)?;
        Ok(stamp(&resource, Some(&inside)))
    }

    fn set_properties(
        &self,
        path: &Path,
        is_directory: bool,
        inside: &Inside,
        properties: &Properties,
    ) -> io::Result<()> {
        let inside = inside.write();
        let attributes = write_attributes(&properties.attributes);
        let all = [("inside", &*inside), ("attributes", &*attributes)];
        let not_kept = [all[0], ("attributes", NOT_KEPT)];
        let has_some = !attributes.is_empty();
        // Attributes that are too long for what is there do not hold up the file. A directory may have had others before.
        let ways = [(has_some || is_directory, &all[..]), (has_some, &not_kept[..]), (true, &all[..1])];
        for (_, properties) in ways.into_iter().filter(|(is_way, _)| *is_way) {
            if self.server.set(path, is_directory, properties)? {
                return Ok(());
            }
        }
        Err(io::Error::other("the server does not keep its properties any more"))
    }

    /// What was left there: for a server whose versions change their names as they are renamed, only now to be known.
    fn left(&self, path: &Path, stamp: Stamp) -> io::Result<Stamp> {
        if self.abilities()?.has_steady_versions {
            return Ok(stamp);
        }
        let found = self.find(path)?.filter(|found| found.stamp.size == stamp.size);
        Ok(found.map_or(stamp, |found| found.stamp))
    }

    fn left_out(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, (Found, OsString)>> {
        self.left_out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A path that may be asked for.
fn checked(path: &Path) -> io::Result<&Path> {
    if path.as_os_str().is_empty() || is_inner(path) {
        Ok(path)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

/// The name of what is in a directory, by the paths of both.
fn name_below(directory: &[u8], path: &[u8]) -> Option<OsString> {
    let name = path.strip_prefix(directory)?.strip_prefix(b"/")?;
    is_name(name).then(|| OsString::from_vec(name.to_vec()))
}

/// Its attributes; nothing is known of those that were not kept, nor of those of what was not carried there.
fn attributes(resource: &Resource) -> Option<Attributes> {
    match &resource.attributes {
        Some(text) => read_attributes(text),
        None => resource.inside.as_ref().map(|_| Attributes::new()),
    }
}

impl Store for WebDav {
    fn at_once(&self) -> usize {
        http::AT_ONCE
    }

    fn lacks(&self) -> Vec<&'static str> {
        match self.abilities.get() {
            Some(abilities) if !abilities.has_properties => {
                vec!["modes, owners, times, extended attributes, symbolic links"]
            }
            _ => Vec::new(),
        }
    }

    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        match if_there(self.resource(path))? {
            Some(resource) => Ok(Some(found(&resource))),
            None => Ok(self.left_out().get(path).map(|(found, _)| found.clone())),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>> {
        let all = self.entries(path)?.into_iter().filter(|(name, _)| !is_temporary(name));
        let all = all.map(|(name, resource)| {
            self.listed.note(path.join(&name), attributes(&resource));
            (name, found(&resource))
        });
        Ok(all.collect())
    }

    fn get(&self, path: &Path) -> io::Result<Box<dyn Content + '_>> {
        Ok(Box::new(self.server.get(checked(path)?)?))
    }

    fn attributes(&self, path: &Path) -> io::Result<Option<Attributes>> {
        if !self.abilities()?.has_properties {
            return Ok(None);
        }
        if let Some(attributes) = self.listed.take(path) {
            return Ok(attributes);
        }
        self.resource(path).map(|resource| attributes(&resource))
    }

    fn target(&self, path: &Path) -> io::Result<OsString> {
        if let Some((_, target)) = self.left_out().get(path) {
            return Ok(target.clone());
        }
        read_target(&mut *self.get(path)?)
    }

    fn put(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        checked(path)?;
        // Nothing is there that could be in the way.
        self.left_out().remove(path);
        let stamp =
            self.leave(path, Kind::File, aside, |temporary| self.send(temporary, content, properties, FILE))?;
        self.left(path, stamp)
    }

    fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        checked(path)?;
        if self.abilities()?.has_properties {
            // A small file, and a property that says what it is.
            return self.leave(path, Kind::Link, aside, |temporary| {
                self.send(temporary, &mut Text(target.as_bytes()), properties, LINK)
            });
        }
        let stamp = Stamp { size: target.len() as u64, modified: properties.modified, tag: None };
        let found = Found { kind: Kind::Link, stamp: stamp.clone(), meta: None, mode: None, session: None };
        self.left_out().insert(path.to_owned(), (found, target.to_owned()));
        Ok(stamp)
    }

    fn make_directory(&self, path: &Path, properties: &Properties, aside: Aside<'_>) -> io::Result<Stamp> {
        checked(path)?;
        self.left_out().remove(path);
        self.clear_for_directory(path, aside)?;
        if let Err(error) = self.server.make_directory(path) {
            // Somebody else may have been faster.
            if !self.find(path)?.is_some_and(|found| found.kind == Kind::Directory) {
                return Err(error);
            }
        }
        if self.abilities()?.has_properties {
            let inside = Inside::new(properties, DIRECTORY, NO_VERSION.to_owned());
            self.set_properties(path, true, &inside, properties)?;
        }
        Ok(Stamp { size: 0, modified: Time::default(), tag: None })
    }

    fn remove(&self, path: &Path, kind: Kind) -> io::Result<()> {
        if self.left_out().remove(path).is_some() {
            return Ok(());
        }
        // The server would remove everything in it.
        if kind == Kind::Directory && !self.entries(path)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        match self.server.remove(checked(path)?, kind == Kind::Directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn sweep(&self, directory: &Path) -> io::Result<()> {
        for (name, resource) in self.entries(directory)? {
            if is_abandoned(&name, &self.tag) && !resource.is_directory {
                self.remove(&directory.join(&name), Kind::File)?;
            }
        }
        Ok(())
    }
}

impl Names for WebDav {
    fn temporary(&self) -> OsString {
        temporary(&self.tag, self.count.fetch_add(1, Ordering::Relaxed))
    }

    fn rename(&self, from: &Path, to: &Path, kind: Kind) -> io::Result<()> {
        self.server.rename(from, to, kind == Kind::Directory, false)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.server.rename(from, to, false, true)
    }
}

/// See [`crate::carry::try_answer`].
pub(super) fn try_answer(text: &str) {
    let _ = multistatus::is_all_set(text);
    for resource in multistatus::parse(text).unwrap_or_default() {
        assert!(!resource.path.contains(&0) && !resource.path.ends_with(b"/"));
        let tag = resource.tag.as_deref().unwrap_or("tag");
        assert!(!tag.is_empty() && !tag.contains(char::is_control));
        let found = found(&resource);
        assert_eq!(found.kind == Kind::Directory, resource.is_directory);
        assert!(found.meta.is_none_or(|meta| meta.mode <= 0o7777));
        let attributes = attributes(&resource).unwrap_or_default();
        assert!(attributes.iter().all(|(name, _)| name.as_bytes().starts_with(b"user.")));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::carry::stores::http::tests::{answering, answering_in_turn};
    use crate::carry::stores::tests::Asking;

    #[test]
    fn names_are_names() {
        let of = |path: &[u8]| name_below(b"/files", path);
        assert_eq!(of(b"/files/x"), Some("x".into()));
        for bad in [
            &b"/files"[..],
            b"/files/",
            b"/files/..",
            b"/files/.",
            b"/files/a/b",
            b"/other/x",
            b"/filesx",
            b"/",
        ] {
            assert_eq!(of(bad), None);
        }
    }

    /// A store whose server gives one answer to whatever it is asked, and then closes the connection.
    fn answered(answer: String) -> WebDav {
        let address = answering(answer);
        WebDav::open("webdav://test", false, &format!("{address}/files"), "t", false).unwrap()
    }

    fn listing(inner: &str) -> String {
        let body = format!("<multistatus xmlns='DAV:'>{inner}</multistatus>");
        format!("HTTP/1.1 207 Multi-Status\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    fn entry(path: &str, kind: &str) -> String {
        format!(
            "<response><href>{path}</href><propstat><prop><resourcetype>{kind}</resourcetype></prop><status>HTTP/1.1 200 OK</status>\
             </propstat></response>"
        )
    }

    #[test]
    fn what_a_server_lists_is_in_the_directory_or_nothing_is_believed() {
        let own = entry("/files/", "<collection/>");
        let store = answered(listing(&format!(
            "{own}{}{}",
            entry("/files/x", ""),
            entry("/files/.memdev-carry-x", "")
        )));
        let names: Vec<_> = store.list(Path::new("")).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["x"]);
        for other in ["/files/..", "/files/%2e%2e", "/files/a%2fb", "/other/x", "/", "/files/a/b"] {
            let store = answered(listing(&format!("{own}{}", entry(other, ""))));
            let error = store.list(Path::new("")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{other}");
        }
        // It does not list itself: whatever this is, it is no empty directory.
        let error = answered(listing("")).list(Path::new("")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
        let error = answered(listing(&entry("/files/y", ""))).find(Path::new("x")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    /// The attributes that a directory had once, and has no more, came back with the next fill.
    #[test]
    fn a_directory_may_lose_its_attributes() {
        let kept = |attributes: Vec<(OsString, Vec<u8>)>, is_too_long: bool| {
            let directory = listing(&entry("/files/d/", "<collection/>"));
            let set = |status: &str| {
                listing(&format!(
                    "<response><href>/files/d/</href><propstat><prop/><status>HTTP/1.1 {status}</status></propstat></response>"
                ))
            };
            let made = "HTTP/1.1 405 It is there\r\nContent-Length: 0\r\n\r\n".to_owned();
            let mut answers = vec![directory.clone(), made, directory];
            answers.extend(is_too_long.then(|| set("507 Full")));
            answers.push(set("200 OK"));
            let (address, asked) = answering_in_turn(answers, |_, body| {
                body.split_once("<m:attributes>").map_or_else(String::new, |(_, rest)| format!(" {rest}"))
            });
            let rest = format!("{address}/files");
            let store = WebDav::open("webdav://test", false, &rest, "t", false).unwrap();
            let abilities = Abilities { has_properties: true, has_steady_versions: true };
            let _ = store.abilities.set(abilities);
            let properties = Properties { attributes, ..Properties::default() };
            store.make_directory(Path::new("d"), &properties, &mut Asking(|_, _| Ok(None))).unwrap();
            let asked = asked.lock().unwrap();
            let last =
                asked.last().unwrap().strip_prefix("PROPPATCH /files/d/ ").expect("it is set").to_owned();
            last.split_once("</m:attributes>").unwrap().0.to_owned()
        };
        let one = || vec![("user.a".into(), b"1".to_vec())];
        assert_eq!(kept(one(), false), "user.a=1");
        assert_eq!(kept(one(), true), "!", "neither those nor others, nor none");
        assert_eq!(kept(Vec::new(), false), "");
    }

    /// Somebody else's directory would have taken the attributes from the image's.
    #[test]
    fn what_was_not_carried_there_has_no_attributes_to_tell_of() {
        let told = |properties: &str, has_properties: bool| {
            let entry = entry("/files/d/", "<collection/>");
            let entry = entry.replace("<resourcetype>", &format!("{properties}<resourcetype>"));
            let store = answered(listing(&entry));
            let _ = store.abilities.set(Abilities { has_properties, has_steady_versions: true });
            store.attributes(Path::new("d")).unwrap()
        };
        let ours = "<inside xmlns='urn:memdev:carry'>x</inside>";
        assert_eq!(told("", true), None);
        assert_eq!(told(ours, true), Some(Vec::new()));
        assert_eq!(told(ours, false), None);
        let some = format!("{ours}<attributes xmlns='urn:memdev:carry'>user.a=1</attributes>");
        assert_eq!(told(&some, true), Some(vec![("user.a".into(), b"1".to_vec())]));
        assert_eq!(told(&some.replace("user.a=1", ""), true), Some(Vec::new()));
        assert_eq!(told(&some.replace("user.a=1", "!"), true), None, "there was no room for them");
    }

    #[test]
    fn an_answer_is_whole_and_no_longer_than_it_may_be() {
        let whole = listing(&entry("/files/", "<collection/>"));
        assert!(answered(whole.clone()).list(Path::new("")).is_ok());
        for length in [0, 10, whole.len() / 2, whole.len() - 1] {
            assert!(answered(whole[..length].to_owned()).list(Path::new("")).is_err(), "{length}");
        }
        let long = format!("HTTP/1.1 207 Multi-Status\r\n\r\n{}", " ".repeat(2 << 20));
        let error = answered(long).find(Path::new("x")).unwrap_err();
        assert!(error.to_string().contains("longer than 1 MiB"), "{error}");
        let short = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n1234".to_owned();
        assert!(answered(short).get(Path::new("x")).unwrap().read_to_end(&mut Vec::new()).is_err());
        let endless = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n".to_owned();
        assert!(answered(endless).get(Path::new("x")).is_err(), "nobody knows how long it is");
    }

    #[test]
    fn statuses_are_what_others_would_say() {
        let error = |status: &str| {
            let answer =
                format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nLocation: http://192.0.2.1/\r\n\r\n");
            answered(answer).server.put(Path::new("x"), &mut Text(b"x")).unwrap_err().kind()
        };
        assert_eq!(error("507 Insufficient Storage"), io::ErrorKind::StorageFull);
        assert_eq!(error("403 Forbidden"), io::ErrorKind::PermissionDenied);
        assert_eq!(error("401 Unauthorized"), io::ErrorKind::Other);
        assert_eq!(error("302 Found"), io::ErrorKind::Other);
        assert_eq!(error("202 Accepted"), io::ErrorKind::InvalidData, "that it will be there is not enough");
    }
}
