//! `OPT_EXTENDED_HEADERS`.

use super::*;

const DF: TransmissionFlags = TransmissionFlags::SEND_DF;
const STATUS_PAYLOAD: TransmissionFlags = TransmissionFlags::BLOCK_STATUS_PAYLOAD;

fn told_flags(talk: &Talk) -> TransmissionFlags {
    let Ending::Ready { info, .. } = &talk.ending else { panic!("not ready: {talk:?}") };
    info.flags
}

#[test]
fn is_granted_and_implies_structured_replies() {
    let talk = Client::new().extended().go("vm").talk();
    assert_eq!(talk.types()[0], Reply::Ack);
    let expected = Negotiated {
        export_name: "vm".into(),
        structured_replies: true,
        extended_headers: true,
        contexts: ContextSet::default(),
    };
    assert_eq!(talk.negotiated(), &expected);
    assert_eq!(told_flags(&talk), TOLD_FLAGS.union(DF));
}

#[test]
fn twice_is_as_once_and_structured_replies_may_come_before_but_not_after() {
    let talk = Client::new().structured().extended().extended().structured().go("vm").talk();
    assert_eq!(talk.types()[..4], [Reply::Ack, Reply::Ack, Reply::Ack, Reply::ErrExtHeaderReqd]);
    assert!(talk.negotiated().extended_headers);
}

#[test]
fn takes_no_data_and_with_data_grants_nothing() {
    let talk = Client::new().option(OptionCode::ExtendedHeaders, b"\x01").go("vm").talk();
    assert_eq!(talk.types()[0], Reply::ErrInvalid);
    assert!(!talk.negotiated().extended_headers && !talk.negotiated().structured_replies);
    let talk = Client::new().option(OptionCode::ExtendedHeaders, &[0; 40_000]).go("vm").talk();
    assert_eq!(talk.types()[0], Reply::ErrTooBig);
    assert!(!talk.negotiated().extended_headers);
}

#[test]
fn export_name_afterwards_ends_the_connection() {
    let talk = Client::new().extended().option(OptionCode::ExportName, b"vm").talk();
    assert_eq!(talk.reason(), &CloseReason::ExportNameWithExtendedHeaders);
    assert_eq!(talk.opened, [""; 0]);
    assert_eq!(talk.types(), [Reply::Ack]);
}

#[test]
fn masked_it_is_unsupported_alone_or_with_structured_replies() {
    let alone = Knobs { extended_headers: false, ..Knobs::default() };
    let talk = Client::new().extended().structured().go("vm").talk_to(alone);
    assert_eq!(talk.types()[..2], [Reply::ErrUnsup, Reply::Ack]);
    assert!(talk.negotiated().structured_replies && !talk.negotiated().extended_headers);

    let both = Knobs { structured_replies: false, ..Knobs::default() };
    let talk = Client::new().extended().structured().go("vm").talk_to(both);
    assert_eq!(talk.types()[..2], [Reply::ErrUnsup, Reply::ErrUnsup]);
    assert_eq!(told_flags(&talk), TOLD_FLAGS);
    let talk = Client::new().option(OptionCode::ExtendedHeaders, &[0; 40_000]).talk_to(both);
    assert_eq!(talk.types(), [Reply::ErrUnsup]);
}

#[test]
fn block_status_with_a_payload_is_told_of_when_there_are_contexts_to_choose_from() {
    let all = &["base:allocation", "memdev:dirty"];
    let with = |client: Client| told_flags(&client.go("vm").talk());
    assert_eq!(
        with(Client::new().extended().set_meta_context("vm", all)),
        TOLD_FLAGS.union(DF).union(STATUS_PAYLOAD)
    );
    assert_eq!(with(Client::new().set_meta_context("vm", all).extended()), TOLD_FLAGS.union(DF));
    assert_eq!(with(Client::new().extended().set_meta_context("vm", &["no:such"])), TOLD_FLAGS.union(DF));
    assert_eq!(with(Client::new().extended().set_meta_context("größe", all)), TOLD_FLAGS.union(DF));
    assert_eq!(with(Client::new().structured().set_meta_context("vm", all)), TOLD_FLAGS.union(DF));
    assert_eq!(
        with(Client::new().structured().set_meta_context("vm", all).extended()),
        TOLD_FLAGS.union(DF).union(STATUS_PAYLOAD),
        "the selection made with structured replies stands"
    );
}
