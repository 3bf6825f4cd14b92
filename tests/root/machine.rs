//! Private roots as these tests start them, and the care that nothing of them stays.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::interop_support::said;
use crate::support::server::scratch;
use crate::support::wait_until;

/// Where one test's sessions are written down. When it is dropped, all of them must have gone.
pub struct Place {
    dir: TempDir,
    ordinary: bool,
}

/// The ordinary user that tests are, in a mount namespace of their own: there it has a name, a FUSE device that is open to it
/// and, if so, subordinate ids; and it can get at memdev and the image, wherever these are.
pub const USER: u32 = 4711;

/// The first of its subordinate ids.
pub const FIRST_SUBORDINATE: u32 = 0x6ff0_0000;

const AS_USER: &str = r#"
d=$1 memdev=$2; shift 2
put() { mount --bind "$d/$1" "$2"; }
put passwd /etc/passwd; put fuse /dev/fuse; put subids /etc/subuid; put subids /etc/subgid
mount --bind "$memdev" "$d/memdev"; mount --bind "$MEMDEV_ROOT_IMAGE" "$d/image"
exec setpriv --reuid 4711 --regid 4711 --clear-groups --inh-caps=-all env XDG_RUNTIME_DIR="$d" "$d/memdev" "$@"
"#;

impl Place {
    pub fn new() -> Self {
        assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse (modprobe fuse)");
        Self { dir: scratch(), ordinary: false }
    }

    /// One of an ordinary user's.
    pub fn of_user(has_subordinate_ids: bool) -> Self {
        for program in ["fuse2fs", "newuidmap", "setpriv"] {
            let found =
                ["/usr/bin", "/bin", "/usr/sbin"].iter().any(|dir| Path::new(dir).join(program).exists());
            assert!(found, "this test needs {program}: run tools/setup");
        }
        let mut place = Self::new();
        place.ordinary = true;
        let write = |name: &str, text: &str| fs::write(place.path(name), text).unwrap();
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        write("passwd", &format!("{passwd}tester:x:{USER}:{USER}::/nonexistent:/bin/sh\n"));
        let ids = format!("tester:{FIRST_SUBORDINATE}:65536\n");
        write("subids", if has_subordinate_ids { &ids } else { "" });
        write("memdev", "");
        write("image", "");
        let fuse = place.path("fuse");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fuse,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
            rustix::fs::makedev(10, 229),
        )
        .expect("making a device node");
        fs::set_permissions(&fuse, fs::Permissions::from_mode(0o666)).unwrap();
        fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(place.state()).unwrap();
        chown(place.state(), Some(USER), Some(USER)).unwrap();
        for file in ["/etc/subuid", "/etc/subgid"] {
            // Something to mount on.
            fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        }
        place
    }

    /// Where the image is for those who run here.
    pub fn image(&self) -> PathBuf {
        if self.ordinary { self.path("image") } else { image() }
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
        let memdev = env!("CARGO_BIN_EXE_memdev");
        let mut command = Command::new(if self.ordinary { "unshare" } else { memdev });
        if self.ordinary {
            // Each becomes the next, so that the process is memdev's in the end.
            command.args(["--mount", "--propagation", "private", "sh", "-euc", AS_USER, "sh"]);
            command.arg(self.path("")).arg(memdev);
        }
        command.arg(subcommand).arg("--state").arg(self.state()).args(options);
        command.env_remove("MEMDEV_LOG").stdin(Stdio::null());
        command
    }

    /// `memdev run OPTIONS IMAGE -- COMMAND`.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.memdev("run", options);
        // Where the kernel has an nbd driver, that would be chosen; it is tested in a virtual machine.
        run.args(["--backend", "fuse"]).arg(self.image());
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
        self.begin(self.run(options, &["sh", "-c", &script]))
    }

    /// The same in a fork of `session`.
    #[track_caller]
    pub fn start_fork(&self, session: &str, options: &[&str], script: &str) -> Running<'_> {
        let script = format!("echo ready; {script}");
        let mut command = self.memdev("fork", options);
        command.args([session, "--", "sh", "-c", &script]);
        self.begin(command)
    }

    /// Starts a command that has a shell say `ready` once.
    #[track_caller]
    pub fn begin(&self, mut command: Command) -> Running<'_> {
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

    /// Which processes there are of this place's user: its directory is in their environment.
    pub fn of_this_user(&self) -> Vec<String> {
        let own = format!("XDG_RUNTIME_DIR={}", self.path("").display());
        let processes = fs::read_dir("/proc").expect("reading /proc").flatten();
        let names = processes.filter_map(|entry| {
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let is_own = environment.split(|&byte| byte == 0).any(|variable| variable == own.as_bytes());
            is_own.then(|| fs::read_to_string(entry.path().join("comm")).unwrap_or_default())
        });
        names.collect()
    }

    /// Whether there is a process that was started with a path in this place.
    fn is_going(&self) -> bool {
        let own = self.path("").into_os_string().into_vec();
        let mut processes = fs::read_dir("/proc").expect("reading /proc").flatten();
        processes.any(|entry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.windows(own.len()).any(|part| part == own)
        })
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

