//! A real server behind the destination: OpenSSH's, on loopback, mounted by sshfs.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::house::House;
use crate::interop_support::{run, said};
use crate::machine::once_told;
use crate::remote::Server;
use crate::support::server::scratch;
use crate::support::wait_until;

const SFTP: &str = "/usr/lib/openssh/sftp-server";

/// In the place of `ssh`: OpenSSH's server, as from a place to which so many bytes get in a twentieth of a second, and so many
/// from there.
const SLOW: &str = r#"#!/usr/bin/python3
import os, subprocess, threading, time
server = subprocess.Popen([SFTP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
def relay(source, sink, most):
    while part := os.read(source, most):
        while part:
            part = part[os.write(sink, part):]
        time.sleep(0.05)
def up():
    relay(0, server.stdin.fileno(), UP)
    server.kill()
    os._exit(0)
threading.Thread(target=up, daemon=True).start()
relay(server.stdout.fileno(), 1, DOWN)
"#;

/// A server by `sftp://` that is far away: no daemon, but its program by what is called `ssh` here.
pub struct Slow {
    dir: TempDir,
}

impl Slow {
    /// Bytes in a twentieth of a second: to the server, and from it.
    pub fn new(up: usize, down: usize) -> Self {
        assert!(Path::new(SFTP).exists(), "run tools/setup");
        let dir = scratch();
        fs::create_dir(dir.path().join("files")).unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        let values = [("SFTP", format!("{SFTP:?}")), ("UP", up.to_string()), ("DOWN", down.to_string())];
        let script = values.iter().fold(SLOW.to_owned(), |text, (name, value)| text.replace(name, value));
        let path = dir.path().join("bin/ssh");
        fs::write(&path, script).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }
}

impl Server for Slow {
    fn url(&self) -> String {
        format!("sftp://far-away{}", self.files().display())
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let path = std::env::var("PATH").unwrap();
        vec![("PATH", format!("{}:{path}", self.dir.path().join("bin").display()))]
    }

    fn files(&self) -> PathBuf {
        self.dir.path().join("files")
    }

    fn stop(&mut self) {}

    fn start(&mut self) {}
}

/// A server with keys and settings of its own, for one directory.
pub struct Sshd {
    dir: TempDir,
    pub port: u16,
    pub server: Option<Child>,
}

impl Sshd {
    pub fn new() -> Self {
        assert!(Path::new("/usr/sbin/sshd").exists() && Path::new(SFTP).exists(), "run tools/setup");
        let dir = scratch();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for key in ["host", "user"] {
            run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]);
        }
        fs::copy(path("user.pub"), path("authorized")).unwrap();
        fs::create_dir(path("files")).unwrap();
        fs::create_dir(path("mounted")).unwrap();
        // The directory that it separates its rights in.
        fs::create_dir_all("/run/sshd").unwrap();
        fs::set_permissions("/run/sshd", fs::Permissions::from_mode(0o755)).unwrap();
        let port = free_port();
        // The program of the same name would be started by root's shell, which may have much to do before.
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nSubsystem sftp internal-sftp\n",
            path("host"),
            path("authorized")
        );
        fs::write(path("config"), config).unwrap();
        let mut this = Self { dir, port, server: None };
        this.start();
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn start(&mut self) {
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(self.path("config"));
        self.server = Some(start(&mut command, &self.path("log"), self.port));
    }

    /// Mounts it, until this is dropped.
    fn mount(&self) -> Mounted {
        let place = self.path("mounted");
        let options = format!(
            "IdentityFile={},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,BatchMode=yes,LogLevel=ERROR,port={}",
            self.path("user").display(),
            self.port
        );
        let source = format!("root@127.0.0.1:{}", self.path("files").display());
        let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).unwrap_or(0);
        let before = device(&self.path(""));
        let mut command = Command::new("sshfs");
        command.arg("-f").arg(source).arg(&place).args(["-o", &options]);
        let sshfs = command.stdin(Stdio::null()).spawn().expect("sshfs can be run: run tools/setup");
        wait_until("it is mounted", || ![0, before].contains(&device(&place)));
        Mounted { place, sshfs }
    }
}

