//! `memdev serve`: what is typed about TLS.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use memdev::handshake::TlsPolicy;
use memdev::net::tls::ServerTls;

use crate::cli::Failure;

/// Whether clients may, or must, encrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Clients without TLS are served nothing
    Require,
    /// Clients may choose; whoever is on the way between can choose for them
    #[value(alias = "on")]
    Allow,
    /// There is none
    Off,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Encryption")]
pub(super) struct TlsArgs {
    /// Encrypt, with the certificates in DIR
    ///
    /// DIR holds server-cert.pem and server-key.pem, and ca-cert.pem (and ca-crl.pem, if certificates were revoked) to
    /// check clients by: the names that QEMU, nbdkit and libnbd use. README.md tells how to make them.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,

    /// Whether clients must encrypt [default: require with --tls-certificates, else off]
    #[arg(long, value_name = "WHETHER")]
    tls: Option<Wanted>,

    /// Serve only clients with a certificate that the CA in ca-cert.pem has signed
    ///
    /// A named session then belongs to the key of the certificate that it was made with.
    #[arg(long)]
    tls_verify_peer: bool,
}

/// What came of it: whether there is TLS, and how it is done.
pub(super) struct Tls {
    pub(super) policy: TlsPolicy,
    pub(super) server: Option<ServerTls>,
}

impl Tls {
    /// Whether nobody is served without.
    pub(super) fn is_demanded(&self) -> bool {
        self.policy == TlsPolicy::Require
    }
}

impl TlsArgs {
    /// Reads the files.
    ///
    /// # Errors
    /// What was typed makes no sense together, or the files are not what they should be.
    pub(super) fn load(&self) -> Result<Tls, Failure> {
        let usage = |why: &str| Err(Failure::Usage(why.to_owned()));
        let policy = match (self.tls, &self.tls_certificates) {
            (Some(Wanted::Off), _) | (None, None) => TlsPolicy::Off,
            (Some(_), None) => return usage("--tls needs certificates; give --tls-certificates DIR"),
            (Some(Wanted::Require) | None, Some(_)) => TlsPolicy::Require,
            (Some(Wanted::Allow), Some(_)) => TlsPolicy::Allow,
        };
        match (&self.tls_certificates, policy) {
            (_, TlsPolicy::Off) if self.tls_verify_peer => {
                usage("--tls-verify-peer needs TLS; give --tls-certificates DIR, and not --tls off")
            }
            (None, _) | (_, TlsPolicy::Off) => Ok(Tls { policy: TlsPolicy::Off, server: None }),
            (Some(dir), policy) => {
                if policy == TlsPolicy::Allow && self.tls_verify_peer {
                    tracing::warn!(
                        "clients without TLS show no certificate, and --tls allow serves them all the same"
                    );
                }
                Ok(Tls { policy, server: Some(ServerTls::load(dir, self.tls_verify_peer)?) })
            }
        }
    }
}