impl Drop for Place {
    /// What a launcher that was killed has left of its control groups is found by what it has written down, which goes with
    /// this directory. A failed test's launchers end by themselves, with their terminals, and write here until they have.
    fn drop(&mut self) {
        let _ = self.memdev("enter", &["--list"]).output();
        let end = Instant::now() + Duration::from_secs(10);
        while std::thread::panicking() && self.is_going() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
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
        if let [one] = &all[..] {
            return one.clone();
        }
        let session = self.session();
        let path = self.place.state().join("attach").join(session["attachment"].as_str().expect("text"));
        serde_json::from_slice(&fs::read(path).expect("it is written down")).expect("JSON")
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

    /// Has it go on with what it does [`once_told`].
    pub fn tell(&self) {
        kill(&self.launcher(), Signal::USR1);
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
        all.extend(self.children());
        all.extend(namespace(&init));
        all
    }

    /// Those of them that are its alone: not the daemon, which may serve forks as well.
    #[track_caller]
    pub fn own_processes(&self) -> Vec<Value> {
        let daemon = self.attachment()["pid"].clone();
        self.processes().into_iter().filter(|pid| *pid != daemon).collect()
    }

    /// The launcher's children: process 1 and the servers of the disk.
    #[track_caller]
    pub fn children(&self) -> Vec<Value> {
        let launcher = self.child.id();
        let text = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).expect("it runs");
        text.split_whitespace().map(|pid| pid.parse::<u32>().expect("a number").into()).collect()
    }

    /// The launcher's child of this name.
    #[track_caller]
    pub fn child(&self, name: &str) -> Value {
        let is_it = |pid: &Value| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
        };
        self.children().into_iter().find(is_it).expect("it runs")
    }

    /// Its device: where the kernel says what the file behind it is, and what it says. The name of that file has 128 random
    /// bits, so that whoever has the device next is not taken for this one.
    #[track_caller]
    pub fn device(&self) -> Device {
        let attachment = self.attachment();
        let name =
            attachment["device"].as_str().and_then(|path| path.strip_prefix("/dev/")).expect("a device");
        let says = PathBuf::from(format!("/sys/block/{name}/loop/backing_file"));
        let file = fs::read_to_string(&says).expect("the loop device has a file");
        assert!(file.contains("memdev:"), "{file}");
        Device { says, file }
    }

    /// Waits until these have gone.
    #[track_caller]
    pub fn assert_ended(self, processes: &[Value]) {
        for pid in processes {
            wait_until("the process has ended", || has_ended(pid));
        }
    }

    /// Waits until these, and the device, have gone.
    #[track_caller]
    pub fn assert_gone(mut self, processes: &[Value], device: &Device) {
        for pid in processes {
            wait_until("the process has ended", || has_ended(pid));
        }
        wait_until("the device is gone", || {
            fs::read_to_string(&device.says).ok().as_ref() != Some(&device.file)
        });
        let _ = self.child.wait();
    }
}

/// A device that a private root has, or had.
pub struct Device {
    says: PathBuf,
    file: String,
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

/// What a shell inside does once it is [told](Running::tell) to; it says `set` when it can be.
pub fn once_told(script: &str) -> String {
    format!("trap told=1 USR1; echo set; until [ \"$told\" ]; do sleep 0.05; done; {script}")
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
