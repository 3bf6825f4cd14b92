//! TLS, both sides: credentials from files, and the record layer of one accepted connection. The cryptography is rustls's
//! and ring's; here is what of it is wanted, and words for what goes wrong.
//!
//! ```text
//!   DIR/*.pem ──> ServerTls ── Channel::new ──> Channel   records in, plain bytes out; plain bytes in, records out
//!             └─> ClientTls ── connect ──> a blocking stream
//! ```
//!
//! A [`Channel`] does no I/O and keeps no buffers: its worker lends them, so that an idle connection costs its keys and
//! little else.

mod channel;
mod client;
mod files;
mod server;
#[cfg(test)]
mod tests;
mod trouble;

pub use channel::{Channel, Opened};
pub use client::{ClientTls, TlsParameters, TlsStream};
pub use server::ServerTls;
pub use trouble::Trouble;

use rustls::crypto::CryptoProvider;
use rustls::{ProtocolVersion, SupportedCipherSuite};
use std::fmt;
use std::sync::Arc;

/// The CA's certificate, by which the other side's is checked.
pub const CA_CERTIFICATE: &str = "ca-cert.pem";
/// Certificates that the CA has taken back; used if it is there.
pub const CA_REVOCATIONS: &str = "ca-crl.pem";
/// The server's certificate, and those between it and the CA's behind it.
pub const SERVER_CERTIFICATE: &str = "server-cert.pem";
/// The key to [`SERVER_CERTIFICATE`].
pub const SERVER_KEY: &str = "server-key.pem";
/// The client's certificate, and those between it and the CA's behind it.
pub const CLIENT_CERTIFICATE: &str = "client-cert.pem";
/// The key to [`CLIENT_CERTIFICATE`].
pub const CLIENT_KEY: &str = "client-key.pem";

/// Whose certificate it is: the SHA-256 of its public key (of the DER form of its SubjectPublicKeyInfo). A certificate
/// that is renewed for the same key is the same one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a SubjectPublicKeyInfo.
    fn of(public_key: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, public_key).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    /// In hexadecimal, as `openssl dgst -sha256` shows it; a precision cuts it short.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.pad(&digits)
    }
}

/// What is used of the cryptography: TLS 1.2 and 1.3 with what rustls holds to be safe. Of the suites of TLS 1.2 those
/// come first that can go on for ever: there, one with AES-GCM has to be given up after 2^24 records, which a busy device
/// has had in minutes, as TLS 1.2 has no way to change keys that is still held to be safe.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite {
        SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit < u64::MAX,
        SupportedCipherSuite::Tls13(_) => false,
    });
    debug_assert!(
        provider
            .cipher_suites
            .first()
            .is_some_and(|suite| suite.version().version == ProtocolVersion::TLSv1_3)
    );
    Arc::new(provider)
}
