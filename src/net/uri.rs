//! NBD URIs: an address and the name of an export, as the NBD URI specification writes them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

use super::address::{Address, authority, number};
use super::tls::TlsParameters;
use crate::proto::DEFAULT_PORT;

/// What a client connects to: an address and an export there (the empty name is the server's default export).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The name of the export, unescaped; empty for the default one.
    pub export: String,
    /// Whether the server must speak TLS (`nbds://`), and how it is checked.
    pub tls: Option<TlsParameters>,
}

impl From<Address> for Uri {
    /// The default export there, without TLS.
    fn from(address: Address) -> Self {
        Self { address, export: String::new(), tls: None }
    }
}

impl Uri {
    /// Whether `text` is meant as an NBD URI rather than as the path of a file.
    #[must_use]
    pub fn looks_like(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| {
            let scheme = scheme.to_ascii_lowercase();
            matches!(scheme.split('+').next(), Some("nbd" | "nbds"))
        })
    }
}

impl FromStr for Uri {
    type Err = Error;

    /// Reads `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH` and, as libnbd has it,
    /// `nbd+vsock://[CID[:PORT]]/EXPORT` (without a CID it is the host of this virtual machine), and the same with `nbds`:
    /// over TLS, then with `tls-certificates=DIR` and `tls-hostname=NAME`.
    ///
    /// # Errors
    /// `Invalid` if it is no such URI, `Unsupported` if it asks for a transport or for a kind of TLS that this client
    /// has not.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("{why} in URI '{text}'"))
                .advise("write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")
        };
        let unknown = || {
            invalid("Unknown scheme")
                .advise("there are nbd, nbd+unix, nbd+vsock, and the same with nbds for TLS")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| invalid("No '://'"))?;
        let rest = rest.split('#').next().unwrap_or_default();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(percent_decode(path).ok_or_else(|| invalid("Bad % escape"))?)
            .map_err(|_| invalid("Export name that is not UTF-8"))?;

        let scheme = scheme.to_ascii_lowercase();
        let (secure, transport) = match scheme.split_once('+') {
            Some((protocol, transport)) => (protocol, transport),
            None => (scheme.as_str(), ""),
        };
        let secure = match secure {
            "nbd" => false,
            "nbds" => true,
            _ => return Err(unknown()),
        };
        let mut socket = None;
        let mut tls = TlsParameters::default();
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = percent_decode(value).ok_or_else(|| invalid("Bad % escape"))?;
            match key {
                "socket" => socket = Some(OsString::from_vec(value)),
                "tls-certificates" => tls.certificates = Some(OsString::from_vec(value).into()),
                "tls-hostname" => {
                    let name =
                        String::from_utf8(value).map_err(|_| invalid("Host name that is not UTF-8"))?;
                    tls.hostname = Some(name);
                }
                // What would weaken TLS is not passed over.
                "tls-verify-peer" if secure && !matches!(&value[..], b"1" | b"true" | b"yes" | b"on") => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("No way to leave the server unchecked, as URI '{text}' asks for"),
                    )
                    .advise("give a CA certificate with tls-certificates=DIR"));
                }
                "tls-type" if secure && value != b"x509" => return Err(unsupported_tls(text)),
                "tls-psk-file" if secure => return Err(unsupported_tls(text)),
                _ => {}
            }
        }

        let address = match transport {
            "" if host.is_empty() => return Err(invalid("No host")),
            "" => {
                let host = percent_decode(host).and_then(|bytes| String::from_utf8(bytes).ok());
                Address::tcp(&host.ok_or_else(|| invalid("Bad % escape"))?)?
            }
            "unix" if !host.is_empty() => {
                return Err(invalid("A host where a unix socket takes none"));
            }
            "unix" => {
                Address::unix(socket.filter(|s| !s.is_empty()).ok_or_else(|| invalid("No 'socket='"))?)?
            }
            "vsock" => {
                let (cid, port) = host.split_once(':').map_or((host, None), |(cid, port)| (cid, Some(port)));
                let cid = if cid.is_empty() { Some(Address::HOST_CID) } else { number(cid) };
                let port = port.map_or(Some(u32::from(DEFAULT_PORT)), number);
                match (cid, port) {
                    (Some(cid), Some(port)) => Address::Vsock { cid, port },
                    _ => return Err(invalid("Something other than the numbers CID:PORT")),
                }
            }
            _ => return Err(unknown()),
        };
        Ok(Self { address, export, tls: secure.then_some(tls) })
    }
}

