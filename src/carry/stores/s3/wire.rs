//! One S3 server: its requests, signed, and what of their answers counts.

use std::io;

use ureq::http::header::{CONTENT_LENGTH, ETAG, LAST_MODIFIED};
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use ureq::{Agent, Body, SendBody};
use zeroize::Zeroizing;

use super::account::Account;
use super::sign::{Signed, Signer, hash, time};
use super::xml::{self, Page, Unfinished};
use crate::carry::entry::Time;
use crate::carry::stores::http::{self, Download};

/// The longest answer that is read, in bytes: 1,000 keys of 1,024 bytes that XML has as six each, and what is around them.
const ANSWER_MAX: u64 = 8 << 20;

/// What starts the names of headers that are kept with an object.
const META: &str = "x-amz-meta-";

/// A bucket on a server.
pub(super) struct Server {
    agent: Agent,
    /// Scheme, host and port.
    origin: String,
    host: String,
    /// What is before each key: a slash, or the bucket between two.
    base: String,
    bucket: String,
    signer: Signer,
    token: Option<Zeroizing<String>>,
}

/// What the server tells of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Object {
    /// Bytes.
    pub(super) size: u64,
    /// When it was put there, in seconds since 1970.
    pub(super) modified: i64,
    /// The server's name for this version of it.
    pub(super) tag: Option<String>,
    /// What was put there with it.
    pub(super) meta: Vec<(String, String)>,
}

/// Under which condition something is put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Only {
    /// None.
    Always,
    /// Nothing has the key.
    New,
    /// This version has it.
    Instead(String),
}

/// What one request has beside its method and key.
#[derive(Default)]
struct Ask<'a> {
    /// Sorted.
    query: &'a [(&'a str, &'a str)],
    headers: Vec<(String, String)>,
    body: &'a [u8],
}

