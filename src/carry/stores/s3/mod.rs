//! A prefix in a bucket of an S3 server (`s3://BUCKET[/PREFIX]`).
//!
//! An object is there whole or not at all, so nothing has a temporary name: what is short is put there at once, what is long in
//! parts of which an object is made at last, both under the condition that what has the name is what was looked at, or
//! nothing. What others put there at the same time is not replaced unseen, on a server that knows such conditions; what is removed, and
//! what a directory takes the place of, is looked at and removed a moment later.
//!
//! There are no directories: one is what is before a slash in a key, and an empty object `DIRECTORY/`, which has its mode.

mod account;
mod beside;
mod place;
mod sign;
mod wire;
mod xml;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use self::account::{Account, parse};
use self::beside::{attributes, found, meta};
use self::wire::{Object, Only, Server};
use super::beside::{DIRECTORY, FILE, LINK, Listed, read_target};
use super::http::not_understood;
use super::{
    ABANDONED, Aside, Attributes, Content, Found, Properties, Store, TEMPORARY, Text, if_there, is_abandoned,
    is_name, is_temporary, temporary,
};
use crate::carry::entry::{Kind, Stamp, Time, is_inner};
use crate::carry::together::together;
use crate::error::{Error, ErrorKind, Result};

/// What is put there at once, and the length of parts, in bytes: they are in memory while they are sent.
const PART: u64 = 8 << 20;

/// How many parts a file may have: servers take 10,000.
const PARTS_MAX: u64 = 9_000;

/// The longest file, in bytes.
const SIZE_MAX: u64 = 1 << 40;

/// The most pages of a listing, of 1,000 names each.
const PAGES_MAX: u32 = 1_000;

/// How many files are on their way at the same time.
const AT_ONCE: usize = 4;

/// How many objects of a directory are asked about at the same time.
const ASKED: usize = 8;

/// The store.
pub(super) struct S3 {
    server: Server,
    /// What is before every key: nothing, or a prefix with a slash at its end.
    prefix: String,
    tag: String,
    count: AtomicU64,
    has_conditions: OnceLock<bool>,
    listed: Listed,
    kept: place::Kept,
}

impl S3 {
    /// The store at `destination`, which is `s3://` and `rest`.
    pub(super) fn open(destination: &str, rest: &str, tag: &str, at_once: bool) -> Result<Self> {
        let (bucket, prefix) = parse(rest).map_err(|why| {
            Error::new(ErrorKind::Invalid, format!("Cannot carry to '{destination}': {why}"))
                .advise("write s3://BUCKET[/PREFIX], with AWS_ENDPOINT_URL and AWS_REGION in the environment")
        })?;
        let failed = |error: io::Error| {
            Error::io("Cannot carry to", error)
                .on(destination)
                .advise("see AWS_ENDPOINT_URL, AWS_REGION and the keys, and that the bucket is there")
        };
        let server = Account::of_environment().and_then(|account| Server::new(&bucket, account));
        let this = Self {
            server: server.map_err(failed)?,
            prefix,
            tag: tag.to_owned(),
            count: AtomicU64::new(0),
            has_conditions: OnceLock::new(),
            listed: Listed::default(),
            kept: place::Kept::default(),
        };
        if at_once {
            this.has_conditions().map_err(failed)?;
        }
        Ok(this)
    }

