//! A real sshd on loopback, on a test's own machine, and its clients.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::machine::{DIR, Machine};
use crate::support::wait_until;

/// What a host shell that is reached by mistake would say.
pub const HOST: &str = "this is the host";

/// Where Debian's own sshd is; it is to be started by its whole path.
const SSHD: &str = "/usr/sbin/sshd";

pub struct Sshd {
    child: Child,
    port: u16,
    key: String,
}

impl Sshd {
    /// Starts one with these lines in its settings, beside those that every test has.
    #[track_caller]
    pub fn start(machine: &Machine, settings: &str) -> Self {
        assert!(Path::new(SSHD).exists(), "this test needs sshd: run tools/setup");
        let make_key = |name: &str| {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(machine.file(name));
            assert!(command.status().expect("ssh-keygen").success());
        };
        make_key("host-key");
        make_key("key");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let all = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {DIR}/host-key\nAuthorizedKeysFile {DIR}/key.pub\n\
             PidFile none\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             UseDNS no\nMaxStartups 100\nLogLevel DEBUG1\nAcceptEnv LANG LC_* FOO\n{settings}\n"
        );
        fs::write(machine.file("sshd_config"), all).unwrap();
        let log = fs::File::create(machine.file("sshd.log")).unwrap();
        let mut command = machine.daemon(SSHD);
        command.args(["-D", "-e", "-f", &format!("{DIR}/sshd_config")]).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        // The client runs outside, where the machine's files are behind a process.
        let key = machine.file("key").display().to_string();
        let sshd = Self { child, port, key };
        wait_until("sshd listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        sshd
    }

    /// `ssh OPTIONS USER@... COMMAND`.
    pub fn ssh(&self, user: &str, options: &[&str], command: &[&str]) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-i", &self.key, "-p", &self.port.to_string()]);
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args(options).arg(format!("{user}@127.0.0.1")).args(command);
        ssh.stdin(Stdio::null()).env_remove("SSH_AUTH_SOCK");
        ssh
    }

    /// What it has logged, in the end.
    pub fn log(machine: &Machine) -> String {
        let log = fs::File::open(machine.file("sshd.log"));
        log.map(|log| BufReader::new(log).lines().map_while(Result::ok).collect::<Vec<_>>().join("\n"))
            .unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
