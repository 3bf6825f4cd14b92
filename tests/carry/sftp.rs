//! `sftp://`: to OpenSSH's server, and to rclone's, whose rename replaces what has the name, on loopback, by OpenSSH's client.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use crate::house::{House, tree};
use crate::interop_support::said;
use crate::machine::once_told;
use crate::remote::{Server, house};
use crate::servers::{Sshd, start};
use crate::support::wait_until;

pub struct Sftp(Sshd);

impl Sftp {
    /// A server, and an `ssh` that knows it and has its key: as somebody's `~/.ssh` would have it.
    pub fn new() -> Self {
        let sshd = Sshd::new();
        let path = |name: &str| sshd.path(name).to_str().unwrap().to_owned();
        let key = fs::read_to_string(path("host.pub")).unwrap();
        fs::write(path("known"), format!("[127.0.0.1]:{} {key}", sshd.port)).unwrap();
        let config = format!(
            "IdentityFile {}\nIdentitiesOnly yes\nUserKnownHostsFile {}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n",
            path("user"),
            path("known")
        );
        fs::write(path("ssh_config"), config).unwrap();
        fs::create_dir(path("bin")).unwrap();
        let script = format!("#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n", path("ssh_config"));
        fs::write(path("bin/ssh"), script).unwrap();
        fs::set_permissions(path("bin/ssh"), fs::Permissions::from_mode(0o755)).unwrap();
        Self(sshd)
    }

    fn url_of(&self, path: &str) -> String {
        format!(
            "sftp://root@127.0.0.1:{}{}/{path}",
            self.0.port,
            self.0.path("").to_str().unwrap().trim_end_matches('/')
        )
    }
}

impl Server for Sftp {
    fn url(&self) -> String {
        self.url_of("files")
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let path = std::env::var("PATH").unwrap();
        vec![("PATH", format!("{}:{path}", self.0.path("bin").display()))]
    }

    fn files(&self) -> PathBuf {
        self.0.path("files")
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn start(&mut self) {
        self.0.start();
    }
}

/// `rclone serve sftp`, with the keys of the other.
struct Rclone(Sftp);

impl Rclone {
    fn new() -> Self {
        let mut this = Self(Sftp::new());
        this.0.stop();
        this.start();
        this
    }
}

impl Server for Rclone {
    fn url(&self) -> String {
        format!("sftp://root@127.0.0.1:{}/", self.0.0.port)
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        self.0.environment()
    }

