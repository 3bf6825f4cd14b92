//! How attacks are run, inside and outside.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

pub const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

/// How a private root keeps root inside from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By a user namespace.
    User,
    /// By taking capabilities.
    Privileged,
}

pub const MODES: [Mode; 2] = [Mode::User, Mode::Privileged];

/// The Debian root that is attacked from within. It never changes, so all tests have the same.
pub fn image() -> PathBuf {
    let image = std::env::var_os("MEMDEV_ROOT_IMAGE")
        .expect("MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image prints it");
    PathBuf::from(image)
}

/// `memdev run` of an image, up to the command. Only what hangs takes as long as it may.
pub fn run(mode: Mode, image: &Path, options: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "240", MEMDEV, "run"]).args(options);
    if mode == Mode::Privileged {
        command.arg("--privileged");
    }
    command.arg(image).arg("--").env_remove("MEMDEV_LOG").stdin(Stdio::null());
    command
}

/// Runs a shell script in a private root of the Debian image; it succeeds, and this is what it printed.
#[track_caller]
pub fn sh(mode: Mode, options: &[&str], script: &str) -> String {
    let mut command = run(mode, &image(), options);
    succeed(command.args(["sh", "-euc", script]))
}

/// Runs a shell script outside, in a mount namespace that is thrown away.
#[track_caller]
pub fn sh_outside(script: &str, args: &[&str]) -> String {
    let mut command = Command::new("unshare");
    succeed(command.args(["--mount", "--propagation", "private", "sh", "-euc", script, "sh"]).args(args))
}

#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let output = command.output().expect("it can be run");
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).expect("text")
}

pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}: {}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// What attempts came to.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcomes(Vec<(String, String)>);

impl Outcomes {
    pub fn parse(text: &str) -> Self {
        let pair = |line: &str| {
            let (name, outcome) = line.rsplit_once('\t').unwrap_or_else(|| panic!("not an outcome: {line}"));
            (name.to_owned(), outcome.to_owned())
        };
        Self(text.lines().map(pair).collect())
    }

    pub fn of(&self, name: &str) -> &str {
        &self.0.iter().find(|(attempt, _)| attempt == name).unwrap_or_else(|| panic!("{name} in {self:?}")).1
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, outcome)| (&**name, &**outcome))
    }

    /// Each attempt got through.
    #[track_caller]
    pub fn assert_all_ok(&self) {
        assert!(!self.0.is_empty(), "there were attempts");
        assert!(self.0.iter().all(|(_, outcome)| outcome == "OK"), "{self:?}");
    }

    /// No attempt got through, and each for one of these reasons.
    #[track_caller]
    pub fn assert_all_refused(&self, mode: Mode, reasons: &[&str]) {
        assert!(!self.0.is_empty(), "there were attempts");
        assert!(self.0.iter().all(|(_, outcome)| reasons.contains(&&**outcome)), "{mode:?}: {self:?}");
    }

    /// There are the attempts that another had.
    #[track_caller]
    pub fn assert_same_attempts(&self, other: &Self) {
        assert!(
            self.iter().map(|(name, _)| name).eq(other.iter().map(|(name, _)| name)),
            "{self:?} {other:?}"
        );
    }
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, outcome)| writeln!(f, "{name}: {outcome}"))
    }
}

/// System calls by name, for the programs. The numbers are the machine's.
const CALLS: &[(&str, libc::c_long)] = &[
    ("acct", libc::SYS_acct),
    ("bpf", libc::SYS_bpf),
    ("chroot", libc::SYS_chroot),
    ("delete_module", libc::SYS_delete_module),
    ("finit_module", libc::SYS_finit_module),
    ("fsmount", libc::SYS_fsmount),
    ("fsconfig", libc::SYS_fsconfig),
    ("fsopen", libc::SYS_fsopen),
    ("init_module", libc::SYS_init_module),
    ("ioperm", libc::SYS_ioperm),
    ("iopl", libc::SYS_iopl),
    ("kexec_file_load", libc::SYS_kexec_file_load),
    ("kexec_load", libc::SYS_kexec_load),
    ("mknod", libc::SYS_mknod),
    ("mknodat", libc::SYS_mknodat),
    ("mount", libc::SYS_mount),
    ("mount_setattr", libc::SYS_mount_setattr),
    ("name_to_handle_at", libc::SYS_name_to_handle_at),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("open_tree", libc::SYS_open_tree),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("pidfd_open", libc::SYS_pidfd_open),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("ptrace", libc::SYS_ptrace),
    ("quotactl", libc::SYS_quotactl),
    ("reboot", libc::SYS_reboot),
    ("setns", libc::SYS_setns),
    ("swapoff", libc::SYS_swapoff),
    ("swapon", libc::SYS_swapon),
    ("umount2", libc::SYS_umount2),
    ("unshare", libc::SYS_unshare),
];

const PRELUDE: &str = r#"
use strict; use Errno; use Fcntl; $| = 1;
# The name of what went wrong.
sub why { my ($name) = sort grep { $!{$_} } keys %!; $name || "error" . ($! + 0) }
# One attempt's line.
sub report { print "$_[0]\t$_[1]\n" }
# A system call: OK or why not.
sub call { my ($name, $number, @args) = @_; report($name, syscall($number, @args) == -1 ? why() : "OK") }
# A system call with strings that are written in the program, which Perl itself does not take; what it returns.
sub try { my ($number, @args) = @_; syscall($number, @args) }
# Opening a file: OK or why not.
sub opens { my ($path, $how) = @_; report("$path", sysopen(my $file, $path, $how) ? "OK" : why()) }
"#;

