//! Generic netlink, as little of it as the nbd driver takes: messages built and read by pure functions, and a socket.
//!
//! ```text
//!  | length u32 | type u16 | flags u16 | sequence u32 | port u32 | command u8 | version u8 | 0 u16 | attributes ...
//!  attribute: | length u16 | type u16 | value, padded to 4 bytes |      lengths count their headers, not the padding
//! ```
//!
//! Everything is in this machine's own byte order: it goes to this machine's kernel.
#![expect(clippy::disallowed_methods, reason = "the kernel speaks in the machine's own byte order")]

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Type of a message that ends an exchange: an error number, or 0.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// The attribute holds attributes.
const NLA_F_NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are its type.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// The family that knows the other families' numbers.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const HEADER: usize = 16;
const COMMAND_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

/// More than any answer that is asked for here.
const ANSWER_MAX: usize = 64 << 10;

/// A request that is being built.
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A request to `family`, which is answered by an acknowledgement at the end.
    pub(super) fn new(family: u16, command: u8) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend([command, 1, 0, 0]);
        Self(bytes)
    }

    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    pub(super) fn u64(self, kind: u16, value: u64) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// A string; it ends with a NUL byte.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Attributes in an attribute.
    pub(super) fn nested(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self = inner(self.attribute(kind | NLA_F_NESTED, &[]));
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// The bytes to send.
    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// What the kernel answers.
#[derive(Debug, PartialEq, Eq)]
enum Answer<'a> {
    /// The request is done: an error number, or 0.
    End(i32),
    /// The attributes of a message.
    Attributes(&'a [u8]),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The messages in what was received that answer request `sequence`; what makes no sense ends them.
fn answers(mut bytes: &[u8], sequence: u32) -> Vec<Answer<'_>> {
    let mut answers = Vec::new();
    while let Some(length) = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok()) {
        let Some(message) = bytes.get(..length).filter(|message| message.len() >= HEADER) else { break };
        let body = &message[HEADER..];
        if u32_at(message, 8) == Some(sequence) {
            if u16_at(message, 4) == Some(NLMSG_ERROR) {
                let Some(error) = u32_at(body, 0) else { break };
                answers.push(Answer::End(error.cast_signed()));
            } else if let Some(attributes) = body.get(COMMAND_HEADER..) {
                answers.push(Answer::Attributes(attributes));
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answers
}

/// The value of the first attribute of type `kind`.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while let Some((length, found)) = u16_at(attributes, 0).zip(u16_at(attributes, 2)) {
        let length = usize::from(length);
        let value = attributes.get(ATTRIBUTE_HEADER..length)?;
        if found & NLA_TYPE_MASK == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// A family of generic netlink, to be asked.
pub(super) struct Family {
    socket: OwnedFd,
    number: u16,
    sequence: u32,
}

impl Family {
    /// The family called `name`; `None` if this kernel does not have it, or not in this network namespace.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn open(name: &str) -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(GENERIC))?;
        let mut family = Self { socket, number: GENL_ID_CTRL, sequence: 0 };
        let question = family.message(CTRL_CMD_GETFAMILY).text(CTRL_ATTR_FAMILY_NAME, name);
        let number = match family.ask(question, CTRL_ATTR_FAMILY_ID) {
            Ok(number) => number,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let number = number.and_then(|value| u16_at(&value, 0));
        family.number = number.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Some(family))
    }

    /// A request to this family.
    pub(super) fn message(&self, command: u8) -> Message {
        Message::new(self.number, command)
    }

    /// Sends a request and waits until it is done; gives the attribute of type `wanted`, a number of 32 bits.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn ask_u32(&mut self, message: Message, wanted: u16) -> io::Result<Option<u32>> {
        Ok(self.ask(message, wanted)?.and_then(|value| u32_at(&value, 0)))
    }

    fn ask(&mut self, message: Message, wanted: u16) -> io::Result<Option<Vec<u8>>> {
        self.sequence += 1;
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &message.finish(self.sequence), SendFlags::empty(), &kernel)?;
        let mut found = None;
        let mut buffer = vec![0; ANSWER_MAX];
        loop {
            let received = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?.0,
            };
            for answer in answers(&buffer[..received], self.sequence) {
                match answer {
                    Answer::End(0) => return Ok(found),
                    Answer::End(error) => return Err(io::Error::from_raw_os_error(-error)),
                    Answer::Attributes(attributes) => {
                        found = found.or_else(|| find(attributes, wanted).map(<[u8]>::to_vec));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The bytes of a request as they are sent.
    pub(in super::super) fn bytes(message: Message) -> Vec<u8> {
        message.finish(7)
    }

    /// Numbers in this machine's order.
    fn words(list: &[u32]) -> Vec<u8> {
        list.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn halves(list: &[u16]) -> Vec<u8> {
        list.iter().flat_map(|half| half.to_ne_bytes()).collect()
    }

    #[test]
    fn a_request_is_built_byte_by_byte() {
        let message = Message::new(30, 5)
            .u32(1, 0x0102_0304)
            .u64(2, 0x1122_3344_5566_7788)
            .text(10, "abcd")
            .nested(7, |list| list.nested(1, |item| item.u32(1, 9)).nested(1, |item| item.u32(1, 10)));
        let expected = [
            words(&[80]),
            halves(&[30, 5]),
            words(&[7, 0]),
            vec![5, 1, 0, 0],
            halves(&[8, 1]),
            words(&[0x0102_0304]),
            halves(&[12, 2]),
            0x1122_3344_5566_7788_u64.to_ne_bytes().to_vec(),
            halves(&[9, 10]),
            b"abcd\0\0\0\0".to_vec(),
            halves(&[28, 7 | 0x8000]),
            halves(&[12, 1 | 0x8000, 8, 1]),
            words(&[9]),
            halves(&[12, 1 | 0x8000, 8, 1]),
            words(&[10]),
        ];
        assert_eq!(bytes(message), expected.concat());
    }

    #[test]
    fn answers_are_taken_apart() {
        let data =
            [words(&[28]), halves(&[30, 0]), words(&[7, 99]), vec![1, 1, 0, 0], halves(&[8, 1]), words(&[3])];
        let other = [words(&[20]), halves(&[30, 0]), words(&[6, 99]), vec![1, 1, 0, 0]];
        let end = [words(&[20]), halves(&[2, 0]), words(&[7, 99]), (-16_i32).to_ne_bytes().to_vec()];
        // The length of the first is a multiple of four already.
        let all = [data.concat()[..].to_vec(), other.concat(), end.concat()].concat();
        let found = answers(&all, 7);
        let [Answer::Attributes(attributes), Answer::End(-16)] = found[..] else { panic!("{found:?}") };
        assert_eq!(find(attributes, 1).and_then(|value| u32_at(value, 0)), Some(3));
        assert_eq!(find(attributes, 2), None);
    }

    #[test]
    fn nonsense_is_nothing() {
        for bytes in
            [&[][..], &[1, 0], &words(&[3, 0, 7, 0]), &words(&[4000, 0, 7, 0]), &words(&[0, 0, 0, 0])]
        {
            assert_eq!(answers(bytes, 7), []);
        }
        for bytes in [&[][..], &[4], &halves(&[2, 1]), &halves(&[40, 1]), &halves(&[0, 0])] {
            assert_eq!(find(bytes, 1), None);
        }
    }

    #[test]
    fn this_machines_kernel_answers() {
        let control = Family::open("nlctrl").unwrap().expect("every kernel has it");
        assert_eq!(control.number, GENL_ID_CTRL);
        assert!(Family::open("no-such-family").unwrap().is_none());
    }
}
