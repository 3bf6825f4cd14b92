//! HTTP/1.1 messages as bytes: heads of requests taken apart, responses put together. Pure; no I/O.
//!
//! The grammar is `httparse`'s. What this adds is what RFC 9112 leaves to a server to decide: one length for a body, no
//! transfer codings, and bounds for everything.

use crate::error::ErrorKind;
use serde::Serialize;
use std::fmt::Write as _;
use std::time::SystemTime;

/// Bytes of a request up to its body.
pub(super) const MOST_HEAD: usize = 8 << 10;
/// Bytes of a body.
pub(super) const MOST_BODY: usize = 64 << 10;
/// Header fields of a request.
const MOST_FIELDS: usize = 64;

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) method: String,
    /// The path in pieces, unescaped.
    pub(super) path: Vec<String>,
    pub(super) query: Vec<(String, String)>,
    /// Bytes of the head itself.
    pub(super) len: usize,
    /// Bytes of the body behind it.
    pub(super) body: usize,
    /// More requests may follow.
    pub(super) keep_alive: bool,
    /// The client waits for a word before it sends the body.
    pub(super) expects_continue: bool,
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    kind: &'static str,
    pub(super) body: Vec<u8>,
    allow: Option<&'static str>,
}

impl Response {
    pub(super) fn json(status: u16, value: &impl Serialize) -> Self {
        // What is put into JSON here has names for keys and no numbers that are not.
        let mut body = serde_json::to_vec(value).unwrap_or_default();
        body.push(b'\n');
        Self { status, kind: "application/json", body, allow: None }
    }

    pub(super) fn text(kind: &'static str, body: String) -> Self {
        Self { status: 200, kind, body: body.into_bytes(), allow: None }
    }

    pub(super) fn nothing() -> Self {
        Self { status: 204, kind: "", body: Vec::new(), allow: None }
    }

    /// A failure in words, of a status of HTTP's own.
    pub(super) fn failure(status: u16, kind: ErrorKind, message: impl Into<String>) -> Self {
        let problem = super::model::Problem { kind: kind_name(kind).to_owned(), message: message.into() };
        Self::json(status, &super::model::Failure { error: problem })
    }

    pub(super) fn allowing(mut self, methods: &'static str) -> Self {
        self.allow = Some(methods);
        self
    }

    /// The bytes of it; without its body if only the head was asked for.
    pub(super) fn encode(&self, out: &mut Vec<u8>, keep_alive: bool, head_only: bool) {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nDate: {}\r\n",
            self.status,
            reason(self.status),
            httpdate::fmt_http_date(SystemTime::now())
        );
        // A fmt::Write to a String does not fail.
        let _ = match self.status {
            204 => Ok(()),
            _ => write!(head, "Content-Type: {}\r\nContent-Length: {}\r\n", self.kind, self.body.len()),
        };
        if let Some(methods) = self.allow {
            let _ = write!(head, "Allow: {methods}\r\n");
        }
        if !keep_alive {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        out.extend_from_slice(head.as_bytes());
        if !head_only {
            out.extend_from_slice(&self.body);
        }
    }
}

/// What a client gets that waits before it sends a body.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The name of a kind of failure.
pub(super) fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not-found",
        ErrorKind::Denied => "denied",
        ErrorKind::InUse => "in-use",
        ErrorKind::OutOfSpace => "out-of-space",
        ErrorKind::Io => "io",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Protocol => "protocol",
        ErrorKind::Shutdown => "shutdown",
        ErrorKind::Elsewhere => "elsewhere",
        ErrorKind::Away => "io",
    }
}

/// The kind of failure of a name.
pub(super) fn kind_of(name: &str) -> ErrorKind {
    use ErrorKind::{
        Denied, Elsewhere, InUse, Invalid, Io, NotFound, OutOfSpace, Protocol, Shutdown, Unsupported,
    };
    let kinds =
        [Invalid, NotFound, Denied, InUse, OutOfSpace, Io, Unsupported, Protocol, Shutdown, Elsewhere];
    kinds.into_iter().find(|kind| kind_name(*kind) == name).unwrap_or(Io)
}

