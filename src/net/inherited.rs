//! Listening sockets that a service manager has bound and hands over when it starts this process (`sd_listen_fds(3)`).
//!
//! `LISTEN_FDS` says how many there are, from descriptor 3 on; `LISTEN_PID` for which process, so that they are not
//! taken by a child that merely inherited the variables; `LISTEN_FDNAMES` what they are called.

use std::env::{self, VarError};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, ipproto, sockopt};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::inherited;
use crate::sys::vsock::VsockAddr;

use super::listener::{tcp_address, vsock_address};
use super::{Address, Listener};

/// `SD_LISTEN_FDS_START`.
const FIRST: i32 = 3;
/// More sockets than this are a slip: the variable was not meant as a number of sockets.
const MOST: i32 = 1024;

const FDS: &str = "LISTEN_FDS";
const PID: &str = "LISTEN_PID";
const NAMES: &str = "LISTEN_FDNAMES";
/// All that a service manager may set about sockets.
const VARIABLES: [&str; 4] = [FDS, PID, NAMES, "LISTEN_PIDFDID"];

impl Listener {
    /// The listening sockets that a service manager started this process with; none if it was not started so. Also takes
    /// the variables that say so out of the environment. Call it once, before any thread is started.
    ///
    /// # Errors
    /// `Invalid` when the variables make no sense, or when something was handed over that is no listening stream socket.
    pub fn inherited() -> Result<Vec<Self>> {
        let count = count(&variable(PID)?, &variable(FDS)?);
        let names = variable(NAMES)?;
        if [PID, FDS, NAMES].iter().any(|name| env::var_os(name).is_some())
            && !inherited::remove_variables(&VARIABLES)
        {
            tracing::debug!("the variables of the service manager stay in the environment");
        }
        let names = names.unwrap_or_default();
        let mut names = names.split(':');
        (FIRST..FIRST + count?)
            .map(|number| {
                let name = match names.next().unwrap_or_default() {
                    "" => format!("descriptor {number}"),
                    name => format!("descriptor {number} ('{name}')"),
                };
                let taken = inherited::take(number)
                    .map_err(|error| Error::io("Cannot take over", error).on(&name).advise(SET_UP))?;
                Self::take_over(taken, &name)
            })
            .collect()
    }

    /// Makes a listener of a socket that should be one already.
    pub(super) fn take_over(fd: OwnedFd, name: &str) -> Result<Self> {
        let unfit = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("Cannot listen on {name}: {why}")).advise(SET_UP)
        };
        let system = |errno: Errno| match errno {
            Errno::NOTSOCK => unfit("it is no socket"),
            errno => Error::io("Cannot listen on", errno).on(name),
        };
        if sockopt::socket_type(&fd).map_err(system)? != SocketType::STREAM {
            return Err(unfit("it is no stream socket"));
        }
        let family = sockopt::socket_domain(&fd).map_err(system)?;
        if !sockopt::socket_acceptconn(&fd).map_err(system)? {
            return Err(unfit("it does not listen"));
        }
        let bound = rustix::net::getsockname(&fd).map_err(system)?;
        let address = match family {
            AddressFamily::UNIX => unix_address(&SocketAddrUnix::try_from(bound).map_err(system)?),
            AddressFamily::INET | AddressFamily::INET6 => {
                // There are other streams over IP, with other options.
                if sockopt::socket_protocol(&fd).map_err(system)? != Some(ipproto::TCP) {
                    return Err(unfit("it is a stream socket, but not of TCP"));
                }
                tcp_address(SocketAddr::try_from(bound).map_err(system)?)
            }
            AddressFamily::VSOCK => match VsockAddr::from_any(&bound) {
                Some(bound) => vsock_address(bound),
                None => return Err(unfit("it has no address")),
            },
            _ => return Err(unfit("it is neither a unix nor a TCP nor a vsock socket")),
        };
        rustix::io::ioctl_fionbio(&fd, true).map_err(system)?;
        Ok(Self::adopted(fd, address))
    }
}

const SET_UP: &str = "let the socket unit have ListenStream= and Accept=no";

