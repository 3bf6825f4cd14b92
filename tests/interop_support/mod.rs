//! Foreign programs as clients: how they are run, and how a session is mounted through them.
//!
//! They are required. A missing one fails the test that needs it, with the command that installs it.

// Every interop test binary compiles this module and uses its own part of it.
#![allow(dead_code, unreachable_pub)]

pub mod door;
pub mod mounted;
pub mod terminal;
pub mod vm;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::Server;

/// Seconds a foreign program may take; only what hangs takes that long.
const LIMIT: &str = "240";

/// Debian's own interpreter, which has libnbd's module; the first python3 in PATH may be another.
pub const PYTHON: &str = "/usr/bin/python3";

/// The URI of an export (or `NAME@ID`) over the server's unix socket.
pub fn uri(server: &Server, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", server.socket().display())
}

/// A command with a time limit, and with the directories that hold `mkfs` and `losetup`.
pub fn command<I, S>(program: &str, args: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", LIMIT, program])
        .args(args)
        .stdin(Stdio::null())
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C.UTF-8");
    command
}

/// Runs a program and returns what it did, successful or not.
#[track_caller]
pub fn attempt<I, S>(program: &str, args: I) -> Output
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    finish(program, command(program, args))
}

/// Runs a program that has to succeed; returns its standard output.
#[track_caller]
pub fn run<I, S>(program: &str, args: I) -> String
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    succeed(program, command(program, args))
}

/// Runs one of btrfs's programs, which has to succeed. They ask of every loop device that is mounted whether its file is the
/// one they were given, and fail when some file cannot be asked: as that of a device whose server another test has just
/// killed. So this one sees no mounts.
#[track_caller]
pub fn run_btrfs<I, S>(program: &str, args: I) -> String
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let unseen = r#"mount --bind /dev/null "/proc/$$/mounts" && exec "$0" "$@""#;
    let mut command =
        command("unshare", ["--mount", "--propagation", "private", "sh", "-c", unseen, program]);
    command.args(args);
    succeed(program, command)
}

/// Runs a prepared command that has to succeed; returns its standard output.
#[track_caller]
pub fn succeed(program: &str, command: Command) -> String {
    let shown = shown(&command);
    let output = finish(program, command);
    assert!(output.status.success(), "{shown} ended with {}:\n{}", output.status, said(&output));
    String::from_utf8(output.stdout).expect("the program prints text")
}

#[track_caller]
fn finish(program: &str, mut command: Command) -> Output {
    let output = command.output().expect("coreutils' timeout can be run");
    match output.status.code() {
        Some(127) => panic!("{program} is missing; run tools/setup"),
        Some(124 | 137) => panic!("{} did not end in {LIMIT} s:\n{}", shown(&command), said(&output)),
        _ => output,
    }
}

/// The command as one would type it, without its time limit.
fn shown(command: &Command) -> String {
    let words: Vec<_> = command.get_args().skip(2).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// Everything a program said.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs one of the Python scripts beside this file with libnbd.
#[track_caller]
pub fn libnbd_script(script: &str, args: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop_support").join(script);
    let path = path.to_str().expect("the checkout's path is text");
    run(PYTHON, ["-B", path].iter().chain(args));
}

/// Panics unless both files have the same bytes.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path) {
    run("cmp", [left, right]);
}
