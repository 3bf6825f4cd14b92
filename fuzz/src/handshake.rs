//! Whole handshakes: a client's bytes, in one piece, byte by byte, and cut at random, against a world with a few exports.
//!
//! ```text
//!   | knobs 1 | cuts 2 | client flags 4 | options ... | what follows
//! ```
//!
//! Knobs: bit 0 withholds structured replies, bit 1 the flag NO_ZEROES, bit 2 shuts the server down, bit 3 withholds
//! extended headers, bit 4 offers TLS and bit 5 demands it. Cuts: from which the lengths of the random pieces follow. What
//! follows a STARTTLS that was granted is taken for what came through TLS.

use std::cell::Cell;

use memdev::handshake::{
    BlockSizes, Environment, ExportInfo, Handshake, Knobs, Negotiated, Progress, Refusal, TlsPolicy,
};
use memdev::proto::{
    EXPORT_NAME_PADDING, ExportNameReply, OptionHeader, OptionReplyHeader, TransmissionFlags,
};

/// More than [`World`] has to say to any one option.
const LARGEST_ANSWER: usize = 512;

/// One image, sessions of it, and a name for every refusal.
#[derive(Default)]
struct World {
    opened: Cell<u32>,
}

impl Environment for World {
    type Export = String;

    fn list(&self) -> Vec<(String, String)> {
        vec![("vm".into(), "A machine".into()), ("größe".into(), String::new())]
    }

    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal> {
        match name {
            "" | "vm" | "vm@a" => Ok(ExportInfo {
                name: "vm".into(),
                description: "A machine".into(),
                size: 4097,
                flags: TransmissionFlags::SEND_FLUSH,
                block_sizes: BlockSizes::default(),
            }),
            "p" => Err(Refusal::Policy("not yours".into())),
            "s" => Err(Refusal::Shutdown),
            "i" => Err(Refusal::Invalid("not a name".into())),
            _ => Err(Refusal::Unknown),
        }
    }

    fn open(&self, name: &str) -> Result<(ExportInfo, String), Refusal> {
        let info = self.describe(name)?;
        self.opened.set(self.opened.get() + 1);
        Ok((info, name.into()))
    }
}

#[derive(Debug, PartialEq)]
enum Ending {
    More,
    Closed(String),
    Ready(String, ExportInfo, Negotiated),
}

/// How one conversation went.
#[derive(Debug, PartialEq)]
struct Talk {
    output: Vec<u8>,
    taken: usize,
    ending: Ending,
}

/// One input.
pub fn body(data: &[u8]) {
    let Some((&[knobs, cut_high, cut_low], client)) = data.split_first_chunk::<3>() else { return };
    let cuts = u16::from_be_bytes([cut_high, cut_low]);
    let whole = talk(knobs, client, std::iter::empty());
    check(client, &whole);
    assert_eq!(talk(knobs, client, std::iter::repeat(1)), whole, "byte by byte is as in one");
    assert_eq!(talk(knobs, client, random_lengths(cuts)), whole, "cut at random is as in one");
}

pub(crate) fn tls_policy(knobs: u8) -> TlsPolicy {
    match knobs >> 4 & 3 {
        0 => TlsPolicy::Off,
        1 => TlsPolicy::Allow,
        _ => TlsPolicy::Require,
    }
}

fn random_lengths(seed: u16) -> impl Iterator<Item = usize> {
    let mut state = u32::from(seed) | 0x1_0000;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        usize::from(state.to_be_bytes()[0] % 40)
    })
}

fn talk(knobs: u8, client: &[u8], lengths: impl IntoIterator<Item = usize>) -> Talk {
    let world = World::default();
    let mut handshake = Handshake::new(Knobs {
        structured_replies: knobs & 1 == 0,
        handshake_flags_mask: if knobs & 2 == 0 { u16::MAX } else { 1 },
        extended_headers: knobs & 8 == 0,
        tls: tls_policy(knobs),
    });
    if knobs & 4 != 0 {
        handshake.shut_down();
    }
    let mut lengths = lengths.into_iter();
    let (mut output, mut taken) = (Vec::new(), 0);
    let mut secure = false;
    let progress = loop {
        let rest = &client[taken..];
        let piece = &rest[..rest.len().min(lengths.next().unwrap_or(usize::MAX))];
        let (consumed, progress) = handshake.receive(&world, piece, &mut output);
        taken += consumed;
        match progress {
            Progress::More => assert_eq!(consumed, piece.len(), "more is wanted, so everything was taken"),
            Progress::StartTls => {
                assert!(!secure && tls_policy(knobs) != TlsPolicy::Off, "TLS is to be had, once");
                secure = true;
            }
            progress => break progress,
        }
        if taken == client.len() {
            break Progress::More;
        }
    };
    if !secure && tls_policy(knobs) == TlsPolicy::Require {
        assert!(!matches!(progress, Progress::Ready { .. }), "nothing is to be had in plain text");
    }
    let ending = match progress {
        Progress::More | Progress::StartTls => Ending::More,
        Progress::Elsewhere { .. } => panic!("there is no other server"),
        Progress::Closed => Ending::Closed(handshake.close_reason().expect("a reason").to_string()),
        Progress::Ready { export, info, negotiated } => Ending::Ready(export, info, negotiated),
    };
    let opened = u32::from(matches!(ending, Ending::Ready(..)));
    assert_eq!(
        world.opened.get(),
        opened,
        "an export is opened when the transmission phase begins, and only then"
    );
    Talk { output, taken, ending }
}

/// What holds for every conversation.
fn check(client: &[u8], talk: &Talk) {
    assert!(talk.taken <= client.len());
    let options = talk.taken.saturating_sub(4) / OptionHeader::SIZE;
    assert!(talk.output.len() <= options * LARGEST_ANSWER, "no more is said than was asked for");

    // Everything that goes out is whole option replies, and then the reply to an export name.
    let mut rest = &talk.output[..];
    let mut finals = 0;
    while let Some(Ok(header)) = rest.first_chunk().map(OptionReplyHeader::parse) {
        let length = usize::try_from(header.length).expect("a length");
        let (payload, behind) =
            rest[OptionReplyHeader::SIZE..].split_at_checked(length).expect("a whole reply");
        if header.reply.is_error() {
            assert!(std::str::from_utf8(payload).is_ok_and(|message| !message.is_empty()));
        }
        let is_item = u32::from(header.reply) > 1 && !header.reply.is_error();
        finals += usize::from(!is_item);
        rest = behind;
    }
    assert!(finals <= options, "an option has one final reply");
    if let Ending::Ready(export, info, negotiated) = &talk.ending {
        let by_name = [ExportNameReply::SIZE, ExportNameReply::SIZE + EXPORT_NAME_PADDING];
        assert!(rest.is_empty() || by_name.contains(&rest.len()));
        assert_eq!(export, &negotiated.export_name);
        let Negotiated { structured_replies, extended_headers, contexts, .. } = negotiated;
        assert!(*structured_replies || !extended_headers && contexts.is_empty());
        assert!(info.flags.contains(TransmissionFlags::HAS_FLAGS));
        assert_eq!(info.flags.contains(TransmissionFlags::SEND_DF), *structured_replies);
        let chooses = info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        assert_eq!(chooses, *extended_headers && !contexts.is_empty());
        assert!(!extended_headers || rest.is_empty(), "EXPORT_NAME does not go with extended headers");
    } else {
        assert!(rest.is_empty());
    }
}
