//! `webdav://` and `webdavs://`: to Apache's server, which keeps properties, over TLS, and to rclone's, which keeps none, both on
//! loopback.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, Command};

use tempfile::TempDir;

use crate::files::attributes_of_a_directory;
use crate::house::House;
use crate::interop_support::{run, said};
use crate::remote::{Server, house, names, what_belongs_to_files};
use crate::servers::{end, free_port, start};
use crate::spool::Small;
use crate::support::server::scratch;
use crate::support::tls::{Age, Authority, Role};
use crate::support::wait_until;

/// Who may log in.
const NETRC: &str = "machine 127.0.0.1 login joe password secret\n";

/// A server's directory, with a `.netrc` in it.
struct Site {
    dir: TempDir,
    port: u16,
    server: Option<Child>,
}

impl Site {
    fn new() -> Self {
        let dir = scratch();
        let this = Self { dir, port: free_port(), server: None };
        fs::create_dir_all(this.files()).unwrap();
        this.set_netrc(NETRC);
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn files(&self) -> PathBuf {
        self.path("root/files")
    }

    fn set_netrc(&self, text: &str) {
        fs::write(self.path("netrc"), text).unwrap();
        fs::set_permissions(self.path("netrc"), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            end(server);
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Apache's `mod_dav`, as nobody.
struct Apache(Site);

impl Apache {
    fn new() -> Self {
        let site = Site::new();
        let authority = Authority::new("files");
        let issued = authority.sign(Role::Server, Age::Good);
        fs::write(site.path("ca.pem"), authority.certificate()).unwrap();
        fs::write(site.path("server.pem"), format!("{}{}", issued.certificate, issued.key)).unwrap();
        let hash = run("openssl", ["passwd", "-apr1", "secret"]);
        fs::write(site.path("users"), format!("joe:{hash}")).unwrap();
        for directory in ["", "root", "root/files"] {
            fs::set_permissions(site.path(directory), fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::create_dir(site.path("state")).unwrap();
        chown(site.path("state"), Some(65534), Some(65534)).unwrap();
        chown(site.files(), Some(65534), Some(65534)).unwrap();
        let modules = [
            "mpm_event",
            "authn_core",
            "authn_file",
            "authz_core",
            "authz_user",
            "auth_basic",
            "alias",
            "dir",
            "dav",
        ];
        let modules: String = modules
            .iter()
            .chain(&["dav_fs", "dav_lock", "ssl"])
            .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"))
            .collect();
        let config = format!(
            "{modules}ServerRoot {dir}\nDefaultRuntimeDir state\nPidFile pid\nMutex file:{dir}state default\nServerName localhost\n\
             Listen 127.0.0.1:{port}\nUser #65534\nGroup #65534\nErrorLog {dir}errors\nLogLevel warn\nStartServers 1\nDavLockDB state/locks\n\
             DocumentRoot {dir}root\nSSLEngine on\nSSLCertificateFile {dir}server.pem\nSSLSessionCache none\n\
             Redirect /elsewhere https://192.0.2.1/files\n\
             <Directory {dir}root>\nDAV On\nAuthType Basic\nAuthName files\nAuthUserFile {dir}users\nRequire valid-user\n</Directory>\n",
            dir = site.text(""),
            port = site.port
        );
        fs::write(site.path("config"), config).unwrap();
        let mut this = Self(site);
        this.start();
        this
    }

    fn url_of(&self, path: &str) -> String {
        format!("webdavs://joe@127.0.0.1:{}/{path}", self.0.port)
    }
}

impl Server for Apache {
    fn url(&self) -> String {
        self.url_of("files")
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![("NETRC", self.0.text("netrc")), ("SSL_CERT_FILE", self.0.text("ca.pem"))]
    }

    fn files(&self) -> PathBuf {
        self.0.files()
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn start(&mut self) {
        let mut command = Command::new("/usr/sbin/apache2");
        command.arg("-DFOREGROUND").arg("-f").arg(self.0.path("config"));
        self.0.server = Some(start(&mut command, &self.0.path("log"), self.0.port));
    }
}

/// `rclone serve webdav`.
struct Rclone(Site);

impl Rclone {
    fn new() -> Self {
        let mut this = Self(Site::new());
        this.start();
        this
    }
}

impl Server for Rclone {
    fn url(&self) -> String {
        format!("webdav://127.0.0.1:{}/files/", self.0.port)
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![("NETRC", self.0.text("netrc"))]
    }

    fn files(&self) -> PathBuf {
        self.0.files()
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn start(&mut self) {
        let mut command = Command::new("rclone");
        let address = format!("127.0.0.1:{}", self.0.port);
        // What is changed in the directory itself is to be seen.
        command.args([
            "serve",
            "webdav",
            "--addr",
            &address,
            "--user",
            "joe",
            "--pass",
            "secret",
            "--dir-cache-time",
            "0s",
        ]);
        command.arg("--config").arg(self.0.path("none")).arg(self.0.path("root"));
        self.0.server = Some(start(&mut command, &self.0.path("log"), self.0.port));
    }
}

mod apache {
    crate::remote::scenarios!(super::Apache::new());
}

mod rclone {
    crate::remote::scenarios!(super::Rclone::new());
}

#[test]
fn webdav_what_belongs_to_files() {
    let server = Apache::new();
    let made = "printf x >\"$(printf '\\303\\244 \\033[31m')\"";
    let found = "test $(cat \"$(printf '\\303\\244 \\033[31m')\") = x";
    let house = what_belongs_to_files(&server, 2, made, found);
    // What somebody makes of it on the server has its own time, and is a file; its mode stays.
    fs::write(server.files().join("root"), "edited").unwrap();
    fs::write(server.files().join("link"), "edited").unwrap();
    let back = "set -e; test $(cat root) = edited; test $(stat -c %u:%g:%a daemon) = 1:2:644; test $(stat -c %Y root) != 1000000000; \
                test ! -L link; test $(cat link) = edited";
    house.sh(&[], back);
}

#[test]
fn webdav_attributes() {
    let server = Apache::new();
    // setxattr and getxattr, by what every Debian has.
    let set = "perl -e '($f, $n, $v) = (\"x\", \"user.a b\", \"1 = 2\"); syscall(188, $f, $n, $v, 5, 0) == 0 or die $!'";
    let get = "perl -e '($f, $n, $v) = (\"x\", \"user.a b\", \"-\" x 9); print substr($v, 0, syscall(191, $f, $n, $v, 9))'";
    assert_eq!(house(&server).sh(&[], &format!("echo 1 >x; {set}; chmod 600 x")), "");
    house(&server).sh(&[], &format!("test \"$({get})\" = '1 = 2' && test $(stat -c %a x) = 600"));
    attributes_of_a_directory(|| house(&server));
}

#[test]
fn webdav_without_properties() {
    let server = Rclone::new();
    let house = house(&server);
    let told = house
        .sh(&[], "echo 1 >x; chmod 600 x; ln -s x link; ln -s x other; echo 2 >y; touch -h -d @1000000000 other; sleep 1; rm other; echo 3 >other");
    assert!(told.contains("holds no modes, owners, times, extended attributes, symbolic links"), "{told}");
    assert_eq!(names(&server), ["other", "x", "y"], "links are left out, and hold nothing up");
    house.sh(
        &["--carry-deletes"],
        "test $(stat -c %a x) = 644 && test ! -e link && ln -s y link && rm y && rm link",
    );
    assert_eq!(names(&server), ["other", "x"]);
}

#[test]
fn webdav_that_is_full() {
    let server = Apache::new();
    let small = Small::at(server.files(), "1m");
    fs::set_permissions(server.files(), fs::Permissions::from_mode(0o777)).unwrap();
    let house = house(&server);
    let running = house
        .start(&[], "echo early >early; head -c 3000000 /dev/urandom >big; sha256sum big >sum; sleep 1000");
    wait_until("it has failed", || {
        house.status()["running"][0]["last_error"].to_string().contains("no space left on the server")
    });
    assert!(!server.files().join("big").exists());
    run("mount", ["-o", "remount,size=8m", server.files().to_str().unwrap()]);
    wait_until("it is delivered", || {
        server.files().join("big").metadata().is_ok_and(|file| file.len() == 3_000_000)
    });
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    assert!(house.spooled().is_empty());
    assert_eq!(names(&server), ["big", "early", "sum"]);
    drop(small);
}

#[test]
fn webdav_that_cannot_be_used_lets_nobody_in() {
    let mut server = Apache::new();
    let environment = server.environment();
    let attempt = |url: &str, expected: &str| {
        let output = House::at(url, &environment).attempt(&[], "echo inside");
        let said = said(&output);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{said}");
        assert!(
            said.to_lowercase().contains(expected) && said.trim_end().lines().count() == 1,
            "{url}: {said}"
        );
    };
    attempt(&server.url_of("nothing"), "no such file or directory on the server (404)");
    attempt(&server.url_of("elsewhere"), "the server leads elsewhere");
    fs::write(server.files().join("file"), "x").unwrap();
    attempt(&server.url_of("files/file"), "not a directory");
    attempt(&server.url_of("files/../files"), "its path has '.' or '..'");
    attempt(&server.url().replace("joe@", "joe:secret@"), "a password in it would be seen by everybody");
    attempt(&server.url().replace("joe@", "eve@"), "netrc has no password of eve at 127.0.0.1");
    let with_netrc = |text: &str, url: &str, expected: &str| {
        server.0.set_netrc(text);
        attempt(url, expected);
    };
    with_netrc(
        &NETRC.replace("secret", "wrong"),
        &server.url(),
        "the server does not accept the credentials (401)",
    );
    with_netrc(
        &NETRC.replace("127.0.0.1", "192.0.2.1"),
        "webdav://192.0.2.1/files",
        "the password would be seen on the way",
    );
    server.0.set_netrc(NETRC);
    fs::set_permissions(server.0.path("netrc"), fs::Permissions::from_mode(0o644)).unwrap();
    attempt(&server.url(), "netrc is open to others: chmod 600");
    server.0.set_netrc(NETRC);
    // A certificate of somebody who is not known.
    fs::write(server.0.path("ca.pem"), Authority::new("other").certificate()).unwrap();
    attempt(&server.url(), "invalid peer certificate");
    server.stop();
    attempt(&server.url().replace("webdavs", "webdav"), "connection refused");
}