/// The status for a kind of failure.
pub(super) fn status_of(kind: ErrorKind) -> u16 {
    match kind {
        ErrorKind::Invalid | ErrorKind::Protocol => 400,
        ErrorKind::Denied => 403,
        ErrorKind::NotFound => 404,
        ErrorKind::InUse => 409,
        ErrorKind::Io | ErrorKind::Away => 500,
        ErrorKind::Unsupported => 501,
        ErrorKind::Shutdown | ErrorKind::Elsewhere => 503,
        ErrorKind::OutOfSpace => 507,
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    }
}

/// Takes the head that `input` begins with apart; `None` if it is not all there.
///
/// # Errors
/// The response to something that is no request, or one that will not be served. The stream is of no use behind it.
pub(super) fn parse(input: &[u8]) -> Result<Option<Head>, Response> {
    let bad = |why: &str| Response::failure(400, ErrorKind::Protocol, why);
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let len = match request.parse(&input[..input.len().min(MOST_HEAD)]) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if input.len() < MOST_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(Response::failure(431, ErrorKind::Invalid, "The head of the request is too long"));
        }
        Err(httparse::Error::Version) => {
            return Err(Response::failure(505, ErrorKind::Unsupported, "Only HTTP/1.1 and 1.0 are spoken"));
        }
        Err(error) => return Err(bad(&format!("Not a request of HTTP/1.1: {error}"))),
    };
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(bad("Not a request of HTTP/1.1"));
    };
    let values = |name: &str| {
        let fields = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        fields.map(|field| field.value.trim_ascii()).collect::<Vec<_>>()
    };
    if minor == 1 && values("Host").len() != 1 {
        return Err(bad("A request of HTTP/1.1 has one Host field"));
    }
    let lengths = values("Content-Length");
    if !values("Transfer-Encoding").is_empty() {
        // With both, whoever is on the way may see other borders of the message.
        return Err(if lengths.is_empty() {
            Response::failure(411, ErrorKind::Unsupported, "A body needs a Content-Length here")
        } else {
            bad("A body has either a length or a coding")
        });
    }
    let body = match lengths[..] {
        [] => 0,
        [first, ref others @ ..] if others.iter().all(|other| *other == first) => {
            decimal(first).ok_or_else(|| bad("Not a Content-Length"))?
        }
        _ => return Err(bad("A body has one length")),
    };
    if body > MOST_BODY as u64 {
        return Err(Response::failure(413, ErrorKind::Invalid, "The body is too long"));
    }
    let connection = values("Connection");
    let says = |word: &str| {
        let mut words = connection.iter().flat_map(|value| value.split(|byte| *byte == b','));
        words.any(|said| said.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    };
    let keep_alive = if minor == 1 { !says("close") } else { says("keep-alive") && !says("close") };
    let expects = values("Expect");
    let expects_continue =
        minor == 1 && expects.iter().any(|value| value.eq_ignore_ascii_case(b"100-continue"));
    let (path, query) = split_target(target).ok_or_else(|| bad("Not a path"))?;
    let body = usize::try_from(body).unwrap_or(usize::MAX);
    let method = method.to_owned();
    Ok(Some(Head { method, path, query, len, body, keep_alive, expects_continue }))
}

/// Digits only, as RFC 9110 has it: no sign, and no more than fit.
fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    if digits { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

type Target = (Vec<String>, Vec<(String, String)>);

/// A path and a query, unescaped. An absolute URI as the target, which proxies get, has its path looked at only.
fn split_target(target: &str) -> Option<Target> {
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => target,
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = path.strip_prefix('/')?.split('/').map(unescape).collect::<Option<Vec<_>>>()?;
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        Some((unescape(key)?, unescape(value)?))
    });
    Some((path, pairs.collect::<Option<Vec<_>>>()?))
}

