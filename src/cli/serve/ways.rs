//! Where clients come in: addresses that were typed, sockets of a service manager, one connection that is there already.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::{PathBufValueParser, TypedValueParser};
use memdev::confine::Confinement;
use memdev::control::Client;
use memdev::net::{Address, Listener, Stream};
use memdev::takeover::{Bridge, Offer};
use memdev::worker::Server;
use memdev::{Error, ErrorKind, Result, proto};

use super::{confine, duration};

#[derive(Args, Debug)]
#[command(next_help_heading = "Addresses")]
pub(super) struct Ways {
    /// Listen on a unix socket (repeatable); unless --unix-mode says otherwise, only its owner can connect
    ///
    /// A socket that a dead server left behind is replaced. The socket is removed when the server ends.
    #[arg(long, value_name = "PATH", value_parser = PathBufValueParser::new().try_map(unix_path))]
    unix: Vec<PathBuf>,

    /// Permissions of the unix sockets; who may write may connect
    #[arg(long, value_name = "OCTAL", default_value = "0600", value_parser = mode)]
    unix_mode: u32,

    /// Listen on a TCP address (repeatable) [default: 127.0.0.1:10809]
    ///
    /// That is HOST:PORT; IPv6 in brackets, as [::1]:10809. Without a port it is 10809; port 0 lets the system choose
    /// one, which is then shown. Other addresses than loopback need encryption (--tls-certificates), or --insecure.
    #[arg(long, value_name = "HOST:PORT", value_parser = Address::tcp)]
    tcp: Vec<Address>,

    /// Listen on a port for virtual machines on this host, or for the host of this one (repeatable)
    ///
    /// Without a CID, on every one that this machine has. Port 0 lets the system choose one, which is then shown.
    #[arg(long, value_name = "[CID:]PORT", value_parser = Address::vsock)]
    vsock: Vec<Address>,

    /// Let the network in without encryption: whoever can connect, or listen in, can read the images
    #[arg(long)]
    insecure: bool,

    /// Serve the connected socket that is open as descriptor N, and end when it does
    ///
    /// For programs that start a server for themselves, with one end of a socket pair as its standard input (0) or any
    /// other descriptor.
    #[arg(
        long, value_name = "N", conflicts_with_all = ["unix", "tcp", "vsock"],
        value_parser = clap::value_parser!(i32).range(0..)
    )]
    fd: Option<i32>,

    /// Answer 'memdev ps' and the other commands for live sessions on a unix socket
    ///
    /// It speaks HTTP with JSON (docs/control-api.md), to the server's own user and root only. It is removed when the
    /// server ends.
    #[arg(long, value_name = "PATH", value_parser = PathBufValueParser::new().try_map(unix_path))]
    control: Option<PathBuf>,

    /// Take the place of the server at the control socket, which goes on serving the clients that it has until they have left
    ///
    /// Its addresses are this server's from then on; with addresses given, those, of which it keeps the sockets that are
    /// open already. No connection is refused meanwhile.
    #[arg(long, requires = "control")]
    takeover: bool,

    /// With --takeover: the time after which the other server hangs up on those who are still there
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, requires = "takeover")]
    drain_timeout: Option<Duration>,
}

/// The server that this one is going to take the place of.
pub(super) struct Predecessor {
    client: Client,
    version: String,
    pid: u32,
    /// Those of its sockets that are not wanted any more.
    pub(super) unwanted: Vec<Listener>,
    bridge: (Bridge, OwnedFd),
    drain_timeout: Option<Duration>,
}

impl Predecessor {
    /// Takes its place: from here on it accepts nobody any more, and `server` has to.
    pub(super) fn commit(self, server: &Server) -> Result<()> {
        let Self { mut client, version, pid, mut unwanted, bridge: (bridge, theirs), drain_timeout } = self;
        let taken = client.commit_takeover(theirs, drain_timeout)?;
        tracing::info!(version, pid, sessions = taken.sessions.len(), "Takes a server's place");
        server.succeed(taken, bridge);
        // With their files.
        unwanted.iter_mut().for_each(Listener::own);
        Ok(())
    }
}

/// What the process was started with.
pub(super) struct Inherited {
    listeners: Vec<Listener>,
    connection: Option<Stream>,
}

/// Where clients come in.
pub(super) struct WaysIn {
    pub(super) listeners: Vec<Listener>,
    pub(super) connections: Vec<Stream>,
    pub(super) control: Option<Listener>,
    pub(super) predecessor: Option<Predecessor>,
}

impl Ways {
    /// Takes the sockets that this process was started with. Call it before anything else is opened or started.
    pub(super) fn take_inherited(&self) -> Result<Inherited> {
        let listeners = Listener::inherited()?;
        let connection = self.fd.map(Stream::inherited).transpose()?;
        if connection.is_some() && !listeners.is_empty() {
            let why = "Cannot serve one connection (--fd) and listen on the sockets of a service manager";
            return Err(Error::new(ErrorKind::Invalid, why).advise("leave one of the two away"));
        }
        Ok(Inherited { listeners, connection })
    }

