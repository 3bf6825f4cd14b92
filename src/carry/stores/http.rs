//! Requests over HTTP/1.1, plain or by TLS, for the stores that speak it.
//!
//! What a server says is not trusted: everything of it that is kept in memory is bounded, it may be silent for no longer than
//! [`SILENCE`], and nobody goes where it redirects to: credentials are for one place only.

use std::io::{self, Read};
use std::time::{Duration, UNIX_EPOCH};

use ureq::http::header::CONTENT_LENGTH;
use ureq::http::{Request, Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body, BodyReader, SendBody};

use super::Content;
use crate::net::tls::provider;

/// How long a server may be silent, or take nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// How long it may take to get a connection.
const CONNECT: Duration = Duration::from_secs(15);

/// How many files are on their way at the same time, each by a connection of its own, which is kept for the next.
pub(super) const AT_ONCE: usize = 8;

/// The longest name that a server may give to a version, in bytes.
const TAG_MAX: usize = 200;

/// How much is read of an answer that says no more than its status, in bytes.
const WORDS_MAX: u64 = 64 << 10;

/// From how many bytes on a server is asked whether it would take a body before it is sent.
const ASK_FIRST: u64 = 256 << 10;

/// Who makes the connections. Certificates are checked by what the system trusts, or `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
///
/// # Errors
/// There are no certificates to trust.
pub(super) fn agent(is_secret: bool) -> io::Result<Agent> {
    let mut tls = TlsConfig::builder().unversioned_rustls_crypto_provider(provider());
    if is_secret {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
            let why = format!(
                "no certificate is trusted on this machine{why}; install some, or name a file by SSL_CERT_FILE"
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        let roots: Vec<_> = found.certs.iter().map(|one| Certificate::from_der(one).to_owned()).collect();
        tls = tls.root_certs(RootCerts::new_with_certs(&roots));
    }
    let config = Agent::config_builder()
        .tls_config(tls.build())
        .https_only(is_secret)
        // A variable of the environment is not to lead credentials somewhere else.
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .allow_non_standard_methods(true)
        .user_agent(concat!("memdev/", env!("CARGO_PKG_VERSION")))
        .max_idle_connections(AT_ONCE)
        .max_idle_connections_per_host(AT_ONCE)
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_per_read(Some(SILENCE))
        .timeout_per_write(Some(SILENCE));
    Ok(config.build().new_agent())
}

/// Has a request answered, whatever the answer is.
///
/// # Errors
/// There is no connection, or it is lost; what reads the body says.
pub(super) fn send(agent: &Agent, request: Request<SendBody<'_>>) -> io::Result<Response<Body>> {
    agent.run(request).map_err(explain)
}

/// What went wrong, as the system would say it.
fn explain(error: ureq::Error) -> io::Error {
    let (kind, text) = match error {
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            (io::ErrorKind::ConnectionAborted, "the connection to the server is lost".to_owned())
        }
        ureq::Error::Io(error) => return error,
        ureq::Error::Timeout(_) => (io::ErrorKind::TimedOut, "the server does not answer".to_owned()),
        ureq::Error::HostNotFound => (io::ErrorKind::HostUnreachable, "no such host is known".to_owned()),
        // The system's own words are told as such.
        ureq::Error::Other(other) if other.is::<io::Error>() => {
            return other
                .downcast::<io::Error>()
                .map_or_else(io::Error::other, |error| explain((*error).into()));
        }
        other => (io::ErrorKind::Other, format!("the server cannot be talked to: {other}")),
    };
    io::Error::new(kind, text)
}

