//! TLS with foreign programs at the other end: libnbd's tools, QEMU's and nbd-client as clients; nbdkit and qemu-nbd as
//! servers of this project's client. (fio cannot be told where certificates are: libnbd does not let it name files.)

mod interop_support;
mod support;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use interop_support::{PYTHON, assert_same, attempt, run, said};
use support::server::{Serve, scratch};
use support::tls::{Age, Authority, Role};
use support::{Image, MIB, Server, wait_until};

const EXPORT: u64 = 8 * MIB;

/// A server that demands TLS, and folders of clients that it should and should not let in.
struct Setting {
    dir: tempfile::TempDir,
    image: Image,
    server: Server,
}

fn serve(server_age: Age, args: &[&str]) -> Setting {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 7);
    let (authority, other) = (Authority::new("The CA"), Authority::new("Another CA"));
    let path = |name: &str| dir.path().join(name);
    authority.equip_server(&path("server"), &authority.sign(Role::Server, server_age));
    authority.equip_client(&path("good"), Some(&authority.sign(Role::Client, Age::Good)));
    authority.equip_client(&path("none"), None);
    authority.equip_client(&path("expired"), Some(&authority.sign(Role::Client, Age::Expired)));
    authority.equip_client(&path("stranger"), Some(&other.sign(Role::Client, Age::Good)));
    other.equip_client(&path("wrong-ca"), Some(&other.sign(Role::Client, Age::Good)));
    let server =
        Serve::image(&image).tcp().args(["--tls-certificates".into(), path("server")]).args(args).start();
    Setting { dir, image, server }
}

impl Setting {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn port(&self) -> &str {
        self.server.tcp_address().rsplit_once(':').expect("a port").1
    }

    /// As libnbd takes it.
    fn uri(&self, export: &str, certificates: &str) -> String {
        let dir = self.path(certificates);
        format!("nbds://localhost:{}/{export}?tls-certificates={}", self.port(), dir.display())
    }

    /// As QEMU takes it: its credentials, and the image.
    fn qemu(&self, export: &str, certificates: &str) -> [String; 4] {
        let dir = self.path(certificates);
        [
            "--object".to_owned(),
            format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", dir.display()),
            "--image-opts".to_owned(),
            format!(
                "driver=nbd,server.type=inet,server.host=localhost,server.port={},export={export},tls-creds=tls0",
                self.port()
            ),
        ]
    }

    /// Waits until the log has so many warnings with `text` in them.
    #[track_caller]
    fn warned(&self, text: &str, times: usize) {
        let count = || {
            let lines = self.server.log();
            lines.iter().filter(|line| line.contains("WARN") && line.contains(text)).count()
        };
        wait_until(&format!("'{text}' is in the log {times} times"), || count() >= times);
    }
}

/// The refusals that every client must meet, and the words for them in the server's log. A client may find out first that
/// it does not trust the server, and then the server can tell only that it left.
const REFUSED: [(&str, &str); 3] = [
    ("none", "it shows no certificate, and one is demanded"),
    ("expired", "its certificate has expired"),
    ("stranger", "its certificate is not signed by a CA in ca-cert.pem"),
];
const UNTRUSTED: &str = "trust";
/// A server that demands certificates of its clients.
const VERIFY: &[&str] = &["--tls-verify-peer"];

fn text(path: &Path) -> &str {
    path.to_str().expect("the temporary directory's path is text")
}

