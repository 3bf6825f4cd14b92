//! The handshake phase as a client sees it: greeting, option haggling, every option and its malformed forms.

mod support;

use std::net::Shutdown;

use support::haggling::{serve, started};
use support::peer::{context_data, info_data, option_bytes, option_with_length};
use support::server::{Serve, scratch};
use support::{Client, Image, KIB, MIB, Peer, Request, assert_bytes, nbd, wait_until};

/// Any error reply; says which came if it was a success.
#[track_caller]
fn assert_refused(kind: u32) {
    assert_ne!(kind & nbd::REP_ERROR, 0, "reply type {kind:#x} is no error");
}

// Greeting and client flags.

#[test]
fn the_greeting_offers_fixed_newstyle_and_no_zeroes_and_nothing_else() {
    let (_dir, _image, server) = serve();
    assert_eq!(server.peer().greeting(), nbd::FLAG_FIXED_NEWSTYLE | nbd::FLAG_NO_ZEROES);
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let (_dir, _image, server) = serve();
    for flags in [4_u32, 1 << 31, 0xffff_ffff] {
        let mut peer = server.peer();
        peer.greeting();
        peer.send(&flags.to_be_bytes());
        peer.expect_end();
    }
    started(&server).assert_usable();
}

#[test]
fn masked_handshake_flags_are_neither_offered_nor_accepted() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).args(["--mask-handshake", "1"]).start();
    let mut peer = server.peer();
    assert_eq!(peer.greeting(), nbd::FLAG_FIXED_NEWSTYLE);
    peer.send(&3_u32.to_be_bytes());
    peer.expect_end();

    let server = Serve::image(&image).args(["--mask-handshake", "0"]).start();
    let mut peer = server.peer();
    assert_eq!(peer.greeting(), 0);
    peer.send(&0_u32.to_be_bytes());
    assert_eq!(peer.export_name("base", true).size, MIB);
}

#[test]
fn a_wrong_option_magic_closes_the_connection() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.send(&[0x55; 16]);
    peer.expect_end();
}

// NBD_OPT_EXPORT_NAME.

#[test]
fn export_name_sends_124_zero_bytes_unless_both_sides_agreed_to_leave_them_out() {
    let (_dir, image, server) = serve();
    for (client_flags, zeroes) in [(0_u32, true), (1, true), (2, false), (3, false)] {
        let mut peer = server.peer();
        peer.greeting();
        peer.send(&client_flags.to_be_bytes());
        let export = peer.export_name("base", zeroes);
        assert_eq!(export.size, MIB);
        assert_eq!(export.flags & nbd::SEND_DF, 0, "DF needs structured replies");
        let mut client = Client::new(peer, export, false, None);
        assert_bytes(&client.read(4096, 8192), &image.bytes(4096, 8192), 4096);
        client.disconnect();
    }
}

#[test]
fn export_name_enters_transmission_with_what_was_negotiated_before() {
    let (_dir, image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let contexts = peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", &["base:allocation"]).expect("accepted");
    let export = peer.export_name("base", false);
    assert_ne!(export.flags & nbd::SEND_DF, 0);
    let mut client = Client::new(peer, export, true, Some(contexts[0].0));
    assert_bytes(&client.read(0, 512), &image.bytes(0, 512), 0);
    assert!(!client.status(0, MIB).is_empty());
}

#[test]
fn export_name_of_an_unknown_export_closes_without_a_word() {
    let (_dir, _image, server) = serve();
    for name in ["nothing", "base@bad/id", "base@"] {
        let mut peer = started(&server);
        peer.send_option(nbd::OPT_EXPORT_NAME, name.as_bytes());
        peer.expect_end();
    }
}

#[test]
fn the_empty_name_is_the_first_image() {
    let dir = scratch();
    let first = Image::random(dir.path().join("first.img"), MIB, 1);
    let second = Image::random(dir.path().join("second.img"), 2 * MIB, 2);
    let server = Serve::image(&first).and(&second).start();
    assert_eq!(started(&server).export_name("", false).size, MIB);
    let export = started(&server).info("", &[nbd::INFO_NAME]).expect("offered");
    assert_eq!((export.size, export.name.as_deref()), (MIB, Some("first")));
    let mut client = server.client("");
    assert_bytes(&client.read(0, 4096), &first.bytes(0, 4096), 0);
    let mut client = server.client("second");
    assert_bytes(&client.read(0, 4096), &second.bytes(0, 4096), 0);
}

// NBD_OPT_ABORT.

#[test]
fn abort_is_acknowledged_with_or_without_data_and_ends_the_connection() {
    let (_dir, _image, server) = serve();
    for data in [&b""[..], b"ignored"] {
        let mut peer = started(&server);
        assert_eq!(peer.ask(nbd::OPT_ABORT, data), nbd::REP_ACK);
        peer.expect_end();
    }
}

#[test]
fn a_client_may_abort_and_leave_without_waiting() {
    let (_dir, _image, mut server) = serve();
    started(&server).assert_usable();
    for _ in 0..20 {
        let mut peer = started(&server);
        peer.send_option(nbd::OPT_ABORT, &[]);
    }
    started(&server).assert_usable();
    server.assert_alive();
}

// NBD_OPT_LIST.

#[test]
fn list_names_every_image_in_order() {
    let dir = scratch();
    let first = Image::random(dir.path().join("zebra.img"), MIB, 1);
    let second = Image::random(dir.path().join("ant.raw"), MIB, 2);
    let server = Serve::image(&first).and(&second).and_named("other name", &first).start();
    let names: Vec<String> = started(&server).list().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["zebra", "ant", "other name"]);
}