/// The Perl of a program, with what all have in common.
pub fn program(text: &str) -> String {
    let mut whole = PRELUDE.to_owned();
    for (name, number) in CALLS {
        writeln!(whole, "sub SYS_{name} {{ {number} }}").expect("memory");
    }
    whole + text
}

/// Runs an attack in a private root of the Debian image.
#[track_caller]
pub fn attack(mode: Mode, options: &[&str], text: &str, args: &[&str]) -> Outcomes {
    attack_in(mode, &image(), options, text, args)
}

/// Runs an attack in a private root of some image.
#[track_caller]
pub fn attack_in(mode: Mode, image: &Path, options: &[&str], text: &str, args: &[&str]) -> Outcomes {
    let mut command = run(mode, image, options);
    Outcomes::parse(&succeed(command.args(["perl", "-e", &program(text)]).args(args)))
}

/// Runs an attack outside, in a mount namespace that is thrown away: it should get through there.
#[track_caller]
pub fn attack_outside(text: &str, args: &[&str]) -> Outcomes {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "perl", "-e", &program(text)]).args(args);
    Outcomes::parse(&succeed(&mut command))
}

/// A copy of the Debian image, changed by `debugfs` as an administrator who means harm would.
#[track_caller]
pub fn changed_image(dir: &Path, requests: &[&str]) -> PathBuf {
    let copy = dir.join("changed.img");
    let options = ["--sparse=always", "--reflink=auto"];
    succeed(Command::new("cp").args(options).arg(image()).arg(&copy));
    change(&copy, requests);
    copy
}

/// Changes a file system that is mounted nowhere.
#[track_caller]
pub fn change(image: &Path, requests: &[&str]) {
    for request in requests {
        tool("debugfs", &["-w".as_ref(), "-R".as_ref(), request.as_ref(), image.as_os_str()]);
    }
}

/// Runs one of the administrator's tools.
#[track_caller]
pub fn tool(name: &str, args: &[&OsStr]) -> String {
    let mut command = Command::new(name);
    succeed(command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(args))
}

/// A small ext4 file system in a file, with the device nodes that `requests` make.
#[track_caller]
pub fn small_image(path: &Path, requests: &[&str]) {
    File::create(path).and_then(|file| file.set_len(4 << 20)).expect("a file");
    tool("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), path.as_os_str()]);
    change(path, requests);
}

/// A private root in which a command waits until it is told to go on.
pub struct Held {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Held {
    /// Starts it; its command has begun when this returns.
    #[track_caller]
    pub fn start(mode: Mode, options: &[&str]) -> Self {
        Self::start_with(mode, options, "echo here; read line; echo \"$line\"")
    }

    /// As [`Held::start`], with a script that prints a line when it has begun and then reads one.
    #[track_caller]
    pub fn start_with(mode: Mode, options: &[&str], script: &str) -> Self {
        let mut command = run(mode, &image(), options);
        command.args(["sh", "-euc", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it can be run");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut this = Self { child, stdin, stdout };
        assert_eq!(this.line(), "here", "the session has begun");
        this
    }

    /// The next line that the script prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    /// The processes that it has: those of the launcher, and those inside.
    pub fn processes(&self) -> Processes {
        let all = descendants(self.child.id());
        let (inside, outside) = all.into_iter().partition(|&pid| depth(pid) > 1);
        Processes { inside, outside }
    }

    /// Lets it end; it ends well.
    #[track_caller]
    pub fn end(mut self) {
        drop(self.stdin.take());
        let status = self.child.wait().expect("a child");
        // `read` says 1 at the end of its input.
        assert!(status.code().is_some_and(|code| code <= 1), "{status}");
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            // `timeout` tells its child.
            let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process");
            let _ = kill_process(pid, Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

/// The processes of a session, by the host's numbers.
#[derive(Debug)]
pub struct Processes {
    /// In its pid namespace; the first is its process 1.
    pub inside: Vec<u32>,
    /// Those that make and keep it.
    pub outside: Vec<u32>,
}

fn descendants(of: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for task in tasks {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace() {
            let child = child.parse().expect("a number");
            found.push(child);
            found.extend(descendants(child));
        }
    }
    found
}

/// How many pid namespaces a process has a number in.
fn depth(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_whitespace().count()
}

/// A process of the host's that an attack may try its hands on.
pub struct Victim(Child);

impl Victim {
    pub fn start() -> Self {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Self(child.expect("sleep"))
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// Panics if somebody has harmed it.
    #[track_caller]
    pub fn assert_well(&mut self) {
        assert_eq!(self.0.try_wait().expect("a child"), None, "it lives");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives a descriptor to what `command` starts, by a certain number, by way of a shell: Rust's own are closed there.
pub fn with_descriptor(command: &Command, number: u32, file: &OwnedFd) -> Command {
    use std::os::fd::AsRawFd;
    let mut outer = Command::new("bash");
    let source = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    outer.args(["-c", &format!("exec {number}<\"$0\" \"$@\""), &source]);
    outer.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    outer
}