#[test]
fn libnbd_reads_and_writes() {
    let setting = serve(Age::Good, VERIFY);
    let info = run("nbdinfo", ["--json", &setting.uri("base", "good")]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!((&info["TLS"], &info["structured"]), (&true.into(), &true.into()), "{info}");
    assert_eq!(info["exports"][0]["export-size"], EXPORT);
    let list = run("nbdinfo", ["--list", &setting.uri("", "good")]);
    assert!(list.contains("export=\"base\""), "{list}");

    let out = setting.path("out.img");
    run("nbdcopy", [&setting.uri("base", "good"), text(&out)]);
    assert_same(&out, &setting.image.path);
    let new = Image::random(setting.path("new.img"), EXPORT, 8);
    // One request at a time on each connection: see interop_libnbd.
    let session = setting.uri("base@one", "good");
    run("nbdcopy", ["--connections=4", "--requests=1", "--flush", text(&new.path), &session]);
    run("nbdcopy", ["--connections=4", &session, text(&out)]);
    assert_same(&out, &new.path);

    let script = "import nbd, sys
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(sys.argv[1])
h.set_export_name('base@two')
h.connect_tcp('localhost', sys.argv[2])
assert h.get_tls_negotiated()
data = bytes(range(256)) * 4000
h.pwrite(data, 12345)
h.flush()
assert h.pread(len(data), 12345) == data
h.shutdown()
";
    run(PYTHON, ["-c", script, text(&setting.path("good")), setting.port()]);
    setting.server.stop();
}

#[test]
fn libnbd_is_refused_where_it_should_be() {
    let setting = serve(Age::Good, VERIFY);
    for (certificates, why) in REFUSED {
        let output = attempt("nbdinfo", [setting.uri("base", certificates)]);
        assert!(!output.status.success(), "{certificates}: {}", said(&output));
        setting.warned(why, 1);
    }
    let output = attempt("nbdinfo", [format!("nbd://localhost:{}/base", setting.port())]);
    assert!(!output.status.success(), "{}", said(&output));
    setting.warned("it speaks plain text, and TLS is demanded", 1);
    run("nbdinfo", [setting.uri("base", "good")]);

    for (age, certificates) in [(Age::Good, "wrong-ca"), (Age::Expired, "good")] {
        let setting = serve(age, &[]);
        let output = attempt("nbdinfo", [setting.uri("base", certificates)]);
        assert!(!output.status.success(), "{}", said(&output));
        setting.warned(UNTRUSTED, 1);
    }
}

#[test]
fn qemu_reads_and_writes() {
    let setting = serve(Age::Good, VERIFY);
    let out = setting.path("out.img");
    let [object, credentials, options, base] = setting.qemu("base", "good");
    run("qemu-img", ["convert", &object, &credentials, &options, &base, "-O", "raw", text(&out)]);
    assert_same(&out, &setting.image.path);

    let new = Image::random(setting.path("new.img"), EXPORT, 9);
    let [.., session] = setting.qemu("base@one", "good");
    let target = ["--target-image-opts", "-n", "-W", "-f", "raw", text(&new.path), &session];
    run("qemu-img", ["convert", &object, &credentials].into_iter().chain(target));
    let source = format!("driver=raw,file.driver=file,file.filename={}", text(&new.path));
    run("qemu-img", ["compare", &object, &credentials, &options, &source, &session]);

    let commands =
        ["write -P 0x5a 1234 100k", "read -P 0x5a 1234 100k", "flush", "write -z 4k 64k", "read -P 0 4k 64k"];
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let output =
        attempt("qemu-io", [&*object, &credentials, &options].into_iter().chain(commands).chain([&*session]));
    let said = said(&output);
    assert!(output.status.success() && !said.to_lowercase().contains("fail"), "{said}");
    setting.server.stop();
}

#[test]
fn qemu_is_refused_where_it_should_be() {
    let setting = serve(Age::Good, VERIFY);
    let attempt_with = |setting: &Setting, certificates: &str| {
        let output =
            attempt("qemu-img", [&["info".to_owned()], &setting.qemu("base", certificates)[..]].concat());
        assert!(!output.status.success(), "{certificates}: {}", said(&output));
        said(&output)
    };
    // QEMU itself does not send a certificate that it sees to have expired.
    for (certificates, why) in REFUSED.iter().filter(|(name, _)| *name == "none") {
        attempt_with(&setting, certificates);
        setting.warned(why, 1);
    }
    attempt_with(&setting, "expired");
    attempt_with(&setting, "wrong-ca");
    setting.warned("its certificate is not signed by a CA in ca-cert.pem", 1);
    let output = attempt("qemu-img", ["info", &format!("nbd://localhost:{}/base", setting.port())]);
    assert!(!output.status.success(), "{}", said(&output));
    setting.warned("it speaks plain text, and TLS is demanded", 1);
    run("qemu-img", [&["info".to_owned()], &setting.qemu("base", "good")[..]].concat());

    for (age, certificates) in [(Age::Good, "wrong-ca"), (Age::Expired, "good")] {
        let setting = serve(age, &[]);
        attempt_with(&setting, certificates);
        setting.warned(UNTRUSTED, 1);
    }
}

#[test]
fn certificates_made_by_openssl_with_rsa_keys_do_as_well() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let script = "new='-newkey rsa:2048 -nodes'
openssl req -x509 $new -keyout ca-key.pem -out ca-cert.pem -days 9 -subj '/CN=My CA' \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
openssl req $new -keyout server-key.pem -subj /CN=server -addext subjectAltName=DNS:localhost \
    -addext keyUsage=critical,digitalSignature,keyEncipherment -addext extendedKeyUsage=serverAuth |
    openssl x509 -req -CA ca-cert.pem -CAkey ca-key.pem -days 9 -copy_extensions copy -out server-cert.pem";
    let mut command = interop_support::command("sh", ["-ec", script]);
    command.current_dir(dir.path());
    interop_support::succeed("sh", command);
    let server =
        Serve::image(&image).tcp().args(["--tls-certificates".as_ref(), dir.path().as_os_str()]).start();
    let port = server.tcp_address().rsplit_once(':').expect("a port").1;
    let uri = format!("nbds://localhost:{port}/base?tls-certificates={}", dir.path().display());
    assert_eq!(run("nbdinfo", ["--size", &uri]).trim(), MIB.to_string());
    server.stop();
}

