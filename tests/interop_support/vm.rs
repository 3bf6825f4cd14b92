//! The kernel's own NBD driver as a client: `tools/vm` boots a machine in which a job of `tests/vm` runs.
//!
//! It needs what `tools/setup vm` installs, and fails without it. Machines are emulated: a boot takes seconds, so a job
//! checks many things in one.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::run;
use crate::support::Server;

/// The kernels that jobs run on.
pub const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// How `tools/vm` ends when the guest does not.
pub mod failure {
    /// The guest's kernel panicked.
    pub const PANICKED: i32 = 121;
    /// The guest hangs.
    pub const HUNG: i32 = 122;
    /// The guest switched off without saying how its job ended.
    pub const NO_STATUS: i32 = 123;
    /// The job took too long.
    pub const TIME_LIMIT: i32 = 124;
}

/// The longest that a machine waits for others. It only catches hangs.
const MEETING_LIMIT: Duration = Duration::from_secs(500);

/// Machines of several tests would only slow each other down, and into their time limits. (Where every test is a
/// process of its own, the test runner's settings see to that.)
static ONE_TEST: Mutex<()> = Mutex::new(());

/// Waits until no other test of this process runs a machine.
pub fn turn() -> MutexGuard<'static, ()> {
    ONE_TEST.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A machine to be started.
#[must_use]
pub struct Vm {
    command: Command,
    job: PathBuf,
    arguments: Vec<OsString>,
}

/// A machine that runs.
pub struct Running {
    child: Child,
    output: Option<JoinHandle<Vec<String>>>,
}

/// How a machine ended.
pub struct Ended {
    /// As `tools/vm` has it: the job's own exit status, or one of [`failure`].
    pub status: ExitStatus,
    /// What the guest said, and what `tools/vm` said of it.
    pub output: String,
}

impl Vm {
    /// A machine with this kernel, for a job of `tests/vm`.
    pub fn job(kernel: &str, job: &str) -> Self {
        let job = tests().join(job);
        let vm = Self::script(kernel, &job);
        // Emulated, on a machine that has much else to do, a job takes many times as long as elsewhere.
        vm.add(&tests().join("lib.sh"), "/lib.sh").option("--time-limit", "500")
    }

    /// A machine with this kernel, for a script that stands alone.
    pub fn script(kernel: &str, job: &Path) -> Self {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/vm"));
        command.args(["--kernel", kernel]);
        Self { command, job: job.to_owned(), arguments: Vec::new() }
    }

    /// Has a file in the guest.
    pub fn add(self, file: &Path, path: &str) -> Self {
        let mut addition = file.as_os_str().to_owned();
        addition.push(":");
        addition.push(path);
        self.option("--add", addition)
    }

    /// Has a program of this machine in the guest.
    pub fn program(self, name: &str) -> Self {
        let path = run("sh", ["-c", &format!("command -v {name}")]);
        let path = Path::new(path.trim());
        self.add(path, &format!("/bin/{name}"))
    }

    /// Has the program under test in the guest, without what only debuggers read.
    pub fn memdev(self, scratch: &Path) -> Self {
        let stripped = scratch.join("memdev");
        if !stripped.exists() {
            let built = Path::new(env!("CARGO_BIN_EXE_memdev"));
            run("strip", ["-o".as_ref(), stripped.as_os_str(), built.as_os_str()]);
        }
        self.add(&stripped, "/bin/memdev")
    }

    /// Sets a variable of the job's environment.
    pub fn env(self, name: &str, value: impl ToString) -> Self {
        self.option("--env", format!("{name}={}", value.to_string()))
    }

    /// Sets the variable to the port of a server on this machine, which the job finds at `$HOST`.
    pub fn port(self, name: &str, server: &Server) -> Self {
        let port = server.tcp_address().rsplit(':').next().expect("an address has a port").to_owned();
        self.env(name, port)
    }

