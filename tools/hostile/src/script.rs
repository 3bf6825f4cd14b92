//! What one client does, step by step, drawn from its kind and a random number.

use std::time::Duration;

use crate::kind::Kind;
use crate::random::Random;
use crate::wire;

/// One step of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Sends all of it, as fast as it is taken.
    Send(Vec<u8>),
    /// Sends it a byte at a time.
    Trickle(Vec<u8>),
    /// Sends it again and again until the time is over; reads what comes, or lets it lie.
    Flood { bytes: Vec<u8>, reads: bool },
    /// Receives so many bytes.
    Receive(u64),
    /// Receives a byte at a time, until the time is over.
    Sip,
    /// Waits.
    Pause(Duration),
    /// Says that it sends no more.
    HalfClose,
    /// Does nothing, until the time is over.
    Hold,
    /// Makes the close a reset, which is what is sent when a process dies with something unread, too.
    Reset,
}

/// A mebibyte; every export is taken to be at least so long.
const MIB: u64 = 1 << 20;
/// Far longer than any option may be.
const HUGE: u32 = u32::MAX - 8;

/// What a client of `kind` does with the export `name`, of which it may use the first `span` bytes.
pub(crate) fn script(kind: Kind, name: &str, span: u64, random: &mut Random) -> Vec<Step> {
    let mut writer = Writer { name, span: span.max(MIB), random };
    match kind {
        Kind::Cut => writer.cut(),
        Kind::Reset => writer.reset(),
        Kind::Garbage => writer.garbage(),
        Kind::Stall => vec![Step::Send(writer.unfinished()), Step::Hold],
        Kind::HalfClose => vec![Step::Send(writer.unfinished()), Step::HalfClose, Step::Hold],
        Kind::Flood => writer.flood(),
        Kind::Lie => vec![Step::Send(writer.lie()), Step::Pause(Duration::from_millis(5))],
        Kind::NeverRead => writer.never_read(),
        Kind::SlowHandshake => vec![Step::Trickle(wire::hello_structured(name)), Step::Hold],
        Kind::SlowPayload => writer.slow_payload(),
        Kind::SlowReading => {
            vec![Step::Send([wire::hello(name), writer.reads(64, 64 << 10)].concat()), Step::Sip]
        }
    }
}

struct Writer<'a> {
    name: &'a str,
    span: u64,
    random: &'a mut Random,
}

