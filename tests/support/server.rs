//! The server under test as a process of its own: started, watched through `/proc`, stopped.
//!
//! To check the tests themselves against another implementation, set `MEMDEV_TEST_COMMAND` to a shell command that
//! serves `{image}` as export `{name}` on the unix socket `{socket}`, for instance
//! `exec qemu-nbd -f raw -s -t -e 100 -x {name} -k {socket} {image}`. Tests of what only memdev promises then fail.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{Client, Image, OptionReply, PATIENCE, Peer, Stream, Style, wait_until};

/// How to start a server.
pub struct Serve {
    dir: TempDir,
    images: Vec<OsString>,
    args: Vec<OsString>,
    confine: Vec<OsString>,
    tcp: bool,
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    dir: TempDir,
    socket: PathBuf,
    tcp: Option<String>,
    log: Arc<Mutex<Vec<String>>>,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory in bytes, everything (`VmRSS`).
    pub resident: u64,
    /// Resident memory in bytes that is not a file's (`RssAnon` and `RssShmem`): overlays live here.
    pub private: u64,
}

/// A directory for a test's images.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("memdev-test-").tempdir().expect("making a temporary directory")
}

impl Serve {
    /// Serves the image under its file stem.
    pub fn image(image: &Image) -> Self {
        // A system call that the server makes and that is not on its list must not just fail: the test must.
        let mut confine: Vec<OsString> = vec!["--confine-strict".into()];
        if !rustix::process::geteuid().is_root() {
            // Else whoever is not root cannot count the server's descriptors.
            confine.push("--confine-traceable".into());
        }
        let images = vec![image.path.clone().into()];
        Self { dir: scratch(), images, args: Vec::new(), confine, tcp: false }
    }

    /// Is confined as users have it by default, or as these arguments say, instead of as it is best for tests.
    #[must_use]
    pub fn confine<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.confine = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        self
    }

    /// Keeps its socket in `dir`.
    #[must_use]
    pub fn dir(mut self, dir: TempDir) -> Self {
        self.dir = dir;
        self
    }

    /// Serves another image too.
    #[must_use]
    pub fn and(mut self, image: &Image) -> Self {
        self.images.push(image.path.clone().into());
        self
    }

    /// Serves another image too, under this name.
    #[must_use]
    pub fn and_named(mut self, name: &str, image: &Image) -> Self {
        let mut operand = OsString::from(format!("{name}="));
        operand.push(&image.path);
        self.images.push(operand);
        self
    }

    /// Adds command-line arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Listens on a free TCP port too.
    #[must_use]
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// Starts the server and waits until it listens.
    pub fn start(self) -> Server {
        let socket = self.dir.path().join("nbd.sock");
        if let Ok(template) = std::env::var("MEMDEV_TEST_COMMAND") {
            return self.start_other(&template, socket);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg("serve").args(&self.images).arg("--unix").arg(&socket);
        if self.tcp {
            command.args(["--tcp", "127.0.0.1:0"]);
        }
        command.args(&self.confine).args(&self.args).stdin(Stdio::null()).stdout(Stdio::null());
        let mut server = Server::spawn(command, self.dir, socket);
        let more = self.args.iter().filter(|arg| ["--unix", "--tcp", "--vsock"].iter().any(|way| arg == way));
        server.wait_for_line("listening on", 1 + usize::from(self.tcp) + more.count());
        let address = |line: &String| {
            let (scheme, address) = line.rsplit_once(' ')?.1.split_once("://")?;
            matches!(scheme, "nbd" | "nbds").then(|| address.to_owned())
        };
        let tcp = server.log().iter().find_map(address);
        server.tcp = tcp.map(|address| address.trim_end_matches('/').trim().to_owned());
        server
    }

    fn start_other(self, template: &str, socket: PathBuf) -> Server {
        let image = Path::new(&self.images[0]);
        let name = image.file_stem().expect("an image has a name").to_string_lossy().into_owned();
        let script = template
            .replace("{image}", &image.to_string_lossy())
            .replace("{name}", &name)
            .replace("{socket}", &socket.to_string_lossy());
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Server::spawn(command, self.dir, socket);
        wait_until("the other server listens", || Stream::unix(&server.socket).is_ok());
        server
    }
}

impl Server {
    /// Serves one image with the defaults.
    pub fn of(image: &Image) -> Self {
        Serve::image(image).start()
    }

    /// A server that somebody starts in a way of their own, in a directory that is there as long as it is. What it does
    /// with its standard input and output is left as it is.
    pub fn by(command: Command, dir: TempDir) -> Self {
        let socket = dir.path().join("nbd.sock");
        Self::spawn(command, dir, socket)
    }

