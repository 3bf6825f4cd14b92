//! TLS: who must use it, what is answered before it and within it, whom it lets in, and what the log says of the others.

mod support;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustls::ClientConfig;
use support::peer::{info_data, option_bytes};
use support::server::{Serve, scratch};
use support::tls::{self, Age, Authority, Issued, Role};
use support::{Client, Image, MIB, Peer, Server, Stream, assert_bytes, nbd, wait_until};

/// A server, the authority that has signed its certificate, and where things lie.
struct Setting {
    dir: tempfile::TempDir,
    image: Image,
    authority: Authority,
    server: Server,
}

impl Setting {
    fn new(args: &[&str]) -> Self {
        Self::with(args, |_, _| {})
    }

    /// The same, `more` being put beside the server's certificates.
    fn with(args: &[&str], more: impl FnOnce(&Authority, &PathBuf)) -> Self {
        let dir = scratch();
        let image = Image::random(dir.path().join("base.img"), MIB, 7);
        let authority = Authority::new("The CA");
        let pki = dir.path().join("pki");
        authority.equip_server(&pki, &authority.sign(Role::Server, Age::Good));
        more(&authority, &pki);
        let server = Serve::image(&image)
            .tcp()
            .args(["--tls-certificates".as_ref(), pki.as_os_str()])
            .args(args)
            .start();
        Self { dir, image, authority, server }
    }

    /// A connection over TLS that looks like one without.
    fn bridge(&self, issued: Option<&Issued>) -> Stream {
        tls::bridge(self.server.tcp_stream(), &self.authority.client(issued)).expect("TLS works")
    }

    fn client(&self, issued: Option<&Issued>, name: &str) -> Client {
        Client::attach(self.bridge(issued), name).expect("the export is offered")
    }

    /// A peer over TLS that has said hello.
    fn peer(&self) -> Peer {
        let mut peer = Peer::new(self.bridge(None));
        peer.start();
        peer
    }

    /// Waits for a warning with `text` in it about the client at `port`; there must be one and no other about it.
    #[track_caller]
    fn warned(&self, port: u16, text: &str) {
        let of_client = || {
            let lines = self.server.log();
            let about = format!("127.0.0.1:{port}");
            lines.into_iter().filter(|line| line.contains(&about)).collect::<Vec<_>>()
        };
        wait_until("the client is in the log", || !of_client().is_empty());
        let lines = of_client();
        assert_eq!(lines.len(), 1, "{lines:#?}");
        assert!(lines[0].contains("WARN") && lines[0].contains(text), "'{text}' is not in {lines:#?}");
    }

    /// The server goes on.
    fn assert_serves(&self) {
        let mut client = self.client(None, "base");
        assert_bytes(&client.read(0, 5000), &self.image.bytes(0, 5000), 0);
    }
}

/// A connection before its handshake, and its port.
fn plain(setting: &Setting) -> (Peer, u16) {
    let stream = setting.server.tcp_stream();
    let port = stream.local_port().expect("TCP");
    (Peer::new(stream), port)
}

// Who must use it.

#[test]
fn with_certificates_it_is_demanded_and_nothing_else_is_answered() {
    let setting = Setting::new(&[]);
    let (mut peer, port) = plain(&setting);
    peer.start();
    let go = info_data(b"base", &[]);
    let context = support::peer::context_data(b"base", &["base:allocation"]);
    for (option, data) in [
        (nbd::OPT_LIST, &[][..]),
        (nbd::OPT_INFO, &go),
        (nbd::OPT_GO, &go),
        (nbd::OPT_STRUCTURED_REPLY, &[]),
        (nbd::OPT_LIST_META_CONTEXT, &context),
        (nbd::OPT_SET_META_CONTEXT, &context),
        (nbd::OPT_EXTENDED_HEADERS, &[]),
        (nbd::OPT_PEEK_EXPORT, &[]),
        (4711, b"what is this"),
        (4711, &[0; 100_000]),
    ] {
        assert_eq!(peer.ask(option, data), nbd::REP_ERR_TLS_REQD, "option {option}");
    }
    assert_eq!(peer.ask(nbd::OPT_ABORT, &[]), nbd::REP_ACK);
    peer.expect_end();
    setting.warned(port, "it speaks plain text, and TLS is demanded");
    setting.assert_serves();
    setting.server.stop();
}

