//! The client of the library, and `memdev info`, over TLS: whom it trusts, and what it says of whom it does not.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use memdev::client::Haggling;
use memdev::net::Uri;
use memdev::proto::CommandFlags;
use memdev::{Error, ErrorKind};
use support::server::{Serve, scratch};
use support::tls::{self, Age, Authority, Role};
use support::{Image, MIB, Server};

struct Setting {
    dir: tempfile::TempDir,
    authority: Authority,
    server: Server,
}

fn serve(server_age: Age, args: &[&str]) -> Setting {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 7);
    let authority = Authority::new("The CA");
    authority.equip_server(&dir.path().join("server"), &authority.sign(Role::Server, server_age));
    authority.equip_client(&dir.path().join("client"), None);
    let certificates = dir.path().join("server");
    let server = Serve::image(&image)
        .tcp()
        .args(["--tls-certificates".as_ref(), certificates.as_os_str()])
        .args(args)
        .start();
    Setting { dir, authority, server }
}

impl Setting {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn port(&self) -> &str {
        self.server.tcp_address().rsplit_once(':').expect("a port").1
    }

    fn uri(&self, certificates: &Path) -> String {
        format!("nbds://localhost:{}/base?tls-certificates={}", self.port(), certificates.display())
    }
}

fn connect(uri: &str) -> Result<Haggling, Error> {
    Haggling::connect(&uri.parse::<Uri>().expect("a URI"))
}

#[track_caller]
fn refused(uri: &str, why: &str) -> Error {
    let Err(error) = connect(uri) else { panic!("{uri} should be refused: {why}") };
    assert!(error.to_string().contains(why), "'{why}' is not in: {error}");
    error
}

#[test]
fn it_reads_and_writes_over_every_socket() {
    let setting = serve(Age::Good, &[]);
    let client = setting.path("client");
    let socket = setting.server.socket().display();
    let dir = client.display();
    for uri in [
        setting.uri(&client),
        format!("nbds://127.0.0.1:{}/base?tls-certificates={dir}", setting.port()),
        format!("nbds://127.0.0.1:{}/base?tls-hostname=localhost&tls-certificates={dir}", setting.port()),
        format!("nbds+unix:///base?socket={socket}&tls-certificates={dir}"),
    ] {
        let haggling = connect(&uri).unwrap_or_else(|error| panic!("{uri}: {error}"));
        assert!(haggling.is_secure());
        let mut client = haggling.go("base").expect("offered");
        client.write(1000, b"over TLS", CommandFlags::NONE).expect("writing");
        let mut seen = [0; 8];
        client.read(1000, &mut seen).expect("reading");
        assert_eq!(&seen, b"over TLS");
        client.disconnect().expect("leaving");
    }
}

#[test]
fn it_refuses_a_server_that_is_not_who_it_should_be() {
    let setting = serve(Age::Good, &[]);
    let other = setting.path("other");
    Authority::new("Another CA").equip_client(&other, None);
    let error = refused(&setting.uri(&other), "its certificate is not signed by a CA in ca-cert.pem");
    assert_eq!(error.kind(), ErrorKind::Denied);
    let client = setting.path("client");
    let misnamed = format!("{}&tls-hostname=example.org", setting.uri(&client));
    refused(&misnamed, "its certificate is not for 'example.org' but for");
    let expired = serve(Age::Expired, &[]);
    let error = refused(&expired.uri(&expired.path("client")), "its certificate has expired");
    assert!(error.to_string().contains("TLS with the server failed"), "{error}");
}

#[test]
fn it_tells_what_is_missing() {
    let setting = serve(Age::Good, &["--tls-verify-peer"]);
    let client = setting.path("client");
    refused(&setting.uri(&client), "it demands a certificate, and we have none to show");
    refused(&setting.uri(&setting.path("nowhere")), "ca-cert.pem: no such file or directory");
    let issued = setting.authority.sign(Role::Client, Age::Good);
    setting.authority.equip_client(&client, Some(&issued));
    connect(&setting.uri(&client)).expect("now it has one").abort().expect("leaving");
    setting.authority.equip_client(&client, Some(&setting.authority.sign(Role::Client, Age::Expired)));
    refused(&setting.uri(&client), "it finds our certificate expired");
    std::fs::remove_file(client.join("client-key.pem")).expect("it was there");
    refused(&setting.uri(&client), "client-key.pem: no such file or directory");
    // In plain text where TLS is demanded, and over TLS where there is none.
    refused(&format!("nbd://localhost:{}/base", setting.port()), "it demands TLS");
    let plain = serve(Age::Good, &["--tls", "off"]);
    let error = refused(&plain.uri(&plain.path("client")), "The server refuses TLS");
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[test]
fn without_a_parameter_it_looks_where_libnbd_does() {
    let setting = serve(Age::Good, &[]);
    let uri = format!("nbds://localhost:{}/base", setting.port());
    let info = |home: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.args(["info", &uri]).env("HOME", home).output().expect("memdev runs")
    };
    for place in [".pki/libnbd", ".config/pki/libnbd"] {
        let home = setting.path(&place.replace('/', "-"));
        let output = info(&home);
        let line = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1));
        assert!(line.contains("No ca-cert.pem") && line.contains("tls-certificates=DIR"), "{line}");
        setting.authority.equip_client(&home.join(place), None);
        let output = info(&home);
        let text = String::from_utf8(output.stdout).expect("text");
        assert!(
            output.status.success() && text.contains("with TLS") && text.contains("export: 'base'"),
            "{text}"
        );
        let first = format!("server: nbds://localhost:{}", setting.port());
        assert!(text.starts_with(&first), "{text}");
    }
}

