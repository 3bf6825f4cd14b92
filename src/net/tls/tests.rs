//! The record layer against rustls's own client, in memory: no sockets, any cut, any amount.

use super::*;
use rcgen::{CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::fs;
use std::io::{Read, Write};

/// A server's files, and what its clients need.
struct World {
    dir: tempfile::TempDir,
    roots: RootCertStore,
    client: (String, KeyPair),
}

fn world() -> World {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let sign = |purpose: ExtendedKeyUsagePurpose| {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &ca).unwrap().pem(), key)
    };
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = sign(ExtendedKeyUsagePurpose::ServerAuth);
    fs::write(dir.path().join(SERVER_CERTIFICATE), certificate).unwrap();
    fs::write(dir.path().join(SERVER_KEY), key.serialize_pem()).unwrap();
    fs::write(dir.path().join(CA_CERTIFICATE), ca.pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    World { dir, roots, client: sign(ExtendedKeyUsagePurpose::ClientAuth) }
}

/// Both ends, and what is on its way between them.
struct Ends {
    client: ClientConnection,
    channel: Channel,
    /// From the client, not opened.
    partial: Vec<u8>,
    /// What came through.
    plain: Vec<u8>,
    ended: bool,
}

impl Ends {
    fn new(world: &World, verify: bool, versions: &[&'static rustls::SupportedProtocolVersion]) -> Self {
        let tls = ServerTls::load(world.dir.path(), verify).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(world.roots.clone());
        let certificate = CertificateDer::from_pem_slice(world.client.0.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(world.client.1.serialize_pem().as_bytes()).unwrap();
        let config = builder.with_client_auth_cert(vec![certificate], key).unwrap();
        let client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let channel = Channel::new(&tls).unwrap();
        Self { client, channel, partial: Vec::new(), plain: Vec::new(), ended: false }
    }

    /// Carries what the client has to say, in pieces of this length, and the answers back.
    fn carry(&mut self, piece: usize) -> Result<(), Trouble> {
        let mut records = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut records).unwrap();
        }
        for piece in records.chunks(piece) {
            self.partial.extend_from_slice(piece);
            let mut room = vec![0; self.partial.len()];
            let mut answer = Vec::new();
            let opened = self.channel.open(&mut self.partial, &mut room, &mut answer);
            self.back(&answer);
            let opened = opened?;
            self.plain.extend_from_slice(&room[..opened.plain]);
            self.partial.drain(..opened.used);
            self.ended |= opened.ended;
        }
        Ok(())
    }

    fn back(&mut self, records: &[u8]) -> Vec<u8> {
        let mut rest = records;
        let mut seen = Vec::new();
        while !rest.is_empty() {
            self.client.read_tls(&mut rest).unwrap();
            // What the client thinks of it is looked at where it matters.
            if let Ok(state) = self.client.process_new_packets() {
                let start = seen.len();
                seen.resize(start + state.plaintext_bytes_to_read(), 0);
                self.client.reader().read_exact(&mut seen[start..]).unwrap();
            }
        }
        seen
    }

    fn shake_hands(&mut self, piece: usize) {
        while self.client.is_handshaking() || self.channel.is_handshaking() {
            self.carry(piece).unwrap();
        }
    }

    fn say(&mut self, bytes: &[u8], piece: usize) {
        for part in bytes.chunks(50_000) {
            self.client.writer().write_all(part).unwrap();
            self.carry(piece).unwrap();
        }
    }

