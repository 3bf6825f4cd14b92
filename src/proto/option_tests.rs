//! Options and their replies against bytes written by hand from the specification.

use super::*;

#[test]
fn an_option_is_a_magic_a_number_and_a_length() {
    let wire = b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x0a";
    let header = OptionHeader { option: OptionCode::Go, length: 10 };
    assert_eq!(OptionHeader::parse(wire), Ok(header));
    assert_eq!(&header.encode(), wire);
    assert_eq!(
        OptionHeader::parse(b"NBDMAGIC\x00\x00\x00\x07\x00\x00\x00\x0a"),
        Err(BadMagic { found: NBD_MAGIC })
    );
    let unknown = OptionHeader::parse(b"IHAVEOPT\xff\x00\x00\x01\xff\xff\xff\xff").unwrap();
    assert_eq!(unknown, OptionHeader { option: OptionCode::Other(0xff00_0001), length: u32::MAX });
}

#[test]
fn an_option_reply_is_a_magic_the_option_a_type_and_a_length() {
    let mut out = Vec::new();
    append_option_reply(&mut out, OptionCode::List, OptionReplyType::ErrPolicy, b"no");
    assert_eq!(out, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x02\x00\x00\x00\x02no");
    let header = OptionReplyHeader::parse(&field(&out, 0)).unwrap();
    let expected =
        OptionReplyHeader { option: OptionCode::List, reply: OptionReplyType::ErrPolicy, length: 2 };
    assert_eq!(header, expected);
    assert!(OptionReplyHeader::parse(&[0; 20]).is_err());
}

#[test]
fn every_number_survives_and_errors_are_known_by_bit_31() {
    for value in (0..20).chain(REP_FLAG_ERROR..REP_FLAG_ERROR + 20).chain([u32::MAX]) {
        assert_eq!(u32::from(OptionCode::from(value)), value);
        assert_eq!(u32::from(OptionReplyType::from(value)), value);
        assert_eq!(OptionReplyType::from(value).is_error(), value >= REP_FLAG_ERROR);
    }
    assert_eq!(OptionReplyType::from(REP_FLAG_ERROR + 9), OptionReplyType::ErrTooBig);
}

#[test]
fn an_info_payload_is_a_name_and_a_list_of_requests() {
    let wire = b"\x00\x00\x00\x02vm\x00\x02\x00\x03\xab\xcd";
    let payload = InfoPayload::parse(wire).unwrap();
    assert_eq!(payload.name, "vm");
    assert_eq!(payload.requests().collect::<Vec<_>>(), [InfoType::BlockSize, InfoType::Other(0xabcd)]);
    assert!(payload.requests_info(InfoType::BlockSize));
    assert!(!payload.requests_info(InfoType::Name));
    assert_eq!(InfoPayload::build("vm", &[InfoType::BlockSize, InfoType::Other(0xabcd)]), wire);

    let default = InfoPayload::parse(b"\x00\x00\x00\x00\x00\x00").unwrap();
    assert_eq!((default.name, default.requests().count()), ("", 0));
}

#[test]
fn malformed_info_payloads_are_named() {
    let cases: &[(&[u8], Malformed)] = &[
        (b"", Malformed::Truncated),
        (b"\x00\x00\x00\x02v", Malformed::Truncated),
        // The name takes the place of the count: its length must be at most the payload's less six.
        (b"\x00\x00\x00\x02vm", Malformed::Truncated),
        (b"\x00\x00\x00\x02vm\x00", Malformed::Truncated),
        (b"\x00\x00\x00\x02vm\x00\x01", Malformed::Truncated),
        (b"\x00\x00\x00\x02vm\x00\x01\x00", Malformed::Truncated),
        (b"\x00\x00\x00\x02vm\x00\x01\x00\x03\x00", Malformed::TrailingData),
        (b"\x00\x00\x00\x02vm\x00\x00\x00\x03", Malformed::TrailingData),
        (b"\xff\xff\xff\xffvm\x00\x00", Malformed::Truncated),
        (b"\x00\x00\x00\x02v\0\x00\x00", Malformed::ContainsNul),
        (b"\x00\x00\x00\x02v\xc3\x00\x00", Malformed::NotUtf8),
    ];
    for (wire, why) in cases {
        assert_eq!(InfoPayload::parse(wire), Err(*why), "{wire:?}");
    }
    let mut long = 4097_u32.to_be_bytes().to_vec();
    long.resize(4 + 4097 + 2, b'a');
    assert_eq!(InfoPayload::parse(&long), Err(Malformed::StringTooLong));
}

#[test]
fn information_items_are_as_the_specification_lays_them_out() {
    let cases: &[(InfoItem<'_>, &[u8])] = &[
        (
            InfoItem::Export { size: 1 << 32, flags: TransmissionFlags(0x010d) },
            b"\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x01\x0d",
        ),
        (InfoItem::Name("vm"), b"\x00\x01vm"),
        (InfoItem::Description(""), b"\x00\x02"),
        (
            InfoItem::BlockSize(BlockSizes::default()),
            b"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00",
        ),
        (InfoItem::Other(0x1234, b"?"), b"\x12\x34?"),
    ];
    for (item, wire) in cases {
        assert_eq!(item.encode(), *wire);
        assert_eq!(InfoItem::parse(wire), Ok(*item));
    }
    assert_eq!(InfoItem::parse(b"\x00"), Err(Malformed::Truncated));
    assert_eq!(InfoItem::parse(b"\x00\x00\x00"), Err(Malformed::Truncated));
    assert_eq!(InfoItem::parse(&[0; 13]), Err(Malformed::TrailingData));
    assert_eq!(InfoItem::parse(b"\x00\x03\x00\x00\x00\x01"), Err(Malformed::Truncated));
}

#[test]
fn an_entry_of_the_list_is_a_name_and_the_rest_is_its_description() {
    let entry = ExportEntry { name: "vm", description: "Debian" };
    assert_eq!(entry.encode(), b"\x00\x00\x00\x02vmDebian");
    assert_eq!(ExportEntry::parse(b"\x00\x00\x00\x02vmDebian"), Ok(entry));
    assert_eq!(ExportEntry::parse(b"\x00\x00\x00\x00"), Ok(ExportEntry { name: "", description: "" }));
    assert_eq!(ExportEntry::parse(b"\x00\x00\x00\x03vm"), Err(Malformed::Truncated));
}

#[test]
fn a_meta_context_payload_is_a_name_and_queries() {
    let wire = b"\x00\x00\x00\x01v\x00\x00\x00\x02\x00\x00\x00\x05base:\x00\x00\x00\x03x-y";
    let payload = MetaContextPayload::parse(wire).unwrap();
    assert_eq!(payload.export_name, "v");
    assert_eq!(payload.queries().collect::<Vec<_>>(), ["base:", "x-y"]);
    assert!(!payload.is_empty());
    assert_eq!(MetaContextPayload::build("v", &["base:", "x-y"]), wire);

    let none = MetaContextPayload::parse(&[0; 8]).unwrap();
    assert!(none.is_empty() && none.queries().next().is_none());
    // An empty query is a query.
    let empty = MetaContextPayload::parse(b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00").unwrap();
    assert_eq!(empty.queries().collect::<Vec<_>>(), [""]);
}

#[test]
fn malformed_meta_context_payloads_are_named() {
    let cases: &[(&[u8], Malformed)] = &[
        (b"", Malformed::Truncated),
        (b"\x00\x00\x00\x00", Malformed::Truncated),
        (b"\x00\x00\x00\x00\xff\xff\xff\xff", Malformed::Truncated),
        (b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02a", Malformed::Truncated),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00a", Malformed::TrailingData),
        (b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01\xff", Malformed::NotUtf8),
    ];
    for (wire, why) in cases {
        assert_eq!(MetaContextPayload::parse(wire), Err(*why), "{wire:?}");
    }
}

#[test]
fn a_meta_context_is_a_number_and_a_name() {
    let context = MetaContext { id: META_CONTEXT_BASE_ALLOCATION, name: META_NAME_BASE_ALLOCATION };
    assert_eq!(context.encode(), b"\x00\x00\x00\x01base:allocation");
    assert_eq!(MetaContext::parse(&context.encode()), Ok(context));
    assert_eq!(MetaContext::parse(b"\x00\x00\x00"), Err(Malformed::Truncated));
}

#[test]
fn outgoing_strings_are_clipped_so_that_the_reply_stays_well_formed() {
    let long = "ä".repeat(4000);
    let entry = ExportEntry { name: &long, description: &long }.encode();
    let back = ExportEntry::parse(&entry).unwrap();
    assert_eq!((back.name.len(), back.description.len()), (4096, 4096));
    assert_eq!(InfoItem::parse(&InfoItem::Name(&long).encode()), Ok(InfoItem::Name(back.name)));
}