    /// Lets the job have a shell command run on this machine, by `on-host NAME`.
    pub fn call(self, name: &str, command: &str) -> Self {
        self.option("--call", format!("{name}={command}"))
    }

    /// Lets the job ask for the server's private memory, in KiB.
    pub fn call_memory(self, server: &Server) -> Self {
        let sum = "awk '/^Rss(Anon|Shmem):/ { sum += $2 } END { print sum }'";
        self.call("memory", &format!("{sum} /proc/{}/status", server.pid()))
    }

    /// Adds an option of `tools/vm`.
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.arg(name).arg(value);
        self
    }

    /// Adds an argument of the job.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts the machine.
    #[track_caller]
    pub fn start(mut self) -> Running {
        let mut child = self
            .command
            .arg(&self.job)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("tools/vm can be run");
        // Two pipes, read at once; what tools/vm itself says comes last anyhow.
        let (console, words) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let output = std::thread::spawn(move || {
            let words = std::thread::spawn(move || lines(words));
            let mut all = lines(console);
            all.extend(words.join().expect("reading does not panic"));
            all
        });
        Running { child, output: Some(output) }
    }

    /// Runs the machine to its end.
    #[track_caller]
    pub fn end(self) -> Ended {
        self.start().end()
    }

    /// Runs the machine to its end, and panics unless the job succeeds. Returns what it said.
    #[track_caller]
    pub fn succeed(self) -> String {
        self.start().succeed()
    }
}

impl Running {
    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let status = self.child.wait().expect("waiting for tools/vm");
        let output = self.output.take().expect("it is taken once").join().expect("reading does not panic");
        Ended { status, output: output.join("\n") }
    }

    /// Waits for its end, and panics unless the job succeeded. Returns what it said.
    #[track_caller]
    pub fn succeed(self) -> String {
        let Ended { status, output } = self.end();
        assert!(status.success(), "the job ended with {status}:\n{output}");
        println!("{output}");
        output
    }
}

impl Running {
    fn ended(&mut self) -> bool {
        self.child.try_wait().expect("asking for tools/vm's status").is_some()
    }

    #[track_caller]
    fn panic_with_output(&mut self, who: &str) -> ! {
        let output = self.output.take().map(|output| output.join().expect("reading does not panic"));
        panic!("{who} ended early:\n{}", output.unwrap_or_default().join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only what a failed test left. qemu ends with tools/vm.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A place where machines wait for each other, as often as they like: the n-th time that they call it is round n.
pub struct Meeting {
    dir: PathBuf,
}

impl Meeting {
    /// A meeting that keeps its notes in this new folder.
    pub fn new(dir: PathBuf) -> Self {
        std::fs::create_dir(&dir).expect("creating a directory");
        Self { dir }
    }

    /// The command by which `who` comes to it, and waits.
    pub fn command(&self, who: &str) -> String {
        let dir = self.dir.display();
        format!(
            "cd '{dir}' || exit; round=$(($(ls | grep -c '^{who}\\.') + 1)); : >{who}.$round; \
             until [ -e go.$round ]; do sleep 0.1; done"
        )
    }

    /// Waits until all of these have come, and panics if one of their machines ends instead.
    #[track_caller]
    pub fn wait(&self, round: u32, machines: &mut [(&str, Running)]) {
        let start = Instant::now();
        for (who, machine) in machines {
            let note = self.dir.join(format!("{who}.{round}"));
            while !note.exists() {
                if machine.ended() {
                    // The rest is said by the machine.
                    machine.panic_with_output(who);
                }
                assert!(start.elapsed() < MEETING_LIMIT, "{who} does not come");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Lets all go on.
    pub fn go(&self, round: u32) {
        std::fs::write(self.dir.join(format!("go.{round}")), "").expect("creating a file");
    }
}

fn lines(stream: impl std::io::Read) -> Vec<String> {
    BufReader::new(stream)
        .split(b'\n')
        .map_while(Result::ok)
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .collect()
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")
}
