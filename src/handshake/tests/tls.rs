//! `OPT_STARTTLS`, and what is answered before it, in each of the specification's three modes.

use super::*;

fn knobs(tls: TlsPolicy) -> Knobs {
    Knobs { tls, ..Knobs::default() }
}

const EVERYTHING: [OptionCode; 9] = [
    OptionCode::List,
    OptionCode::PeekExport,
    OptionCode::Info,
    OptionCode::Go,
    OptionCode::StructuredReply,
    OptionCode::ListMetaContext,
    OptionCode::SetMetaContext,
    OptionCode::ExtendedHeaders,
    OptionCode::Other(4711),
];

#[test]
fn without_tls_it_is_refused_and_haggling_goes_on() {
    let talk = Client::new().option(OptionCode::StartTls, &[]).option(OptionCode::List, &[]).talk();
    assert_eq!(talk.types(), [Reply::ErrPolicy, Reply::Server, Reply::Server, Reply::Ack]);
    talk.assert_usable();
    let talk = Client::new().option(OptionCode::StartTls, b"data").talk();
    assert_eq!(talk.types(), [Reply::ErrInvalid]);
}

#[test]
fn where_tls_is_demanded_nothing_else_is_answered() {
    for option in EVERYTHING {
        for payload in [&InfoPayload::build("vm", &[])[..], &[], &[0; 40_000]] {
            let talk = Client::new().option(option, payload).talk_to(knobs(TlsPolicy::Require));
            assert_eq!(talk.types(), [Reply::ErrTlsReqd], "{option:?}");
            talk.assert_usable();
            assert!(talk.opened.is_empty());
        }
    }
    let talk = Client::new().option(OptionCode::Abort, &[]).talk_to(knobs(TlsPolicy::Require));
    assert_eq!((talk.types(), talk.reason()), (vec![Reply::Ack], &CloseReason::Aborted));
}

#[test]
fn where_tls_is_demanded_an_export_name_ends_the_connection() {
    for flags in [0, 3] {
        let client = Client::with_flags(flags).option(OptionCode::ExportName, b"vm");
        let talk = client.talk_to(knobs(TlsPolicy::Require));
        assert_eq!(talk.reason(), &CloseReason::PlainText);
        assert!(talk.output.is_empty() && talk.opened.is_empty());
    }
}

#[test]
fn it_stops_before_whatever_was_sent_behind_it() {
    for policy in [TlsPolicy::Allow, TlsPolicy::Require] {
        let client = Client::new().option(OptionCode::StartTls, &[]);
        let taken = client.0.len();
        let client = client.go("vm");
        for lengths in [vec![usize::MAX; 9], vec![1; 999], vec![19; 99]] {
            let talk = client.talk_in_pieces(knobs(policy), lengths);
            assert_eq!((talk.types(), talk.taken), (vec![Reply::Ack], taken));
            assert_eq!(talk.ending, Ending::StartTls);
            assert!(talk.opened.is_empty());
        }
    }
}

#[test]
fn data_with_it_is_refused() {
    for policy in [TlsPolicy::Allow, TlsPolicy::Require] {
        for payload in [&b"x"[..], &[0; 40_000]] {
            let client = Client::new().option(OptionCode::StartTls, payload);
            let talk = client.option(OptionCode::StartTls, &[]).talk_to(knobs(policy));
            assert_eq!(talk.types(), [Reply::ErrInvalid, Reply::Ack]);
            assert_eq!(talk.ending, Ending::StartTls);
        }
    }
}

/// Haggles before STARTTLS and after it.
fn twice(policy: TlsPolicy, before: Client, after: Client) -> (Talk, Handshake) {
    let world = World::default();
    let mut handshake = Handshake::new(knobs(policy));
    let mut ignored = Vec::new();
    let before = before.option(OptionCode::StartTls, &[]).0;
    let (taken, progress) = handshake.receive(&world, &before, &mut ignored);
    assert!(taken == before.len() && matches!(progress, Progress::StartTls));
    let mut output = Vec::new();
    let (taken, progress) = handshake.receive(&world, &after.0, &mut output);
    let ending = match progress {
        Progress::More => Ending::More,
        Progress::StartTls => Ending::StartTls,
        Progress::Closed => Ending::Closed(handshake.close_reason().unwrap().clone()),
        Progress::Ready { export, info, negotiated } => Ending::Ready { export, info, negotiated },
        Progress::Elsewhere { side, agreed, option } => Ending::Elsewhere { side, agreed, option },
    };
    (Talk { output, taken, ending, opened: world.opened.into_inner() }, handshake)
}

#[test]
fn what_was_agreed_on_before_it_is_forgotten() {
    let extended = |client: Client| client.option(OptionCode::ExtendedHeaders, &[]);
    let before = extended(Client::new().structured()).set_meta_context("vm", &["base:allocation"]);
    let after = Client::default().go("vm");
    let (talk, _) = twice(TlsPolicy::Allow, before.clone(), after);
    assert!(!talk.negotiated().structured_replies && !talk.negotiated().extended_headers);
    assert!(talk.negotiated().contexts == ContextSet::default());
    // The contexts are forgotten even if structured replies are agreed on again.
    let (talk, _) = twice(TlsPolicy::Allow, before, Client::default().structured().go("vm"));
    assert!(talk.negotiated().structured_replies && talk.negotiated().contexts == ContextSet::default());
}

#[test]
fn after_it_everything_is_answered_and_nothing_demands_it() {
    for policy in [TlsPolicy::Allow, TlsPolicy::Require] {
        for option in EVERYTHING {
            let (talk, _) = twice(policy, Client::new(), Client::default().option(option, &[]));
            assert!(!talk.types().contains(&Reply::ErrTlsReqd), "{option:?}");
        }
        let (talk, _) = twice(policy, Client::new(), Client::default().option(OptionCode::ExportName, b"vm"));
        assert_eq!(talk.opened, ["vm"]);
        // A second time it is refused, and haggling goes on.
        let again = Client::default().option(OptionCode::StartTls, &[]).structured();
        let (talk, _) = twice(policy, Client::new(), again);
        assert_eq!(talk.types(), [Reply::ErrInvalid, Reply::Ack]);
        talk.assert_usable();
    }
}

#[test]
fn it_is_known_who_wanted_plain_text_and_left_it_at_that() {
    let wanted = |client: &Client, policy| {
        let mut handshake = Handshake::new(knobs(policy));
        handshake.receive(&World::default(), &client.0, &mut Vec::new());
        handshake.wanted_plain_text()
    };
    let list = Client::new().option(OptionCode::List, &[]);
    assert!(wanted(&list, TlsPolicy::Require));
    assert!(wanted(&list.clone().option(OptionCode::Abort, &[]), TlsPolicy::Require));
    assert!(wanted(&Client::new().option(OptionCode::ExportName, b"vm"), TlsPolicy::Require));
    assert!(!wanted(&list.clone().option(OptionCode::StartTls, &[]), TlsPolicy::Require));
    assert!(!wanted(&Client::new().option(OptionCode::Abort, &[]), TlsPolicy::Require));
    assert!(!wanted(&list, TlsPolicy::Allow));
}

#[test]
fn the_limits_of_a_handshake_hold_across_it() {
    let many = (0..MAX_OPTIONS / 2).fold(Client::new(), |client, _| client.structured());
    let more = (0..MAX_OPTIONS / 2).fold(Client::default(), |client, _| client.structured());
    let (talk, _) = twice(TlsPolicy::Allow, many, more);
    assert_eq!(talk.reason(), &CloseReason::TooManyOptions);
}
