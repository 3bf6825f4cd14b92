//! TLS for the tests: certificate authorities and what they sign, a raw client's way to STARTTLS and past it, and a
//! bridge by which a [`Peer`](super::Peer) that knows nothing of TLS speaks to a server that demands it.
//!
//! ```text
//!   Peer, Client ── unix socket ── bridge ── records ── server
//! ```

use std::cell::Cell;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose as Purpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

use super::peer::option_bytes;
use super::{Stream, nbd};

/// Who signs.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    serial: Cell<u64>,
}

/// When a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Today.
    Good,
    /// Until some time ago.
    Expired,
    /// From some time on.
    Future,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A server called `localhost` and `127.0.0.1`.
    Server,
    /// A client.
    Client,
}

/// A certificate, its key and its number.
pub struct Issued {
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: String,
    serial: u64,
}

impl Authority {
    /// One that calls itself `name`.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2049, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        Self { issuer, serial: Cell::new(1) }
    }

    /// A certificate for a new key.
    pub fn sign(&self, role: Role, age: Age) -> Issued {
        self.sign_key(&KeyPair::generate().expect("a key"), role, age)
    }

    /// A certificate for the key of another one: a renewal.
    pub fn renew(&self, old: &Issued, role: Role) -> Issued {
        self.sign_key(&KeyPair::from_pem(&old.key).expect("a key"), role, Age::Good)
    }

    fn sign_key(&self, key: &KeyPair, role: Role, age: Age) -> Issued {
        self.serial.set(self.serial.get() + 1);
        let (names, name, purpose) = match role {
            Role::Server => {
                (vec!["localhost".to_owned(), "127.0.0.1".to_owned()], "server", Purpose::ServerAuth)
            }
            Role::Client => (vec![], "client", Purpose::ClientAuth),
        };
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, format!("{name} {}", self.serial.get()));
        params.serial_number = Some(SerialNumber::from(self.serial.get()));
        params.use_authority_key_identifier_extension = true;
        // QEMU demands both, whatever the kind of key.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let (from, until) = match age {
            Age::Good => (2020, 2049),
            Age::Expired => (2020, 2021),
            Age::Future => (2048, 2049),
        };
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        let certificate = params.signed_by(key, &self.issuer).expect("a certificate");
        Issued { certificate: certificate.pem(), key: key.serialize_pem(), serial: self.serial.get() }
    }

    /// Its own certificate, in PEM.
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// The list that takes `revoked` back, in PEM; good until `year`.
    pub fn revoke(&self, revoked: &[&Issued], year: i32) -> String {
        let entry = |issued: &&Issued| RevokedCertParams {
            serial_number: SerialNumber::from(issued.serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).and_then(|list| list.pem()).expect("a revocation list")
    }

    /// Makes `dir` what a server is given: the authority's certificate, and its own with its key.
    pub fn equip_server(&self, dir: &Path, issued: &Issued) {
        write(dir, "ca-cert.pem", &self.certificate());
        write(dir, "server-cert.pem", &issued.certificate);
        write(dir, "server-key.pem", &issued.key);
    }

    /// Makes `dir` what a client is given: the authority's certificate, and perhaps its own with its key.
    pub fn equip_client(&self, dir: &Path, issued: Option<&Issued>) {
        write(dir, "ca-cert.pem", &self.certificate());
        if let Some(issued) = issued {
            write(dir, "client-cert.pem", &issued.certificate);
            write(dir, "client-key.pem", &issued.key);
        }
    }

    /// A raw client that trusts it, and shows `issued`.
    pub fn client(&self, issued: Option<&Issued>) -> Arc<ClientConfig> {
        self.client_of(issued, rustls::ALL_VERSIONS)
    }

    /// The same with these versions of TLS only.
    pub fn client_of(
        &self,
        issued: Option<&Issued>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a CA's certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots);
        Arc::new(match issued {
            Some(issued) => {
                let certificate = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).expect("PEM");
                let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).expect("PEM");
                builder.with_client_auth_cert(vec![certificate], key).expect("a key that fits")
            }
            None => builder.with_no_client_auth(),
        })
    }
}

/// Puts a file there, for its owner only.
pub fn write(dir: &Path, name: &str, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(dir).expect("a directory");
    let path = dir.join(name);
    fs::write(&path, text).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a file's mode");
}

/// A raw connection over TLS: options can be sent.
pub type Raw = StreamOwned<ClientConnection, Stream>;

/// The greeting, and what the client says to it: fixed newstyle, no zeroes.
pub fn hello(stream: &mut Stream) -> io::Result<[u8; 18]> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    stream.write_all(&3_u32.to_be_bytes())?;
    Ok(greeting)
}

/// From the greeting to the acknowledgement of STARTTLS; returns the greeting.
pub fn start_tls(stream: &mut Stream) -> io::Result<[u8; 18]> {
    let greeting = hello(stream)?;
    stream.write_all(&option_bytes(nbd::OPT_STARTTLS, &[]))?;
    expect_ack(stream)?;
    Ok(greeting)
}