/// What is to be said about a status that is no success, with what the server says itself.
pub(super) fn refused(status: StatusCode, said: &str) -> io::Error {
    use io::ErrorKind as Kind;
    let (kind, text) = match status.as_u16() {
        300..=399 => (Kind::Other, "the server leads elsewhere: give the address that it means"),
        // These are about everything, not about this file.
        401 => (Kind::Other, "the server does not accept the credentials"),
        407 => (Kind::Other, "there is a proxy in between that wants credentials"),
        400 | 422 => (Kind::InvalidInput, "the server does not take this name or request"),
        403 => (Kind::PermissionDenied, "the server does not allow it"),
        404 | 410 => (Kind::NotFound, "no such file or directory on the server"),
        405 | 501 => (Kind::Unsupported, "the server cannot do it here"),
        409 => (Kind::NotFound, "the directory for it is not there on the server"),
        412 => (Kind::AlreadyExists, "somebody else has changed it on the server"),
        413 => (Kind::FileTooLarge, "the server takes no file as long as this"),
        414 => (Kind::InvalidFilename, "the server takes no name as long as this"),
        423 => (Kind::PermissionDenied, "somebody has locked it on the server"),
        429 | 503 => (Kind::Other, "the server has too much to do"),
        507 => (Kind::StorageFull, "no space left on the server"),
        _ => (Kind::Other, "the server failed"),
    };
    let said = clipped(said);
    let said = if said.trim().is_empty() { String::new() } else { format!(": {}", said.trim()) };
    io::Error::new(kind, format!("{text} ({}{said})", status.as_u16()))
}

/// That an answer makes no sense.
pub(super) fn not_understood(why: &str) -> io::Error {
    let why = format!("the server's answer is not understood: {}", clipped(why));
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// What may be told of what a server has said.
pub(super) fn clipped(said: &str) -> String {
    said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

/// The whole of an answer, as text.
///
/// # Errors
/// `InvalidData` if it is longer than `most` bytes, or no text; the connection is lost.
pub(super) fn text(answer: Response<Body>, most: u64) -> io::Result<String> {
    let mut text = String::new();
    reader(answer).take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        let why = format!("the server's answer is longer than {} MiB", most >> 20);
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(text)
}

/// Reads what is left of an answer, so that its connection can be used again.
pub(super) fn finish(answer: Response<Body>) {
    let _ = io::copy(&mut reader(answer).take(WORDS_MAX), &mut io::sink());
}

fn reader(answer: Response<Body>) -> BodyReader<'static> {
    answer.into_body().into_reader()
}

/// Whether the server is to be asked before a body of so many bytes.
pub(super) fn is_asked_first(size: u64) -> bool {
    size >= ASK_FIRST
}

/// A content that comes from a server, which may send neither less nor more than it said.
pub(super) struct Download {
    from: BodyReader<'static>,
    size: u64,
    left: u64,
}

impl Download {
    /// # Errors
    /// `InvalidData` if the server does not say how long it is.
    pub(super) fn new(answer: Response<Body>) -> io::Result<Self> {
        let why =
            || io::Error::new(io::ErrorKind::InvalidData, "the server does not say how long the file is");
        let size = answer.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let size = size.ok_or_else(why)?;
        Ok(Self { from: reader(answer), size, left: size })
    }
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.from.read(buffer)?;
        let changed = || io::Error::other("the server sends another length than it said");
        self.left = self.left.checked_sub(got as u64).ok_or_else(changed)?;
        if got == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(changed());
        }
        Ok(got)
    }
}

impl Content for Download {
    fn size(&self) -> u64 {
        self.size
    }
}

/// A moment as headers have it, in seconds since 1970.
pub(super) fn seconds(date: &str) -> Option<i64> {
    let since = httpdate::parse_http_date(date).ok()?.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}

/// A server's name for a version of a file (`ETag`), without its quotes. That it may be another one within the second is what some say
/// of it at first, and no more later.
pub(super) fn tag(text: &str) -> Option<String> {
    let text = text.trim();
    let tag = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    let is_tag = !tag.is_empty() && tag.len() <= TAG_MAX && !tag.contains(char::is_control);
    is_tag.then(|| tag.to_owned())
}

