//! However the input is cut into pieces, what comes out is the same.

use super::*;
use proptest::prelude::*;

/// Conversations of every kind, good and bad.
fn conversations() -> Vec<Client> {
    let base = &["base:allocation"][..];
    let every_info = InfoPayload::build("vm", &[InfoType::Name, InfoType::Description, InfoType::BlockSize]);
    vec![
        Client::new(),
        Client::with_flags(0).option(OptionCode::ExportName, b"vm").bytes(b"behind"),
        Client::with_flags(1).option(OptionCode::ExportName, b"nowhere"),
        Client::with_flags(4).go("vm"),
        Client::with_flags(0).go("vm"),
        Client::new().option(OptionCode::List, &[]).option(OptionCode::Abort, b"bye").bytes(b"behind"),
        Client::new()
            .option(OptionCode::Info, &every_info)
            .option(OptionCode::Go, &every_info)
            .bytes(b"behind"),
        Client::new()
            .structured()
            .list_meta_context("vm", &[])
            .set_meta_context("vm", base)
            .go("vm")
            .bytes(b"behind"),
        Client::new()
            .structured()
            .set_meta_context("vm", base)
            .option(OptionCode::ExportName, b"vm")
            .bytes(b"x"),
        Client::new().go("nowhere").go("forbidden").go("vm"),
        Client::new()
            .option(OptionCode::StartTls, &[])
            .option(OptionCode::ExtendedHeaders, &[])
            .structured()
            .go(""),
        Client::new().option(OptionCode::Go, b"\x00\x00\x00\x09vm\x00\x00").go("vm"),
        Client::new()
            .option(OptionCode::Other(99), &[7; 33_000])
            .option(OptionCode::List, &[7; 33_000])
            .go("vm"),
        Client::new().structured().bytes(b"not an option at all"),
    ]
}

#[test]
fn byte_by_byte_is_as_in_one() {
    for client in conversations() {
        let bytewise = client.talk_in_pieces(Knobs::default(), std::iter::repeat(1));
        assert_eq!(bytewise, client.talk());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_cut_is_as_in_one(lengths in prop::collection::vec(0_usize..60, 1..40)) {
        for client in conversations() {
            let cut = client.talk_in_pieces(Knobs::default(), lengths.iter().copied());
            prop_assert_eq!(cut, client.talk());
        }
    }

    #[test]
    fn garbage_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 1_usize..20) {
        let client = Client::new().bytes(&bytes);
        let cut = client.talk_in_pieces(Knobs::default(), std::iter::repeat(cut));
        prop_assert_eq!(cut, client.talk());
    }
}
