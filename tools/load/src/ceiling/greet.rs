//! The ceiling's handshake: fixed newstyle, GO and EXPORT_NAME, everything else unsupported.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt;

use crate::wire::{u32_at, u64_at};

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, CAN_MULTI_CONN.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8;

/// A descriptor as a blocking stream.
struct Blocking(OwnedFd);

impl Read for Blocking {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}

impl Write for Blocking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.0, bytes)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes a client from the greeting to the transmission phase, a second at most for each of its messages.
pub(super) fn greet(stream: OwnedFd, size: u64) -> io::Result<OwnedFd> {
    sockopt::set_socket_timeout(stream.as_fd(), sockopt::Timeout::Recv, Some(Duration::from_secs(1)))?;
    let mut stream = Blocking(stream);
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let zeroes = u32_at(&flags, 0) & 2 == 0;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (option, length) = (u32_at(&header, 8), u32_at(&header, 12));
        if u64_at(&header, 0) != OPTION_MAGIC || length > 65536 {
            return Err(io::Error::other("a garbled option"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        let export = [&size.to_be_bytes()[..], &TRANSMISSION_FLAGS.to_be_bytes()].concat();
        match option {
            OPT_EXPORT_NAME => {
                stream.write_all(&export)?;
                stream.write_all(&[0; 124][..if zeroes { 124 } else { 0 }])?;
                return Ok(stream.0);
            }
            OPT_ABORT => return Err(io::Error::other("the client gave up")),
            OPT_GO => {
                let mut out = reply(option, REP_INFO, &[&[0, 0], &export[..]].concat());
                out.extend(reply(option, REP_ACK, &[]));
                stream.write_all(&out)?;
                return Ok(stream.0);
            }
            _ => stream.write_all(&reply(option, REP_ERR_UNSUP, &[]))?,
        }
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes
}