    /// Refuses an address that is given twice: the second would meet the first, as if another server were there.
    pub(super) fn check_distinct(&self) -> Result<(), String> {
        let unix = |path: &PathBuf| Address::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone()));
        let sockets = self.unix.iter().map(|path| ("--unix", unix(path)));
        let control = self.control.iter().map(|path| ("--control", unix(path)));
        let tcp = self.tcp.iter().map(|address| ("--tcp", address.clone()));
        let vsock = self.vsock.iter().map(|address| ("--vsock", address.clone()));
        let mut seen: Vec<(&str, Address)> = Vec::new();
        for (option, address) in sockets.chain(tcp).chain(vsock).chain(control) {
            // Each time another one.
            if matches!(address, Address::Tcp { port: 0, .. } | Address::Vsock { port: 0, .. }) {
                continue;
            }
            if let Some((first, _)) = seen.iter().find(|(_, other)| *other == address) {
                let shown = match &address {
                    Address::Unix(path) => path.display().to_string(),
                    other => other.to_string(),
                };
                return Err(match *first == option {
                    true => format!("{option} {shown} is given twice; leave one of the two away"),
                    false => format!("{shown} is given with {first} and with {option}; choose two paths"),
                });
            }
            seen.push((option, address));
        }
        Ok(())
    }

    /// Begins to listen; every connection is going to be `encrypted`, or not.
    pub(super) fn open(
        &self,
        inherited: Inherited,
        confinement: &Confinement,
        encrypted: bool,
    ) -> Result<WaysIn> {
        let Inherited { mut listeners, connection } = inherited;
        let (mut offered, mut predecessor) = match &self.control {
            Some(control) if self.takeover => {
                let (offered, predecessor) = ask(control, self.drain_timeout)?;
                (offered, Some(predecessor))
            }
            _ => (Vec::new(), None),
        };
        let mut control_listener = predecessor.as_ref().and_then(|_| offered.pop());
        // Of what is there already nothing is made anew.
        let mut there = |address: &Address| -> Vec<Listener> {
            offered.extract_if(.., |listener| listener.stands_for(address)).collect()
        };
        for path in &self.unix {
            match there(&Address::Unix(path.clone())) {
                found if found.is_empty() => {
                    listeners.push(confine::bind_unix(path, self.unix_mode, confinement)?);
                }
                found => listeners.extend(found),
            }
        }
        for address in self.tcp.iter().chain(&self.vsock) {
            match there(address) {
                found if found.is_empty() => listeners.extend(Listener::bind_all(address)?),
                found => listeners.extend(found),
            }
        }
        if let Some(predecessor) = &mut predecessor {
            if listeners.is_empty() {
                listeners.append(&mut offered);
            }
            predecessor.unwanted = offered;
        }
        let connections = Vec::from_iter(connection);
        if listeners.is_empty() && connections.is_empty() {
            let default = Address::Tcp { host: "127.0.0.1".into(), port: proto::DEFAULT_PORT };
            listeners.extend(Listener::bind_all(&default)?);
        }
        check_exposure(&listeners, encrypted, self.insecure)?;
        if let (None, Some(path)) = (&control_listener, &self.control) {
            control_listener = Some(confine::bind_unix(path, Listener::UNIX_MODE, confinement)?);
        }
        Ok(WaysIn { listeners, connections, control: control_listener, predecessor })
    }
}

/// Asks the server at the control socket for its place: its listeners, that of the control socket last.
fn ask(control: &Path, drain_timeout: Option<Duration>) -> Result<(Vec<Listener>, Predecessor)> {
    let mut client = Client::connect(control)?;
    let (Offer { version, pid, files }, sockets) = client.take_over()?;
    if files.len() != sockets.len() {
        let why = format!("What answers at {} does not share its sockets", control.display());
        return Err(
            Error::new(ErrorKind::Protocol, why).advise("stop it, and start this one without --takeover")
        );
    }
    let offered = sockets.into_iter().zip(files);
    let listeners = offered.map(|(socket, file)| Listener::offered(socket, file)).collect::<Result<_>>()?;
    let bridge = Bridge::pair()?;
    Ok((listeners, Predecessor { client, version, pid, unwanted: Vec::new(), bridge, drain_timeout }))
}

/// Refuses to let the network in unless every connection is `encrypted`, or the person has said that it is to be so.
/// Nothing was accepted yet, so nobody has got anything.
fn check_exposure(listeners: &[Listener], encrypted: bool, insecure: bool) -> Result<()> {
    match listeners.iter().find(|listener| !listener.is_local()) {
        Some(listener) if !encrypted && !insecure => {
            let why = format!("Will not listen on {} without encryption", listener.uri());
            Err(Error::new(ErrorKind::Denied, why).advise(
                "listen on 127.0.0.1, demand TLS (--tls-certificates), or add --insecure if everybody on that \
                 network may read the images",
            ))
        }
        _ => Ok(()),
    }
}

fn unix_path(path: PathBuf) -> Result<PathBuf> {
    Address::unix(path.clone()).map(|_| path)
}

fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|&mode| mode <= 0o777 && !text.starts_with('+'))
        .ok_or_else(|| "not permissions; write them in octal, as 0600 or 0660".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!((mode("0600"), mode("660"), mode("0")), (Ok(0o600), Ok(0o660), Ok(0)));
        for text in ["", "0o600", "rw", "1000", "888", "-1", "+600", "01777"] {
            assert!(mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_network_is_let_in_when_it_is_encrypted_or_wanted() {
        let bind = |address: &str| Listener::bind(&Address::tcp(address).unwrap()).unwrap();
        let loopback = [bind("127.0.0.1:0"), bind("127.1.2.3:0")];
        assert!(check_exposure(&loopback, false, false).is_ok());
        let all = [bind("127.0.0.1:0"), bind("0.0.0.0:0")];
        assert!(check_exposure(&all, true, false).is_ok());
        assert!(check_exposure(&all, false, true).is_ok());
        let error = check_exposure(&all, false, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("nbd://0.0.0.0:"), "{error}");
    }
}
