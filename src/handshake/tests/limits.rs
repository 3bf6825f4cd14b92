//! What one handshake may take, and what happens to a client that wants more.

use super::*;

fn header(option: OptionCode, length: u32) -> [u8; 16] {
    OptionHeader { option, length }.encode()
}

#[test]
fn options_that_are_too_long_are_drained_and_refused() {
    let options = [
        OptionCode::List,
        OptionCode::Info,
        OptionCode::Go,
        OptionCode::StructuredReply,
        OptionCode::ListMetaContext,
        OptionCode::SetMetaContext,
    ];
    let length = usize::try_from(MAX_OPTION_LENGTH).unwrap() + 1;
    for option in options {
        let talk = Client::new().option(option, &vec![0; length]).go("vm").talk();
        assert_eq!(talk.types()[0], Reply::ErrTooBig);
        assert_eq!(talk.negotiated().export_name, "vm");
    }
}

#[test]
fn the_longest_option_is_read() {
    // 4 bytes of length and "vm", 4 of count, then 21 for each query, and one query takes what is left.
    let mut queries = vec!["x-long:0123456789"; 1559];
    queries.push("x:3456789012345");
    let payload = MetaContextPayload::build("vm", &queries);
    assert_eq!(u32::try_from(payload.len()), Ok(MAX_OPTION_LENGTH));
    let talk = Client::new().structured().list_meta_context("vm", &queries).talk();
    assert_eq!(talk.types(), [Reply::Ack, Reply::Ack]);
}

#[test]
fn a_partial_option_is_kept_only_as_far_as_it_came() {
    let mut handshake = Handshake::new(Knobs::default());
    let client = Client::new().bytes(&header(OptionCode::Go, MAX_OPTION_LENGTH)).bytes(&[0; 100]);
    let (taken, progress) = handshake.receive(&World::default(), &client.0, &mut Vec::new());
    assert!(matches!(progress, Progress::More));
    assert_eq!(taken, client.0.len());
    assert!(handshake.buffered() <= 128);
}

#[test]
fn drained_bytes_are_not_kept() {
    let mut handshake = Handshake::new(Knobs::default());
    let client = Client::new().bytes(&header(OptionCode::Other(99), 50_000_000)).bytes(&[0; 1_000_000]);
    let (taken, _) = handshake.receive(&World::default(), &client.0, &mut Vec::new());
    assert_eq!(taken, client.0.len());
    assert!(handshake.buffered() <= 128);
}

#[test]
fn whoever_announces_gigabytes_is_hung_up_on_at_once() {
    let talk = Client::new().bytes(&header(OptionCode::Other(99), u32::MAX)).talk();
    assert_eq!(talk.reason(), &CloseReason::TooMuchData);
}

#[test]
fn drained_bytes_add_up() {
    // Twice 40 MB: the first is drained, the second is too much.
    let mut handshake = Handshake::new(Knobs::default());
    let world = World::default();
    let mut output = Vec::new();
    let opening = Client::new().bytes(&header(OptionCode::Other(99), 40_000_000));
    handshake.receive(&world, &opening.0, &mut output);
    for _ in 0..40 {
        assert!(matches!(
            handshake.receive(&world, &[0; 1_000_000], &mut output),
            (1_000_000, Progress::More)
        ));
    }
    assert!(!output.is_empty());
    let again = header(OptionCode::Other(99), 40_000_000);
    assert!(matches!(handshake.receive(&world, &again, &mut output), (16, Progress::Closed)));
    assert_eq!(handshake.close_reason(), Some(&CloseReason::TooMuchData));
}

#[test]
fn a_thousand_options_are_answered_and_no_more() {
    let mut client = Client::new();
    for _ in 0..MAX_OPTIONS {
        client = client.option(OptionCode::Other(99), &[]);
    }
    let talk = client.talk();
    talk.assert_usable();
    assert_eq!(talk.replies().len(), 1000);
    let talk = client.option(OptionCode::Other(99), &[]).talk();
    assert_eq!(talk.reason(), &CloseReason::TooManyOptions);
    assert_eq!(talk.replies().len(), 1000);
}

#[test]
fn replies_are_bounded_too() {
    /// A server with so many exports that listing them is an effort.
    struct Crowd;
    impl Environment for Crowd {
        type Export = ();
        fn list(&self) -> Vec<(String, String)> {
            vec![("n".repeat(80), String::new()); 10_000]
        }
        fn describe(&self, _: &str) -> Result<ExportInfo, Refusal> {
            Err(Refusal::Unknown)
        }
        fn open(&self, _: &str) -> Result<(ExportInfo, ()), Refusal> {
            Err(Refusal::Unknown)
        }
    }
    let mut handshake = Handshake::new(Knobs::default());
    let mut client = Client::new();
    for _ in 0..100 {
        client = client.option(OptionCode::List, &[]);
    }
    let mut output = Vec::new();
    let (_, progress) = handshake.receive(&Crowd, &client.0, &mut output);
    assert!(matches!(progress, Progress::Closed));
    assert_eq!(handshake.close_reason(), Some(&CloseReason::TooManyReplies));
    let one_list = 10_000 * (20 + 4 + 80) + 20;
    assert!(output.len() <= MAX_REPLY_BYTES + one_list);
}