    /// Whether the server puts something there under a condition. Others say so by an error, or say nothing and do it anyway.
    fn has_conditions(&self) -> io::Result<bool> {
        if let Some(has) = self.has_conditions.get() {
            return Ok(*has);
        }
        self.server.page(&self.prefix, true, 1, None)?;
        let name = temporary(&self.tag, self.count.fetch_add(1, Ordering::Relaxed));
        let key = format!("{}{}", self.prefix, name.to_string_lossy());
        self.server.put(&key, b"memdev", &[], &Only::Always)?;
        let again = self.server.put(&key, b"memdev", &[], &Only::New);
        let removed = self.server.remove(&key);
        let has = match again {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => true,
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) =>
            {
                return Err(error);
            }
            _ => false,
        };
        removed?;
        Ok(*self.has_conditions.get_or_init(|| has))
    }

    /// The key of a file.
    fn key(&self, path: &Path) -> io::Result<String> {
        let text = path.to_str().filter(|text| !text.contains(char::is_control));
        let text = text.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidFilename, "S3 has no names that are not printable text")
        })?;
        if !is_inner(path) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(format!("{}{text}", self.prefix))
    }

    /// What is before the keys of what is in a directory.
    fn within(&self, path: &Path) -> io::Result<String> {
        if path.as_os_str().is_empty() {
            Ok(self.prefix.clone())
        } else {
            Ok(format!("{}/", self.key(path)?))
        }
    }

    /// Hands over every page of what is below a prefix.
    fn pages(
        &self,
        prefix: &str,
        is_flat: bool,
        take: &mut dyn FnMut(xml::Page) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut next = None;
        for _ in 0..PAGES_MAX {
            let mut page = self.server.page(prefix, is_flat, 1_000, next.as_deref())?;
            if !page.keys.iter().chain(&page.prefixes).all(|key| key.starts_with(prefix)) {
                return Err(not_understood("it lists what is not in the directory"));
            }
            next = page.next.take();
            take(page)?;
            if next.is_none() {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "there are too many files in one directory"))
    }

    /// What is told of a directory: by its own object, if it has one.
    fn directory(&self, path: &Path) -> io::Result<Option<Found>> {
        let prefix = self.within(path)?;
        if let Some(object) = if_there(self.server.head(&prefix))? {
            return Ok(Some(found(&object, true)));
        }
        let page = self.server.page(&prefix, true, 1, None)?;
        let is_one = !page.keys.is_empty() || !page.prefixes.is_empty();
        Ok(is_one.then(|| found(&Object::default(), true)))
    }

    fn send(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        kind: u32,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        let (key, size) = (self.key(path)?, content.size());
        if size > SIZE_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 TiB"));
        }
        let meta = meta(kind, properties);
        let tag = if size <= PART {
            let body = read(content, size)?;
            at_end(content)?;
            self.place(path, aside, &mut |only| self.server.put(&key, &body, &meta, only))?
        } else {
            let id = self.server.begin(&key, &meta)?;
            let sent = self.send_parts(&key, &id, content).and_then(|parts| {
                self.place(path, aside, &mut |only| self.server.complete(&key, &id, &parts, only))
            });
            if sent.is_err() {
                let _ = self.server.abort(&key, &id);
            }
            Some(sent?)
        };
        Ok(Stamp { size, modified: properties.modified, tag })
    }

    fn send_parts(&self, key: &str, id: &str, content: &mut dyn Content) -> io::Result<Vec<String>> {
        let length = PART.max(content.size().div_ceil(PARTS_MAX));
        let mut left = content.size();
        let mut parts = Vec::new();
        while left > 0 {
            let body = read(content, left.min(length))?;
            left -= body.len() as u64;
            if left == 0 {
                at_end(content)?;
            }
            parts.push(self.server.part(key, id, parts.len() + 1, &body)?);
        }
        Ok(parts)
    }
}

