//! TLS on the client's side, lean: records are opened where they were received and sealed a batch at a time.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::net::{self, RecvFlags, SendFlags};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, RootCertStore};

/// Bytes of records that are received at a time.
const RECORDS: usize = 256 << 10;

/// The TLS of one connection.
pub(crate) struct Tls {
    connection: UnbufferedClientConnection,
    incoming: Vec<u8>,
    /// Bytes of `incoming` that are not opened yet.
    filled: usize,
    sealed: Vec<u8>,
    /// Bytes of `sealed` that the socket has taken.
    sent: usize,
}

impl Tls {
    /// Agrees on keys over `stream`, on which STARTTLS was acknowledged; the server is `localhost` by the CA in the file
    /// `authority`.
    ///
    /// # Errors
    ///
    /// The file cannot be read, the server is another, or the connection fails.
    pub(crate) fn begin(stream: BorrowedFd<'_>, authority: &Path) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(authority).map_err(io::Error::other)? {
            roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().map_err(io::Error::other)?;
        let connection = UnbufferedClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let incoming = vec![0; RECORDS];
        let mut tls = Self { connection, incoming, filled: 0, sealed: Vec::new(), sent: 0 };
        tls.open(&mut [])?;
        while tls.connection.is_handshaking() || tls.wants_to_send() {
            tls.flush(stream, true)?;
            if tls.connection.is_handshaking() {
                tls.fill(stream, true)?;
                tls.open(&mut [])?;
            }
        }
        Ok(tls)
    }

    /// Bytes that the socket has not taken.
    pub(crate) fn wants_to_send(&self) -> bool {
        self.sent < self.sealed.len()
    }

    /// Seals `plain` behind what is still to be sent.
    pub(crate) fn seal(&mut self, plain: &[u8]) -> io::Result<()> {
        loop {
            let records = &mut self.incoming[..self.filled];
            match self.connection.process_tls_records(records).state.map_err(io::Error::other)? {
                ConnectionState::EncodeTlsData(data) => encode(data, &mut self.sealed),
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    let start = self.sealed.len();
                    self.sealed.resize(start + plain.len() + (plain.len() / 16_384 + 2) * 64, 0);
                    let count =
                        traffic.encrypt(plain, &mut self.sealed[start..]).map_err(io::Error::other)?;
                    self.sealed.truncate(start + count);
                    return Ok(());
                }
                _ => return Err(io::Error::other("the server has ended TLS")),
            }
        }
    }

    /// Sends what the socket takes at once, or, if it is to `wait`, all.
    pub(crate) fn flush(&mut self, stream: BorrowedFd<'_>, wait: bool) -> io::Result<()> {
        let mut flags = SendFlags::NOSIGNAL;
        flags.set(SendFlags::DONTWAIT, !wait);
        while self.wants_to_send() {
            match net::send(stream.as_fd(), &self.sealed[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(rustix::io::Errno::AGAIN) if !wait => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.sealed.clear();
        self.sent = 0;
        Ok(())
    }

    /// Receives what is there, waiting for it if `wait`, and opens it into `plain`; returns how many bytes that gave.
    pub(crate) fn receive(
        &mut self,
        stream: BorrowedFd<'_>,
        plain: &mut [u8],
        wait: bool,
    ) -> io::Result<usize> {
        // What was received is never shorter than what it holds.
        let most = plain.len().min(RECORDS);
        if self.filled < most {
            self.fill_to(stream, most, wait)?;
        }
        self.open(plain)
    }

    fn fill(&mut self, stream: BorrowedFd<'_>, wait: bool) -> io::Result<()> {
        self.fill_to(stream, RECORDS, wait)
    }

    fn fill_to(&mut self, stream: BorrowedFd<'_>, most: usize, wait: bool) -> io::Result<()> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        match net::recv(stream, &mut self.incoming[self.filled..most], flags) {
            Ok((_, 0)) => Err(io::Error::other("the server hung up")),
            Ok((_, count)) => {
                self.filled += count;
                Ok(())
            }
            Err(rustix::io::Errno::AGAIN) if wait => Err(io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn open(&mut self, plain: &mut [u8]) -> io::Result<usize> {
        let (mut used, mut opened) = (0, 0);
        loop {
            let records = &mut self.incoming[used..self.filled];
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(records);
            let mut last = false;
            match state.map_err(io::Error::other)? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(io::Error::other)?;
                        discard += record.discard;
                        plain[opened..opened + record.payload.len()].copy_from_slice(record.payload);
                        opened += record.payload.len();
                    }
                }
                ConnectionState::EncodeTlsData(data) => encode(data, &mut self.sealed),
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => last = true,
                _ => return Err(io::Error::other("the server has ended TLS")),
            }
            used += discard;
            if last {
                break;
            }
        }
        self.incoming.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(opened)
    }
}

fn encode(mut data: EncodeTlsData<'_, ClientConnectionData>, sealed: &mut Vec<u8>) {
    let start = sealed.len();
    if let Err(EncodeError::InsufficientSize(needed)) = data.encode(&mut []) {
        sealed.resize(start + needed.required_size, 0);
        let written = data.encode(&mut sealed[start..]).unwrap_or(0);
        sealed.truncate(start + written);
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}