#[test]
fn an_export_name_in_plain_text_is_hung_up_on() {
    let setting = Setting::new(&["--tls", "require"]);
    for flags in [0_u32, 3] {
        let (mut peer, port) = plain(&setting);
        peer.greeting();
        peer.send(&flags.to_be_bytes());
        peer.send_option(nbd::OPT_EXPORT_NAME, b"base");
        peer.expect_end();
        setting.warned(port, "it speaks plain text, and TLS is demanded");
    }
    setting.assert_serves();
}

#[test]
fn where_it_is_allowed_clients_may_do_without() {
    for word in ["allow", "on"] {
        let setting = Setting::new(&["--tls", word]);
        let mut plain = Client::attach(setting.server.tcp_stream(), "base").expect("offered");
        assert_bytes(&plain.read(0, 5000), &setting.image.bytes(0, 5000), 0);
        setting.assert_serves();
        assert!(!setting.server.log().iter().any(|line| line.contains("WARN")));
    }
}

#[test]
fn where_it_is_off_it_is_refused_and_haggling_goes_on() {
    let setting = Setting::new(&["--tls", "off"]);
    let (mut peer, _) = plain(&setting);
    peer.start();
    assert_eq!(peer.ask(nbd::OPT_STARTTLS, &[]), nbd::REP_ERR_POLICY);
    assert_eq!(peer.ask(nbd::OPT_STARTTLS, b"x"), nbd::REP_ERR_INVALID);
    peer.assert_usable();
}

#[test]
fn the_address_that_is_shown_says_whether_it_is_demanded() {
    for (args, scheme) in [(&[][..], "nbds"), (&["--tls", "allow"], "nbd"), (&["--tls", "off"], "nbd")] {
        let setting = Setting::new(args);
        let lines = setting.server.log();
        for transport in ["://127.0.0.1:", "+unix:///?socket="] {
            let expected = format!("listening on {scheme}{transport}");
            assert!(lines.iter().any(|line| line.starts_with(&expected)), "{expected} is not in {lines:?}");
        }
    }
}

#[test]
fn only_where_it_is_demanded_the_network_is_let_in() {
    let mut setting = Setting::new(&["--tcp", "0.0.0.0:0"]);
    setting.server.wait_for_line("listening on nbds://0.0.0.0:", 1);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_memdev"))
        .args(["serve".as_ref(), setting.image.path.as_os_str()])
        .args(["--tcp", "0.0.0.0:0", "--tls", "allow", "--tls-certificates"])
        .arg(setting.dir.path().join("pki"))
        .output()
        .expect("memdev runs");
    let line = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1));
    assert!(line.contains("without encryption; listen on 127.0.0.1, demand TLS"), "{line}");
}

// What is answered.