/// The next bytes of a content, as many as that.
fn read(content: &mut dyn Content, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    content.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Sees that a content ends here.
fn at_end(content: &mut dyn Content) -> io::Result<()> {
    if content.read(&mut [0])? == 0 {
        return Ok(());
    }
    Err(io::Error::other("it is longer than it said"))
}

impl Store for S3 {
    fn at_once(&self) -> usize {
        // To list asks several times as much.
        AT_ONCE
    }

    fn lists_at_once(&self) -> bool {
        false
    }

    fn lacks(&self) -> Vec<&'static str> {
        let mut all = Vec::new();
        if self.has_conditions.get() == Some(&false) {
            all.push("promise that nothing is replaced that was put there at the same time");
        }
        all
    }

    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        match if_there(self.server.head(&self.key(path)?))? {
            Some(object) => Ok(Some(found(&object, false))),
            None => self.directory(path),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(OsString, Found)>> {
        let prefix = self.within(path)?;
        let mut names = std::collections::BTreeMap::new();
        self.pages(&prefix, true, &mut |page| {
            let all = page.keys.iter().map(|key| (key, false));
            for (key, is_directory) in all.chain(page.prefixes.iter().map(|key| (key, true))) {
                let name = &key[prefix.len()..];
                let name = if is_directory { name.strip_suffix('/').unwrap_or(name) } else { name };
                // What no file system could hold is none of ours; the directory's own object has no name.
                if is_name(name.as_bytes()) && !is_temporary(OsStr::new(name)) {
                    *names.entry(name.to_owned()).or_default() |= is_directory;
                }
            }
            Ok(())
        })?;
        // A listing does not have what is kept beside.
        let all = Mutex::new(Vec::new());
        together(ASKED, names.into_iter().collect(), |(name, is_directory)| {
            let key = format!("{prefix}{name}{}", if is_directory { "/" } else { "" });
            let object = if_there(self.server.head(&key))?;
            self.listed.note(path.join(&name), object.as_ref().and_then(attributes));
            // A directory needs no object of its own. Somebody may have removed a file meanwhile.
            if let Some(object) = object.or_else(|| is_directory.then(Object::default)) {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                all.push((name.into(), found(&object, is_directory)));
            }
            Ok::<_, io::Error>(Vec::new())
        })?;
        Ok(all.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn get(&self, path: &Path) -> io::Result<Box<dyn Content + '_>> {
        Ok(Box::new(self.server.get(&self.key(path)?)?))
    }

    fn attributes(&self, path: &Path) -> io::Result<Option<Attributes>> {
        if let Some(attributes) = self.listed.take(path) {
            return Ok(attributes);
        }
        let object = match if_there(self.server.head(&self.key(path)?))? {
            Some(object) => Some(object),
            None => if_there(self.server.head(&self.within(path)?))?,
        };
        Ok(object.as_ref().and_then(attributes))
    }

    fn target(&self, path: &Path) -> io::Result<OsString> {
        read_target(&mut *self.get(path)?)
    }

    fn put(
        &self,
        path: &Path,
        content: &mut dyn Content,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        self.send(path, content, properties, FILE, aside)
    }

    fn link(
        &self,
        path: &Path,
        target: &OsStr,
        properties: &Properties,
        aside: Aside<'_>,
    ) -> io::Result<Stamp> {
        self.send(path, &mut Text(target.as_bytes()), properties, LINK, aside)
    }

    fn make_directory(&self, path: &Path, properties: &Properties, aside: Aside<'_>) -> io::Result<Stamp> {
        self.place_directory(path, aside, &mut || {
            self.server.put(&self.within(path)?, b"", &meta(DIRECTORY, properties), &Only::Always)
        })?;
        Ok(Stamp { size: 0, modified: Time::default(), tag: None })
    }

    fn remove(&self, path: &Path, kind: Kind) -> io::Result<()> {
        if kind != Kind::Directory {
            return self.server.remove(&self.key(path)?);
        }
        let prefix = self.within(path)?;
        let page = self.server.page(&prefix, true, 2, None)?;
        if page.keys.iter().any(|key| *key != prefix) || !page.prefixes.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.server.remove(&prefix)
    }

    /// Parts that nobody makes an object of are not seen, but paid for. Whose they are cannot be known, so only old ones go.
    fn sweep(&self, directory: &Path) -> io::Result<()> {
        if !directory.as_os_str().is_empty() {
            return Ok(());
        }
        let before = sign::time(Time::new(Time::now().seconds - ABANDONED, 0_u32));
        // Not every server lists them; nor may every account have them listed.
        for upload in self.server.unfinished(&self.prefix).unwrap_or_default() {
            let begun: String = upload.begun.chars().filter(|c| !matches!(c, '-' | ':')).collect();
            if upload.key.starts_with(&self.prefix) && begun < before {
                let _ = self.server.abort(&upload.key, &upload.id);
            }
        }
        // What was put there to find out what the server knows, by who was killed in that moment.
        self.pages(&format!("{}{TEMPORARY}", self.prefix), true, &mut |page| {
            let is_left = |key: &&String| is_abandoned(OsStr::new(&key[self.prefix.len()..]), &self.tag);
            page.keys.iter().filter(is_left).try_for_each(|key| self.server.remove(key))
        })
    }
}

/// See [`crate::carry::try_answer`].
pub(super) fn try_answer(text: &str) {
    let is_page = xml::page(text).is_ok();
    let is_unfinished = xml::unfinished(text).is_ok();
    let is_done = xml::field(text, "CompleteMultipartUploadResult", "ETag").is_ok();
    let is_error = xml::error(text).is_some();
    assert!([is_page, is_unfinished, is_done, is_error].iter().filter(|is| **is).count() <= 1);
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::carry::stores::http::tests::{answering, answering_in_turn, success};

    /// A store whose server gives one answer to whatever it is asked.
    fn answered(status: &str, body: &str) -> S3 {
        store(answering(format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"e\"\r\nLocation: http://192.0.2.1/\r\n\r\n{body}",
            body.len()
        )))
    }

    /// A store whose server is there.
    pub(super) fn store(address: SocketAddr) -> S3 {
        let endpoint = format!("http://{address}");
        let keys = account::Keys { key_id: "JOE".into(), secret: String::from("secret").into(), token: None };
        let account = Account { endpoint: Some(endpoint), region: "x".into(), keys };
        S3 {
            server: Server::new("bucket", account).unwrap(),
            prefix: "a/".to_owned(),
            tag: "t".to_owned(),
            count: AtomicU64::new(0),
            has_conditions: OnceLock::from(true),
            listed: Listed::default(),
            kept: place::Kept::default(),
        }
    }

    #[test]
    fn what_a_server_lists_is_in_the_directory_or_nothing_is_believed() {
        let listing = |key: &str| {
            let body = format!(
                "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>{key}</Key></Contents></ListBucketResult>"
            );
            let all = answered("200 OK", &body).list(Path::new(""))?;
            Ok::<_, io::Error>(all.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        assert_eq!(listing("a/x").unwrap(), ["x"]);
        for none in ["a/", "a/.", "a/..", "a/b/c", "a/.memdev-carry-x"] {
            assert_eq!(listing(none).unwrap(), [""; 0], "{none}");
        }
        for other in ["x", "b/x", "", "../x"] {
            assert_eq!(listing(other).unwrap_err().kind(), io::ErrorKind::InvalidData, "{other}");
        }
        let again = "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken></ListBucketResult>";
        assert!(answered("200 OK", again).list(Path::new("")).is_err(), "it never ends");
    }

    #[test]
    fn what_fails_late_or_elsewhere_is_no_success() {
        let late = answered("200 OK", "<Error><Code>InternalError</Code></Error>");
        let error = late.server.complete("a/x", "id", &["e".to_owned()], &Only::New).unwrap_err();
        assert!(error.to_string().contains("InternalError"), "{error}");
        assert!(late.server.copy("a/x", "a/y", None).is_err());
        let kind = |status: &str, body: &str| {
            answered(status, body).server.put("a/x", b"x", &[], &Only::Always).unwrap_err().kind()
        };
        assert_eq!(kind("307 Temporary Redirect", ""), io::ErrorKind::Other);
        assert_eq!(
            kind("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"),
            io::ErrorKind::PermissionDenied
        );
        assert_eq!(
            kind("403 Forbidden", "<Error><Code>SignatureDoesNotMatch</Code></Error>"),
            io::ErrorKind::Other
        );
        assert_eq!(
            kind("409 Conflict", "<Error><Code>ConditionalRequestConflict</Code></Error>"),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(
            kind("400 Bad", "<Error><Code>EntityTooLarge</Code></Error>"),
            io::ErrorKind::FileTooLarge
        );
        assert_eq!(kind("507 Full", "<html>"), io::ErrorKind::StorageFull);
    }

    /// Whoever was killed while it found out what the server knows left an object that nobody saw, for ever.
    #[test]
    fn what_was_abandoned_is_removed() {
        let now = Time::now().seconds;
        let mine = temporary("t", 1).into_string().unwrap();
        let keys = [
            mine,
            format!(".memdev-carry-t-0-1-{now}"),
            format!(".memdev-carry-other-0-1-{now}"),
            ".memdev-carry-other-0-1-5".to_owned(),
            ".memdev-carry-x".to_owned(),
        ];
        let listed: String =
            keys.iter().map(|key| format!("<Contents><Key>a/{key}</Key></Contents>")).collect();
        let listing =
            format!("<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>");
        // It lists no uploads.
        let answers = ["", &listing, "", ""].map(success).to_vec();
        let (address, asked) = answering_in_turn(answers, |_, _| String::new());
        let store = store(address);
        store.sweep(Path::new("d")).unwrap();
        store.sweep(Path::new("")).unwrap();
        let asked = asked.lock().unwrap();
        assert!(asked[1].ends_with("&prefix=a%2F.memdev-carry-"), "{asked:?}");
        assert_eq!(asked[2..], [&keys[1], &keys[3]].map(|key| format!("DELETE /bucket/a/{key}")));
    }
}
