//! `OPT_EXPORT_NAME`: the old way in, which cannot be refused but by hanging up.

use super::*;
use crate::proto::ExportNameReply;

fn reply(talk: &Talk) -> ExportNameReply {
    ExportNameReply::parse(talk.output.first_chunk().unwrap())
}

#[test]
fn answers_size_and_flags_without_zeroes_when_both_sides_said_so() {
    let talk = Client::new().option(OptionCode::ExportName, b"vm").talk();
    assert_eq!(talk.output.len(), 10);
    assert_eq!(reply(&talk), ExportNameReply { size: SIZE, flags: TOLD_FLAGS });
    assert_eq!(talk.opened, ["vm"]);
}

#[test]
fn answers_with_zeroes_to_a_client_that_did_not_say_so() {
    let talk = Client::with_flags(1).option(OptionCode::ExportName, b"vm").talk();
    assert_eq!(talk.output.len(), 134);
    assert!(talk.output[10..].iter().all(|&byte| byte == 0));
}

#[test]
fn the_empty_name_is_the_default_export() {
    let talk = Client::new().option(OptionCode::ExportName, b"").talk();
    let Ending::Ready { export, info, negotiated } = &talk.ending else { panic!() };
    assert_eq!((export.as_str(), info.name.as_str(), negotiated.export_name.as_str()), ("opened ", "vm", ""));
}

#[test]
fn structured_replies_and_contexts_hold_for_it_too() {
    let talk = Client::new()
        .structured()
        .set_meta_context("vm", &["base:allocation"])
        .option(OptionCode::ExportName, b"vm")
        .talk();
    assert!(talk.negotiated().structured_replies && !talk.negotiated().contexts.is_empty());
    assert_eq!(
        talk.output[talk.output.len() - 2..],
        TOLD_FLAGS.union(TransmissionFlags::SEND_DF).bits().to_be_bytes()
    );
}

#[test]
fn every_refusal_is_a_silent_end() {
    for name in ["nowhere", "forbidden", "closing", "vm@?"] {
        let talk = Client::new().option(OptionCode::ExportName, name.as_bytes()).talk();
        let CloseReason::ExportRefused { name: refused, .. } = talk.reason() else { panic!("{talk:?}") };
        assert_eq!(refused, name);
        assert!(talk.output.is_empty() && talk.opened.is_empty());
    }
    let talk = Client::new().option(OptionCode::ExportName, b"nowhere").talk();
    assert_eq!(talk.reason().to_string(), "Export \"nowhere\" refused: no such export");
}

#[test]
fn what_is_no_name_is_a_silent_end() {
    for (name, why) in [(&b"v\0m"[..], Malformed::ContainsNul), (b"\xff", Malformed::NotUtf8)] {
        let talk = Client::new().option(OptionCode::ExportName, name).talk();
        assert_eq!(talk.reason(), &CloseReason::MalformedExportName(why));
        assert!(talk.output.is_empty());
    }
}

#[test]
fn a_name_may_have_4096_bytes_and_a_longer_one_is_not_waited_for() {
    let longest = Client::new().option(OptionCode::ExportName, &[b'a'; 4096]).talk();
    assert!(matches!(longest.reason(), CloseReason::ExportRefused { refusal: Refusal::Unknown, .. }));
    // Only the header came.
    let mut longer = Client::new().option(OptionCode::ExportName, &[b'a'; 4097]);
    longer.0.truncate(4 + OptionHeader::SIZE);
    assert_eq!(longer.talk().reason(), &CloseReason::MalformedExportName(Malformed::StringTooLong));
}

#[test]
fn what_follows_belongs_to_the_transmission_phase() {
    let client = Client::new().option(OptionCode::ExportName, b"vm");
    let length = client.0.len();
    let talk = client.bytes(b"\x25\x60\x95\x13").talk();
    assert_eq!(talk.taken, length);
}