    fn spawn(mut command: Command, dir: TempDir, socket: PathBuf) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.lock().expect("the log is not poisoned").push(line);
            }
        });
        Self { child, dir, socket, tcp: None, log }
    }

    /// Waits until it has said `text` in so many lines.
    pub fn wait_for_line(&mut self, text: &str, times: usize) {
        let start = Instant::now();
        while self.log().iter().filter(|line| line.contains(text)).count() < times {
            if let Some(status) = self.child.try_wait().expect("asking for the server's status") {
                // The reader may still be busy with the last words.
                std::thread::sleep(std::time::Duration::from_millis(50));
                panic!("the server ended with {status} instead of listening: {:#?}", self.log());
            }
            assert!(start.elapsed() < PATIENCE, "the server never said {text:?}: {:#?}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// What it said on standard error so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("the log is not poisoned").clone()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The path of its unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The directory its unix socket is in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new connection to its unix socket.
    pub fn stream(&self) -> Stream {
        Stream::unix(&self.socket).expect("connecting to the server's unix socket")
    }

    /// The address it listens on over TCP, as `host:port`.
    pub fn tcp_address(&self) -> &str {
        self.tcp.as_deref().expect("the server listens on TCP")
    }

    /// A new connection over TCP.
    pub fn tcp_stream(&self) -> Stream {
        Stream::tcp(self.tcp_address()).expect("connecting to the server over TCP")
    }

    /// A new connection before its handshake.
    pub fn peer(&self) -> Peer {
        Peer::new(self.stream())
    }

    /// A client with structured replies and `base:allocation`.
    #[track_caller]
    pub fn client(&self, name: &str) -> Client {
        Client::attach(self.stream(), name).expect("the export is offered")
    }

    /// A client with simple replies.
    #[track_caller]
    pub fn simple(&self, name: &str) -> Client {
        Client::attach_simple(self.stream(), name).expect("the export is offered")
    }

    /// A client with these headers, and `base:allocation` where there is block status.
    #[track_caller]
    pub fn client_in(&self, style: Style, name: &str) -> Client {
        let contexts: &[&str] = if style.has_chunks() { &["base:allocation"] } else { &[] };
        Client::attach_as(self.stream(), name, style, contexts).expect("the export is offered")
    }

    /// A client with these headers and both metadata contexts.
    #[track_caller]
    pub fn client_with_contexts(&self, style: Style, name: &str) -> Client {
        let contexts = ["base:allocation", "memdev:dirty"];
        Client::attach_as(self.stream(), name, style, &contexts).expect("the export is offered")
    }

    /// A client with structured replies, or the refusal.
    pub fn try_client(&self, name: &str) -> Result<Client, OptionReply> {
        Client::attach(self.stream(), name)
    }

    /// What the process holds now.
    pub fn usage(&self) -> Usage {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let entries = |name: &str| fs::read_dir(proc.join(name)).expect("the server lives").count();
        let status = fs::read_to_string(proc.join("status")).expect("the server lives");
        let kib = |field: &str| {
            let line = status.lines().find(|line| line.starts_with(field)).expect("a field of the status");
            let number = line.split_whitespace().nth(1).expect("a number follows the field");
            number.parse::<u64>().expect("the field is a number") * 1024
        };
        Usage {
            descriptors: entries("fd"),
            threads: entries("task"),
            resident: kib("VmRSS:"),
            private: kib("RssAnon:") + kib("RssShmem:"),
        }
    }

    /// Waits until no more descriptors and threads are held than in `baseline`, and at most `slack` bytes more memory.
    #[track_caller]
    pub fn settles_at(&self, baseline: Usage, slack: u64) {
        let start = Instant::now();
        loop {
            let now = self.usage();
            if now.descriptors <= baseline.descriptors
                && now.threads <= baseline.threads
                && now.private <= baseline.private + slack
            {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the server keeps {now:?}, before it had {baseline:?}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Panics if the process has ended.
    pub fn assert_alive(&mut self) {
        let status = self.child.try_wait().expect("asking for the server's status");
        assert!(status.is_none(), "the server ended with {status:?}: {:#?}", self.log());
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("signalling the server");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("asking for the server's status") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not end: {:#?}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Asks it to end; it must do so with status 0 and leave no socket file.
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "the server ended with {status}: {:#?}", self.log());
        assert!(!self.socket.exists(), "the unix socket is removed");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; nothing else can be done here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server said: {:#?}", self.log());
        }
    }
}
