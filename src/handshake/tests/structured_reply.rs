//! `OPT_STRUCTURED_REPLY`.

use super::*;

#[test]
fn is_granted() {
    let talk = Client::new().structured().go("vm").talk();
    assert_eq!(talk.types()[0], Reply::Ack);
    assert!(talk.negotiated().structured_replies);
}

#[test]
fn twice_is_as_once() {
    let talk = Client::new().structured().structured().go("vm").talk();
    assert_eq!(talk.types()[..2], [Reply::Ack, Reply::Ack]);
    assert!(talk.negotiated().structured_replies);
}

#[test]
fn takes_no_data_and_with_data_grants_nothing() {
    let talk = Client::new().option(OptionCode::StructuredReply, b"\x01").go("vm").talk();
    assert_eq!(talk.types()[0], Reply::ErrInvalid);
    assert!(!talk.negotiated().structured_replies);
}

#[test]
fn masked_it_is_unsupported_and_contexts_with_it() {
    let knobs = Knobs { structured_replies: false, ..Knobs::default() };
    let talk =
        Client::new().structured().set_meta_context("vm", &["base:allocation"]).go("vm").talk_to(knobs);
    assert_eq!(talk.types()[..2], [Reply::ErrUnsup, Reply::ErrInvalid]);
    let nothing = Negotiated { export_name: "vm".into(), ..Negotiated::default() };
    assert_eq!(talk.negotiated(), &nothing);
}