impl Server {
    /// Nothing is asked of it yet.
    ///
    /// # Errors
    /// Its address is none; there is nobody whose certificates are trusted.
    pub(super) fn new(bucket: &str, account: Account) -> io::Result<Self> {
        let wrong = || {
            let why = "AWS_ENDPOINT_URL is no address: write https://HOST[:PORT]";
            io::Error::new(io::ErrorKind::InvalidInput, why)
        };
        let (origin, base) = match account.endpoint {
            Some(endpoint) => (endpoint, format!("/{bucket}/")),
            // A certificate for names before it is not for names with more dots.
            None if bucket.contains('.') => {
                (format!("https://s3.{}.amazonaws.com", account.region), format!("/{bucket}/"))
            }
            None => (format!("https://{bucket}.s3.{}.amazonaws.com", account.region), "/".to_owned()),
        };
        let uri: Uri = origin.parse().map_err(|_| wrong())?;
        let is_secret = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong()),
        };
        let host = uri.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(wrong)?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong());
        }
        let signer =
            Signer { key_id: account.keys.key_id, secret: account.keys.secret, region: account.region };
        Ok(Self {
            agent: http::agent(is_secret)?,
            host: host.to_string(),
            origin,
            base,
            bucket: bucket.to_owned(),
            signer,
            token: account.keys.token,
        })
    }

    /// Has a request answered that is signed at this moment.
    fn send(&self, method: &Method, key: &str, ask: Ask<'_>) -> io::Result<Response<Body>> {
        let wrong = |error: ureq::http::Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let path = http::encode(format!("{}{key}", self.base).as_bytes());
        let word = |text: &str| http::encode(text.as_bytes()).replace('/', "%2F");
        let query: Vec<_> =
            ask.query.iter().map(|(name, value)| format!("{}={}", word(name), word(value))).collect();
        let query = query.join("&");
        let (now, body) = (time(Time::now()), hash(ask.body));
        let mut headers = ask.headers;
        headers.push(("host".to_owned(), self.host.clone()));
        headers.push(("x-amz-content-sha256".to_owned(), body.clone()));
        headers.push(("x-amz-date".to_owned(), now.clone()));
        if let Some(token) = &self.token {
            headers.push(("x-amz-security-token".to_owned(), token.to_string()));
        }
        headers.sort_unstable();
        let signed = Signed {
            method: method.as_str(),
            path: &path,
            query: &query,
            headers: &headers,
            body: &body,
            time: &now,
        };
        let authorization = self.signer.sign(&signed);
        let mark = if query.is_empty() { "" } else { "?" };
        let mut request =
            Request::builder().method(method).uri(format!("{}{path}{mark}{query}", self.origin));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        request = request.header("authorization", authorization);
        if !matches!(*method, Method::PUT | Method::POST) {
            return http::send(&self.agent, request.body(SendBody::none()).map_err(wrong)?);
        }
        let mut body = ask.body;
        request = request.header(CONTENT_LENGTH, body.len());
        http::send(&self.agent, request.body(SendBody::from_reader(&mut body)).map_err(wrong)?)
    }

    /// The same, where only a success counts.
    fn done(&self, method: &Method, key: &str, ask: Ask<'_>) -> io::Result<Response<Body>> {
        let answer = self.send(method, key, ask)?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = http::text(answer, ANSWER_MAX).unwrap_or_default();
        Err(refused(status, xml::error(&text)))
    }

    fn text(&self, method: &Method, key: &str, ask: Ask<'_>) -> io::Result<String> {
        http::text(self.done(method, key, ask)?, ANSWER_MAX)
    }

    /// What is told of an object.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub(super) fn head(&self, key: &str) -> io::Result<Object> {
        let answer = self.done(&Method::HEAD, key, Ask::default())?;
        let object = Object::of(answer.headers());
        http::finish(answer);
        object.ok_or_else(|| http::not_understood("an object without a length"))
    }

    pub(super) fn get(&self, key: &str) -> io::Result<Download> {
        let answer = self.done(&Method::GET, key, Ask::default())?;
        if answer.status() != StatusCode::OK {
            return Err(http::not_understood("a part of an object"));
        }
        Download::new(answer)
    }

    /// A page of what is below a prefix, up to the next slash if `is_flat`.
    pub(super) fn page(
        &self,
        prefix: &str,
        is_flat: bool,
        most: u32,
        from: Option<&str>,
    ) -> io::Result<Page> {
        let most = most.to_string();
        let mut query = Vec::new();
        query.extend(from.map(|from| ("continuation-token", from)));
        query.extend(is_flat.then_some(("delimiter", "/")));
        query.extend([("list-type", "2"), ("max-keys", &*most), ("prefix", prefix)]);
        let text = self.text(&Method::GET, "", Ask { query: &query, ..Ask::default() })?;
        xml::page(&text).map_err(|why| http::not_understood(&why))
    }

    /// Puts a whole object there. The server's name for it.
    pub(super) fn put(
        &self,
        key: &str,
        body: &[u8],
        meta: &[(&str, String)],
        only: &Only,
    ) -> io::Result<Option<String>> {
        let headers = headers_of(meta).chain(only.headers()).collect();
        let answer = self.done(&Method::PUT, key, Ask { headers, body, ..Ask::default() })?;
        let tag = tag_of(answer.headers());
        http::finish(answer);
        Ok(tag)
    }

    /// Copies an object, with what is kept with it, if it still is this version.
    pub(super) fn copy(&self, from: &str, to: &str, tag: Option<&str>) -> io::Result<()> {
        let source = http::encode(format!("/{}/{from}", self.bucket).as_bytes());
        let mut headers = vec![("x-amz-copy-source".to_owned(), source)];
        headers.extend(tag.map(|tag| ("x-amz-copy-source-if-match".to_owned(), format!("\"{tag}\""))));
        let text = self.text(&Method::PUT, to, Ask { headers, ..Ask::default() })?;
        xml::field(&text, "CopyObjectResult", "ETag").map_err(|why| failed(&why)).map(|_| ())
    }

    pub(super) fn remove(&self, key: &str) -> io::Result<()> {
        self.done(&Method::DELETE, key, Ask::default()).map(http::finish)
    }

    /// Begins an upload in parts. Its name.
    pub(super) fn begin(&self, key: &str, meta: &[(&str, String)]) -> io::Result<String> {
        let headers = headers_of(meta).collect();
        let ask = Ask { query: &[("uploads", "")], headers, ..Ask::default() };
        let text = self.text(&Method::POST, key, ask)?;
        xml::field(&text, "InitiateMultipartUploadResult", "UploadId").map_err(|why| failed(&why))
    }

    /// One part, of those that are counted from 1. The server's name for it.
    pub(super) fn part(&self, key: &str, id: &str, number: usize, body: &[u8]) -> io::Result<String> {
        let number = number.to_string();
        let ask = Ask { query: &[("partNumber", &number), ("uploadId", id)], body, ..Ask::default() };
        let answer = self.done(&Method::PUT, key, ask)?;
        let tag = tag_of(answer.headers());
        http::finish(answer);
        tag.ok_or_else(|| http::not_understood("a part without a name"))
    }

    /// Makes an object of its parts. The server's name for it.
    pub(super) fn complete(&self, key: &str, id: &str, parts: &[String], only: &Only) -> io::Result<String> {
        let part = |(at, tag): (usize, &String)| {
            let tag = tag.replace('&', "&amp;").replace('<', "&lt;");
            format!("<Part><PartNumber>{}</PartNumber><ETag>\"{tag}\"</ETag></Part>", at + 1)
        };
        let parts: String = parts.iter().enumerate().map(part).collect();
        let body = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>");
        let headers = only.headers().collect();
        let ask = Ask { query: &[("uploadId", id)], headers, body: body.as_bytes() };
        let text = self.text(&Method::POST, key, ask)?;
        let tag = xml::field(&text, "CompleteMultipartUploadResult", "ETag").map_err(|why| failed(&why))?;
        http::tag(&tag).ok_or_else(|| http::not_understood("an object without a name"))
    }

    /// Gives up an upload in parts.
    pub(super) fn abort(&self, key: &str, id: &str) -> io::Result<()> {
        let ask = Ask { query: &[("uploadId", id)], ..Ask::default() };
        self.done(&Method::DELETE, key, ask).map(http::finish)
    }

    /// Uploads in parts that nobody has finished: the first thousand.
    pub(super) fn unfinished(&self, prefix: &str) -> io::Result<Vec<Unfinished>> {
        let ask = Ask { query: &[("prefix", prefix), ("uploads", "")], ..Ask::default() };
        xml::unfinished(&self.text(&Method::GET, "", ask)?).map_err(|why| http::not_understood(&why))
    }
}

