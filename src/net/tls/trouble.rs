//! Words for what goes wrong in TLS, for the log and for people.

use rustls::{AlertDescription, CertificateError, Error as TlsError};
use std::fmt;
use std::io;

/// Why a TLS connection is of no use any more; shown as what the other side did or lacks.
#[derive(Clone, Debug, PartialEq)]
pub struct Trouble(TlsError);

impl From<TlsError> for Trouble {
    fn from(error: TlsError) -> Self {
        Self(error)
    }
}

impl From<Trouble> for io::Error {
    fn from(trouble: Trouble) -> Self {
        Self::new(io::ErrorKind::InvalidData, trouble)
    }
}

impl std::error::Error for Trouble {}

impl Trouble {
    /// The trouble behind an error of a stream, if that is what it is.
    #[must_use]
    pub fn behind(error: &io::Error) -> Option<Self> {
        let inner = error.get_ref()?;
        let tls = || inner.downcast_ref::<TlsError>().cloned().map(Self);
        inner.downcast_ref::<Self>().cloned().or_else(tls)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            TlsError::InvalidCertificate(error) => certificate(error, f),
            TlsError::NoCertificatesPresented => f.write_str("it shows no certificate, and one is demanded"),
            TlsError::AlertReceived(alert) => f.write_str(&complaint(*alert)),
            TlsError::InvalidMessage(what) => {
                write!(f, "it sends what is no TLS, plain text perhaps ({what:?})")
            }
            TlsError::InappropriateMessage { .. } | TlsError::InappropriateHandshakeMessage { .. } => {
                write!(f, "it breaks the protocol ({})", self.0)
            }
            TlsError::PeerIncompatible(what) => {
                write!(f, "there is no version or cipher of TLS that both sides have ({what:?})")
            }
            TlsError::PeerMisbehaved(what) => write!(f, "it breaks the protocol ({what:?})"),
            TlsError::DecryptError => f.write_str("what it sends was damaged or forged on its way"),
            other => other.fmt(f),
        }
    }
}

/// What is wrong with the other side's certificate.
fn certificate(error: &CertificateError, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    use CertificateError as E;
    f.write_str(match error {
        E::Expired | E::ExpiredContext { .. } => "its certificate has expired",
        E::NotValidYet | E::NotValidYetContext { .. } => "its certificate is not valid yet",
        E::Revoked => "its certificate was revoked",
        E::UnknownIssuer => "its certificate is not signed by a CA in ca-cert.pem",
        E::BadSignature => "its certificate is not signed by the CA that it names (bad signature)",
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "its certificate is not meant for this use (extended key usage)"
        }
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            "its certificate cannot be checked, as ca-crl.pem is out of date"
        }
        E::NotValidForName => "its certificate is for another name",
        E::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            return match presented.is_empty() {
                true => {
                    write!(f, "its certificate is not for '{expected}': it has no subject alternative name")
                }
                false => {
                    write!(f, "its certificate is not for '{expected}' but for {}", presented.join(", "))
                }
            };
        }
        other => return write!(f, "its certificate is not valid ({other:?})"),
    })
}

/// What the other side finds wrong with us.
fn complaint(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let why = match alert {
        A::UnknownCA => "it does not trust the CA of our certificate",
        A::CertificateExpired => "it finds our certificate expired",
        A::CertificateRevoked => "it finds our certificate revoked",
        A::CertificateRequired | A::NoCertificate => "it demands a certificate, and we have none to show",
        A::BadCertificate | A::UnsupportedCertificate | A::CertificateUnknown | A::AccessDenied => {
            "it does not accept our certificate"
        }
        A::ProtocolVersion | A::HandshakeFailure | A::InsufficientSecurity => {
            "there is no version or cipher of TLS that both sides have"
        }
        _ => "it gave up",
    };
    format!("{why} (alert {alert:?})")
}