    fn answer(&mut self, plain: &[u8], records: &mut Vec<u8>) -> Vec<u8> {
        let length = self.channel.seal(&mut self.partial, plain, records).unwrap();
        self.back(&records[..length])
    }
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

#[test]
fn bytes_come_through_in_both_directions_however_they_are_cut() {
    let world = world();
    for versions in [&[&rustls::version::TLS12], &[&rustls::version::TLS13]] {
        for piece in [1, 7, 1000, 17_000, usize::MAX] {
            let mut ends = Ends::new(&world, true, versions);
            ends.shake_hands(piece);
            // A buffer that is used again is not cleared, and grows when it must.
            let mut records = vec![9; 3];
            for length in [1, 100, 16_384, 16_385, 200_000] {
                let sent = bytes(length);
                ends.plain.clear();
                ends.say(&sent, piece);
                assert_eq!(ends.plain, sent);
                assert!(ends.partial.is_empty());
                assert_eq!(ends.answer(&sent, &mut records), sent);
            }
        }
    }
}

#[test]
fn a_reply_can_be_sealed_in_the_middle_of_a_request() {
    let mut ends = Ends::new(&world(), false, rustls::ALL_VERSIONS);
    ends.shake_hands(usize::MAX);
    ends.client.writer().write_all(&bytes(5000)).unwrap();
    let mut wire = Vec::new();
    ends.client.write_tls(&mut wire).unwrap();
    for cut in [1, 5, 100] {
        let (head, tail) = wire.split_at(cut);
        ends.partial.extend_from_slice(head);
        let opened = ends.channel.open(&mut ends.partial, &mut [0; 200], &mut Vec::new()).unwrap();
        assert_eq!(opened, Opened { used: 0, plain: 0, ended: false });
        assert_eq!(ends.answer(b"meanwhile", &mut Vec::new()), b"meanwhile");
        wire = tail.to_vec();
    }
    ends.partial.extend_from_slice(&wire);
    let mut room = [0; 6000];
    let opened = ends.channel.open(&mut ends.partial, &mut room, &mut Vec::new()).unwrap();
    assert_eq!(room[..opened.plain], bytes(5000));
}

#[test]
fn keys_can_be_changed_on_the_way() {
    let mut ends = Ends::new(&world(), false, &[&rustls::version::TLS13]);
    ends.shake_hands(usize::MAX);
    let mut records = Vec::new();
    for round in 0..10 {
        ends.client.refresh_traffic_keys().unwrap();
        ends.plain.clear();
        ends.say(&bytes(round * 1000 + 1), 500);
        assert_eq!(ends.plain, bytes(round * 1000 + 1));
        assert_eq!(ends.answer(&bytes(30_000), &mut records), bytes(30_000));
    }
}

#[test]
fn either_end_can_say_goodbye() {
    let mut ends = Ends::new(&world(), false, rustls::ALL_VERSIONS);
    ends.shake_hands(usize::MAX);
    ends.say(b"last words", usize::MAX);
    ends.client.send_close_notify();
    ends.carry(usize::MAX).unwrap();
    assert!(ends.ended && ends.plain == b"last words");
    // The other direction is still open.
    assert_eq!(ends.answer(b"and a reply", &mut Vec::new()), b"and a reply");
    let mut records = b"before".to_vec();
    ends.channel.say_goodbye(&mut [], &mut records).unwrap();
    assert!(records.starts_with(b"before") && records.len() > 6);
    ends.client.read_tls(&mut &records[6..]).unwrap();
    assert!(ends.client.process_new_packets().unwrap().peer_has_closed());
}

#[test]
fn nothing_can_be_said_before_keys_are_agreed_on() {
    let mut ends = Ends::new(&world(), false, rustls::ALL_VERSIONS);
    assert!(ends.channel.seal(&mut [], b"too early", &mut Vec::new()).is_err());
    let mut records = b"before".to_vec();
    assert!(ends.channel.say_goodbye(&mut [], &mut records).is_err());
    assert_eq!(records, b"before");
    assert_eq!(ends.channel.client(), None);
}

#[test]
fn what_is_no_tls_is_trouble_and_the_client_is_told() {
    for garbage in [&b"IHAVEOPT\0\0\0\x03\0\0\0\0"[..], &[0; 64], &[0x16, 3, 1, 0xff, 0xff, 0, 0]] {
        let mut ends = Ends::new(&world(), false, rustls::ALL_VERSIONS);
        let mut answer = Vec::new();
        let trouble = ends.channel.open(&mut garbage.to_vec(), &mut [0; 64], &mut answer).unwrap_err();
        assert!(trouble.to_string().starts_with("it "), "{trouble}");
        assert_eq!(answer.first(), Some(&0x15), "an alert");
        // It stays so.
        assert!(ends.channel.open(&mut garbage.to_vec(), &mut [0; 64], &mut answer).is_err());
    }
}

#[test]
fn a_client_is_known_by_its_key_if_it_had_to_show_a_certificate() {
    let world = world();
    let mut ends = Ends::new(&world, true, rustls::ALL_VERSIONS);
    assert_eq!(ends.channel.client(), None, "it is nobody before the handshake has ended");
    ends.shake_hands(usize::MAX);
    let fingerprint = ends.channel.client().unwrap();
    assert_eq!(fingerprint, Fingerprint::of(&rcgen::PublicKeyData::subject_public_key_info(&world.client.1)));
    assert_eq!(fingerprint.to_string().len(), 64);
    assert_eq!(format!("{fingerprint:.16}"), fingerprint.to_string()[..16]);
    assert!(ends.channel.terms().contains("TLS"), "{}", ends.channel.terms());
    let mut ends = Ends::new(&world, false, rustls::ALL_VERSIONS);
    ends.shake_hands(usize::MAX);
    assert_eq!(ends.channel.client(), None);
}

#[test]
fn the_digest_is_sha_256() {
    let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(Fingerprint::of(b"abc").to_string(), expected);
}

#[test]
fn trouble_is_found_behind_errors_of_streams() {
    let expired = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
    for error in
        [std::io::Error::from(Trouble::from(expired.clone())), std::io::Error::other(expired.clone())]
    {
        let trouble = Trouble::behind(&error).unwrap();
        assert_eq!(trouble, Trouble::from(expired.clone()));
        assert_eq!(trouble.to_string(), "its certificate has expired");
    }
    assert_eq!(Trouble::behind(&std::io::Error::other("else")), None);
    assert_eq!(Trouble::behind(&std::io::ErrorKind::BrokenPipe.into()), None);
}