impl Only {
    fn headers(&self) -> impl Iterator<Item = (String, String)> {
        let header = match self {
            Self::Always => None,
            Self::New => Some(("if-none-match".to_owned(), "*".to_owned())),
            Self::Instead(tag) => Some(("if-match".to_owned(), format!("\"{tag}\""))),
        };
        header.into_iter()
    }
}

impl Object {
    /// What was put there with it under this name.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.meta.iter().find(|(found, _)| found == name).map(|(_, value)| &**value)
    }

    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| headers.get(name).and_then(|value: &ureq::http::HeaderValue| value.to_str().ok());
        let meta = headers.iter().filter_map(|(name, value)| {
            Some((name.as_str().strip_prefix(META)?.to_owned(), value.to_str().ok()?.to_owned()))
        });
        Some(Self {
            size: text(CONTENT_LENGTH)?.parse().ok()?,
            modified: text(LAST_MODIFIED).and_then(http::seconds).unwrap_or(0),
            tag: tag_of(headers),
            meta: meta.collect(),
        })
    }
}

fn headers_of(meta: &[(&str, String)]) -> impl Iterator<Item = (String, String)> {
    meta.iter().map(|(name, value)| (format!("{META}{name}"), value.clone()))
}

fn tag_of(headers: &HeaderMap) -> Option<String> {
    http::tag(headers.get(ETAG)?.to_str().ok()?)
}

/// What is to be said about a status that is no success, and what the server says of it.
fn refused(status: StatusCode, said: Option<(String, String)>) -> io::Error {
    let (code, message) = said.unwrap_or_default();
    let is_about_keys = matches!(
        &*code,
        "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "InvalidToken"
            | "NotSignedUp"
            | "RequestTimeTooSkewed"
    );
    let status = match &*code {
        _ if is_about_keys => StatusCode::UNAUTHORIZED,
        // Two at the same time.
        "ConditionalRequestConflict" => StatusCode::PRECONDITION_FAILED,
        "EntityTooLarge" => StatusCode::PAYLOAD_TOO_LARGE,
        "KeyTooLongError" => StatusCode::URI_TOO_LONG,
        "QuotaExceeded" | "XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded" => {
            StatusCode::INSUFFICIENT_STORAGE
        }
        _ => status,
    };
    let said = match (code.is_empty(), message.is_empty()) {
        (true, _) => message,
        (_, true) => code,
        _ => format!("{code}, {message}"),
    };
    http::refused(status, &said)
}

/// That something has failed although the answer began as a success.
fn failed(why: &str) -> io::Error {
    io::Error::other(format!("the server has failed: {}", http::clipped(why)))
}