#[test]
fn starttls_with_data_is_refused_and_without_it_is_not() {
    let setting = Setting::new(&[]);
    let mut stream = setting.server.tcp_stream();
    tls::hello(&mut stream).expect("a greeting");
    for data in [&b"x"[..], &[0; 70_000]] {
        stream.write_all(&option_bytes(nbd::OPT_STARTTLS, data)).expect("sending");
        let refusal = tls::expect_ack(&mut stream).expect_err("data has no place there");
        assert!(refusal.to_string().contains("0x80000003"), "{refusal}");
        // Its sentence.
        let mut text = vec![0; "option takes no data".len()];
        stream.read_exact(&mut text).expect("a sentence");
    }
    stream.write_all(&option_bytes(nbd::OPT_STARTTLS, &[])).expect("sending");
    tls::expect_ack(&mut stream).expect("it is acknowledged");
    let config = setting.authority.client(None);
    let mut raw = tls::shake_hands(stream, &config).expect("TLS begins");
    // A second time it is refused, and haggling goes on.
    raw.write_all(&option_bytes(nbd::OPT_STARTTLS, &[])).expect("sending");
    let refusal = tls::expect_ack(&mut raw).expect_err("TLS has begun");
    assert!(refusal.to_string().contains("0x80000003"), "{refusal}");
    let mut text = vec![0; "TLS has begun already".len()];
    raw.read_exact(&mut text).expect("a sentence");
    raw.write_all(&option_bytes(nbd::OPT_ABORT, &[])).expect("sending");
    raw.read_exact(&mut [0; 20]).expect("an acknowledgement");
    // The server says that it ends before it does.
    assert_eq!(raw.read(&mut [0]).expect("an end in good order"), 0);
}

#[test]
fn what_was_agreed_on_in_plain_text_is_forgotten() {
    let setting = Setting::new(&["--tls", "allow"]);
    let mut stream = setting.server.tcp_stream();
    tls::hello(&mut stream).expect("a greeting");
    let context = support::peer::context_data(b"base", &["base:allocation"]);
    stream.write_all(&option_bytes(nbd::OPT_STRUCTURED_REPLY, &[])).expect("sending");
    stream.read_exact(&mut [0; 20]).expect("a reply");
    stream.write_all(&option_bytes(nbd::OPT_SET_META_CONTEXT, &context)).expect("sending");
    stream.read_exact(&mut [0; 20 + 4 + 15 + 20]).expect("a reply");
    stream.write_all(&option_bytes(nbd::OPT_STARTTLS, &[])).expect("sending");
    tls::expect_ack(&mut stream).expect("it is acknowledged");
    let mut raw = tls::shake_hands(stream, &setting.authority.client(None)).expect("TLS begins");
    raw.write_all(&option_bytes(nbd::OPT_EXPORT_NAME, b"base")).expect("sending");
    let mut export = [0; 10];
    raw.read_exact(&mut export).expect("an export");
    let flags = u16::from_be_bytes([export[8], export[9]]);
    assert_eq!(flags & nbd::SEND_DF, 0, "structured replies are forgotten");
    // A read is answered by a simple reply.
    raw.write_all(&support::Request::read(0, 512).bytes(7)).expect("sending");
    let mut reply = [0; 16 + 512];
    raw.read_exact(&mut reply).expect("a reply");
    assert_eq!(reply[..4], nbd::SIMPLE_REPLY_MAGIC.to_be_bytes());
    assert_eq!(reply[16..], setting.image.bytes(0, 512));
}

#[test]
fn plain_text_behind_starttls_is_never_taken_for_something_that_came_through_tls() {
    // The class of bug known from mail servers: somebody on the way puts options of his own behind the client's STARTTLS,
    // and a server that kept them in its buffer would act on them as the authenticated client's.
    let setting = Setting::new(&[]);
    for injected in [
        option_bytes(nbd::OPT_LIST, &[]),
        option_bytes(nbd::OPT_GO, &info_data(b"base@stolen", &[])),
        option_bytes(nbd::OPT_ABORT, &[]),
        option_bytes(nbd::OPT_STARTTLS, &[]),
        vec![0; 100],
        vec![0x16; 20_000],
    ] {
        let mut stream = setting.server.tcp_stream();
        let port = stream.local_port().expect("TCP");
        tls::hello(&mut stream).expect("a greeting");
        let mut bytes = option_bytes(nbd::OPT_STARTTLS, &[]);
        bytes.extend_from_slice(&injected);
        stream.write_all(&bytes).expect("sending");
        tls::expect_ack(&mut stream).expect("it is acknowledged");
        // The client, who knows nothing of that, begins TLS; it comes to nothing.
        stream.be_patient().expect("a limit");
        let config = setting.authority.client(None);
        tls::shake_hands(stream, &config).expect_err("the connection is of no use");
        setting.warned(port, "TLS with a client failed: it");
    }
    // Nothing of it was done.
    setting.assert_serves();
}

