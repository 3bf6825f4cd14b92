//! Addresses of the sockets between a virtual machine and its host (`AF_VSOCK`), which rustix has no type for.
//!
//! # Safety
//! A `sockaddr_vm` is plain numbers; it is given to the kernel with its own size, and read back only from an address that
//! says it is one and has the size of one.

use std::fs::File;
use std::mem;
use std::os::fd::AsRawFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny};

/// Bytes of a `sockaddr_vm`.
const LENGTH: SocketAddrLen = 16;
const _: () = assert!(mem::size_of::<libc::sockaddr_vm>() == LENGTH as usize);
/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID` of `linux/vm_sockets.h`: `_IO(7, 0xb9)`.
const GET_LOCAL_CID: libc::Ioctl = 0x7b9;

/// Where a vsock socket is: a machine and a port of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VsockAddr {
    /// The machine's context id; `u32::MAX` for any of this machine's own.
    pub(crate) cid: u32,
    /// The port; `u32::MAX` lets the kernel choose one.
    pub(crate) port: u32,
}

impl VsockAddr {
    /// The vsock address that `addr` is, if it is one.
    pub(crate) fn from_any(addr: &SocketAddrAny) -> Option<Self> {
        if addr.address_family() != AddressFamily::VSOCK || addr.addr_len() < LENGTH {
            return None;
        }
        // SAFETY: `addr` has `addr_len` initialised bytes behind the pointer, which are as many as a `sockaddr_vm` has;
        // every bit pattern is a valid one, and an unaligned read needs no alignment.
        let raw = unsafe { addr.as_ptr().cast::<libc::sockaddr_vm>().read_unaligned() };
        Some(Self { cid: raw.svm_cid, port: raw.svm_port })
    }
}

// SAFETY: the closure gets a pointer to a whole `sockaddr_vm` and its size, and the value lives until it returns.
unsafe impl SocketAddrArg for VsockAddr {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // The family is a small constant.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let addr = libc::sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: self.port,
            svm_cid: self.cid,
            svm_zero: [0; 4],
        };
        f((&raw const addr).cast(), LENGTH)
    }
}

/// The context id that others know this machine by; `None` where it has none, or where that cannot be asked.
pub(crate) fn local_cid() -> Option<u32> {
    let device = File::open("/dev/vsock").ok()?;
    let mut cid = u32::MAX;
    // SAFETY: this request writes one `u32`, to a variable that outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    (result == 0 && cid != u32::MAX).then_some(cid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn an_address_comes_back_as_it_went() {
        let addr = VsockAddr { cid: 3, port: 70_000 };
        assert_eq!(VsockAddr::from_any(&addr.as_any()), Some(addr));
        let other = std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        assert_eq!(VsockAddr::from_any(&other.as_any()), None);
    }
}