impl Sshd {
    /// Ends it, and all of its connections.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            end(server);
        }
    }
}

/// Ends a server, with all that it has started.
pub fn end(mut server: Child) {
    // First what starts others.
    let mut all = vec![server.id()];
    let mut at = 0;
    while let Some(pid) = all.get(at).copied() {
        at += 1;
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::STOP);
        let children = format!("/proc/{pid}/task/{pid}/children", pid = pid.as_raw_nonzero());
        let children = fs::read_to_string(children).unwrap_or_default();
        all.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
    }
    for &pid in &all {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    let _ = server.wait();
    // What is being killed may listen still, and be taken for the next one.
    let is_going = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    wait_until("all of it has ended", || !all.iter().any(is_going));
}

/// A port that nobody else gets before a server does: ports that were given are not given again soon.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts a server, and waits until it listens.
pub fn start(command: &mut Command, log: &Path, port: u16) -> Child {
    let log = fs::File::create(log).unwrap();
    let server = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
    let server = server.expect("the server can be run: run tools/setup");
    wait_until("the server listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    server
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Mounted {
    place: PathBuf,
    sshfs: Child,
}

impl Mounted {
    /// From now on everything that is asked of it fails.
    fn cut_off(&mut self) {
        let _ = self.sshfs.kill();
        let _ = self.sshfs.wait();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.cut_off();
        let _ = Command::new("fusermount3").arg("-uz").arg(&self.place).output();
    }
}

#[test]
fn over_sshfs() {
    let server = Sshd::new();
    let mounted = server.mount();
    let house = House::to(mounted.place.clone());
    let script = "mkdir -p d/e; echo one >d/e/f; ln -s e d/link; head -c 3000000 /dev/urandom >big; chmod 640 big; sha256sum big >sum";
    let said = house.sh(&[], script);
    assert!(said.contains("holds no extended attributes, set-id bits"), "{said}");
    let files = server.path("files");
    let expected = ["big 640 3000000", "d/ 755", "d/e/ 755", "d/e/f 644 4", "d/link -> e", "sum 644 70"];
    assert_eq!(crate::house::tree(&files), expected);
    // Changed again within a second, of the same size; and what comes back is whole.
    house.sh(&["--carry-deletes"], "sha256sum -c --quiet sum && echo two >d/e/f && rm big sum && mv d/e d/g");
    assert_eq!(crate::house::tree(&files), ["d/ 755", "d/g/ 755", "d/g/f 644 4", "d/link -> e"]);
    assert_eq!(fs::read_to_string(files.join("d/g/f")).unwrap(), "two\n");
    // Somebody edits it on the server.
    let mut running = house.start(&[], &once_told("sleep 2; echo mine >d/g/f; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(files.join("d/g/f"), "their").unwrap();
    running.tell();
    wait_until("it is delivered", || {
        fs::read_to_string(files.join("d/g/f")).is_ok_and(|text| text == "mine\n")
    });
    let is_kept = |line: &String| line.starts_with("d/g/f.conflict-other-");
    wait_until("theirs is beside", || crate::house::tree(&files).iter().any(is_kept));
}

#[test]
fn a_server_that_is_cut_off() {
    let server = Sshd::new();
    let mut mounted = server.mount();
    let house = House::to(mounted.place.clone());
    let carry = format!("/home/u={}", mounted.place.display());
    let script = "echo ready; read x; echo late >late; exit 0";
    let options = ["--carry", &carry, "--workdir", "/home/u", "--carry-wait", "1s"];
    let mut command = house.place.run(&options, &["sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    use std::io::{BufRead, BufReader};
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    mounted.cut_off();
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(74), "{}", said(&output));
    drop(mounted);
    let mounted = server.mount();
    let resumed = house.memdev_carry(&["resume"]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert_eq!(fs::read_to_string(server.path("files").join("late")).unwrap(), "late\n");
    drop(mounted);
}