/// Takes the acknowledgement of STARTTLS.
pub fn expect_ack(stream: &mut impl Read) -> io::Result<()> {
    let mut reply = [0; 20];
    stream.read_exact(&mut reply)?;
    let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().expect("four bytes"));
    if (word(8), word(12), word(16)) == (nbd::OPT_STARTTLS, nbd::REP_ACK, 0) {
        Ok(())
    } else {
        Err(io::Error::other(format!("STARTTLS was answered with {:#x}", word(12))))
    }
}

/// A client's end, about to begin.
pub fn beginning(config: &Arc<ClientConfig>) -> ClientConnection {
    let name = "localhost".try_into().expect("a name");
    ClientConnection::new(Arc::clone(config), name).expect("a client")
}

/// The whole TLS handshake of a connection on which STARTTLS was acknowledged. What a server thinks of the client's
/// certificate may be heard only later.
pub fn shake_hands(stream: Stream, config: &Arc<ClientConfig>) -> io::Result<Raw> {
    finish(stream, beginning(config))
}

/// The rest of the TLS handshake of `connection`, of which some may have been sent.
pub fn finish(mut stream: Stream, mut connection: ClientConnection) -> io::Result<Raw> {
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

/// From the greeting to the end of the TLS handshake.
pub fn raw(mut stream: Stream, config: &Arc<ClientConfig>) -> io::Result<Raw> {
    stream.be_patient()?;
    start_tls(&mut stream)?;
    shake_hands(stream, config)
}

/// A stream for a [`Peer`](super::Peer) that knows nothing of TLS: it gets the greeting again, and what it says goes on
/// over TLS.
pub fn bridge(mut stream: Stream, config: &Arc<ClientConfig>) -> io::Result<Stream> {
    stream.be_patient()?;
    let greeting = start_tls(&mut stream)?;
    let StreamOwned { conn, sock } = shake_hands(stream, config)?;
    let (mut near, far) = UnixStream::pair()?;
    near.write_all(&greeting)?;
    thread::spawn(move || {
        // Either end may go at any time, which is no concern of the bridge.
        let _ = carry(conn, sock, near);
    });
    Ok(Stream::Unix(far))
}

/// Bytes that the bridge holds for an end that does not take them.
const HELD: usize = 256 << 10;

fn carry(mut tls: ClientConnection, mut net: Stream, mut app: UnixStream) -> io::Result<()> {
    net.set_nonblocking(true)?;
    app.set_nonblocking(true)?;
    let mut buffer = vec![0; 64 << 10];
    let (mut out, mut back) = (Vec::new(), Vec::new());
    // The four bytes of flags, which the server has had.
    let mut to_swallow = 4;
    let (mut app_ended, mut net_ended) = (false, false);
    loop {
        let mut net_flags = PollFlags::empty();
        let mut app_flags = PollFlags::empty();
        net_flags.set(PollFlags::IN, back.len() < HELD && !net_ended);
        net_flags.set(PollFlags::OUT, !out.is_empty());
        app_flags.set(PollFlags::IN, out.len() < HELD && !app_ended);
        app_flags.set(PollFlags::OUT, !back.is_empty());
        let mut fds = [PollFd::from_borrowed_fd(net.as_fd(), net_flags), PollFd::new(&app, app_flags)];
        poll(&mut fds, None)?;
        let [net_now, app_now] = [fds[0].revents(), fds[1].revents()];
        if app_now.contains(PollFlags::IN) {
            match app.read(&mut buffer)? {
                0 => app_ended = true,
                count => {
                    let swallowed = to_swallow.min(count);
                    to_swallow -= swallowed;
                    tls.writer().write_all(&buffer[swallowed..count])?;
                }
            }
        }
        while tls.wants_write() {
            tls.write_tls(&mut out)?;
        }
        if !out.is_empty() {
            put(&mut net, &mut out)?;
        }
        if app_ended && out.is_empty() {
            net.shutdown(Shutdown::Write)?;
            if app_now.intersects(PollFlags::HUP | PollFlags::ERR) || net_ended {
                return Ok(());
            }
        }
        if net_now.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && !net_ended {
            match tls.read_tls(&mut net) {
                Ok(0) => net_ended = true,
                Ok(_) => {
                    let state = tls.process_new_packets().map_err(io::Error::other)?;
                    let start = back.len();
                    back.resize(start + state.plaintext_bytes_to_read(), 0);
                    tls.reader().read_exact(&mut back[start..])?;
                    net_ended |= state.peer_has_closed();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if !back.is_empty() {
            put(&mut app, &mut back)?;
        }
        if net_ended && back.is_empty() {
            return Ok(());
        }
    }
}

fn put(to: &mut impl Write, bytes: &mut Vec<u8>) -> io::Result<()> {
    match to.write(bytes) {
        Ok(count) => drop(bytes.drain(..count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(error),
    }
    Ok(())
}