#[test]
fn list_never_shows_sessions() {
    let (_dir, _image, server) = serve();
    let mut fresh = server.client("base");
    let mut named = server.client("base@secret-id");
    fresh.write(0, b"x");
    named.write(0, b"y");
    let list = started(&server).list();
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].0, "base");
    assert!(!format!("{list:?}").contains("secret-id"));
}

#[test]
fn list_with_data_is_invalid() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    assert_eq!(peer.ask(nbd::OPT_LIST, b"x"), nbd::REP_ERR_INVALID);
    peer.assert_usable();
}

// Unknown options and STARTTLS.

#[test]
fn unknown_options_are_unsupported_and_the_connection_stays_usable() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    for option in [0, nbd::OPT_PEEK_EXPORT, 12, 77, 0x7fff_ffff, 0xffff_ffff] {
        for data in [vec![], vec![7; 1], vec![7; 4096]] {
            assert_eq!(peer.ask(option, &data), nbd::REP_ERR_UNSUP, "option {option}");
        }
    }
    peer.assert_usable();
    assert!(peer.go("base").is_ok());
}

#[test]
fn starttls_is_answered_and_the_connection_stays_usable() {
    let (_dir, image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let kind = peer.ask(nbd::OPT_STARTTLS, &[]);
    assert!([nbd::REP_ERR_UNSUP, nbd::REP_ERR_POLICY].contains(&kind), "STARTTLS gives {kind:#x}");
    assert_refused(peer.ask(nbd::OPT_STARTTLS, b"data"));
    peer.assert_usable();
    // No upgrade took place, so what was negotiated before still holds.
    let export = peer.go("base").expect("offered");
    let mut client = Client::new(peer, export, true, None);
    assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
}

#[test]
fn an_oversized_option_is_refused_and_drained() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let big = vec![b'x'; 3 << 20];
    for option in [nbd::OPT_GO, nbd::OPT_LIST, nbd::OPT_SET_META_CONTEXT, 4242] {
        assert_refused(peer.ask(option, &big));
        peer.assert_usable();
    }
}

#[test]
fn an_option_may_arrive_in_single_bytes() {
    let (_dir, image, server) = serve();
    let mut peer = server.peer();
    peer.greeting();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option_bytes(nbd::OPT_GO, &info_data(b"base", &[nbd::INFO_BLOCK_SIZE])));
    for byte in bytes {
        peer.send(&[byte]);
    }
    let replies = peer.option_replies(nbd::OPT_GO);
    assert_eq!(replies.last().expect("a final reply").kind, nbd::REP_ACK);
    let mut client =
        Client::new(peer, support::Export { size: MIB, flags: 1, ..Default::default() }, false, None);
    assert_bytes(&client.read(100, 100), &image.bytes(100, 100), 100);
}

#[test]
fn everything_may_arrive_in_one_segment() {
    let (_dir, image, server) = serve();
    let mut peer = server.peer();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option_bytes(nbd::OPT_LIST, &[]));
    bytes.extend(option_bytes(4242, b"unknown"));
    bytes.extend(option_bytes(nbd::OPT_GO, &info_data(b"base", &[])));
    bytes.extend(Request::read(0, 512).bytes(7));
    peer.send(&bytes);
    peer.greeting();
    assert_eq!(peer.option_replies(nbd::OPT_LIST).len(), 2);
    assert_eq!(peer.option_replies(4242)[0].kind, nbd::REP_ERR_UNSUP);
    assert_eq!(peer.option_replies(nbd::OPT_GO).last().expect("a final reply").kind, nbd::REP_ACK);
    assert_eq!((peer.u32(), peer.u32(), peer.u64()), (nbd::SIMPLE_REPLY_MAGIC, 0, 7));
    assert_bytes(&peer.receive_vec(512), &image.bytes(0, 512), 0);
}

