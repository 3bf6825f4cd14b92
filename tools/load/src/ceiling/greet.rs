//! The ceiling's handshake: fixed newstyle, GO and EXPORT_NAME, everything else unsupported.

use std::io::{self, Read, Write};
use std::time::Duration;

use memdev::net::Stream;
use memdev::proto::{
    ExportNameReply, Greeting, HandshakeFlags, InfoItem, OptionCode, OptionHeader, OptionReplyType,
    TransmissionFlags, append_option_reply,
};
use rustix::net::sockopt;

/// A stream that waits, for as long as the handshake lasts.
struct Waiting<'a>(&'a Stream);

impl Read for Waiting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.0, buffer)?)
    }
}

impl Write for Waiting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(self.0, bytes)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes a client from the greeting to the transmission phase; each of its messages may take a second.
pub(super) fn greet(stream: &Stream, size: u64) -> io::Result<()> {
    rustix::io::ioctl_fionbio(stream, false)?;
    sockopt::set_socket_timeout(stream, sockopt::Timeout::Recv, Some(Duration::from_secs(1)))?;
    haggle(&mut Waiting(stream), size)
}

fn haggle(stream: &mut impl ReadWrite, size: u64) -> io::Result<()> {
    let flags = HandshakeFlags::FIXED_NEWSTYLE.union(HandshakeFlags::NO_ZEROES);
    stream.write_all(&Greeting { flags }.encode())?;
    let mut client_flags = [0; 4];
    stream.read_exact(&mut client_flags)?;
    let padded = client_flags[3] & 2 == 0;
    let flags = TransmissionFlags::HAS_FLAGS
        .union(TransmissionFlags::SEND_FLUSH)
        .union(TransmissionFlags::SEND_FUA)
        .union(TransmissionFlags::SEND_TRIM)
        .union(TransmissionFlags::CAN_MULTI_CONN);
    loop {
        let mut header = [0; OptionHeader::SIZE];
        stream.read_exact(&mut header)?;
        let OptionHeader { option, length } = OptionHeader::parse(&header).map_err(io::Error::other)?;
        io::copy(&mut Read::by_ref(stream).take(length.into()), &mut io::sink())?;
        let mut out = Vec::new();
        match option {
            OptionCode::ExportName => ExportNameReply { size, flags }.append_to(&mut out, padded),
            OptionCode::Go => {
                let item = InfoItem::Export { size, flags }.encode();
                append_option_reply(&mut out, option, OptionReplyType::Info, &item);
                append_option_reply(&mut out, option, OptionReplyType::Ack, &[]);
            }
            OptionCode::Abort => return Err(io::Error::other("the client gave up")),
            _ => append_option_reply(&mut out, option, OptionReplyType::ErrUnsup, &[]),
        }
        stream.write_all(&out)?;
        if matches!(option, OptionCode::ExportName | OptionCode::Go) {
            return Ok(());
        }
    }
}

/// Both directions of a stream.
trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}