/// A path as it is in a URL: what is neither plain nor a slash as `%XX`.
pub(super) fn encode(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for &byte in path {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(byte.into())
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::VecDeque;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{SocketAddr, TcpListener};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A server that is asked by one request on each connection; what is asked comes as its head and its body.
    fn server(mut answer: impl FnMut(&str, &str) -> String + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut request = String::new();
                while reader.read_line(&mut request).unwrap() > 0 && !request.ends_with("\r\n\r\n") {}
                let length = header(&request, "content-length").map_or(0, |length| length.parse().unwrap());
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                // Else whoever asks next may do so on this connection, before it hears that it is closed.
                let answer = answer(&request, &String::from_utf8_lossy(&body));
                let answer = answer.replacen("\r\n", "\r\nConnection: close\r\n", 1);
                let head = answer.find("\r\n\r\n").map_or(answer.len(), |end| end + 4);
                let answer = if request.starts_with("HEAD ") { &answer[..head] } else { &answer };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        address
    }

    /// The value of a header, whose name is in small letters.
    pub(in crate::carry::stores) fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
        let mut headers = request.lines().filter_map(|line| line.split_once(':'));
        headers.find(|(found, _)| found.to_lowercase() == name).map(|(_, value)| value.trim())
    }

    /// A server that gives one answer to whatever it is asked, and then closes the connection.
    pub(in crate::carry::stores) fn answering(answer: String) -> SocketAddr {
        server(move |_, _| answer.clone())
    }

    /// An answer that is a success.
    pub(in crate::carry::stores) fn success(body: &str) -> String {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}")
    }

    /// What a server has been asked, as it was noted.
    pub(in crate::carry::stores) type Asked = Arc<Mutex<Vec<String>>>;

    /// A server that gives these answers in turn, and none to what it is asked afterwards. What it is asked is noted: the method and
    /// where, and what `note` makes of head and body.
    pub(in crate::carry::stores) fn answering_in_turn(
        answers: Vec<String>,
        note: fn(&str, &str) -> String,
    ) -> (SocketAddr, Asked) {
        let asked = Asked::default();
        let (noted, mut answers) = (asked.clone(), VecDeque::from(answers));
        let address = server(move |head, body| {
            let first = head.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1");
            noted.lock().unwrap().push(format!("{first}{}", note(head, body)));
            answers.pop_front().unwrap_or_default()
        });
        (address, asked)
    }

    #[test]
    fn what_the_system_says_is_told_as_such() {
        let refused = || io::Error::from_raw_os_error(111);
        for error in [ureq::Error::Io(refused()), ureq::Error::Other(Box::new(refused()))] {
            assert_eq!(crate::error::plain(&explain(error)), "connection refused");
        }
        let other = explain(ureq::Error::Other("no way".into())).to_string();
        assert_eq!(other, "the server cannot be talked to: other: no way");
    }

    #[test]
    fn paths_are_encoded_whole() {
        assert_eq!(encode(b"/a b/\xff%?#\xc3\xa4;+~"), "/a%20b/%FF%25%3F%23%C3%A4%3B%2B~");
    }

    #[test]
    fn moments_and_versions_have_one_name() {
        assert_eq!(seconds("Fri, 24 May 2013 00:00:00 GMT"), Some(1_369_353_600));
        assert_eq!(seconds("Fri, 24 May"), None);
        for text in ["\"7-6\"", "W/\"7-6\"", " 7-6 "] {
            assert_eq!(tag(text).as_deref(), Some("7-6"), "{text}");
        }
        for none in ["", "\"\"", "a\u{1b}b", &"x".repeat(201)] {
            assert_eq!(tag(none), None, "{none}");
        }
    }

    #[test]
    fn what_is_about_one_file_does_not_hold_up_others() {
        let kind = |status: u16| refused(StatusCode::from_u16(status).unwrap(), "").kind();
        assert_eq!(kind(403), io::ErrorKind::PermissionDenied);
        assert_eq!(kind(507), io::ErrorKind::StorageFull);
        assert_eq!(kind(404), io::ErrorKind::NotFound);
        assert_eq!(kind(412), io::ErrorKind::AlreadyExists);
        for about_all in [301, 401, 407, 429, 500, 502, 503, 504] {
            assert_eq!(kind(about_all), io::ErrorKind::Other, "{about_all}");
        }
        let said = refused(StatusCode::IM_A_TEAPOT, &format!("\x1b[31m\n{}", "x".repeat(1000))).to_string();
        assert!(said.len() < 300 && !said.contains(char::is_control), "{said}");
    }
}