impl Writer<'_> {
    /// A place for `length` bytes.
    fn offset(&mut self, length: u32) -> u64 {
        self.random.below(self.span - u64::from(length) + 1)
    }

    /// So many reads of `length` bytes each.
    fn reads(&mut self, count: u64, length: u32) -> Vec<u8> {
        (0..count).flat_map(|n| wire::request(wire::READ, n, self.offset(length), length)).collect()
    }

    /// A write with a payload of `length` bytes.
    fn write(&mut self, length: u32) -> Vec<u8> {
        let offset = self.offset(length);
        let data = self.random.bytes(length as usize);
        wire::write(self.random.word(), offset, &data)
    }

    /// A whole, polite conversation: every option, every command, a goodbye.
    fn conversation(&mut self) -> Vec<u8> {
        let mut bytes = wire::flags();
        bytes.extend(wire::option(wire::OPT_LIST, &[]));
        bytes.extend(wire::option(wire::OPT_STARTTLS, &[]));
        bytes.extend(wire::option(wire::OPT_STRUCTURED_REPLY, &[]));
        bytes.extend(wire::option(wire::OPT_SET_META_CONTEXT, &wire::contexts(self.name)));
        bytes.extend(wire::option(wire::OPT_INFO, &wire::info(self.name)));
        bytes.extend(wire::option(wire::OPT_GO, &wire::info(self.name)));
        for cookie in 0..4 {
            let length = u32::try_from(self.random.below(20_000)).unwrap_or(0) + 1;
            bytes.extend(self.write(length));
            for command in [wire::READ, wire::TRIM, wire::CACHE, wire::WRITE_ZEROES, wire::BLOCK_STATUS] {
                let offset = self.offset(65_536);
                bytes.extend(wire::request(command, cookie, offset, 65_536));
            }
            bytes.extend(wire::request(wire::FLUSH, cookie, 0, 0));
        }
        bytes.extend(wire::request(wire::DISC, 0, 0, 0));
        bytes
    }

    /// The beginning of a conversation, cut anywhere: half of the clients do not get beyond the handshake.
    fn beginning(&mut self) -> Vec<u8> {
        let mut bytes = self.conversation();
        let most = if self.random.below(2) == 0 { 280 } else { bytes.len() };
        bytes.truncate(self.random.index(most));
        bytes
    }

    fn cut(&mut self) -> Vec<Step> {
        let mut steps = vec![Step::Send(self.beginning())];
        match self.random.below(4) {
            0 => steps.push(Step::Reset),
            1 => steps.push(Step::HalfClose),
            // Somewhere in the replies.
            2 => steps.insert(0, Step::Receive(self.random.below(19))),
            _ => {}
        }
        steps
    }

    fn reset(&mut self) -> Vec<Step> {
        let bytes = [wire::hello(self.name), self.reads(64, 64 << 10)].concat();
        vec![Step::Send(bytes), Step::Receive(self.random.below(300_000)), Step::Reset]
    }

    fn garbage(&mut self) -> Vec<Step> {
        let length = self.random.index(4000) + 1;
        let garbage = self.random.bytes(length);
        let before = match self.random.below(5) {
            0 => Vec::new(),
            1 => wire::flags(),
            2 => [wire::flags(), b"IHAVEOPT".to_vec()].concat(),
            3 => wire::hello(self.name),
            _ => [wire::hello(self.name), self.reads(8, 4096), self.write(8192)].concat(),
        };
        vec![Step::Send([before, garbage].concat()), Step::Pause(Duration::from_millis(5))]
    }

    /// What a client has sent when it stops in the middle of something.
    fn unfinished(&mut self) -> Vec<u8> {
        let mut bytes = match self.random.below(8) {
            0 => return Vec::new(),
            1 => return wire::flags(),
            2 => [wire::flags(), wire::option(wire::OPT_GO, &wire::info(self.name))].concat(),
            3 => wire::option_claiming(wire::OPT_INFO, 30_000, &self.random.bytes(20_000)),
            // In the transmission phase: with nothing, in a header, in a payload.
            4 => return wire::hello(self.name),
            5 => {
                return [&wire::hello(self.name)[..], &self.reads(1, 4096)[..self.random.index(28)]].concat();
            }
            6 => self.write(60_000),
            _ => self.write(900_000),
        };
        let most = bytes.len();
        bytes.truncate(self.random.index(most));
        match bytes.first_chunk() {
            Some(b"IHAV") => [wire::flags(), bytes].concat(),
            Some([0x25, 0x60, 0x95, 0x13]) => [wire::hello(self.name), bytes].concat(),
            _ => bytes,
        }
    }

    fn flood(&mut self) -> Vec<Step> {
        let (first, bytes) = match self.random.below(7) {
            0 => (wire::flags(), wire::option(wire::OPT_LIST, &[]).repeat(200)),
            1 => (wire::flags(), wire::option(wire::OPT_EXTENDED_HEADERS, &[7; 5000]).repeat(20)),
            2 => (wire::hello(self.name), self.reads(512, 4096)),
            3 => (wire::hello(self.name), self.write(4096).repeat(64)),
            4 => {
                let status = wire::request(wire::BLOCK_STATUS, 1, 0, 1 << 20);
                (wire::hello_structured(self.name), status.repeat(512))
            }
            5 => (wire::hello(self.name), wire::request(wire::TRIM, 1, 0, 1 << 20).repeat(512)),
            // Refused, every one of them, with a payload that must be drained.
            _ => (wire::hello(self.name), wire::write(1, u64::MAX - 9000, &[0x99; 8192]).repeat(16)),
        };
        vec![Step::Send(first), Step::Flood { bytes, reads: self.random.below(2) == 0 }]
    }

    fn lie(&mut self) -> Vec<u8> {
        let option = |code: u32, length: u32, data: &[u8]| {
            [wire::flags(), wire::option_claiming(code, length, data)].concat()
        };
        let some = self.random.bytes(200);
        match self.random.below(10) {
            // Options: far more than there is, a little more, less.
            0 => option(wire::OPT_GO, HUGE, &some),
            1 => option(wire::OPT_EXPORT_NAME, HUGE, &some),
            2 => option(4242, 60 << 20, &some),
            3 => option(wire::OPT_GO, 32 << 10, &wire::info(self.name)),
            4 => option(wire::OPT_GO, 3, &wire::info(self.name)),
            // A name, and a list of queries, that do not fit into their option.
            5 => option(wire::OPT_GO, 10, &[&HUGE.to_be_bytes()[..], b"abcdef"].concat()),
            6 => {
                let data =
                    [&wire::contexts(self.name)[..8], &HUGE.to_be_bytes(), b"base:allocation"].concat();
                [wire::flags(), wire::option(wire::OPT_STRUCTURED_REPLY, &[]), wire::option(10, &data)]
                    .concat()
            }
            // Writes: of as much as may be, of more than that, behind the end; with a few bytes of each.
            7 => [wire::hello(self.name), wire::request(wire::WRITE, 1, 0, 32 << 20), some].concat(),
            8 => [wire::hello(self.name), wire::request(wire::WRITE, 1, 0, HUGE), some].concat(),
            _ => {
                let read = wire::request(wire::READ, 1, u64::MAX, HUGE);
                [wire::hello(self.name), read, wire::request(0xffff, 2, u64::MAX, HUGE), some].concat()
            }
        }
    }

    /// Most ask for what their socket can still hold, a few for far more: ten thousand sockets full of replies would be
    /// much of a machine's memory, and none of it the server's.
    fn never_read(&mut self) -> Vec<Step> {
        let count = if self.random.below(64) == 0 { 256 } else { 4 };
        vec![Step::Send([wire::hello(self.name), self.reads(count, 64 << 10)].concat()), Step::Hold]
    }

    fn slow_payload(&mut self) -> Vec<Step> {
        let write = self.write(300_000);
        // Straight into its block, or at the end of a window.
        let (fast, slow) = write.split_at(self.random.pick(&[29, 4000, 262_000]));
        vec![Step::Send([&wire::hello(self.name), fast].concat()), Step::Trickle(slow.to_vec()), Step::Hold]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_script_for_every_number_and_those_that_stay_say_so() {
        for kind in Kind::ALL {
            for seed in 0..500 {
                let steps = script(kind, "base", 1 << 20, &mut Random::new(seed));
                let stays =
                    steps.iter().any(|step| matches!(step, Step::Hold | Step::Flood { .. } | Step::Sip));
                assert_eq!(stays, kind.stays(), "{kind} with {seed}: {steps:?}");
            }
        }
    }
}
