//! `OPT_INFO` and `OPT_GO`: what is told about an export, and the new way in.

use super::*;

const ALL: [InfoType; 4] = [InfoType::Export, InfoType::Name, InfoType::Description, InfoType::BlockSize];

fn infos(talk: &Talk) -> Vec<Vec<u8>> {
    let of_info = |(_, reply, payload)| (reply == Reply::Info).then_some(payload);
    talk.replies().into_iter().filter_map(of_info).collect()
}

#[test]
fn go_tells_export_and_block_size_unasked_and_ends_the_handshake() {
    let talk = Client::new().go("vm").talk();
    assert_eq!(talk.types(), [Reply::Info, Reply::Info, Reply::Ack]);
    let infos = infos(&talk);
    assert_eq!(InfoItem::parse(&infos[0]), Ok(InfoItem::Export { size: SIZE, flags: TOLD_FLAGS }));
    assert_eq!(InfoItem::parse(&infos[1]), Ok(InfoItem::BlockSize(BlockSizes::default())));
    let Ending::Ready { export, info, negotiated } = &talk.ending else { panic!("{talk:?}") };
    assert_eq!(export, "opened vm");
    assert_eq!(info.flags, TOLD_FLAGS, "what the client was told");
    let plain = Negotiated { export_name: "vm".into(), ..Negotiated::default() };
    assert_eq!(negotiated, &plain);
}

#[test]
fn name_and_description_are_told_when_asked_for() {
    let payload = InfoPayload::build("", &ALL);
    let talk = Client::new().option(OptionCode::Go, &payload).talk();
    assert_eq!(
        infos(&talk).iter().map(|info| InfoItem::parse(info).unwrap()).collect::<Vec<_>>(),
        [
            InfoItem::Export { size: SIZE, flags: TOLD_FLAGS },
            InfoItem::Name("vm"),
            InfoItem::Description("A machine"),
            InfoItem::BlockSize(BlockSizes::default()),
        ]
    );
}

#[test]
fn unknown_and_repeated_requests_change_nothing() {
    let asked = [InfoType::Other(7), InfoType::Name, InfoType::Name, InfoType::Other(0xffff)];
    let talk = Client::new().option(OptionCode::Info, &InfoPayload::build("vm", &asked)).talk();
    assert_eq!(talk.types(), [Reply::Info, Reply::Info, Reply::Info, Reply::Ack]);
}

#[test]
fn info_tells_what_go_tells_and_opens_nothing() {
    for name in ["", "vm", "größe", "vm@shared"] {
        let payload = InfoPayload::build(name, &ALL);
        let both = Client::new()
            .structured()
            .option(OptionCode::Info, &payload)
            .option(OptionCode::Go, &payload)
            .talk();
        let infos = infos(&both);
        assert_eq!(infos[..4], infos[4..]);
        assert_eq!(both.opened, [name]);
        let only = Client::new().option(OptionCode::Info, &payload).talk();
        only.assert_usable();
        assert!(only.opened.is_empty());
    }
}

#[test]
fn refusals_are_told_and_the_connection_goes_on() {
    let table = [
        ("nowhere", Reply::ErrUnknown, "no such export"),
        ("forbidden", Reply::ErrPolicy, "not yours"),
        ("closing", Reply::ErrShutdown, "server is shutting down"),
        ("vm@?", Reply::ErrInvalid, "not a session name"),
    ];
    for option in [OptionCode::Info, OptionCode::Go] {
        for (name, reply, message) in table {
            let talk = Client::new().option(option, &InfoPayload::build(name, &ALL)).talk();
            assert_eq!((talk.types(), talk.message()), (vec![reply], message.to_owned()));
            assert_eq!(talk.replies()[0].0, option);
            talk.assert_usable();
        }
    }
    let second_try = Client::new().go("nowhere").go("vm").talk();
    assert_eq!(second_try.negotiated().export_name, "vm");
}

#[test]
fn malformed_payloads_are_invalid_and_the_connection_goes_on() {
    let payloads: [&[u8]; 7] = [
        b"",
        b"\x00\x00\x00\x02vm",
        b"\x00\x00\x00\x03vm\x00\x00",
        b"\x00\x00\x00\x02vm\x00\x01",
        b"\x00\x00\x00\x02vm\x00\x00!",
        b"\x00\x00\x00\x02v\xff\x00\x00",
        b"\xff\xff\xff\xffvm\x00\x00",
    ];
    for option in [OptionCode::Info, OptionCode::Go] {
        for payload in payloads {
            let talk = Client::new().option(option, payload).go("vm").talk();
            assert_eq!(talk.types()[0], Reply::ErrInvalid, "{payload:?}");
            assert_eq!(talk.opened, ["vm"]);
        }
    }
}

#[test]
fn df_is_told_exactly_when_structured_replies_are_negotiated() {
    for name in ["vm", "größe"] {
        let told = |client: Client| {
            let talk = client.go(name).talk();
            let Ending::Ready { info, .. } = talk.ending else { panic!() };
            info.flags.contains(TransmissionFlags::SEND_DF)
        };
        assert!(!told(Client::new()));
        assert!(told(Client::new().structured()));
    }
}

#[test]
fn what_follows_go_belongs_to_the_transmission_phase() {
    let client = Client::new().go("vm");
    let length = client.0.len();
    let talk = client.bytes(b"\x25\x60\x95\x13 and so on").talk();
    assert_eq!(talk.taken, length);
    assert!(matches!(talk.ending, Ending::Ready { .. }));
}