#[test]
fn a_client_that_does_not_wait_for_the_acknowledgement_gets_its_tls() {
    // What is behind STARTTLS is TLS's to make something of, and this is TLS.
    let setting = Setting::new(&[]);
    for pause in [false, true] {
        let mut stream = setting.server.tcp_stream();
        stream.be_patient().expect("a limit");
        tls::hello(&mut stream).expect("a greeting");
        let config = setting.authority.client(None);
        let mut connection = tls::beginning(&config);
        let mut bytes = option_bytes(nbd::OPT_STARTTLS, &[]);
        connection.write_tls(&mut bytes).expect("a hello");
        let (first, rest) = bytes.split_at(if pause { 100 } else { bytes.len() });
        stream.write_all(first).expect("sending");
        if pause {
            tls::expect_ack(&mut stream).expect("it is acknowledged");
        }
        stream.write_all(rest).expect("sending");
        if !pause {
            tls::expect_ack(&mut stream).expect("it is acknowledged");
        }
        let mut raw = tls::finish(stream, connection).expect("TLS begins");
        raw.write_all(&option_bytes(nbd::OPT_ABORT, &[])).expect("sending");
        raw.read_exact(&mut [0; 20]).expect("an acknowledgement");
    }
}

#[test]
fn haggling_over_tls_is_as_without() {
    let setting = Setting::new(&[]);
    let mut peer = setting.peer();
    assert_eq!(peer.list().len(), 1);
    peer.structured();
    assert_eq!(peer.info("base", &[]).expect("offered").size, MIB);
    let refusal = peer.go("nothing").expect_err("there is none");
    assert_eq!(refusal.kind, nbd::REP_ERR_UNKNOWN);
    assert_eq!(peer.ask(4711, b"x"), nbd::REP_ERR_UNSUP);
    let export = peer.go("base").expect("offered");
    let mut client = Client::new(peer, export, true, None);
    assert_bytes(&client.read(0, 5000), &setting.image.bytes(0, 5000), 0);
    client.disconnect();
    let mut peer = setting.peer();
    peer.export_name("base", false);
}

#[test]
fn both_versions_that_are_safe_are_spoken_over_every_socket() {
    let setting = Setting::new(&[]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = setting.authority.client_of(None, &[version]);
        for stream in [setting.server.tcp_stream(), setting.server.stream()] {
            let stream = tls::bridge(stream, &config).expect("TLS works");
            let mut client = Client::attach(stream, "base").expect("offered");
            assert_bytes(&client.read(0, MIB), &setting.image.bytes(0, MIB), 0);
            client.write(1000, b"over TLS");
            assert_eq!(client.read(1000, 8), b"over TLS");
            client.disconnect();
        }
    }
    // In TLS 1.2 keys cannot be changed: there, a cipher that wears its keys out is not the first choice.
    let config = setting.authority.client_of(None, &[&rustls::version::TLS12]);
    let raw = tls::raw(setting.server.tcp_stream(), &config).expect("TLS works");
    let suite = raw.conn.negotiated_cipher_suite().expect("a suite").suite();
    assert!(format!("{suite:?}").contains("CHACHA20_POLY1305"), "{suite:?}");
}

// Whom it lets in.

/// What becomes of a client that has to show a certificate: it gets as far as an answer to LIST, or it does not.
fn is_let_in(setting: &Setting, config: &Arc<ClientConfig>) -> (bool, u16) {
    let stream = setting.server.tcp_stream();
    let port = stream.local_port().expect("TCP");
    let answered = tls::raw(stream, config).and_then(|mut raw| {
        raw.write_all(&option_bytes(nbd::OPT_LIST, &[]))?;
        raw.read_exact(&mut [0; 20])
    });
    (answered.is_ok(), port)
}