#[test]
fn info_says_in_json_whether_there_is_tls() {
    let setting = serve(Age::Good, &["--tls", "allow"]);
    let plain = format!("nbd://localhost:{}/base", setting.port());
    for (uri, expected) in [(setting.uri(&setting.path("client")), true), (plain, false)] {
        let output = Command::new(env!("CARGO_BIN_EXE_memdev"))
            .args(["info", "--json", &uri])
            .output()
            .expect("memdev runs");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(report["TLS"], expected, "{uri}");
    }
    let uri = setting.uri(&setting.path("client"));
    let output =
        Command::new(env!("CARGO_BIN_EXE_memdev")).args(["map", &uri]).output().expect("memdev runs");
    assert!(output.status.success() && !output.stdout.is_empty(), "maps are drawn over TLS, too: {output:?}");
}

// What the server itself says at its start.

/// Runs `memdev serve` to its failure; the one line it says.
fn start_fails(setting: &Setting, args: &[&str], status: i32) -> String {
    let pki = setting.path("server");
    let output = Command::new(env!("CARGO_BIN_EXE_memdev"))
        .arg("serve")
        .arg(setting.path("base.img"))
        .arg("--unix")
        .arg(setting.path("other.sock"))
        .args(args.iter().map(|arg| if *arg == "DIR" { pki.as_os_str() } else { arg.as_ref() }))
        .env_remove("MEMDEV_LOG")
        .output()
        .expect("memdev runs");
    let text = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(status), "{text}");
    let line = text.lines().last().expect("a line").to_owned();
    assert!(line.starts_with("memdev: "), "{text}");
    assert!(text.lines().filter(|line| !line.contains("WARN")).count() == 1, "one line: {text}");
    line
}

#[test]
fn files_that_are_not_what_they_should_be_end_the_start() {
    let setting = serve(Age::Good, &[]);
    let pki = setting.path("server");
    let whole = || setting.authority.equip_server(&pki, &setting.authority.sign(Role::Server, Age::Good));
    let args = ["--tls-certificates", "DIR", "--tls-verify-peer"];
    for (name, kind) in [
        ("server-cert.pem", "certificate"),
        ("server-key.pem", "private key"),
        ("ca-cert.pem", "certificate"),
    ] {
        std::fs::remove_file(pki.join(name)).expect("it was there");
        let line = start_fails(&setting, &args, 1);
        assert!(line.contains("Cannot read TLS file") && line.contains(name), "{line}");
        assert!(line.contains("no such file or directory; name a directory"), "{line}");
        for garbage in [
            "",
            "garbage\n",
            "-----BEGIN CERTIFICATE-----\nMIIB\n",
            "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n",
        ] {
            tls::write(&pki, name, garbage);
            let line = start_fails(&setting, &args, 1);
            assert!(line.contains("Cannot use TLS file") && line.contains(name), "{line}");
            assert!(line.contains(&format!("it has no {kind} in it")), "{line}");
        }
        // PEM of the right kind with nonsense in it.
        let label = if kind == "certificate" { "CERTIFICATE" } else { "PRIVATE KEY" };
        tls::write(&pki, name, &format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n"));
        let line = start_fails(&setting, &args, 1);
        assert!(line.contains("Cannot use TLS file") && line.contains(name), "{line}");
        whole();
    }
    let issued = setting.authority.sign(Role::Server, Age::Good);
    tls::write(&pki, "server-key.pem", &issued.key);
    let line = start_fails(&setting, &args, 1);
    assert!(line.contains("server-key.pem does not belong to") && line.contains("server-cert.pem"), "{line}");
    whole();
    tls::write(&pki, "ca-crl.pem", "garbage");
    let line = start_fails(&setting, &args, 1);
    assert!(line.contains("ca-crl.pem: it has no revocation list in it"), "{line}");
}

#[test]
fn what_makes_no_sense_together_is_a_usage_error() {
    let setting = serve(Age::Good, &[]);
    for (args, why) in [
        (&["--tls", "require"][..], "--tls needs certificates; give --tls-certificates DIR"),
        (&["--tls", "allow"], "--tls needs certificates"),
        (&["--tls-verify-peer"], "--tls-verify-peer needs TLS"),
        (&["--tls-verify-peer", "--tls", "off", "--tls-certificates", "DIR"], "--tls-verify-peer needs TLS"),
        (&["--tls", "maybe", "--tls-certificates", "DIR"], "'maybe'"),
    ] {
        let line = start_fails(&setting, args, 2);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn a_key_that_is_no_secret_and_a_certificate_that_is_too_old_are_warned_of() {
    use std::os::unix::fs::PermissionsExt;
    let setting = serve(Age::Good, &[]);
    assert!(!setting.server.log().iter().any(|line| line.contains("WARN")), "all is well");
    let key = setting.path("server/server-key.pem");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    let image = Image::random(setting.path("other.img"), MIB, 1);
    let server = Serve::image(&image)
        .args(["--tls-certificates".as_ref(), setting.path("server").as_os_str()])
        .start();
    let log = server.log();
    assert!(log.iter().any(|line| line.contains("WARN") && line.contains("chmod 600")), "{log:?}");

    let expired = serve(Age::Expired, &[]);
    let log = expired.server.log();
    assert!(log.iter().any(|line| line.contains("WARN") && line.contains("has expired")), "{log:?}");
}
