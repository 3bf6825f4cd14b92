//! An address to listen on or to connect to, as people type it and as a URI.

use std::ffi::OsStr;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::DEFAULT_PORT;

use super::uri::percent_encode;

/// The longest path of a unix socket, in bytes: `sun_path` has 108, one of which ends the string.
pub(super) const UNIX_PATH_MAX: usize = 107;

/// Where a server listens. Shown as the URI that a client connects to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP port of a host.
    Tcp {
        /// A name or a numeric address, IPv6 without its brackets.
        host: String,
        /// The port; 0 lets the kernel choose one when listening.
        port: u16,
    },
    /// A port of a virtual machine, or of its host (`AF_VSOCK`).
    Vsock {
        /// The machine's context id: 2 is the host; [`Address::ANY_CID`] stands for any of this machine's own.
        cid: u32,
        /// The port; 0 lets the kernel choose one when listening.
        port: u32,
    },
}

impl Address {
    /// The context id that stands for any of this machine's own (`VMADDR_CID_ANY`).
    pub const ANY_CID: u32 = u32::MAX;
    /// The context id of the host, seen from a virtual machine (`VMADDR_CID_HOST`).
    pub const HOST_CID: u32 = 2;

    /// The unix socket at `path`.
    ///
    /// # Errors
    /// `Invalid` if the path is empty, holds a NUL byte or is longer than the 107 bytes that a socket address holds.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "The path of a unix socket is empty"));
        }
        if bytes.contains(&0) {
            return Err(Error::new(ErrorKind::Invalid, "The path of a unix socket holds a NUL byte"));
        }
        if bytes.len() > UNIX_PATH_MAX {
            let why =
                format!("The path of a unix socket has {} bytes and may have {UNIX_PATH_MAX}", bytes.len());
            return Err(Error::new(ErrorKind::Invalid, why).advise("use a shorter one"));
        }
        Ok(Self::Unix(path))
    }

    /// The TCP address written `HOST:PORT`, `HOST` (then the port is [`DEFAULT_PORT`]), `[IPV6]:PORT` or `[IPV6]`.
    /// The host is not looked up here.
    ///
    /// # Errors
    /// `Invalid` if it is written in no such way.
    pub fn tcp(text: &str) -> Result<Self> {
        let invalid = |why: &str, advice| {
            Err(Error::new(ErrorKind::Invalid, format!("{why} in address '{text}'")).advise(advice))
        };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let Some((host, after)) = rest.split_once(']') else {
                return invalid("No ']'", "write [::1]:10809");
            };
            let number = host.split('%').next().unwrap_or_default();
            if number.parse::<Ipv6Addr>().is_err() {
                return invalid("No IPv6 address between the brackets", "write [::1]:10809");
            }
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return invalid("Something other than a port follows the ']'", "write [::1]:10809"),
            }
        } else if text.matches(':').count() > 1 {
            return invalid("More than one ':'", "put an IPv6 address in brackets: [::1]:10809");
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() {
            return invalid("No host", "write 127.0.0.1:10809, or 0.0.0.0:10809 for every IPv4 address");
        }
        // A lone number is a forgotten host rather than the host that inet_aton would make of it.
        if port.is_none() && host.bytes().all(|b| b.is_ascii_digit()) {
            return invalid("No host", "write HOST:PORT, as 127.0.0.1:10809");
        }
        if host.chars().any(|c| c.is_whitespace() || c.is_control() || "/?#@\\".contains(c)) {
            return invalid("No host name", "write HOST:PORT, as 127.0.0.1:10809");
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                match digits.parse() {
                    Ok(port) => port,
                    Err(_) => return invalid("Port over 65535", "write HOST:PORT, as 127.0.0.1:10809"),
                }
            }
            Some(_) => return invalid("No port number", "write HOST:PORT, as 127.0.0.1:10809"),
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }

    /// The vsock address to listen on that is written `CID:PORT`, or `PORT` for every context id of this machine.
    ///
    /// # Errors
    /// `Invalid` if it is written in no such way.
    pub fn vsock(text: &str) -> Result<Self> {
        let (cid, port) = match text.split_once(':') {
            Some((cid, port)) => (number(cid), number(port)),
            None => (Some(Self::ANY_CID), number(text)),
        };
        match (cid, port) {
            // The highest port stands for any, which is written 0 here as with TCP.
            (Some(cid), Some(port)) if port < u32::MAX => Ok(Self::Vsock { cid, port }),
            _ => Err(Error::new(ErrorKind::Invalid, format!("No vsock address: '{text}'"))
                .advise("write PORT or CID:PORT, both numbers, as 10809 or 3:10809")),
        }
    }
}