#[test]
fn a_client_without_a_good_certificate_is_refused_and_the_log_says_why() {
    let stranger = Authority::new("Somebody else's CA");
    let impostor = Authority::new("The CA");
    let mut revoked = None;
    let setting = Setting::with(&["--tls-verify-peer"], |authority, pki| {
        let issued = authority.sign(Role::Client, Age::Good);
        tls::write(pki, "ca-crl.pem", &authority.revoke(&[&issued], 2049));
        revoked = Some(issued);
    });
    let own = &setting.authority;
    let of_other = |other: &Authority| other.sign(Role::Client, Age::Good);
    for (issued, why) in [
        (None, "it shows no certificate, and one is demanded"),
        (Some(of_other(&stranger)), "its certificate is not signed by a CA in ca-cert.pem"),
        (Some(of_other(&impostor)), "its certificate is not signed by"),
        (Some(own.sign(Role::Client, Age::Expired)), "its certificate has expired"),
        (Some(own.sign(Role::Client, Age::Future)), "its certificate is not valid yet"),
        (Some(own.sign(Role::Server, Age::Good)), "its certificate is not meant for this use"),
        (revoked, "its certificate was revoked"),
    ] {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let (let_in, port) = is_let_in(&setting, &own.client_of(issued.as_ref(), &[version]));
            assert!(!let_in, "{why}");
            setting.warned(port, why);
        }
    }
    let good = own.sign(Role::Client, Age::Good);
    let (let_in, port) = is_let_in(&setting, &own.client(Some(&good)));
    assert!(let_in);
    let about = format!("127.0.0.1:{port}");
    assert!(!setting.server.log().iter().any(|line| line.contains(&about)));
}

#[test]
fn an_outdated_list_of_revoked_certificates_lets_nobody_in() {
    let setting = Setting::with(&["--tls-verify-peer"], |authority, pki| {
        tls::write(pki, "ca-crl.pem", &authority.revoke(&[], 2021));
    });
    let issued = setting.authority.sign(Role::Client, Age::Good);
    let (let_in, port) = is_let_in(&setting, &setting.authority.client(Some(&issued)));
    assert!(!let_in);
    setting.warned(port, "ca-crl.pem is out of date");
}

#[test]
fn nobody_is_asked_for_a_certificate_that_is_not_demanded() {
    let setting = Setting::new(&[]);
    let stranger = Authority::new("Somebody else's CA").sign(Role::Client, Age::Good);
    assert!(is_let_in(&setting, &setting.authority.client(Some(&stranger))).0);
}

#[test]
fn a_client_that_does_not_trust_the_server_is_in_the_log() {
    let setting = Setting::new(&[]);
    let (let_in, port) = is_let_in(&setting, &Authority::new("Another CA").client(None));
    assert!(!let_in);
    setting.warned(port, "it does not trust the CA of our certificate");
    // One that hangs up without a word, in the middle of the handshake or after it.
    let mut stream = setting.server.tcp_stream();
    let port = stream.local_port().expect("TCP");
    tls::start_tls(&mut stream).expect("it is acknowledged");
    drop(stream);
    setting.warned(port, "did not finish the TLS handshake");
    let stream = setting.server.tcp_stream();
    let port = stream.local_port().expect("TCP");
    drop(tls::raw(stream, &setting.authority.client(None)).expect("TLS works"));
    setting.warned(port, "left after the TLS handshake");
}

#[test]
fn a_crowd_of_refused_clients_does_not_fill_the_log() {
    let setting = Setting::new(&[]);
    let start = Instant::now();
    for _ in 0..300 {
        let (mut peer, _) = plain(&setting);
        peer.greeting();
        peer.send(&3_u32.to_be_bytes());
        peer.send_option(nbd::OPT_EXPORT_NAME, b"base");
        peer.expect_end();
    }
    // Some twenty lines a second, however long that took.
    let most = 25 * (start.elapsed().as_secs() + 2) + 10;
    let lines = setting.server.log().len();
    assert!(lines as u64 <= most, "{lines} lines about 300 clients");
}