/// `nbd-client -l` over TLS: it lists exports, which is all that it can do without the kernel's nbd module
/// (with it: `tests/interop_kernel.rs`).
#[test]
fn nbd_client_lists_exports() {
    let setting = serve(Age::Good, VERIFY);
    let list = |certificates: Option<&str>| {
        let mut args: Vec<String> = ["-l", "localhost", setting.port()].map(str::to_owned).to_vec();
        if let Some(dir) = certificates.map(|name| setting.path(name)) {
            for (option, file) in [
                ("-cacertfile", "ca-cert.pem"),
                ("-certfile", "client-cert.pem"),
                ("-keyfile", "client-key.pem"),
            ] {
                if dir.join(file).exists() {
                    args.extend([option.to_owned(), text(&dir.join(file)).to_owned()]);
                }
            }
            args.extend(["-tlshostname".to_owned(), "localhost".to_owned()]);
        }
        attempt("nbd-client", args)
    };
    let output = list(Some("good"));
    assert!(output.status.success() && said(&output).contains("base"), "{}", said(&output));
    for (certificates, why) in REFUSED {
        let output = list(Some(certificates));
        assert!(!said(&output).contains("base\n"), "{certificates}: {}", said(&output));
        setting.warned(why, 1);
    }
    let output = list(None);
    assert!(!said(&output).contains("base\n"), "{}", said(&output));
    setting.warned("it speaks plain text, and TLS is demanded", 1);
}

/// A foreign server, ended when dropped.
struct Foreign {
    child: Child,
    port: u16,
}

impl Foreign {
    fn start(program: &str, args: impl FnOnce(u16) -> Vec<String>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port").port();
        let child = Command::new(program)
            .args(args(port))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program} ({error}); run tools/setup"));
        let foreign = Self { child, port };
        wait_until(&format!("{program} listens"), || TcpStream::connect(("127.0.0.1", port)).is_ok());
        foreign
    }

    /// What `memdev info` says of it; whether it succeeded.
    fn info(&self, certificates: &Path) -> (bool, String) {
        let uri = format!("nbds://localhost:{}/base?tls-certificates={}", self.port, certificates.display());
        let output = Command::new(env!("CARGO_BIN_EXE_memdev"))
            .args(["info", "--json", &uri])
            .output()
            .expect("memdev runs");
        (output.status.success(), said(&output))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn our_client_speaks_to_foreign_servers() {
    let setting = serve(Age::Good, VERIFY);
    let (server, image) =
        (setting.path("server").display().to_string(), setting.image.path.display().to_string());
    let nbdkit = Foreign::start("nbdkit", |port| {
        let args = ["-f", "--tls=require", "--tls-verify-peer", "-i", "127.0.0.1", "--exit-with-parent"];
        let mut args = args.map(str::to_owned).to_vec();
        args.extend([
            format!("--tls-certificates={server}"),
            format!("-p{port}"),
            "file".to_owned(),
            image.clone(),
        ]);
        args
    });
    let qemu = Foreign::start("qemu-nbd", |port| {
        let credentials = format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={server}");
        let args = ["-t", "-r", "-f", "raw", "-x", "base", "-b", "127.0.0.1", "--tls-creds", "tls0"];
        let mut args = args.map(str::to_owned).to_vec();
        args.extend(["--object".to_owned(), credentials, "-p".to_owned(), port.to_string(), image.clone()]);
        args
    });
    for foreign in [&nbdkit, &qemu] {
        let (worked, said) = foreign.info(&setting.path("good"));
        assert!(worked, "{said}");
        let report: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        assert_eq!((&report["TLS"], &report["exports"][0]["export-size"]), (&true.into(), &EXPORT.into()));
        for certificates in ["none", "expired", "stranger", "wrong-ca"] {
            let (worked, said) = foreign.info(&setting.path(certificates));
            assert!(
                !worked && said.lines().count() == 1 && said.starts_with("memdev: "),
                "{certificates}: {said}"
            );
        }
    }
}
