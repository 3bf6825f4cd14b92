//! The greeting and what a client may answer to it.

use super::*;

#[test]
fn offers_fixed_newstyle_and_no_zeroes() {
    assert_eq!(&Handshake::new(Knobs::default()).greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn masked_flags_are_not_offered() {
    let knobs = |mask| Knobs { handshake_flags_mask: mask, ..Knobs::default() };
    assert_eq!(&Handshake::new(knobs(1)).greeting(), b"NBDMAGICIHAVEOPT\x00\x01");
    assert_eq!(&Handshake::new(knobs(0)).greeting(), b"NBDMAGICIHAVEOPT\x00\x00");
}

#[test]
fn every_subset_of_the_offered_flags_is_accepted() {
    for flags in 0..=3 {
        Client::with_flags(flags).talk().assert_usable();
    }
}

#[test]
fn unknown_client_flags_end_the_connection() {
    for flags in [4, 7, 0x8000_0003, u32::MAX] {
        let talk = Client::with_flags(flags).go("vm").talk();
        assert_eq!(talk.reason(), &CloseReason::ClientFlags(ClientFlags(flags & !3)));
        assert_eq!((talk.output.len(), talk.taken), (0, 4));
    }
}

#[test]
fn client_flags_that_were_not_offered_end_the_connection() {
    let knobs = Knobs { handshake_flags_mask: 1, ..Knobs::default() };
    assert_eq!(
        Client::with_flags(3).talk_to(knobs).reason(),
        &CloseReason::ClientFlags(ClientFlags::NO_ZEROES)
    );
    Client::with_flags(1).talk_to(knobs).assert_usable();
}

#[test]
fn a_client_without_fixed_newstyle_gets_its_export_by_name() {
    let talk = Client::with_flags(0).option(OptionCode::ExportName, b"vm").talk();
    assert_eq!(talk.negotiated().export_name, "vm");
    assert_eq!(talk.output.len(), 134);
}

#[test]
fn a_client_without_fixed_newstyle_may_send_nothing_else() {
    for option in [OptionCode::Go, OptionCode::List, OptionCode::Abort, OptionCode::Other(99)] {
        let talk = Client::with_flags(2).option(option, &[]).talk();
        assert_eq!(talk.reason(), &CloseReason::NotFixedNewstyle(option));
        assert!(talk.output.is_empty());
    }
}
