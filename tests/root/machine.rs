//! Private roots as these tests start them, and the care that nothing of them stays.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::interop_support::said;
use crate::support::server::scratch;
use crate::support::wait_until;

/// Where one test's sessions are written down. When it is dropped, all of them must have gone.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse (modprobe fuse)");
        Self { dir: scratch() }
    }

    /// A path in a directory of this test's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// `memdev SUBCOMMAND --state ... OPTIONS`.
    pub fn memdev(&self, subcommand: &str, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg(subcommand).arg("--state").arg(self.state()).args(options);
        command.env_remove("MEMDEV_LOG").stdin(Stdio::null());
        command
    }

    /// `memdev run OPTIONS IMAGE -- COMMAND`.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.memdev("run", options);
        // Where the kernel has an nbd driver, that would be chosen; it is tested in a virtual machine.
        run.args(["--backend", "fuse"]).arg(image());
        if !command.is_empty() {
            run.arg("--").args(command);
        }
        run
    }

    /// What a shell inside does with `script`.
    #[track_caller]
    pub fn attempt(&self, options: &[&str], script: &str) -> Output {
        let output = self.run(options, &["sh", "-c", script]).output().expect("memdev can be run");
        self.assert_empty();
        output
    }

    /// What a shell inside prints that has to succeed.
    #[track_caller]
    pub fn sh(&self, options: &[&str], script: &str) -> String {
        let output = self.attempt(options, script);
        assert!(output.status.success(), "{script}: {}\n{}", output.status, said(&output));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{script}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Starts a shell inside with `script`, which says `ready` once.
    #[track_caller]
    pub fn start(&self, options: &[&str], script: &str) -> Running<'_> {
        let script = format!("echo ready; {script}");
        let mut command = self.run(options, &["sh", "-c", &script]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("memdev can be run");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        output.read_line(&mut line).expect("reading what it says");
        assert_eq!(line, "ready\n");
        Running { place: self, child, output }
    }

    /// What is written down: attachments and sessions.
    pub fn written(&self, kind: &str) -> Vec<Value> {
        let entries = fs::read_dir(self.state().join(kind)).into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| fs::read(entry.path()).ok());
        texts.filter_map(|text| serde_json::from_slice(&text).ok()).collect()
    }

    /// Panics if there is anything left of sessions.
    #[track_caller]
    pub fn assert_empty(&self) {
        for kind in ["attach", "root"] {
            let left = self.written(kind);
            assert!(left.is_empty(), "{kind}: {left:?}");
        }
    }
}

/// The Debian root image.
pub fn image() -> PathBuf {
    let path = std::env::var_os("MEMDEV_ROOT_IMAGE");
    path.expect("MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image prints it").into()
}

/// A private root with a shell in it that has said that it is ready.
pub struct Running<'a> {
    place: &'a Place,
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Running<'_> {
    /// What is written down of it.
    #[track_caller]
    pub fn session(&self) -> Value {
        let sessions = self.place.written("root").into_iter();
        let mut own = sessions.filter(|session| session["launcher"] == self.child.id());
        own.next().expect("the session is written down")
    }

    /// What is written down of its device.
    #[track_caller]
    pub fn attachment(&self) -> Value {
        let all = self.place.written("attach");
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    pub fn launcher(&self) -> Value {
        self.child.id().into()
    }

    /// The next line that it says.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("reading what it says");
        line
    }

    /// Waits for its end: its exit status, and what it said.
    #[track_caller]
    pub fn finish(mut self) -> (Option<i32>, String) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("reading what it says");
        let status = self.child.wait().expect("waiting for memdev");
        (status.code(), text)
    }

    /// All the processes that belong to it: launcher, daemon, and what is inside.
    #[track_caller]
    pub fn processes(&self) -> Vec<Value> {
        let init = self.session()["init"].clone();
        let mut all = vec![self.launcher(), self.attachment()["pid"].clone(), init.clone()];
        all.extend(namespace(&init));
        all
    }

    /// Waits until these, and the device, have gone.
    #[track_caller]
    pub fn assert_gone(mut self, processes: &[Value], device: &Value) {
        let _ = self.child.wait();
        for pid in processes {
            wait_until("the process has ended", || has_ended(pid));
        }
        let device = device.as_str().expect("a device").trim_start_matches("/dev/").to_owned();
        let file = format!("/sys/block/{device}/loop/backing_file");
        // Its number may be somebody else's by now.
        let id = |text: String| text.contains("memdev:").then_some(text);
        wait_until("the device is gone", || {
            let now = fs::read_to_string(&file).ok().and_then(id);
            now.is_none_or(|now| self.place.written("attach").iter().all(|_| !now.is_empty()))
        });
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The processes in the same namespace of processes as `init`.
fn namespace(init: &Value) -> Vec<Value> {
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = space(&init.to_string()).expect("it runs");
    let numbers = fs::read_dir("/proc").expect("reading /proc").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().into_string().ok());
    let numbers = numbers.filter(|name| name.parse::<u32>().is_ok());
    numbers
        .filter(|pid| space(pid).as_ref() == Some(&own))
        .map(|pid| pid.parse::<u32>().unwrap().into())
        .collect()
}

/// Sends a signal to a process that belongs to a test's session, by what is written down.
pub fn kill(pid: &Value, signal: Signal) {
    let pid = pid.as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("it runs");
}

/// Whether the process is no more, or at least no more than a name in its parent's list.
pub fn has_ended(pid: &Value) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}