#[test]
fn a_client_that_only_sends_half_an_option_and_shuts_down_is_let_go() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.send(&option_with_length(nbd::OPT_GO, 100, b"short"));
    peer.stream().shutdown(Shutdown::Write).expect("shutting one direction down");
    peer.expect_end();
}

// NBD_OPT_INFO and NBD_OPT_GO.

#[test]
fn info_then_go_tell_the_same() {
    let (_dir, _image, server) = serve();
    let wanted = [nbd::INFO_EXPORT, nbd::INFO_NAME, nbd::INFO_DESCRIPTION, nbd::INFO_BLOCK_SIZE];
    for name in ["base", "", "base@shared"] {
        let mut peer = started(&server);
        peer.structured();
        let info = peer.info(name, &wanted).expect("offered");
        let go = peer.info_or_go(nbd::OPT_GO, name, &wanted).expect("offered");
        assert_eq!(info, go);
        assert_eq!(info.size, MIB);
        assert!(info.name.is_some() && info.description.is_some());
        let (minimum, preferred, maximum) = info.block_sizes.expect("block sizes were asked for");
        assert_eq!(minimum, 1, "any offset and length is served");
        assert!(preferred.is_power_of_two() && preferred >= 512);
        assert_eq!(maximum, 32 << 20);
    }
}

#[test]
fn the_canonical_name_is_the_one_that_list_shows() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let listed = peer.list();
    let export = peer.info("base", &[nbd::INFO_NAME, nbd::INFO_DESCRIPTION]).expect("offered");
    assert_eq!(export.name.expect("asked for"), listed[0].0);
    assert_eq!(export.description.expect("asked for"), listed[0].1);
}

#[test]
fn info_does_not_make_a_session() {
    let (_dir, image, server) = serve();
    let mut peer = started(&server);
    peer.info("base@later", &[]).expect("offered");
    // Were the session made and owned by INFO's connection, its end would start the linger; here nothing happens.
    drop(peer);
    let mut client = server.client("base@later");
    assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
}

#[test]
fn an_unknown_export_is_unknown_to_info_and_go_and_haggling_goes_on() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    for option in [nbd::OPT_INFO, nbd::OPT_GO] {
        for name in ["nothing", "bas", "base ", "BASE", "nothing@id", "base/", "../base.img"] {
            let refusal = peer.info_or_go(option, name, &[]).expect_err("not offered");
            assert_eq!(refusal.kind, nbd::REP_ERR_UNKNOWN, "{name:?}");
        }
    }
    assert!(peer.go("base").is_ok());
}

#[test]
fn session_ids_follow_their_rule() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let longest = format!("base@{}", "x".repeat(64));
    let too_long = format!("base@{}", "x".repeat(65));
    for name in
        ["base@", "base@bad/id", "base@a@b", "base@ ", "base@\u{e9}", "base@a b", "base@a:b", &too_long]
    {
        for option in [nbd::OPT_INFO, nbd::OPT_GO] {
            let refusal = peer.info_or_go(option, name, &[]).expect_err("no such session can be");
            assert!(
                [nbd::REP_ERR_UNKNOWN, nbd::REP_ERR_INVALID].contains(&refusal.kind),
                "{name:?} gives {:#x}",
                refusal.kind
            );
        }
    }
    for name in [longest.as_str(), "base@a", "base@A.b-c_9", "base@-", "base@."] {
        peer.info(name, &[]).unwrap_or_else(|_| panic!("{name:?} is a good name"));
        server.client(name).disconnect();
    }
}

#[test]
fn malformed_info_and_go_are_invalid_and_haggling_goes_on() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let good = info_data(b"base", &[nbd::INFO_NAME]);
    let mut trailing = good.clone();
    trailing.push(0);
    let mut name_too_long = good.clone();
    name_too_long[..4].copy_from_slice(&1000_u32.to_be_bytes());
    let mut name_huge = good.clone();
    name_huge[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut too_many_items = good.clone();
    too_many_items[8..10].copy_from_slice(&9_u16.to_be_bytes());
    let mut too_few_items = good.clone();
    too_few_items[8..10].copy_from_slice(&0_u16.to_be_bytes());
    let bad: [&[u8]; 10] = [
        &[],
        &[0],
        &[0, 0, 0, 0],
        &[0, 0, 0, 0, 0],
        &good[..good.len() - 1],
        &trailing,
        &name_too_long,
        &name_huge,
        &too_many_items,
        &too_few_items,
    ];
    for option in [nbd::OPT_INFO, nbd::OPT_GO] {
        for data in bad {
            assert_eq!(peer.ask(option, data), nbd::REP_ERR_INVALID, "option {option} with {data:02x?}");
        }
    }
    peer.assert_usable();
    assert!(peer.go("base").is_ok());
}

