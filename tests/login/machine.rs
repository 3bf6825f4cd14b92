//! A machine of a test's own, as far as logins see it: its users, its `/run`, its daemon.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::interop_support::said;
use crate::support::server::scratch;
use crate::support::wait_until;

/// The users that the machine has beside those of the host, by number: one whose shell is `memdev-login`, one with a shell
/// of the host's, and one whom the settings of [`Machine::new`] have no entry for.
pub const USERS: [(&str, u32); 3] = [("tester", 4711), ("forced", 4712), ("stranger", 4713)];

/// Where the machine's files are, in its own `/run`.
pub const DIR: &str = "/run/t";

const MAKE: &str = r#"
d=$1 memdev=$2 image=$3
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/t /run/sshd /run/t/pam.d /run/t/home
touch /run/t/image /run/t/memdev /run/t/memdev-login
mount --bind "$image" /run/t/image
mount --bind "$memdev" /run/t/memdev
mount --bind "$memdev" /run/t/memdev-login
for file in passwd group shadow; do cp "$d/$file" "/run/t/$file"; mount --bind "/run/t/$file" "/etc/$file"; done
echo ready
read line
"#;

pub struct Machine {
    dir: TempDir,
    /// Holds the mount namespace, for as long as its standard input is open.
    holder: Child,
    daemon: Option<Child>,
}

impl Machine {
    /// One with everybody but `stranger` in the settings, and a daemon.
    #[track_caller]
    pub fn new() -> Self {
        let mut machine = Self::without_daemon();
        machine.settings(&format!(
            "[[user]]\nname = 'tester'\nimage = '{DIR}/image'\n\n[[group]]\nname = 'forced'\nimage = '{DIR}/image'\n"
        ));
        machine.start_daemon();
        machine
    }

