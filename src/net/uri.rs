//! NBD URIs: an address and the name of an export, as the NBD URI specification writes them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

use super::address::{Address, authority, number};
use crate::proto::DEFAULT_PORT;

/// What a client connects to: an address and an export there (the empty name is the server's default export).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The name of the export, unescaped; empty for the default one.
    pub export: String,
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
    /// `nbd+vsock://[CID[:PORT]]/EXPORT` (without a CID it is the host of this virtual machine).
    ///
    /// # Errors
    /// `Invalid` if it is no such URI, `Unsupported` if it asks for TLS or for a transport this client has not.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("{why} in URI '{text}'"))
                .advise("write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| invalid("No '://'"))?;
        let rest = rest.split('#').next().unwrap_or_default();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(percent_decode(path).ok_or_else(|| invalid("Bad % escape"))?)
            .map_err(|_| invalid("Export name that is not UTF-8"))?;

        let mut socket = None;
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            if key == "socket" {
                socket =
                    Some(OsString::from_vec(percent_decode(value).ok_or_else(|| invalid("Bad % escape"))?));
            }
        }

        let address = match scheme.to_ascii_lowercase().as_str() {
            "nbd" if host.is_empty() => return Err(invalid("No host")),
            "nbd" => {
                let host = percent_decode(host).and_then(|bytes| String::from_utf8(bytes).ok());
                Address::tcp(&host.ok_or_else(|| invalid("Bad % escape"))?)?
            }
            "nbd+unix" if !host.is_empty() => {
                return Err(invalid("A host where a unix socket takes none"));
            }
            "nbd+unix" => {
                Address::unix(socket.filter(|s| !s.is_empty()).ok_or_else(|| invalid("No 'socket='"))?)?
            }
            "nbd+vsock" => {
                let (cid, port) = host.split_once(':').map_or((host, None), |(cid, port)| (cid, Some(port)));
                let cid = if cid.is_empty() { Some(Address::HOST_CID) } else { number(cid) };
                let port = port.map_or(Some(u32::from(DEFAULT_PORT)), number);
                match (cid, port) {
                    (Some(cid), Some(port)) => Address::Vsock { cid, port },
                    _ => return Err(invalid("Something other than the numbers CID:PORT")),
                }
            }
            "nbds" | "nbds+unix" | "nbds+vsock" => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("No support for {scheme}:// in '{text}'"),
                )
                .advise("use nbd:// or nbd+unix://"));
            }
            _ => return Err(invalid("Unknown scheme")),
        };
        Ok(Self { address, export })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = percent_encode(OsStr::new(&self.export));
        match &self.address {
            address if export.is_empty() => address.fmt(f),
            Address::Unix(path) => {
                write!(f, "nbd+unix:///{export}?socket={}", percent_encode(path.as_os_str()))
            }
            Address::Tcp { host, port } => write!(f, "nbd://{}/{export}", authority(host, *port)),
            Address::Vsock { cid, port } => write!(f, "nbd+vsock://{cid}:{port}/{export}"),
        }
    }
}

/// Escapes every byte that is not certain to pass unharmed through a URI's path or query, and through a shell's words.
pub(super) fn percent_encode(text: &OsStr) -> String {
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
fn percent_decode(text: &str) -> Option<Vec<u8>> {
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
            ("http://x/", "Unknown scheme"),
            ("nbd:///x", "No host"),
            ("nbd+unix:///x", "No 'socket='"),
            ("nbd+unix:///x?socket=", "No 'socket='"),
            ("nbd+unix://host/x?socket=/s", "takes none"),
            ("nbd+vsock://host/x", "CID:PORT"),
            ("nbd+vsock://3:x/", "CID:PORT"),
            ("nbd://h:1/%zz", "Bad % escape"),
            ("nbd://h:1/%", "Bad % escape"),
            ("nbd://h:1/%ff", "not UTF-8"),
            ("nbds://h:1/", "No support for nbds://"),
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