#[test]
fn names_that_are_no_strings_are_refused() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let long = vec![b'n'; 4097];
    for name in [&b"\xff\xfe"[..], b"base\0", &long] {
        for option in [nbd::OPT_INFO, nbd::OPT_GO] {
            assert_refused(peer.ask(option, &info_data(name, &[])));
        }
        peer.structured();
        assert_refused(peer.ask(nbd::OPT_SET_META_CONTEXT, &context_data(name, &["base:allocation"])));
    }
    peer.assert_usable();
}

#[test]
fn unknown_information_requests_are_ignored() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let export = peer.info("base", &[77, nbd::INFO_NAME, 0xffff]).expect("offered");
    assert_eq!(export.name.as_deref(), Some("base"));
}

// NBD_OPT_STRUCTURED_REPLY.

#[test]
fn structured_reply_with_data_is_invalid_and_not_negotiated() {
    let (_dir, image, server) = serve();
    let mut peer = started(&server);
    assert_eq!(peer.ask(nbd::OPT_STRUCTURED_REPLY, b"x"), nbd::REP_ERR_INVALID);
    let export = peer.go("base").expect("offered");
    assert_eq!(export.flags & nbd::SEND_DF, 0);
    let mut client = Client::new(peer, export, false, None);
    assert_bytes(&client.read(0, 512), &image.bytes(0, 512), 0);
}

#[test]
fn structured_replies_can_be_turned_off_by_the_server() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).args(["--no-structured-replies"]).start();
    let mut peer = started(&server);
    assert_eq!(peer.ask(nbd::OPT_STRUCTURED_REPLY, &[]), nbd::REP_ERR_UNSUP);
    assert_refused(peer.ask(nbd::OPT_SET_META_CONTEXT, &context_data(b"base", &["base:allocation"])));
    let export = peer.go("base").expect("offered");
    assert_eq!(export.flags & nbd::SEND_DF, 0);
    let mut client = Client::new(peer, export, false, None);
    assert_bytes(&client.read(0, 512), &image.bytes(0, 512), 0);
    client.call(&Request::read(0, 512).with(nbd::DF)).fails(nbd::EINVAL);
}

// Both kinds of socket, and many.

#[test]
fn tcp_and_unix_sockets_serve_the_same() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).tcp().start();
    let mut tcp = Client::attach(server.tcp_stream(), "base").expect("offered");
    let mut unix = server.client("base");
    tcp.write(512, &[1; 512]);
    unix.write(512, &[2; 512]);
    assert_bytes(&tcp.read(0, KIB), &[image.bytes(0, 512), vec![1; 512]].concat(), 0);
    assert_bytes(&unix.read(0, KIB), &[image.bytes(0, 512), vec![2; 512]].concat(), 0);
    tcp.disconnect();
    unix.disconnect();
}

#[test]
fn connections_that_haggle_forever_do_not_keep_others_out() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Serve::image(&image).args(["--handshake-timeout", "off"]).start();
    let mut idle: Vec<Peer> = (0..200).map(|_| server.peer()).collect();
    let mut client = server.client("base");
    assert_bytes(&client.read(0, 512), &image.bytes(0, 512), 0);
    for peer in &mut idle {
        peer.start();
        peer.assert_usable();
    }
}

#[test]
fn stopping_the_server_closes_connections_in_every_phase() {
    let (_dir, _image, server) = serve();
    let mut greeted = server.peer();
    greeted.greeting();
    let mut haggling = started(&server);
    haggling.assert_usable();
    let mut attached = server.client("base");
    attached.write(0, b"volatile");
    server.stop();
    for peer in [&mut greeted, &mut haggling, attached.peer()] {
        peer.expect_end();
    }
}

#[test]
fn a_stopped_server_refuses_new_connections() {
    let (_dir, _image, server) = serve();
    let socket = server.socket().to_owned();
    server.stop();
    wait_until("the socket is gone", || support::Stream::unix(&socket).is_err());
}
