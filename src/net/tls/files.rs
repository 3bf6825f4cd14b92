//! Certificates and keys out of PEM files, with errors that say which file and what to do.

use super::{CA_CERTIFICATE, CA_REVOCATIONS};
use crate::error::{Error, ErrorKind, Result};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) resolver: Arc<SingleCertAndKey>,
}

/// The certificate in `dir/certificate`, and its key in `dir/key`. Warns of a key that is no secret.
pub(super) fn identity(dir: &Path, certificate: &str, key: &str) -> Result<Identity> {
    let (certificate, key) = (dir.join(certificate), dir.join(key));
    let chain = certificates(&certificate)?;
    let pem = Zeroizing::new(read(&key)?);
    warn_of_readers(&key);
    let mut der = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        useless("has no private key in it", &key, &error)
            .advise("give an unencrypted key in PEM form (BEGIN PRIVATE KEY)")
    })?;
    let signing = rustls::crypto::ring::sign::any_supported_type(&der);
    der.zeroize();
    let signing = signing.map_err(|_| {
        useless("has a key that cannot be used", &key, &"neither RSA of 2048 bits or more, ECDSA nor Ed25519")
            .advise("make another key")
    })?;
    let certified = CertifiedKey::new(chain.clone(), signing);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
        Err(rustls::Error::InconsistentKeys(_)) => {
            let error =
                Error::new(ErrorKind::Invalid, format!("The key {} does not belong to", key.display()));
            return Err(error.on_path(&certificate).advise("give a key and the certificate made for it"));
        }
        Err(error) => {
            return Err(useless("has no usable certificate in it", &certificate, &error)
                .advise("give an X.509 certificate of version 3 in PEM form"));
        }
    }
    Ok(Identity { chain, resolver: Arc::new(SingleCertAndKey::from(certified)) })
}

/// The CA's certificates in `dir`.
pub(super) fn authorities(dir: &Path) -> Result<RootCertStore> {
    let path = dir.join(CA_CERTIFICATE);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|error| {
            useless("has no usable CA certificate in it", &path, &error)
                .advise("give an X.509 certificate of version 3 in PEM form")
        })?;
    }
    Ok(roots)
}

/// The lists of revoked certificates in `dir`; none if there is no such file.
pub(super) fn revocations(dir: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let path = dir.join(CA_REVOCATIONS);
    let pem = match fs::read(&path) {
        Ok(pem) => pem,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("Cannot read TLS file", error).on_path(&path)),
    };
    let lists = CertificateRevocationListDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let lists = lists.map_err(|error| useless("has no revocation list in it", &path, &error))?;
    if lists.is_empty() {
        return Err(useless("has no revocation list in it", &path, &"no PEM section of that kind")
            .advise("give one in PEM form, or remove the file"));
    }
    Ok(lists)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let none = |why: &dyn std::fmt::Display| {
        useless("has no certificate in it", path, why).advise("give one in PEM form (BEGIN CERTIFICATE)")
    };
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| none(&error))?;
    if found.is_empty() {
        return Err(none(&"no PEM section of that kind"));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => "let the user who runs this read it",
            _ => "name a directory that holds it; README.md tells how to make one",
        };
        Error::io("Cannot read TLS file", error).on_path(path).advise(advice)
    })
}

fn useless(what: &str, path: &Path, why: &dyn std::fmt::Display) -> Error {
    let error = io::Error::new(io::ErrorKind::InvalidInput, format!("it {what} ({why})"));
    Error::io("Cannot use TLS file", error).on_path(path)
}

fn warn_of_readers(key: &Path) {
    const OTHERS_READ: u32 = 0o004;
    if fs::metadata(key).is_ok_and(|meta| meta.mode() & OTHERS_READ != 0) {
        tracing::warn!(path = %key.display(), "everybody on this machine can read this key; chmod 600 it");
    }
}
