//! One WebDAV server (RFC 4918): its requests, and what of their answers counts.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HeaderName, LOCATION};
use ureq::http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use ureq::{Agent, Body, SendBody};
use zeroize::Zeroizing;

use super::multistatus::{self, Resource};
use crate::carry::stores::Content;
use crate::carry::stores::address::Address;
use crate::carry::stores::http::{self, Download};
use crate::carry::stores::netrc::{self, Login};

/// The longest listing of a directory that is read, in bytes: some 100,000 files.
const LISTING_MAX: u64 = 64 << 20;

/// The longest answer that is read where one file is told of, in bytes.
const ANSWER_MAX: u64 = 1 << 20;

/// How far below a directory is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// It alone.
    Itself,
    /// What is in it as well.
    Within,
}

/// A server, and a directory on it.
pub(super) struct Server {
    agent: Agent,
    /// Scheme, host and port.
    origin: String,
    /// The path of the directory, without a slash at its end.
    base: Vec<u8>,
    authorization: Option<HeaderValue>,
}

impl Server {
    /// Nothing is asked of it yet.
    ///
    /// # Errors
    /// There is no password where one is needed, or it would be seen on the way; there is nobody whose certificates are
    /// trusted.
    pub(super) fn new(address: &Address, is_secret: bool) -> io::Result<Self> {
        let login = netrc::login(&address.host, address.user.as_deref())?;
        if let (Some(user), None) = (&address.user, &login) {
            let why = format!("~/.netrc has no password of {user} at {}", address.host);
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        if login.is_some() && !is_secret && !is_loopback(&address.host) {
            let why = "the password would be seen on the way: use webdavs://";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let scheme = if is_secret { "https" } else { "http" };
        let host =
            if address.host.contains(':') { format!("[{}]", address.host) } else { address.host.clone() };
        let port = address.port.map_or_else(String::new, |port| format!(":{port}"));
        let origin = format!("{scheme}://{host}{port}");
        let is_host = origin.parse::<Uri>().is_ok_and(|uri| uri.host() == Some(&host));
        if !is_host {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its host is no host"));
        }
        let mut base = address.path.clone();
        base.truncate(base.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1));
        let authorization = login.as_ref().map(basic).transpose()?;
        Ok(Self { agent: http::agent(is_secret)?, origin, base, authorization })
    }

    /// The path on the server of what is at `path` below the directory.
    pub(super) fn whole(&self, path: &Path) -> Vec<u8> {
        let path = path.as_os_str().as_bytes();
        if path.is_empty() { self.base.clone() } else { [&self.base, &b"/"[..], path].concat() }
    }

    fn url(&self, path: &Path, is_directory: bool) -> String {
        let slash = if is_directory || self.whole(path).is_empty() { "/" } else { "" };
        format!("{}{}{slash}", self.origin, http::encode(&self.whole(path)))
    }

    fn send(
        &self,
        method: &str,
        url: &str,
        headers: &[(HeaderName, &str)],
        body: SendBody<'_>,
    ) -> io::Result<Response<Body>> {
        let wrong = |error: ureq::http::Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let method = Method::from_bytes(method.as_bytes()).map_err(|error| wrong(error.into()))?;
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        http::send(&self.agent, request.body(body).map_err(wrong)?)
    }

    /// A request with XML in it.
    fn ask(&self, method: &str, url: &str, depth: &str, xml: &str) -> io::Result<Response<Body>> {
        let depth = (HeaderName::from_static("depth"), depth);
        let headers = [depth, (CONTENT_TYPE, "application/xml; charset=utf-8")];
        let length = xml.len().to_string();
        let headers = [&headers[..], &[(CONTENT_LENGTH, &length)]].concat();
        self.send(method, url, &headers, SendBody::from_reader(&mut xml.as_bytes()))
    }

    /// What is told of `path`, and of what is in it.
    pub(super) fn look(&self, path: &Path, depth: Depth) -> io::Result<Vec<Resource>> {
        let (level, most) = match depth {
            Depth::Itself => ("0", ANSWER_MAX),
            Depth::Within => ("1", LISTING_MAX),
        };
        let question = multistatus::question();
        let url = self.url(path, depth == Depth::Within);
        let mut answer = self.ask("PROPFIND", &url, level, &question)?;
        // Some say so that it is a directory.
        let with_slash = format!("{url}/");
        if answer.status().is_redirection() && leads_to(&answer, &self.origin, &with_slash) {
            http::finish(answer);
            answer = self.ask("PROPFIND", &with_slash, level, &question)?;
        }
        let answer = expect(answer, &[StatusCode::MULTI_STATUS])?;
        multistatus::parse(&http::text(answer, most)?).map_err(|why| http::not_understood(&why))
    }

    /// Sets memdev's own properties. Whether the server keeps them.
    pub(super) fn set(
        &self,
        path: &Path,
        is_directory: bool,
        properties: &[(&str, &str)],
    ) -> io::Result<bool> {
        let answer =
            self.ask("PROPPATCH", &self.url(path, is_directory), "0", &multistatus::update(properties))?;
        match answer.status().as_u16() {
            207 => multistatus::is_all_set(&http::text(answer, ANSWER_MAX)?)
                .map_err(|why| http::not_understood(&why)),
            403 | 405 | 409 | 413 | 501 | 507 => {
                http::finish(answer);
                Ok(false)
            }
            _ => expect(answer, &[StatusCode::MULTI_STATUS]).map(|_| false),
        }
    }

    pub(super) fn put(&self, path: &Path, mut content: &mut dyn Content) -> io::Result<()> {
        let size = content.size();
        let length = size.to_string();
        let mut headers = vec![(CONTENT_LENGTH, &*length), (CONTENT_TYPE, "application/octet-stream")];
        if http::is_asked_first(size) {
            headers.push((EXPECT, "100-continue"));
        }
        let body = SendBody::from_reader(&mut content);
        let answer = self.send("PUT", &self.url(path, false), &headers, body)?;
        done(answer, &[StatusCode::CREATED, StatusCode::NO_CONTENT, StatusCode::OK])
    }

    pub(super) fn get(&self, path: &Path) -> io::Result<Download> {
        let answer = self.send("GET", &self.url(path, false), &[], SendBody::none())?;
        Download::new(expect(answer, &[StatusCode::OK])?)
    }

    pub(super) fn make_directory(&self, path: &Path) -> io::Result<()> {
        let answer = self.send("MKCOL", &self.url(path, true), &[], SendBody::none())?;
        done(answer, &[StatusCode::CREATED, StatusCode::OK])
    }

    /// Removes a file, or a directory with everything in it.
    pub(super) fn remove(&self, path: &Path, is_directory: bool) -> io::Result<()> {
        let answer = self.send("DELETE", &self.url(path, is_directory), &[], SendBody::none())?;
        done(answer, &[StatusCode::NO_CONTENT, StatusCode::OK])
    }

    /// Renames; what has the name is in the way unless it may be replaced.
    pub(super) fn rename(
        &self,
        from: &Path,
        to: &Path,
        is_directory: bool,
        replaces: bool,
    ) -> io::Result<()> {
        let to = self.url(to, is_directory);
        let headers = [
            (HeaderName::from_static("destination"), &*to),
            (HeaderName::from_static("overwrite"), if replaces { "T" } else { "F" }),
        ];
        let answer = self.send("MOVE", &self.url(from, is_directory), &headers, SendBody::none())?;
        done(answer, &[StatusCode::CREATED, StatusCode::NO_CONTENT])
    }
}

fn basic(login: &Login) -> io::Result<HeaderValue> {
    let whole = Zeroizing::new(format!("{}:{}", login.user, *login.password));
    let text = Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(whole.as_bytes())));
    let mut value = HeaderValue::from_str(&text).map_err(io::Error::other)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Whether a host is this machine, whatever names are made of it elsewhere.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether the answer leads to this address of the same server.
fn leads_to(answer: &Response<Body>, origin: &str, url: &str) -> bool {
    let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
    location.is_some_and(|location| location == url || format!("{origin}{location}") == url)
}

fn expect(answer: Response<Body>, wanted: &[StatusCode]) -> io::Result<Response<Body>> {
    let status = answer.status();
    if wanted.contains(&status) {
        return Ok(answer);
    }
    http::finish(answer);
    if status.is_success() {
        return Err(http::not_understood(&format!("status {}", status.as_u16())));
    }
    Err(http::refused(status, ""))
}

fn done(answer: Response<Body>, wanted: &[StatusCode]) -> io::Result<()> {
    expect(answer, wanted).map(http::finish)
}