/// A decimal number of nothing but digits.
pub(super) fn number(digits: &str) -> Option<u32> {
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

impl Address {
    /// The address as an NBD URI without an export: `nbd://127.0.0.1:10809`, `nbd+unix:///?socket=/run/memdev.sock`;
    /// `nbd+vsock://3:10809`; with TLS (`secure`) they begin with `nbds`.
    #[must_use]
    pub fn uri(&self, secure: bool) -> String {
        let scheme = if secure { "nbds" } else { "nbd" };
        match self {
            Self::Unix(path) => format!("{scheme}+unix:///?socket={}", percent_encode(path.as_os_str())),
            Self::Tcp { host, port } => format!("{scheme}://{}", authority(host, *port)),
            Self::Vsock { cid, port } => format!("{scheme}+vsock://{cid}:{port}"),
        }
    }
}

impl fmt::Display for Address {
    /// As [`Address::uri`], without TLS.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri(false))
    }
}

/// `host:port` as a URI has it: IPv6 in brackets, the `%` before its zone escaped.
pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{}]:{port}", host.replace('%', "%25"))
    } else {
        format!("{}:{port}", percent_encode(OsStr::new(host)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn tcp_addresses_as_people_write_them() {
        for (text, host, port, uri) in [
            ("127.0.0.1:10809", "127.0.0.1", 10809, "nbd://127.0.0.1:10809"),
            ("localhost:0", "localhost", 0, "nbd://localhost:0"),
            ("localhost", "localhost", 10809, "nbd://localhost:10809"),
            ("[::1]:65535", "::1", 65535, "nbd://[::1]:65535"),
            ("[::]", "::", 10809, "nbd://[::]:10809"),
            ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, "nbd://[fe80::1%25eth0]:1"),
        ] {
            let address = Address::tcp(text).unwrap();
            assert_eq!(address, tcp(host, port), "{text}");
            assert_eq!(address.to_string(), uri, "{text}");
        }
    }

    #[test]
    fn what_is_no_tcp_address_is_refused_with_advice() {
        for (text, why) in [
            ("", "No host"),
            (":10809", "No host"),
            ("10809", "No host"),
            ("::1", "brackets"),
            ("::1:10809", "brackets"),
            ("[::1", "No ']'"),
            ("[localhost]:1", "No IPv6"),
            ("[::1]10809", "follows"),
            ("host:", "No port"),
            ("host:http", "No port"),
            ("host:+1", "No port"),
            ("host:65536", "over 65535"),
            ("a b:1", "No host name"),
            ("user@host:1", "No host name"),
            ("//host:1", "No host name"),
        ] {
            let error = Address::tcp(text).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn unix_paths_are_measured_and_escaped() {
        let address = Address::unix("/run/my disk&1%.sock").unwrap();
        assert_eq!(address.to_string(), "nbd+unix:///?socket=/run/my%20disk%261%25.sock");
        assert!(Address::unix("a".repeat(UNIX_PATH_MAX)).is_ok());
        let error = Address::unix("a".repeat(UNIX_PATH_MAX + 1)).unwrap_err();
        assert!(error.to_string().contains("has 108 bytes and may have 107"), "{error}");
        assert!(Address::unix("").is_err());
        assert!(Address::unix("a\0b").is_err());
    }
    #[test]
    fn vsock_addresses_are_numbers() {
        for (text, cid, port, uri) in [
            ("10809", Address::ANY_CID, 10809, "nbd+vsock://4294967295:10809"),
            ("3:10809", 3, 10809, "nbd+vsock://3:10809"),
            ("2:0", 2, 0, "nbd+vsock://2:0"),
            ("4294967295:4294967294", Address::ANY_CID, u32::MAX - 1, "nbd+vsock://4294967295:4294967294"),
        ] {
            let address = Address::vsock(text).unwrap();
            assert_eq!(address, Address::Vsock { cid, port }, "{text}");
            assert_eq!(address.to_string(), uri);
        }
        for text in ["", ":", "3:", ":1", "host:1", "+3:1", "3:-1", "1:2:3", "4294967296:1", "3:4294967295"] {
            let error = Address::vsock(text).expect_err(text);
            assert!(error.to_string().contains("write PORT or CID:PORT"), "{text}: {error}");
        }
    }
}
