//! A client of the control API: what the commands use, and other programs can.
//!
//! ```no_run
//! let mut control = memdev::control::Client::connect("/run/memdev/control.sock".as_ref())?;
//! let session = control.create(&memdev::control::model::NewSession::default())?;
//! println!("{}", session.session.uris[0]);
//! control.end(&session.session.name)?;
//! # Ok::<(), memdev::Error>(())
//! ```

use super::http::kind_of;
use super::model::{
    Change, Checkpoint, Checkpoints, Failure, Fork, ImageDetail, Images, NewCheckpoint, NewImage, NewSession,
    Rollback, Server, Session, SessionDetail, Sessions,
};
use crate::error::{Error, ErrorKind, Result};
use crate::net::rights;
use crate::takeover::{Commit, Offer, Taken};
use rustix::net::{RecvFlags, SendFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a server may take to go on with an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the head of a response.
const MOST_HEAD: usize = 64 << 10;
/// Bytes of the body of a response.
const MOST_BODY: u64 = 1 << 30;

const HOW_TO_REACH: &str = "give the path that the server was started with: memdev serve --control PATH";

/// A connection to the control socket of a server.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    /// Descriptors that came with the last answer.
    files: Vec<OwnedFd>,
}

impl Client {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or only others may connect.
    pub fn connect(path: &Path) -> Result<Self> {
        let is_no_socket = || {
            std::fs::metadata(path)
                .is_ok_and(|metadata| !std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()))
        };
        let failed = |error: std::io::Error| {
            let advice = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "only the server's own user, and root, may control it"
                }
                _ => HOW_TO_REACH,
            };
            let error = match error.kind() {
                // What the kernel says of any file.
                std::io::ErrorKind::ConnectionRefused if is_no_socket() => {
                    std::io::Error::other("it is no socket")
                }
                _ => error,
            };
            Error::io("Cannot reach the control socket", error).on_path(path).advise(advice)
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(Self { stream, path: path.to_owned(), files: Vec::new() })
    }

    /// The server as a whole.
    ///
    /// # Errors
    /// As all of these: the server is gone, or it is not one of memdev's; or what it says.
    pub fn server(&mut self) -> Result<Server> {
        self.ask("GET", "/v1/server", None::<&()>)
    }

    /// Asks the server to give its place to this process: what it offers, with its listening sockets, that of the control API
    /// last.
    ///
    /// # Errors
    /// As [`Client::server`]; `InUse` when it gives way to somebody already.
    pub fn take_over(&mut self) -> Result<(Offer, Vec<OwnedFd>)> {
        let offer = self.ask("POST", "/v1/takeover", None::<&()>)?;
        Ok((offer, std::mem::take(&mut self.files)))
    }

    /// Takes its place: from now on it accepts nobody any more, and ends when all who are there have left, or after `time`.
    /// `bridge` is one end of a [`Bridge`](crate::takeover::Bridge).
    ///
    /// # Errors
    /// As [`Client::take_over`].
    pub fn commit_takeover(&mut self, bridge: OwnedFd, time: Option<Duration>) -> Result<Taken> {
        let commit = Commit { drain_seconds: time.map(|time| time.as_secs_f64()) };
        let file = File::from(bridge);
        let body = self.exchange("POST", "/v1/takeover/commit", Some(&commit), Some(&file))?;
        serde_json::from_slice(&body).map_err(|error| self.strange(&error.to_string()))
    }

    /// All images that are offered, with the files that they are.
    ///
    /// # Errors
    /// As [`Client::server`].
    pub fn images(&mut self) -> Result<Vec<ImageDetail>> {
        let all: Images = self.ask("GET", "/v1/images", None::<&()>)?;
        Ok(all.images)
    }

    /// Has the server offer `file`, which lies at the absolute `path` and is open for reading alone, as the image `name` from
    /// now on. The server need not be able to open it.
    ///
    /// # Errors
    /// `NotFound` when there is no such image, `Invalid` when the file cannot be one; and as [`Client::server`].
    pub fn set_image(&mut self, name: &str, path: &Path, file: &File) -> Result<ImageDetail> {
        let wanted = NewImage { path: Some(path.to_owned()) };
        let body =
            self.exchange("PUT", &format!("/v1/images/{}", segment(name)), Some(&wanted), Some(file))?;
        serde_json::from_slice(&body).map_err(|error| self.strange(&error.to_string()))
    }

    /// All sessions, the oldest first; then those of a server that is being replaced.
    ///
    /// # Errors
    /// As [`Client::server`].
    pub fn sessions(&mut self) -> Result<Vec<Session>> {
        let mut all: Vec<Session> = Vec::new();
        let mut after = Some(0);
        while let Some(serial) = after {
            let page: Sessions = self.ask("GET", &format!("/v1/sessions?after={serial}"), None::<&()>)?;
            all.extend(page.sessions);
            // One after the other: where there are any, a server is being replaced, which does not last.
            for name in &page.before {
                match self.session(name) {
                    Ok(detail) => all.push(detail.session),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            // A server that does not get on must not keep us for ever.
            after = page.next.filter(|next| *next > serial);
        }
        Ok(all)
    }

    /// One session.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name; and as [`Client::server`].
    pub fn session(&mut self, name: &str) -> Result<SessionDetail> {
        self.ask("GET", &path_of(name), None::<&()>)
    }

    /// Makes a session.
    ///
    /// # Errors
    /// `NotFound` when there is no such image, `Invalid` when the id cannot be one, `InUse` when there is such a session,
    /// `Denied` when there are too many, `OutOfSpace` when there is no memory for it; and as [`Client::server`].
    pub fn create(&mut self, wanted: &NewSession) -> Result<SessionDetail> {
        self.ask("POST", "/v1/sessions", Some(wanted))
    }

    /// Changes a session.
    ///
    /// # Errors
    /// As [`Client::session`].
    pub fn change(&mut self, name: &str, change: &Change) -> Result<SessionDetail> {
        self.ask("PATCH", &path_of(name), Some(change))
    }

    /// Ends a session: hangs up on all who are in it.
    ///
    /// # Errors
    /// As [`Client::session`].
    pub fn end(&mut self, name: &str) -> Result<()> {
        self.exchange("DELETE", &path_of(name), None::<&()>, None).map(drop)
    }

    /// The checkpoints of a session, the oldest first.
    ///
    /// # Errors
    /// As [`Client::session`].
    pub fn checkpoints(&mut self, session: &str) -> Result<Vec<Checkpoint>> {
        let all: Checkpoints = self.ask("GET", &below(session, "checkpoints"), None::<&()>)?;
        Ok(all.checkpoints)
    }

    /// Takes a checkpoint of a session.
    ///
    /// # Errors
    /// `InUse` when there is one of this name, `Invalid` when it cannot be called so, `OutOfSpace` when there is no memory
    /// for it; and as [`Client::session`].
    pub fn checkpoint(&mut self, session: &str, name: &str) -> Result<Checkpoint> {
        let wanted = NewCheckpoint { name: Some(name.to_owned()) };
        self.ask("POST", &below(session, "checkpoints"), Some(&wanted))
    }

    /// Gives up a checkpoint.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name; and as [`Client::session`].
    pub fn drop_checkpoint(&mut self, session: &str, name: &str) -> Result<()> {
        let path = format!("{}/{}", below(session, "checkpoints"), segment(name));
        self.exchange("DELETE", &path, None::<&()>, None).map(drop)
    }

    /// Makes a session what it was at a checkpoint.
    ///
    /// # Errors
    /// As [`Client::drop_checkpoint`].
    pub fn rollback(&mut self, session: &str, checkpoint: &str) -> Result<SessionDetail> {
        let wanted = Rollback { checkpoint: Some(checkpoint.to_owned()) };
        self.ask("POST", &below(session, "rollback"), Some(&wanted))
    }

    /// Makes a session what its image is.
    ///
    /// # Errors
    /// As [`Client::session`].
    pub fn reset(&mut self, session: &str) -> Result<SessionDetail> {
        self.ask("POST", &below(session, "reset"), None::<&()>)
    }

    /// Makes a session of the present state of another.
    ///
    /// # Errors
    /// As [`Client::create`], and [`Client::session`].
    pub fn fork(&mut self, session: &str, wanted: &Fork) -> Result<SessionDetail> {
        self.ask("POST", &below(session, "fork"), Some(wanted))
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        let body = self.exchange(method, path, body, None)?;
        serde_json::from_slice(&body).map_err(|error| self.strange(&error.to_string()))
    }

    /// Asks, and returns the body of the answer; what the server says of a failure is the error.
    fn exchange(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
        file: Option<&File>,
    ) -> Result<Vec<u8>> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| self.strange(&error.to_string()))?,
            None => Vec::new(),
        };
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: memdev\r\n").into_bytes();
        if !body.is_empty() {
            let fields = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
            request.extend_from_slice(fields.as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request.extend_from_slice(&body);
        // One that was refused is told so all the same, and hung up on.
        let written = match file {
            None => self.stream.write_all(&request),
            Some(file) => rights::send(&self.stream, &request, &[file.as_fd()], SendFlags::empty())
                .and_then(|sent| self.stream.write_all(&request[sent..])),
        };
        let (status, answer) = match self.receive() {
            Ok(answer) => answer,
            Err(error) => return Err(written.err().map_or(error, |error| self.lost(error))),
        };
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        match serde_json::from_slice::<Failure>(&answer) {
            Ok(Failure { error }) => Err(Error::new(kind_of(&error.kind), error.message)),
            Err(_) => Err(self.strange(&format!("status {status}"))),
        }
    }

    fn receive(&mut self) -> Result<(u16, Vec<u8>)> {
        let mut input = Vec::new();
        let (status, head, length) = loop {
            self.read_more(&mut input)?;
            let mut fields = [httparse::EMPTY_HEADER; 64];
            let mut response = httparse::Response::new(&mut fields);
            match response.parse(&input) {
                Ok(httparse::Status::Complete(head)) => {
                    let status = response.code.unwrap_or(0);
                    let field = response
                        .headers
                        .iter()
                        .find(|field| field.name.eq_ignore_ascii_case("Content-Length"));
                    let length =
                        field.and_then(|field| std::str::from_utf8(field.value).ok()?.trim().parse().ok());
                    break (status, head, length.unwrap_or(0));
                }
                Ok(httparse::Status::Partial) if input.len() < MOST_HEAD => {}
                Ok(httparse::Status::Partial) => return Err(self.strange("a head without an end")),
                Err(error) => return Err(self.strange(&error.to_string())),
            }
        };
        if length > MOST_BODY {
            return Err(self.strange("an answer of more than 1 GiB"));
        }
        let mut body = input.split_off(head);
        while (body.len() as u64) < length {
            self.read_more(&mut body)?;
        }
        Ok((status, body))
    }

    fn read_more(&mut self, input: &mut Vec<u8>) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        match rights::receive(&self.stream, &mut buffer, RecvFlags::empty()) {
            Ok((0, _)) => Err(self.lost(std::io::ErrorKind::UnexpectedEof.into())),
            Ok((count, files)) => {
                self.files.extend(files);
                input.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.lost(error)),
        }
    }

    fn lost(&self, error: std::io::Error) -> Error {
        Error::io("The server does not answer at", error).on_path(&self.path).advise("see its log")
    }

    fn strange(&self, why: &str) -> Error {
        let message =
            format!("What answers at {} is no memdev server of this version: {why}", self.path.display());
        Error::new(ErrorKind::Protocol, message).advise(HOW_TO_REACH)
    }
}

/// Where a session is.
fn path_of(name: &str) -> String {
    format!("/v1/sessions/{}", segment(name))
}

/// Where something of a session's is.
fn below(session: &str, what: &str) -> String {
    format!("{}/{what}", path_of(session))
}

/// A piece of a path.
fn segment(text: &str) -> String {
    crate::net::percent_encode(text.as_ref()).replace('/', "%2F")
}
