//! Tells a service manager how far the server is (`sd_notify(3)`), if one wants to know: `NOTIFY_SOCKET` says where.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// A line to the service manager. Kept open, so that the last word needs nothing that the server may have given up.
pub(super) struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// A line to whom the environment names. One that cannot be reached is no reason not to serve.
    pub(super) fn from_environment() -> Self {
        Self(env::var_os("NOTIFY_SOCKET").and_then(|name| match connect(name.as_bytes()) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, "Cannot reach the service manager at {name:?}");
                None
            }
        }))
    }

    /// Clients can connect.
    pub(super) fn ready(&self) {
        self.say("READY=1");
    }

    /// Clients can connect, and this process is the service from now on, instead of another one.
    pub(super) fn ready_instead(&self) {
        self.say(&format!("MAINPID={}\nREADY=1", std::process::id()));
    }

    /// The server is about to end.
    pub(super) fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, what: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(what.as_bytes())
        {
            tracing::warn!(%error, "Cannot tell the service manager {what}");
        }
    }
}

fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "neither a path nor an abstract name")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_names_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let abstract_name = format!("memdev notify {}", std::process::id());
        let cases = [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str().as_bytes().to_vec()),
            (
                UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap(),
                format!("@{abstract_name}").into_bytes(),
            ),
        ];
        for (manager, name) in cases {
            let notifier = Notifier(Some(connect(&name).unwrap()));
            notifier.ready();
            let mut got = [0; 64];
            let length = manager.recv(&mut got).unwrap();
            assert_eq!(&got[..length], b"READY=1");
        }
        assert!(connect(b"relative").is_err() && connect(b"").is_err());
    }
}