// Whose a session is.

#[test]
fn a_named_session_belongs_to_the_key_of_the_certificate() {
    let setting = Setting::new(&["--tls-verify-peer", "--tls", "allow"]);
    let alice = setting.authority.sign(Role::Client, Age::Good);
    let bob = setting.authority.sign(Role::Client, Age::Good);
    let mut owner = setting.client(Some(&alice), "base@mine");
    owner.write(0, &[1; 4096]);
    // Her other connections, also with a renewed certificate.
    let mut second = setting.client(Some(&alice), "base@mine");
    assert_eq!(second.read(0, 4096), [1; 4096]);
    let renewed = setting.authority.renew(&alice, Role::Client);
    assert_ne!(renewed.certificate, alice.certificate);
    assert_eq!(setting.client(Some(&renewed), "base@mine").read(0, 4096), [1; 4096]);
    // Another certificate, and nobody's in plain text.
    let plain = || [setting.server.tcp_stream(), setting.server.stream()];
    for stream in [setting.bridge(Some(&bob))].into_iter().chain(plain()) {
        let refusal = Client::attach(stream, "base@mine").err().expect("it is somebody else's");
        assert_eq!(refusal.kind, nbd::REP_ERR_POLICY);
        let text = String::from_utf8(refusal.data).expect("text");
        assert!(text.contains("belongs to another user"), "{text}");
    }
    let mut other = setting.client(Some(&bob), "base@other");
    assert_bytes(&other.read(0, 4096), &setting.image.bytes(0, 4096), 0);
    // It lingers for her only.
    drop((owner, second));
    let refused = Client::attach(setting.bridge(Some(&bob)), "base@mine");
    assert_eq!(refused.err().expect("it is somebody else's").kind, nbd::REP_ERR_POLICY);
    assert_eq!(setting.client(Some(&alice), "base@mine").read(0, 4096), [1; 4096]);
}

#[test]
fn a_session_made_in_plain_text_is_not_for_a_certificate() {
    let setting = Setting::new(&["--tls-verify-peer", "--tls", "allow"]);
    let alice = setting.authority.sign(Role::Client, Age::Good);
    for (name, stream) in [("base@tcp", setting.server.tcp_stream()), ("base@unix", setting.server.stream())]
    {
        let mut plain = Client::attach(stream, name).expect("offered");
        plain.write(0, &[1; 4096]);
        let refused = Client::attach(setting.bridge(Some(&alice)), name).err().expect("it is not hers");
        assert_eq!(refused.kind, nbd::REP_ERR_POLICY);
    }
}

#[test]
fn without_certificates_a_session_is_protected_as_without_tls() {
    let setting = Setting::new(&["--tls", "allow"]);
    let mut one = setting.client(None, "base@0123456789abcdef");
    one.write(0, &[1; 4096]);
    assert_eq!(setting.client(None, "base@0123456789abcdef").read(0, 4096), [1; 4096]);
    // Over a unix socket the kernel still knows who it is.
    let over_unix = tls::bridge(setting.server.stream(), &setting.authority.client(None)).expect("TLS works");
    let refused = Client::attach(over_unix, "base@0123456789abcdef").err().expect("a user is somebody");
    assert_eq!(refused.kind, nbd::REP_ERR_POLICY);
}

#[test]
fn nothing_is_left_in_the_directory_of_certificates() {
    let setting = Setting::new(&[]);
    setting.assert_serves();
    let mut names: Vec<_> = std::fs::read_dir(setting.dir.path().join("pki"))
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["ca-cert.pem", "server-cert.pem", "server-key.pem"]);
    setting.server.stop();
}
