//! The client's credentials, and a blocking stream that is checked and encrypted.

use super::{CA_CERTIFICATE, CLIENT_CERTIFICATE, CLIENT_KEY, Trouble, files, provider};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Address;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::env;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What an NBD URI says of TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TlsParameters {
    /// Where the certificates are (`tls-certificates`); without it, where libnbd looks for them.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must have (`tls-hostname`); without it, the address's host.
    pub hostname: Option<String>,
}

/// How a client does TLS with one server.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl ClientTls {
    /// Reads `ca-cert.pem`, by which the server is checked, and `client-cert.pem` and `client-key.pem` if they are there.
    ///
    /// # Errors
    /// There is no CA certificate, a file is not what its name says, or the server's name is none.
    pub fn load(parameters: &TlsParameters, address: &Address) -> Result<Self> {
        let host = match (&parameters.hostname, address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            // Whoever answers there is on this machine.
            (None, Address::Unix(_)) => "localhost",
            (None, Address::Vsock { .. }) => {
                return Err(Error::new(ErrorKind::Invalid, "A virtual machine's number is no name to check")
                    .advise("give the server's in the URI, as ?tls-hostname=NAME"));
            }
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            Error::new(ErrorKind::Invalid, format!("No name that a certificate can have: '{host}'"))
                .advise("give the server's in the URI, as ?tls-hostname=NAME")
        })?;
        let dir = match &parameters.certificates {
            Some(dir) => dir.clone(),
            None => default_directory()?,
        };
        let unusable = |error: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Invalid, format!("Cannot use the TLS files ({error}) in")).on_path(&dir)
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .with_root_certificates(files::authorities(&dir)?);
        let mut config = if dir.join(CLIENT_CERTIFICATE).exists() {
            let identity = files::identity(&dir, CLIENT_CERTIFICATE, CLIENT_KEY)?;
            builder.with_client_cert_resolver(identity.resolver)
        } else {
            builder.with_no_client_auth()
        };
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), name })
    }

    /// Agrees on keys over `stream` and checks the server.
    ///
    /// # Errors
    /// `Denied` if the server is not who it should be, or will not have us; else what went wrong.
    pub fn connect<S: Read + Write>(&self, mut stream: S) -> Result<TlsStream<S>> {
        let refused = |error: io::Error| match Trouble::behind(&error) {
            Some(trouble) => Error::new(ErrorKind::Denied, format!("TLS with the server failed: {trouble}")),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Error::new(ErrorKind::Denied, "TLS with the server failed: it hung up in the middle of it")
            }
            None => Error::io("TLS with the server failed", error),
        };
        let mut connection = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| refused(Trouble::from(error).into()))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).map_err(refused)?;
        }
        Ok(TlsStream(StreamOwned::new(connection, stream)))
    }
}

/// The first place with a CA certificate of those where libnbd looks.
fn default_directory() -> Result<PathBuf> {
    let home = env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let of_user = home.iter().flat_map(|home| [home.join(".pki/libnbd"), home.join(".config/pki/libnbd")]);
    let of_system = Path::new("/etc/pki/libnbd").to_owned();
    of_user.chain([of_system]).find(|dir| dir.join(CA_CERTIFICATE).exists()).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "No ca-cert.pem to check the server's certificate by")
            .advise("give its directory in the URI, as nbds://HOST/EXPORT?tls-certificates=DIR")
    })
}

/// A blocking stream over TLS.
pub struct TlsStream<S: Read + Write>(StreamOwned<ClientConnection, S>);

impl<S: Read + Write> Read for TlsStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A server that refuses our certificate may say so only now.
        self.0.read(buffer).map_err(in_words)
    }
}

impl<S: Read + Write> Write for TlsStream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(in_words)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(in_words)
    }
}

fn in_words(error: io::Error) -> io::Error {
    Trouble::behind(&error).map_or(error, io::Error::from)
}