fn unsupported_tls(text: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("No support for TLS without certificates in URI '{text}'"))
        .advise("use certificates (tls-certificates=DIR)")
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = percent_encode(OsStr::new(&self.export));
        let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
        match &self.address {
            address if export.is_empty() => f.write_str(&address.uri(self.tls.is_some()))?,
            Address::Unix(path) => {
                write!(f, "{scheme}+unix:///{export}?socket={}", percent_encode(path.as_os_str()))?;
            }
            Address::Tcp { host, port } => write!(f, "{scheme}://{}/{export}", authority(host, *port))?,
            Address::Vsock { cid, port } => write!(f, "{scheme}+vsock://{cid}:{port}/{export}")?,
        }
        let mut separator = if matches!(self.address, Address::Unix(_)) { '&' } else { '?' };
        let tls = self.tls.iter();
        let certificates = tls.clone().filter_map(|tls| tls.certificates.as_deref().map(Path::as_os_str));
        let names = tls.filter_map(|tls| tls.hostname.as_deref().map(OsStr::new));
        let parameters = certificates.map(|dir| ("tls-certificates", dir));
        for (key, value) in parameters.chain(names.map(|name| ("tls-hostname", name))) {
            write!(f, "{separator}{key}={}", percent_encode(value))?;
            separator = '&';
        }
        Ok(())
    }
}

/// Escapes every byte that is not certain to pass unharmed through a URI's path or query, and through a shell's words.
pub(crate) fn percent_encode(text: &OsStr) -> String {
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/@:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The bytes behind the escapes; `None` if a `%` is not followed by two hexadecimal digits.
pub(crate) fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            u8::try_from(high << 4 | low).ok()?
        } else {
            byte
        });
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_round_trip() {
        for text in [
            "nbd://127.0.0.1:10809",
            "nbd://localhost:10809/root",
            "nbd://[::1]:1/root@a-b.c",
            "nbd://[fe80::1%25eth0]:1/x",
            "nbd+unix:///?socket=/run/memdev.sock",
            "nbd+unix:///a%20b/c?socket=/run/my%20disk.sock",
            "nbd+unix:///?socket=relative.sock",
            "nbd+vsock://3:10809/root",
            "nbds://localhost:10809/root",
            "nbds://localhost:10809/root?tls-certificates=/etc/pki/a%20b&tls-hostname=host.example",
            "nbds+unix:///root?socket=/run/s&tls-hostname=host.example",
            "nbds+unix:///?socket=/run/s&tls-certificates=/etc/pki",
            "nbds+vsock://3:10809/root?tls-hostname=host.example",
        ] {
            let uri: Uri = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(uri.to_string(), text);
            assert!(Uri::looks_like(text));
        }
    }

    #[test]
    fn forms_that_other_tools_write() {
        let uri: Uri = "nbd://example.org".parse().unwrap();
        assert_eq!(uri.address, Address::tcp("example.org:10809").unwrap());
        let uri: Uri = "nbd://example.org/".parse().unwrap();
        assert_eq!(uri.export, "");
        let uri: Uri = "NBD+unix:///?tls-type=x&socket=%2Frun%2fs".parse().unwrap();
        assert_eq!(uri.address, Address::unix("/run/s").unwrap());
        for (text, cid, port) in
            [("nbd+vsock:///", 2, 10809), ("nbd+vsock://5/x", 5, 10809), ("nbd+vsock://:7/", 2, 7)]
        {
            let uri: Uri = text.parse().unwrap();
            assert_eq!(uri.address, Address::Vsock { cid, port }, "{text}");
        }
    }

    #[test]
    fn what_is_no_nbd_uri_is_refused() {
        for (text, why) in [
            ("/run/s", "No '://'"),
            ("http://x/", "Unknown scheme in URI 'http://x/'; there are nbd, nbd+unix, nbd+vsock"),
            ("nbd:///x", "No host"),
            ("nbd+unix:///x", "No 'socket='"),
            ("nbd+unix:///x?socket=", "No 'socket='"),
            ("nbd+unix://host/x?socket=/s", "takes none"),
            ("nbd+vsock://host/x", "CID:PORT"),
            ("nbd+vsock://3:x/", "CID:PORT"),
            ("nbd://h:1/%zz", "Bad % escape"),
            ("nbd://h:1/%", "Bad % escape"),
            ("nbd://h:1/%ff", "not UTF-8"),
            ("nbdx://h:1/", "Unknown scheme"),
            ("nbd+tcp://h:1/", "Unknown scheme"),
            ("nbds:///x", "No host"),
            ("nbds+unix:///x", "No 'socket='"),
            ("nbds://h:1/?tls-verify-peer=0", "unchecked"),
            ("nbds://h:1/?tls-verify-peer=false", "unchecked"),
            ("nbds://h:1/?tls-psk-file=/x", "without certificates"),
            ("nbds://h:1/?tls-type=anon", "without certificates"),
            ("nbds://h:1/?tls-hostname=%ff", "not UTF-8"),
            ("nbd://h:99999/", "over 65535"),
        ] {
            let error = text.parse::<Uri>().expect_err(text);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
        assert!(!Uri::looks_like("/a/nbd://x"));
        assert!(!Uri::looks_like("disk.img"));
        assert!(Uri::looks_like("nbds://x"));
    }
}