fn unescape(text: &str) -> Option<String> {
    String::from_utf8(crate::net::percent_decode(text)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        parse(text.as_bytes()).unwrap().expect("a whole head")
    }

    fn refused(text: &str) -> u16 {
        parse(text.as_bytes()).expect_err(text).status
    }

    #[test]
    fn heads_are_taken_apart() {
        let get = head("GET /v1/sessions/root%40a%20b?limit=5&after HTTP/1.1\r\nHost: x\r\n\r\nmore");
        assert_eq!((get.method.as_str(), get.len, get.body), ("GET", 65, 0));
        assert_eq!(get.path, ["v1", "sessions", "root@a b"]);
        assert_eq!(get.query, [("limit".into(), "5".into()), ("after".into(), String::new())]);
        assert!(get.keep_alive && !get.expects_continue);
        let post = head("POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 12\r\nExpect: 100-continue\r\n\r\n");
        assert_eq!((post.path, post.body, post.expects_continue), (vec![String::new()], 12, true));
        assert_eq!(head("GET http://x/v1/server HTTP/1.1\r\nHost: x\r\n\r\n").path, ["v1", "server"]);
        for text in ["", "GET", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: x\r\n"] {
            assert_eq!(parse(text.as_bytes()), Ok(None), "{text:?}");
        }
    }

    #[test]
    fn connections_stay_open_as_each_version_has_it() {
        let keeps = |version: &str, field: &str| {
            head(&format!("GET / HTTP/{version}\r\nHost: x\r\n{field}\r\n\r\n")).keep_alive
        };
        assert!(keeps("1.1", "X: y") && !keeps("1.1", "Connection: Close") && !keeps("1.0", "X: y"));
        assert!(keeps("1.0", "Connection: a, Keep-Alive") && !keeps("1.1", "connection: x , close"));
    }

    #[test]
    fn what_is_ambiguous_or_too_much_is_refused() {
        let with = |fields: &str| refused(&format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n"));
        assert_eq!(with("Content-Length: +1"), 400);
        assert_eq!(with("Content-Length: 1\r\nContent-Length: 2"), 400);
        assert_eq!(with("Content-Length: 1\r\nTransfer-Encoding: chunked"), 400);
        assert_eq!(with("Content-Length: 99999999999999999999999"), 400);
        assert_eq!(with("Transfer-Encoding: chunked"), 411);
        assert_eq!(with(&format!("Content-Length: {}", MOST_BODY + 1)), 413);
        assert_eq!(with("Host: y"), 400);
        assert_eq!(with(&"X: y\r\n".repeat(70)), 431);
        assert_eq!(with(&format!("X: {}", "y".repeat(MOST_HEAD))), 431);
        assert_eq!(refused("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(refused("GET / HTTP/2.0\r\nHost: x\r\n\r\n"), 505);
        assert_eq!(refused("GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n"), 400);
        assert_eq!(refused("GET x HTTP/1.1\r\nHost: x\r\n\r\n"), 400);
        assert_eq!(refused("\0\0\0 \u{1}\r\n\r\n"), 400);
    }

    #[test]
    fn responses_say_how_long_they_are() {
        let mut out = Vec::new();
        Response::failure(405, ErrorKind::Invalid, "No").allowing("GET").encode(&mut out, false, false);
        let text = String::from_utf8(out).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 405 Method Not Allowed\r\nDate: "), "{head}");
        assert!(head.ends_with("Content-Length: 44\r\nAllow: GET\r\nConnection: close"), "{head}");
        assert_eq!(body, "{\"error\":{\"kind\":\"invalid\",\"message\":\"No\"}}\n");
        let mut out = Vec::new();
        Response::nothing().encode(&mut out, true, false);
        assert!(!String::from_utf8(out).unwrap().contains("Content-"));
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        for name in
            ["invalid", "not-found", "denied", "in-use", "out-of-space", "io", "unsupported", "protocol"]
        {
            assert_eq!(kind_name(kind_of(name)), name);
        }
    }
}
