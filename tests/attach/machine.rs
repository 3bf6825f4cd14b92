//! The machine as these tests see it: attachments, devices, mounts; and the care that none of them stays.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::interop_support::mounted::wait_until_free;
use crate::interop_support::{run, said};
use crate::support::server::scratch;
use crate::support::wait_until;

/// Where the attachments of one test are written down. When it is dropped, they are taken away; if there are any, the test
/// has failed.
pub struct State {
    dir: TempDir,
}

impl State {
    pub fn new() -> Self {
        assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse (modprobe fuse)");
        Self { dir: scratch() }
    }

    /// A path in a directory of this test's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn directory(&self) -> PathBuf {
        self.path("state")
    }

    /// `memdev SUBCOMMAND --state ...`.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "120", env!("CARGO_BIN_EXE_memdev"), subcommand, "--state"]);
        command.arg(self.directory()).env_remove("MEMDEV_LOG").stdin(Stdio::null());
        command
    }

    pub fn output(&self, subcommand: &str, args: &[&str]) -> Output {
        self.command(subcommand).args(args).output().expect("memdev can be run")
    }

    /// Attaches; the device is ready when this returns.
    #[track_caller]
    pub fn attach(&self, what: &str, args: &[&str]) -> Attachment<'_> {
        // Where the kernel has an nbd driver, that would be chosen; it is tested in a virtual machine.
        let mut command = self.command("attach");
        let output =
            command.args(["--backend", "fuse", what]).args(args).output().expect("memdev can be run");
        assert!(output.status.success(), "attach {what} {args:?}: {}", said(&output));
        let text = String::from_utf8(output.stdout).expect("text");
        let path = text.strip_suffix('\n').expect("a whole line");
        assert!(path.starts_with("/dev/loop") && !path.contains('\n'), "{text:?}");
        let file = backing_file(path).expect("the loop device has a file");
        Attachment { state: self, path: path.into(), file }
    }

    /// Fails to attach; the one line that says why.
    #[track_caller]
    pub fn attach_failure(&self, args: &[&str]) -> String {
        failure(&self.output("attach", &[&["--backend", "fuse"], args].concat()))
    }

    /// What is attached.
    #[track_caller]
    pub fn list(&self) -> Vec<Value> {
        let output = self.output("attach", &["--list", "--json"]);
        assert!(output.status.success(), "{}", said(&output));
        let Value::Array(list) = serde_json::from_slice(&output.stdout).expect("JSON") else {
            panic!("an array")
        };
        list
    }

    /// Panics unless nothing is attached, and nothing written down.
    #[track_caller]
    pub fn assert_empty(&self) {
        assert_eq!(self.list(), [Value::Null; 0]);
        let left: Vec<_> = fs::read_dir(self.directory()).expect("the directory is there").collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if !self.directory().exists() {
            return;
        }
        let left = self.list();
        for listed in &left {
            let device = listed["device"].as_str().unwrap_or_default();
            if self.output("detach", &[device]).status.success() {
                continue;
            }
            // It is stuck, or in use by what this test left: without its daemon it can at least not hang.
            kill(&listed["pid"], Signal::KILL);
            let detached = self.output("detach", &[device]);
            eprintln!("{device} stayed attached: {}", said(&detached));
        }
        if !std::thread::panicking() {
            assert!(left.is_empty(), "the test left {left:?}");
        }
    }
}

/// Sends a signal to a daemon that the test has started, by the number in a record.
pub fn kill(pid: &Value, signal: Signal) {
    let pid =
        pid.as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).expect("a process");
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
    // It may have gone already; its number must not be anybody else's by then.
    if name == "memdev-attach\n" {
        let _ = kill_process(pid, signal);
    }
}

/// The one line that a command which has failed says.
#[track_caller]
pub fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", said(output));
    assert!(output.stdout.is_empty(), "{}", said(output));
    let text = String::from_utf8(output.stderr.clone()).expect("text");
    let line = text.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "one line: {text}");
    line.strip_prefix("memdev: ").expect("it says who it is").to_owned()
}

/// A device that is attached.
pub struct Attachment<'a> {
    state: &'a State,
    pub path: PathBuf,
    file: String,
}

impl Attachment<'_> {
    pub fn text(&self) -> &str {
        self.path.to_str().expect("text")
    }

    /// The kernel's name, as `loop3`.
    pub fn name(&self) -> &str {
        self.text().strip_prefix("/dev/").expect("a device")
    }

    /// Whether the kernel still has it. Its number may be somebody else's by now.
    pub fn is_there(&self) -> bool {
        backing_file(self.text()).as_deref() == Some(&*self.file)
    }

    /// What `attach --list` says of it.
    #[track_caller]
    pub fn listed(&self) -> Value {
        let found = self.state.list().into_iter().find(|listed| listed["device"] == self.text());
        found.expect("the device is listed")
    }

    /// The process that serves it.
    pub fn daemon(&self) -> Value {
        self.listed()["pid"].clone()
    }

    /// The device, read and written past its cache.
    #[track_caller]
    pub fn direct(&self) -> File {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        options.open(&self.path).expect("opening the device")
    }

    /// Bytes in the device.
    #[track_caller]
    pub fn size(&self) -> u64 {
        File::open(&self.path).and_then(|mut file| file.seek(SeekFrom::End(0))).expect("the device's size")
    }

    /// The bytes there.
    #[track_caller]
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let file = File::open(&self.path).expect("opening the device");
        file.read_exact_at(&mut bytes, offset).expect("reading the device");
        bytes
    }

    /// Writes, and syncs.
    #[track_caller]
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.path).expect("opening the device");
        file.write_all_at(bytes, offset).and_then(|()| file.sync_all()).expect("writing the device");
    }

    /// Detaches. When this returns, device and daemon are gone.
    #[track_caller]
    pub fn detach(self) {
        let pid = self.daemon();
        let output = self.state.output("detach", &[self.text()]);
        assert!(output.status.success(), "{}", said(&output));
        assert!(!self.is_there(), "the kernel has let go");
        assert!(has_ended(&pid), "the daemon has ended");
    }
}

/// The name of a loop device's file, if it has one.
pub fn backing_file(device: &str) -> Option<String> {
    let name = device.strip_prefix("/dev/").expect("a device");
    fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()
}

/// A mounted file system. Unmounted when dropped.
pub struct Mount {
    device: PathBuf,
    point: TempDir,
    mounted: bool,
}

impl Mount {
    #[track_caller]
    pub fn new(device: &Path, kind: &str) -> Self {
        let point =
            tempfile::Builder::new().prefix("memdev-mount-").tempdir().expect("a temporary directory");
        run("mount", ["-t".as_ref(), kind.as_ref(), device.as_os_str(), point.path().as_os_str()]);
        Self { device: device.to_owned(), point, mounted: true }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    pub fn root(&self) -> &Path {
        self.point.path()
    }

    #[track_caller]
    pub fn unmount(mut self) {
        self.mounted = false;
        run("umount", [self.root()]);
        wait_until_free(&self.device);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        let done = || Command::new("umount").arg(self.root()).status().is_ok_and(|status| status.success());
        for _ in 0..50 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("{} stays mounted", self.root().display());
    }
}

/// Waits until the process has ended, or is at least no more than a name in its parent's list.
pub fn wait_for_end(pid: &Value) {
    wait_until("the process has ended", || has_ended(pid));
}

/// The first thread of a process that was killed can be over while others still hold its files.
fn has_ended(pid: &Value) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let is_over = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'));
    stat.is_empty() || (is_over && threads <= 1)
}
