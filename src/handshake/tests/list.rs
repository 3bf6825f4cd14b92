//! `OPT_LIST` and `OPT_ABORT`.

use super::*;
use crate::proto::ExportEntry;

#[test]
fn names_every_export_with_its_description() {
    let talk = Client::new().option(OptionCode::List, &[]).talk();
    assert_eq!(talk.types(), [Reply::Server, Reply::Server, Reply::Ack]);
    let replies = talk.replies();
    assert_eq!(ExportEntry::parse(&replies[0].2), Ok(ExportEntry { name: "vm", description: "A machine" }));
    assert_eq!(ExportEntry::parse(&replies[1].2), Ok(ExportEntry { name: "größe", description: "" }));
    talk.assert_usable();
}

#[test]
fn takes_no_data() {
    let talk = Client::new().option(OptionCode::List, b"x").option(OptionCode::List, &[]).talk();
    assert_eq!(talk.types(), [Reply::ErrInvalid, Reply::Server, Reply::Server, Reply::Ack]);
    talk.assert_usable();
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection_whatever_data_it_has() {
    for data in [&b""[..], b"goodbye", &[0; 40_000]] {
        let talk = Client::new().option(OptionCode::Abort, data).bytes(b"ignored").talk();
        assert_eq!(talk.replies(), [(OptionCode::Abort, Reply::Ack, Vec::new())]);
        assert_eq!(talk.reason(), &CloseReason::Aborted);
    }
}