    fn files(&self) -> PathBuf {
        self.0.files()
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn start(&mut self) {
        let Sshd { port, .. } = self.0.0;
        let path = |name: &str| self.0.0.path(name);
        let mut command = Command::new("rclone");
        command.args(["serve", "sftp", "--addr", &format!("127.0.0.1:{port}"), "--key"]).arg(path("host"));
        command.arg("--authorized-keys").arg(path("authorized"));
        // What is changed in the directory itself is to be seen, and what is written there.
        command.args(["--dir-cache-time", "0s", "--vfs-cache-mode", "writes", "--vfs-write-back", "0s"]);
        command.arg("--cache-dir").arg(path("cache")).arg("--config").arg(path("none")).arg(path("files"));
        let server = start(&mut command, &path("log"), port);
        self.0.0.server = Some(server);
    }
}

mod every {
    crate::remote::scenarios!(super::Sftp::new());
}

mod rclone {
    crate::remote::scenarios!(super::Rclone::new(); conflicts new_on_both_sides no_removal cut_off_and_back killed);
}

#[test]
fn sftp_what_belongs_to_files() {
    let server = Sftp::new();
    std::os::unix::fs::chown(server.files(), Some(4711), Some(4712)).unwrap();
    let script = "echo >root; echo >daemon; chown 1:2 daemon; cp /bin/true suid; chmod 4751 suid; mkdir -m 1770 shared; \
                  ln -s ../x link; ln -s a b; chown -h 1:2 b; touch -d @1000000000.5 root; truncate -s 1G holes; echo x >>holes; \
                  printf x >\"$(printf '\\377 \\033[31m')\"";
    let said = house(&server).sh(&[], script);
    assert!(said.contains("holds no extended attributes, set-id bits, fractions of seconds"), "{said}");
    assert!(!said.contains("owners") && !said.contains("promise"), "{said}");
    let of = |name: &str| {
        let metadata = server.files().join(name).symlink_metadata().unwrap();
        (metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777)
    };
    assert_eq!(of("root"), (4711, 4712, 0o644));
    assert_eq!(of("daemon"), (1, 2, 0o644));
    assert_eq!(of("suid"), (4711, 4712, 0o751), "no rights outside");
    assert_eq!(of("shared"), (4711, 4712, 0o1770));
    assert_eq!((of("b").0, of("b").1), (1, 2));
    assert_eq!(fs::read_link(server.files().join("link")).unwrap().to_str(), Some("../x"));
    assert_eq!(server.files().join("root").metadata().unwrap().mtime(), 1_000_000_000);
    let holes = server.files().join("holes").metadata().unwrap();
    assert!(holes.len() == (1 << 30) + 2 && holes.blocks() < 1000, "{}", holes.blocks());
    fs::remove_file(server.files().join("holes")).unwrap();
    house(&server).sh(
        &[],
        "set -e; test $(stat -c %u:%g:%a root daemon suid shared | tr '\\n' ,) = 0:0:644,1:2:644,0:0:751,0:0:1770,; \
         test $(readlink link) = ../x; test $(stat -c %Y root) = 1000000000; test $(stat -c %u:%g b) = 1:2; \
         test $(cat \"$(printf '\\377 \\033[31m')\") = x",
    );
}

#[test]
fn sftp_links_at_the_destination_lead_nowhere() {
    let server = Sftp::new();
    let outside = server.0.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("x"), "untouched").unwrap();
    symlink(&outside, server.files().join("d")).unwrap();
    symlink(outside.join("x"), server.files().join("l")).unwrap();
    // A directory and a file take the places of the links, which are not followed.
    house(&server).sh(&[], "test -L d; test -L l; rm d l; mkdir d; echo inside >d/x; echo inside >l");
    assert_eq!(tree(&outside), ["x 644 9"]);
    assert_eq!(tree(&server.files()), ["d/ 755", "d/x 644 7", "l 644 7"]);
}

/// OpenSSH's rename puts a link in the place of one that leads nowhere on the server, as those of locks do.
#[test]
fn sftp_a_link_that_leads_nowhere_is_kept_beside() {
    let server = Sftp::new();
    let house = house(&server);
    let mut running = house.start(&[], &once_told("ln -s inside:1 lock; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    symlink("outside:2", server.files().join("lock")).unwrap();
    running.tell();
    let target = |name: &str| fs::read_link(server.files().join(name)).ok();
    wait_until("it is delivered", || target("lock") == Some("inside:1".into()));
    let kept = tree(&server.files()).into_iter().filter(|entry| entry.starts_with("lock.conflict-"));
    let kept: Vec<_> = kept.collect();
    assert!(kept.len() == 1 && kept[0].ends_with(" -> outside:2"), "{kept:?}");
}

#[test]
fn sftp_that_cannot_be_used_lets_nobody_in() {
    let mut server = Sftp::new();
    let attempt = |url: &str, environment: &[(&'static str, String)], expected: &str| {
        let output = House::at(url, environment).attempt(&[], "echo inside");
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{}", said(&output));
        assert!(said(&output).to_lowercase().contains(expected), "{url}: {}", said(&output));
    };
    let environment = server.environment();
    attempt(&server.url_of("nothing"), &environment, "the server says: no such file");
    attempt(&server.url_of("config"), &environment, "not a directory");
    attempt("sftp://joe:secret@127.0.0.1/x", &environment, "a password in it would be seen by everybody");
    attempt("sftp://-oProxyCommand=x/x", &environment, "it has no host");
    // Another host's key is no question that is answered with yes.
    let known = fs::read_to_string(server.0.path("known")).unwrap();
    fs::write(server.0.path("known"), "").unwrap();
    attempt(&server.url(), &environment, "host key verification failed");
    fs::write(server.0.path("known"), known).unwrap();
    server.stop();
    attempt(&server.url(), &environment, "connection refused");
}

#[test]
fn sftp_of_an_account_that_cannot_give_files_away() {
    let server = Sftp::new();
    // The server's program without root's rights, as most accounts have it.
    let script = server.0.path("bin/ssh");
    let text = "#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \
                /usr/lib/openssh/sftp-server\n";
    fs::write(&script, text).unwrap();
    fs::set_permissions(server.0.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(server.files(), Some(65534), Some(65534)).unwrap();
    let said = house(&server).sh(&[], "echo >x; chown 1000:1000 x; chmod 640 x; echo >y");
    assert!(said.contains("holds no owners"), "{said}");
    assert_eq!(tree(&server.files()), ["x 640 1", "y 644 1"]);
    // What comes back belongs to whom the carried directory does.
    let house = house(&server);
    let carry = format!("/var/mail={}", server.url());
    let script = "test $(stat -c %g:%a /var/mail/x) = 8:640 && test $(stat -c %u:%g /var/mail/y) = $(stat -c %u:%g /var/mail/.)";
    let mut command = house.place.run(&["--carry", &carry], &["sh", "-c", script]);
    let output = command.envs(server.environment()).output().unwrap();
    assert!(output.status.success(), "{}", crate::interop_support::said(&output));
}

/// As many files as there are, the connections are few; also where the server takes only one, as some do of an account.
#[test]
fn sftp_many_files_share_few_connections() {
    let server = Sftp::new();
    let path = |name: &str| server.0.path(name).to_str().unwrap().to_owned();
    let ssh = format!("/usr/bin/ssh -F {} \"$@\"", path("ssh_config"));
    let session = |script: &str, inside: &str| {
        fs::write(path("bin/ssh"), format!("#!/bin/sh\necho >>{}\n{script}\n", path("started"))).unwrap();
        fs::write(path("started"), "").unwrap();
        house(&server).sh(&[], &format!("set -e; {inside}"));
        let started = fs::read_to_string(path("started")).unwrap().lines().count();
        assert!((1..=4).contains(&started), "{started} connections");
    };
    session(&format!("exec {ssh}"), "mkdir d; for n in $(seq 300); do echo $n >d/$n; done");
    // Others fail at once. That is found out once, and not by each file.
    session(
        &format!("exec flock --nonblock {} {ssh}", path("started")),
        "test $(cat d/* | sort -n | tail -n 1) = 300; test $(ls d | wc -l) = 300; mkdir e; for n in $(seq 300); do echo $n >e/$n; done",
    );
    let of = |n: u32| ["d", "e"].map(|directory| format!("{directory}/{n} 644 {}", n.to_string().len() + 1));
    let mut expected: Vec<_> = (1..=300).flat_map(of).chain(["d/ 755".into(), "e/ 755".into()]).collect();
    expected.sort();
    assert_eq!(tree(&server.files()), expected);
}
