//! The record layer of one accepted connection, without I/O and without buffers of its own.

use super::{Fingerprint, ServerTls, Trouble};
use rustls::server::{ParsedCertificate, ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use std::fmt;
use std::sync::Arc;

/// Room beside the plain bytes that records take: five bytes of header, a nonce, a type and a tag for each 16 KiB.
const fn sealed_length(plain: usize) -> usize {
    plain + (plain / (16 << 10) + 1) * 64
}

/// One connection's TLS, server side.
pub struct Channel {
    connection: UnbufferedServerConnection,
    /// Why it is of no use any more. What has failed is asked for nothing again.
    failed: Option<Trouble>,
}

/// What came of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of records that were used; the rest is the beginning of one, to be shown again with more behind it.
    pub used: usize,
    /// Plain bytes that they held.
    pub plain: usize,
    /// The client has said that it sends no more.
    pub ended: bool,
}

impl Channel {
    /// A connection that has just been upgraded: the client is to begin.
    ///
    /// # Errors
    /// Should there be something wrong with the configuration.
    pub fn new(tls: &ServerTls) -> Result<Self, Trouble> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&tls.config))?;
        Ok(Self { connection, failed: None })
    }

    /// Whether client and server have not agreed on keys yet.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whose certificate the client has shown, once it was verified.
    #[must_use]
    pub fn client(&self) -> Option<Fingerprint> {
        if self.is_handshaking() {
            return None;
        }
        let certificate = ParsedCertificate::try_from(self.connection.peer_certificates()?.first()?).ok()?;
        Some(Fingerprint::of(&certificate.subject_public_key_info()))
    }

    /// Version and cipher suite, for the log.
    #[must_use]
    pub fn terms(&self) -> String {
        let suite = self.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        format!("{:?} {suite:?}", self.connection.protocol_version()).replace("Some(", "").replace(')', "")
    }

    /// Opens what records there are in `incoming`: puts the bytes they hold into `plain`, which must be as long as
    /// `incoming`, and appends to `answer` what has to be sent in turn. Changes `incoming`.
    ///
    /// # Errors
    /// The connection is of no use any more; `answer` tells the client why.
    pub fn open(
        &mut self,
        incoming: &mut [u8],
        plain: &mut [u8],
        answer: &mut Vec<u8>,
    ) -> Result<Opened, Trouble> {
        self.check()?;
        let mut opened = Opened { used: 0, plain: 0, ended: false };
        loop {
            let rest = &mut incoming[opened.used..];
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(rest);
            let mut last = false;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        let end = opened.plain + record.payload.len();
                        plain[opened.plain..end].copy_from_slice(record.payload);
                        opened.plain = end;
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, answer),
                // It will be: whatever is in `answer` is sent before anything else.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    opened.ended = true;
                    last = true;
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => last = true,
                Ok(_) => return Err(self.fail(rustls::Error::General("data came too early".to_owned()))),
                Err(error) => {
                    // The alert that tells the client of it waits to be sent.
                    while self.connection.wants_write()
                        && let UnbufferedStatus { state: Ok(ConnectionState::EncodeTlsData(data)), .. } =
                            self.connection.process_tls_records(&mut [])
                    {
                        encode(data, answer);
                    }
                    return Err(self.fail(error));
                }
            }
            opened.used += discard;
            if last {
                return Ok(opened);
            }
        }
    }

    fn check(&self) -> Result<(), Trouble> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn fail(&mut self, error: rustls::Error) -> Trouble {
        self.failed.insert(error.into()).clone()
    }

    /// Seals `plain` into the front of `records`, which grows if it is too short and is not cleared, so that using it again
    /// costs nothing; returns the bytes of it that are to be sent. `partial` is what [`Channel::open`] has left, the
    /// beginning of a record.
    ///
    /// # Errors
    /// The connection is of no use any more: its keys are used up (TLS 1.2 only), or not agreed on yet.
    pub fn seal(
        &mut self,
        partial: &mut [u8],
        plain: &[u8],
        records: &mut Vec<u8>,
    ) -> Result<usize, Trouble> {
        let room = sealed_length(plain.len());
        self.write(partial, records, 0, room, |traffic, records| traffic.encrypt(plain, records))
    }

    /// Appends the word that no more is going to be sent.
    ///
    /// # Errors
    /// As [`Channel::seal`].
    pub fn say_goodbye(&mut self, partial: &mut [u8], records: &mut Vec<u8>) -> Result<(), Trouble> {
        let start = records.len();
        let end =
            self.write(partial, records, start, 64, |traffic, records| traffic.queue_close_notify(records));
        records.truncate(*end.as_ref().unwrap_or(&start));
        end.map(drop)
    }

    /// Writes to `records` from `at` on, where `room` bytes should do; returns where that ends.
    fn write(
        &mut self,
        partial: &mut [u8],
        records: &mut Vec<u8>,
        mut at: usize,
        mut room: usize,
        mut put: impl FnMut(&mut WriteTraffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<usize, Trouble> {
        self.check()?;
        loop {
            let state = match self.connection.process_tls_records(partial).state {
                Ok(state) => state,
                Err(error) => return Err(self.fail(error)),
            };
            match state {
                // New keys are announced before what they seal.
                ConnectionState::EncodeTlsData(data) => {
                    records.truncate(at);
                    encode(data, records);
                    at = records.len();
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    if records.len() < at + room {
                        records.resize(at + room, 0);
                    }
                    match put(&mut traffic, &mut records[at..]) {
                        Ok(count) => return Ok(at + count),
                        Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size }))
                            if required_size > room =>
                        {
                            room = required_size;
                        }
                        Err(error) => return Err(self.fail(rustls::Error::General(error.to_string()))),
                    }
                }
                // Everything whole was opened before, and before the handshake there is nothing to say.
                _ => return Err(rustls::Error::HandshakeNotComplete.into()),
            }
        }
    }
}

type WriteTraffic<'c> = rustls::unbuffered::WriteTraffic<'c, ServerConnectionData>;

/// Appends what TLS itself has to say.
fn encode(mut data: EncodeTlsData<'_, ServerConnectionData>, answer: &mut Vec<u8>) {
    let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = data.encode(&mut [])
    else {
        return;
    };
    let start = answer.len();
    answer.resize(start + required_size, 0);
    let written = data.encode(&mut answer[start..]).unwrap_or(0);
    answer.truncate(start + written);
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("handshaking", &self.is_handshaking()).finish_non_exhaustive()
    }
}
