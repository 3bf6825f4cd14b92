//! What is not supported, what makes no sense, what comes too late: each is answered, and the connection goes on.

use super::*;

#[test]
fn unknown_options_are_unsupported_whatever_their_data() {
    let options =
        [OptionCode::PeekExport, OptionCode::Other(0), OptionCode::Other(12), OptionCode::Other(u32::MAX)];
    for option in options {
        for data in [&b""[..], b"IHAVEOPT\x00\x00\x00\x02\x00\x00\x00\x00", &[0xff; 32 * 1024], &[0; 100_000]]
        {
            let talk = Client::new().option(option, data).go("vm").talk();
            let replies = talk.replies();
            assert_eq!((replies[0].0, replies[0].1), (option, Reply::ErrUnsup));
            assert_eq!(talk.negotiated().export_name, "vm");
        }
    }
}

#[test]
fn a_bad_magic_ends_the_connection() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"NBDMAGIC\x00\x00\x00\x07\x00\x00\x00\x00", &[0; 16]] {
        let talk = Client::new().option(OptionCode::Other(99), &[]).bytes(bytes).talk();
        assert!(matches!(talk.reason(), CloseReason::BadMagic(_)));
        assert_eq!(talk.types(), [Reply::ErrUnsup]);
    }
}

#[test]
fn a_server_that_shuts_down_says_so_to_every_option_but_abort() {
    let mut handshake = Handshake::new(Knobs::default());
    handshake.shut_down();
    let client = Client::new()
        .structured()
        .option(OptionCode::List, &[0; 40_000])
        .go("vm")
        .option(OptionCode::Abort, &[]);
    let mut output = Vec::new();
    let (taken, progress) = handshake.receive(&World::default(), &client.0, &mut output);
    assert!(matches!(progress, Progress::Closed));
    let talk = Talk { output, taken, ending: Ending::More, opened: Vec::new() };
    assert_eq!(talk.types(), [Reply::ErrShutdown, Reply::ErrShutdown, Reply::ErrShutdown, Reply::Ack]);

    let mut handshake = Handshake::new(Knobs::default());
    handshake.shut_down();
    let client = Client::new().option(OptionCode::ExportName, b"vm");
    let (_, progress) = handshake.receive(&World::default(), &client.0, &mut Vec::new());
    assert!(matches!(progress, Progress::Closed));
    let refused = CloseReason::ExportRefused { name: "vm".into(), refusal: Refusal::Shutdown };
    assert_eq!(handshake.close_reason(), Some(&refused));
}