    #[track_caller]
    pub fn without_daemon() -> Self {
        let dir = scratch();
        let path = std::env::var_os("MEMDEV_ROOT_IMAGE");
        let image: PathBuf = path
            .expect("MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image prints it")
            .into();
        let image = roots_own(&image, dir.path());
        let write = |name: &str, text: String| fs::write(dir.path().join(name), text).unwrap();
        let host = |name: &str| fs::read_to_string(Path::new("/etc").join(name)).unwrap();
        let each = |line: &dyn Fn(&str, u32) -> String| -> String {
            USERS.iter().map(|&(name, number)| line(name, number)).collect()
        };
        let shell = |name: &str| match name {
            "forced" => "/bin/sh".to_owned(),
            _ => format!("{DIR}/memdev-login"),
        };
        // Where there is no home directory, sshd says so.
        let home = |name: &str| if name == "forced" { "/".to_owned() } else { format!("{DIR}/home") };
        let passwd =
            each(&|name, number| format!("{name}:x:{number}:{number}::{}:{}\n", home(name), shell(name)));
        write("passwd", host("passwd") + &passwd);
        write("group", host("group") + &each(&|name, number| format!("{name}:x:{number}:\n")));
        write("shadow", host("shadow") + &each(&|name, _| format!("{name}:*:19000:0:99999:7:::\n")));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-euc", MAKE, "sh"]);
        command.arg(dir.path()).arg(env!("CARGO_BIN_EXE_memdev")).arg(&image);
        let mut holder =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare can be run");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the machine is made");
        Self { dir, holder, daemon: None }
    }

    /// A file of the machine's, as this process sees it.
    pub fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{DIR}/{name}", self.holder.id()))
    }

    pub fn settings(&self, text: &str) {
        fs::write(self.file("login.toml"), text).unwrap();
        fs::set_permissions(self.file("login.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    }

    /// A command on this machine, of root's.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id())).arg("--");
        command.arg(program).stdin(Stdio::null()).env_remove("MEMDEV_LOG");
        command
    }

    /// The same of a user's.
    pub fn command_of(&self, uid: u32, program: &str) -> Command {
        let mut command = self.command("setpriv");
        let id = uid.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--", program]);
        command
    }

    /// A daemon on this machine: it ends with the test, also with one that is killed.
    pub fn daemon(&self, program: &str) -> Command {
        let mut command = self.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]);
        command
    }

    #[track_caller]
    pub fn start_daemon(&mut self) {
        // The socket of one that was killed is still there.
        let times_served = |machine: &Self| machine.log().matches("Logins are served").count();
        let before = times_served(self);
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = self.daemon(&format!("{DIR}/memdev"));
        command.args([
            "-v",
            "logind",
            "--config",
            &format!("{DIR}/login.toml"),
            "--state",
            &format!("{DIR}/state"),
        ]);
        self.daemon = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        wait_until("the daemon listens", || times_served(self) > before);
    }

    /// Kills the daemon, and nobody else.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// What the daemon and its workers have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// `memdev login` of tester's, with options.
    pub fn login(&self, options: &[&str]) -> Command {
        let mut command = self.command_of(USERS[0].1, &format!("{DIR}/memdev"));
        command.arg("login").args(options);
        command
    }

    /// What tester's shell prints for a line that has to succeed.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let output = self.login(&["-c", line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}\n{}\n{}", output.status, said(&output), self.log());
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{line}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a login of tester's with `line`, which says `ready` once.
    #[track_caller]
    pub fn start(&self, line: &str) -> Running {
        self.begin(self.login(&["-c", &format!("echo ready; {line}")]))
    }

    /// Starts a command that says `ready` once.
    #[track_caller]
    pub fn begin(&self, mut command: Command) -> Running {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut running = Running { output: BufReader::new(child.stdout.take().unwrap()), child };
        assert_eq!(running.line(), "ready\n", "{}", self.log());
        running
    }

    /// What is written down of private roots.
    pub fn sessions(&self) -> Vec<Value> {
        let entries = fs::read_dir(self.file("state/root")).into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| fs::read(entry.path()).ok());
        texts.filter_map(|text| serde_json::from_slice(&text).ok()).collect()
    }

    /// Waits until no process of these private roots is there: what was killed leaves its record behind.
    #[track_caller]
    pub fn assert_gone(&self, sessions: &[Value]) {
        assert!(!sessions.is_empty());
        for session in sessions {
            wait_until("process 1 has ended", || has_ended(&session["init"]));
            wait_until("the launcher has ended", || has_ended(&session["launcher"]));
        }
        wait_until("the devices are gone", || self.devices().is_empty());
    }

    /// The daemons of this machine's devices that run.
    fn devices(&self) -> Vec<Value> {
        let entries = fs::read_dir(self.file("state/attach")).into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| fs::read(entry.path()).ok());
        let all = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
        all.map(|record| record["pid"].clone()).filter(|pid| !has_ended(pid)).collect()
    }

    /// Panics unless a login was refused in the way in which all are, with `why` in the log.
    #[track_caller]
    pub fn assert_refused(&self, output: &Output, why: &str) {
        assert_eq!(output.status.code(), Some(125), "{}", said(output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(line.starts_with("memdev: Login refused: ") && line.matches('\n').count() == 1, "{line}");
        for secret in [DIR, "toml", "image", why] {
            assert!(!line.contains(secret), "{line} tells of {secret}");
        }
        assert!(self.log().contains(why), "{why} is not in {}", self.log());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill_daemon();
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// The image, or a copy of it that is root's: nothing else is taken for a root.
fn roots_own(image: &Path, dir: &Path) -> PathBuf {
    let meta = image.metadata().expect("the image is there");
    if meta.uid() == 0 && meta.mode() & 0o022 == 0 {
        return image.to_owned();
    }
    let copy = dir.join("image");
    let copied =
        Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(image).arg(&copy).status();
    assert!(copied.is_ok_and(|status| status.success()));
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
    copy
}

/// A login that has said that it is ready. Its standard input stays open.
pub struct Running {
    pub child: Child,
    output: BufReader<ChildStdout>,
}

impl Running {
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("text");
        line
    }

    /// Waits for its end: its status, and what it said besides, on either way.
    pub fn finish(mut self) -> (Option<i32>, String) {
        drop(self.child.stdin.take());
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("text");
        self.child.stderr.take().unwrap().read_to_string(&mut text).expect("text");
        (self.child.wait().unwrap().code(), text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process that has started another one.
pub fn parent(pid: &Value) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok()).expect("a number")
}

/// Sends a process a signal.
pub fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a number");
    kill_process(pid, signal).expect("it runs");
}

/// Whether the process is no more, or at least no more than a name in its parent's list.
pub fn has_ended(pid: &Value) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// Whether the image of this machine was written to: when it was, for the last time, and its size.
pub fn state_of_image(machine: &Machine) -> (i64, i64, u64, u64) {
    let meta = fs::metadata(machine.file("image")).unwrap();
    (meta.mtime(), meta.mtime_nsec(), meta.size(), meta.blocks())
}

/// What the image of this machine holds, in short.
pub fn digest(machine: &Machine) -> String {
    crate::interop_support::run("sha256sum", [machine.file("image")])
}
