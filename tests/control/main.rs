//! The control API and its commands: what they show, make, change and end, and that nobody can misuse them.

mod api;
mod bad_input;
mod busy;
mod caps;
mod commands;
mod images;
mod load;
mod openapi;
mod owner;
mod points;
mod save;
#[path = "../support/mod.rs"]
mod support;
mod traffic;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use support::server::{Serve, scratch};
pub(crate) use support::{Client, Stream};
use support::{Image, MIB, PATIENCE, Server};
use tempfile::TempDir;

/// A server of one image of 4 MiB, `base`, with a control socket.
pub(crate) struct House {
    pub(crate) server: Server,
    pub(crate) image: Image,
    _dir: TempDir,
}

impl House {
    pub(crate) fn new() -> Self {
        Self::with(&[])
    }

    pub(crate) fn with(args: &[&str]) -> Self {
        Self::of(4 * MIB, args)
    }

    /// With an image of another size.
    pub(crate) fn of(size: u64, args: &[&str]) -> Self {
        let (dir, sockets) = (scratch(), scratch());
        let image = Image::random(dir.path().join("base.img"), size, 1);
        let control = sockets.path().join("control.sock");
        let server = Serve::image(&image)
            .args([std::ffi::OsStr::new("--control"), control.as_os_str()])
            .args(args)
            .dir(sockets)
            .start();
        Self { server, image, _dir: dir }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.server.dir().join("control.sock")
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).expect("connecting to the control socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// One request on a connection of its own.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        ask_on(&mut stream, method, path, body)
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let answer = self.ask("GET", path, "");
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        answer.json()
    }

    pub(crate) fn session(&self, name: &str) -> Value {
        self.get(&format!("/v1/sessions/{name}"))
    }

    pub(crate) fn create(&self, body: &str) -> Value {
        let answer = self.ask("POST", "/v1/sessions", body);
        assert_eq!(answer.status, 201, "{body}: {}", answer.text);
        answer.json()
    }

    /// The names of all sessions.
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.get("/v1/sessions");
        let names = all["sessions"].as_array().expect("a list").iter();
        names.map(|session| session["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// `memdev COMMAND ... --control SOCKET`.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.args(args).arg("--control").arg(self.socket()).env_remove("MEMDEV_CONTROL");
        command
    }

    /// What a command prints that succeeds.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("the command runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        assert_eq!(said, "", "{args:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// The one line that a command says that fails.
    pub(crate) fn fail(&self, args: &[&str]) -> String {
        failure(&mut self.command(args), 1)
    }
}

pub(crate) fn failure(command: &mut Command, status: i32) -> String {
    let output = command.output().expect("the command runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty());
    said.trim_end().strip_prefix("memdev: ").expect("it says who says it").to_owned()
}

/// An answer by HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The head, with its fields.
    pub(crate) head: String,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        assert!(self.field("Content-Type").is_some_and(|kind| kind == "application/json"), "{}", self.head);
        serde_json::from_str(&self.text).expect(&self.text)
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The kind of a failure.
    pub(crate) fn kind(&self) -> String {
        self.json()["error"]["kind"].as_str().expect("a kind").to_owned()
    }
}

pub(crate) fn ask_on(stream: &mut UnixStream, method: &str, path: &str, body: &str) -> Answer {
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: memdev\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).expect("sending a request");
    read_answer(stream, method == "HEAD").expect("an answer")
}

/// The same with descriptors that come along.
pub(crate) fn ask_with(
    stream: &mut UnixStream,
    (method, path): (&str, &str),
    body: &str,
    files: &[BorrowedFd<'_>],
) -> Answer {
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
    sendmsg(&*stream, &[IoSlice::new(request.as_bytes())], &mut ancillary, SendFlags::empty())
        .expect("it is sent");
    read_answer(stream, false).expect("an answer")
}

/// Sends bytes as they are, and no more; the answers that come until the server hangs up.
pub(crate) fn send_raw(house: &House, bytes: &[u8]) -> Vec<Answer> {
    let mut stream = house.connect();
    // It may hang up before it has everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    std::iter::from_fn(|| read_answer(&mut stream, false)).collect()
}

/// The next answer, if there is one.
pub(crate) fn read_answer(stream: &mut UnixStream, head_only: bool) -> Option<Answer> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).ok()? == 0 {
            assert!(head.is_empty(), "half a head: {}", String::from_utf8_lossy(&head));
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("a head in ASCII");
    let status = head.strip_prefix("HTTP/1.1 ").expect("a status line")[..3].parse().expect("a status");
    let mut answer = Answer { status, head, text: String::new() };
    let length = answer.field("Content-Length").map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; if head_only { 0 } else { length }];
    stream.read_exact(&mut body).expect("the body is as long as it says");
    answer.text = String::from_utf8(body).expect("text");
    Some(answer)
}

/// What curl gets.
pub(crate) fn curl(socket: &Path, args: &[&str]) -> String {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"])
        .arg(socket)
        .args(args)
        .output()
        .expect("curl is installed (tools/setup)");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A number in JSON.
#[track_caller]
pub(crate) fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}
