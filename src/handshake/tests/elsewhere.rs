//! Exports that another server has: the connection goes there, and the handshake goes on as if it had never been here.

use super::*;

const NAMES: [(&str, Side); 2] = [("vm@before", Side::Before), ("vm@after", Side::After)];

/// Every option that names an export.
fn naming(name: &str) -> [Client; 5] {
    let none = Client(Vec::new());
    [
        none.clone().option(OptionCode::ExportName, name.as_bytes()),
        none.clone().option(OptionCode::Info, &InfoPayload::build(name, &[])),
        none.clone().go(name),
        none.clone().set_meta_context(name, &["base:allocation"]),
        none.list_meta_context(name, &[]),
    ]
}

#[test]
fn the_option_that_names_it_and_what_was_agreed_on_before_go_along() {
    for (name, side) in NAMES {
        for (index, option) in naming(name).into_iter().enumerate() {
            for cut in [usize::MAX, 1, 7] {
                let client =
                    Client::new().structured().set_meta_context("vm", &["base:allocation"]).go("nowhere");
                let client = client.bytes(&option.0).bytes(b"rest");
                let talk = client.talk_in_pieces(Knobs::default(), std::iter::repeat(cut));
                let Ending::Elsewhere { side: found, agreed, option: named } = &talk.ending else {
                    panic!("{name}, {index}: {:?}", talk.ending)
                };
                assert_eq!((*found, named), (side, &option.0), "{name}, {index}");
                // Of that option nothing was answered.
                assert_eq!(talk.types(), [Reply::Ack, Reply::MetaContext, Reply::Ack, Reply::ErrUnknown]);
                assert!(talk.opened.is_empty());
                // Another selection, even one that is handed over, ends the one before.
                let selected = if index == 3 { None } else { Some("vm".to_owned()) };
                let contexts =
                    selected.iter().map(|_| KnownContext::BaseAllocation.on_the_wire().id).collect();
                let expected = Agreed {
                    flags: 3,
                    structured_replies: true,
                    extended_headers: false,
                    selected_for: selected,
                    contexts,
                    first: None,
                };
                assert_eq!(agreed, &expected);
            }
        }
    }
}

#[test]
fn the_other_server_goes_on_where_this_one_stopped() {
    let finish = |knobs: Knobs, agreed: Agreed, bytes: &[u8]| {
        let mut handshake = Handshake::resumed(knobs, agreed)?;
        let mut output = Vec::new();
        let (taken, progress) = handshake.receive(&World::default(), bytes, &mut output);
        assert_eq!(taken, bytes.len());
        match progress {
            Progress::Ready { negotiated, .. } => Some(negotiated),
            other => panic!("{other:?}"),
        }
    };
    let agreed = Agreed {
        flags: 3,
        structured_replies: true,
        extended_headers: true,
        selected_for: Some("vm".into()),
        contexts: vec![KnownContext::Dirty.on_the_wire().id],
        first: None,
    };
    let go = Client(Vec::new()).go("vm").0;
    let negotiated = finish(Knobs::default(), agreed.clone(), &go).expect("all of it is offered");
    assert!(negotiated.structured_replies && negotiated.extended_headers);
    assert!(negotiated.contexts.iter().eq([KnownContext::Dirty]));
    // What this server does not offer, or does not know, cannot be gone on with.
    let with = |change: fn(&mut Knobs)| {
        let mut knobs = Knobs::default();
        change(&mut knobs);
        knobs
    };
    assert_eq!(finish(with(|knobs| knobs.structured_replies = false), agreed.clone(), &go), None);
    assert_eq!(finish(with(|knobs| knobs.extended_headers = false), agreed.clone(), &go), None);
    assert_eq!(finish(with(|knobs| knobs.handshake_flags_mask = 1), agreed.clone(), &go), None);
    assert_eq!(finish(Knobs::default(), Agreed { contexts: vec![99], ..agreed }, &go), None);
}

#[test]
fn over_tls_it_is_refused_and_says_why() {
    let knobs = Knobs { tls: TlsPolicy::Require, ..Knobs::default() };
    for (name, reply) in [("vm@before", Reply::ErrPolicy), ("vm@after", Reply::ErrShutdown)] {
        let mut handshake = Handshake::new(knobs);
        let world = World::default();
        let mut output = Vec::new();
        let begin = Client::new().option(OptionCode::StartTls, &[]);
        let (_, progress) = handshake.receive(&world, &begin.0, &mut output);
        assert!(matches!(progress, Progress::StartTls));
        output.clear();
        let (_, progress) = handshake.receive(&world, &Client(Vec::new()).go(name).0, &mut output);
        assert!(matches!(progress, Progress::More));
        let header = OptionReplyHeader::parse(output.first_chunk().unwrap()).unwrap();
        assert_eq!(header.reply, reply);
        let why = String::from_utf8(output[OptionReplyHeader::SIZE..].to_vec()).unwrap();
        assert!(why.contains("is being replaced"), "{why}");
    }
}