fn variable(name: &str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(Error::new(ErrorKind::Invalid, format!("{name} is no text"))),
    }
}

/// How many sockets there are for this process.
fn count(pid: &Option<String>, fds: &Option<String>) -> Result<i32> {
    let (Some(pid), Some(fds)) = (pid, fds) else { return Ok(0) };
    let invalid = |name: &str, value: &str| {
        Error::new(ErrorKind::Invalid, format!("{name} is '{value}', not a number that it could be"))
            .advise("unset it, or start memdev by a service manager")
    };
    let pid: u32 = pid.parse().map_err(|_| invalid(PID, pid))?;
    if pid != std::process::id() {
        // Meant for a process that has started this one.
        return Ok(0);
    }
    fds.parse().ok().filter(|count| (0..=MOST).contains(count)).ok_or_else(|| invalid(FDS, fds))
}

/// A socket without a file has a name that begins with NUL, which is how a URI writes it, too.
fn unix_address(bound: &SocketAddrUnix) -> Address {
    let name = match (bound.path_bytes(), bound.abstract_name()) {
        (Some(path), _) => path.to_vec(),
        (None, Some(name)) => [&[0][..], name].concat(),
        (None, None) => Vec::new(),
    };
    Address::Unix(PathBuf::from(std::ffi::OsString::from_vec(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn counted(pid: &str, fds: &str) -> Result<i32> {
        count(&Some(pid.to_owned()), &Some(fds.to_owned()))
    }

    #[test]
    fn only_what_is_meant_for_this_process_counts() {
        let own = std::process::id().to_string();
        assert_eq!(counted(&own, "3").unwrap(), 3);
        assert_eq!(counted(&own, "0").unwrap(), 0);
        assert_eq!(counted("1", "3").unwrap(), 0);
        assert_eq!(count(&None, &Some("3".into())).unwrap(), 0);
        assert_eq!(count(&Some(own.clone()), &None).unwrap(), 0);
        for (pid, fds) in [(own.as_str(), "x"), (&own, "-1"), (&own, "1025"), (&own, ""), ("me", "1")] {
            assert_eq!(counted(pid, fds).unwrap_err().kind(), ErrorKind::Invalid, "{pid} {fds}");
        }
    }

    #[test]
    fn listening_stream_sockets_are_taken_over_with_their_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = Listener::take_over(UnixListener::bind(&path).unwrap().into(), "x").unwrap();
        assert_eq!(unix.address(), &Address::Unix(path.clone()));
        assert!(unix.is_local() && unix.accept().unwrap().is_none(), "it does not wait");
        drop(unix);
        assert!(path.exists(), "the file is whose it was");

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("nbd://{}", tcp.local_addr().unwrap());
        let tcp = Listener::take_over(tcp.into(), "x").unwrap();
        assert_eq!(tcp.uri(), uri);
        assert!(tcp.is_local());
        let all = Listener::take_over(TcpListener::bind("0.0.0.0:0").unwrap().into(), "x").unwrap();
        assert!(!all.is_local());
    }

    #[test]
    fn a_socket_without_a_file_has_a_uri_too() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("memdev test {}", std::process::id());
        let addr = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = Listener::take_over(UnixListener::bind_addr(&addr).unwrap().into(), "x").unwrap();
        assert_eq!(listener.uri(), format!("nbd+unix:///?socket=%00{}", name.replace(' ', "%20")));
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let (one, _other) = UnixStream::pair().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let cases: [(OwnedFd, &str); 5] = [
            (std::fs::File::open("/dev/null").unwrap().into(), "no socket"),
            (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "no stream socket"),
            (UnixDatagram::unbound().unwrap().into(), "no stream socket"),
            (one.into(), "does not listen"),
            (stream.into(), "does not listen"),
        ];
        for (fd, why) in cases {
            let error = Listener::take_over(fd, "descriptor 3").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert_eq!(
                error.to_string(),
                format!("Cannot listen on descriptor 3: it is {why}; {SET_UP}")
                    .replace("it is does", "it does")
            );
        }
    }
}
