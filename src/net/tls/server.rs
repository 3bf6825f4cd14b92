//! The server's credentials, and what it offers and demands.

use super::files::{self, Identity};
use super::{CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, Trouble, provider};
use crate::error::{Error, ErrorKind, Result};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::UnixTime;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ServerConfig};
use std::path::Path;
use std::sync::Arc;

/// How this server does TLS with all its clients.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(super) config: Arc<ServerConfig>,
}

impl ServerTls {
    /// Reads `server-cert.pem` and `server-key.pem` in `dir`; with `verify_peer` also `ca-cert.pem` (and `ca-crl.pem`, if
    /// there is one), and demands of every client a certificate that the CA has signed.
    ///
    /// # Errors
    /// A file is missing or cannot be read, or is not what its name says, or the key is another certificate's.
    pub fn load(dir: &Path, verify_peer: bool) -> Result<Self> {
        let unusable = |error: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Invalid, format!("Cannot use the TLS files ({error}) in")).on_path(dir)
        };
        let provider = provider();
        let identity = files::identity(dir, SERVER_CERTIFICATE, SERVER_KEY)?;
        warn_of_age(dir, &identity, &provider);
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let builder = if verify_peer {
            let roots = Arc::new(files::authorities(dir)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .with_crls(files::revocations(dir)?)
                // A client that is told which CAs count keeps a certificate of another to itself, and the log could only
                // say that it has shown none.
                .clear_root_hint_subjects()
                // There need not be a list for every CA, but one that there is counts, and has to be of today.
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration()
                .build()
                .map_err(|error| unusable(&error))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(identity.resolver);
        config.ignore_client_order = true;
        // Connections are few and long: nothing that outlives one is kept, and every client proves who it is afresh.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
    }
}

/// Warns of a certificate that clients are going to refuse for its age. No more than that: clocks differ, and that a
/// server cannot be restarted helps nobody.
fn warn_of_age(dir: &Path, identity: &Identity, provider: &CryptoProvider) {
    // Without the CA's certificate at hand it cannot be checked; which is no fault.
    if !dir.join(CA_CERTIFICATE).exists() {
        return;
    }
    let (Some((own, between)), Ok(roots)) = (identity.chain.split_first(), files::authorities(dir)) else {
        return;
    };
    let Ok(own) = ParsedCertificate::try_from(own) else { return };
    let algorithms = provider.signature_verification_algorithms.all;
    let checked =
        verify_server_cert_signed_by_trust_anchor(&own, &roots, between, UnixTime::now(), algorithms);
    use CertificateError as E;
    if let Err(
        error @ rustls::Error::InvalidCertificate(
            E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. },
        ),
    ) = checked
    {
        let path = dir.join(SERVER_CERTIFICATE);
        tracing::warn!(path = %path.display(), "clients will refuse this server: {}", Trouble::from(error));
    }
}
