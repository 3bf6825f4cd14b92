//! Rules of the specification for servers that no themed test covers: `docs/conformance.md` has them all, each with the
//! test that holds memdev to it, and `tests/conformance_table.rs` holds the table to the tests.

mod support;

use support::haggling::started;
use support::in_step::{EXPORT, every_style, serve};
use support::peer::{context_data, info_data, option_bytes};
use support::server::{Serve, scratch};
use support::{Chunk, Client, Image, KIB, MIB, Peer, Request, Server, assert_bytes, nbd};

/// Every option that the specification has, with data that is in order.
fn options() -> [(u32, Vec<u8>); 9] {
    [
        (nbd::OPT_LIST, Vec::new()),
        (nbd::OPT_PEEK_EXPORT, Vec::new()),
        (nbd::OPT_INFO, info_data(b"base", &[nbd::INFO_BLOCK_SIZE])),
        (nbd::OPT_INFO, info_data(b"nothing", &[])),
        (nbd::OPT_STRUCTURED_REPLY, Vec::new()),
        (nbd::OPT_LIST_META_CONTEXT, context_data(b"base", &[])),
        (nbd::OPT_SET_META_CONTEXT, context_data(b"base", &["base:allocation"])),
        (nbd::OPT_GO, info_data(b"nothing", &[])),
        (4242, b"unknown".to_vec()),
    ]
}

/// A client whose handshake is over, without structured replies.
fn simple(peer: Peer, size: u64) -> Client {
    let export = support::Export { size, flags: nbd::HAS_FLAGS, ..Default::default() };
    Client::new(peer, export, false, None)
}

// Handshake.

#[test]
fn without_tls_no_option_is_answered_by_a_demand_for_it() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    for (option, data) in options() {
        assert_ne!(peer.ask(option, &data), nbd::REP_ERROR + 5, "option {option} demands TLS");
    }
    peer.assert_usable();
}

#[test]
fn every_option_names_itself_in_its_replies_and_has_one_final_reply() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let mut bytes = Vec::new();
    for (option, data) in options() {
        bytes.extend(option_bytes(option, &data));
    }
    bytes.extend(option_bytes(nbd::OPT_ABORT, &[]));
    // All of them at once: a reply too many, or one with another's name, would be seen.
    peer.send(&bytes);
    for (option, _) in options() {
        let replies = peer.option_replies(option);
        assert!(replies.iter().rev().skip(1).all(|reply| !reply.is_final()));
    }
    assert_eq!(peer.option_replies(nbd::OPT_ABORT).len(), 1);
    peer.expect_end();
}

#[test]
fn a_client_that_is_only_newstyle_can_name_its_export_and_nothing_else() {
    let (_dir, image, server) = serve();
    for (option, data) in options() {
        let mut peer = server.peer();
        peer.greeting();
        peer.send(&0_u32.to_be_bytes());
        peer.send(&option_bytes(option, &data));
        peer.expect_end();
    }
    let mut peer = server.peer();
    peer.greeting();
    peer.send(&0_u32.to_be_bytes());
    let export = peer.export_name("base", true);
    assert_bytes(&simple(peer, export.size).read(0, 512), &image.bytes(0, 512), 0);
}

#[test]
fn go_is_never_followed_by_zeroes() {
    let (_dir, image, server) = serve();
    for client_flags in [1_u32, 3] {
        let mut peer = server.peer();
        peer.greeting();
        peer.send(&client_flags.to_be_bytes());
        let export = peer.go("base").expect("offered");
        // The first reply would be out of step.
        assert_bytes(&simple(peer, export.size).read(4096, 512), &image.bytes(4096, 512), 4096);
    }
}

#[test]
fn nothing_is_told_about_an_export_that_is_not_there() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    for option in [nbd::OPT_INFO, nbd::OPT_GO] {
        let replies = peer.option(option, &info_data(b"nothing", &[nbd::INFO_NAME, nbd::INFO_BLOCK_SIZE]));
        assert_eq!(replies.len(), 1, "an error and no information");
        assert_eq!(replies[0].kind, nbd::REP_ERR_UNKNOWN);
    }
    for option in [nbd::OPT_LIST_META_CONTEXT, nbd::OPT_SET_META_CONTEXT] {
        assert_eq!(peer.option(option, &context_data(b"nothing", &["base:allocation"])).len(), 1);
    }
}

#[test]
fn all_that_is_told_are_strings_whatever_was_asked_with() {
    // Peer::option_reply looks at every error's message: at most 4,096 bytes of UTF-8 without NUL.
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let longest = "n".repeat(4096);
    let hostile = ["\u{1b}[31m", "a@\u{202e}b", "\u{fffd}\u{10ffff}", "@", "a@", "base@\"\\\n\t", &longest];
    let escaped = format!("base@{}", "\u{1}".repeat(4000));
    for name in hostile.into_iter().chain([&*escaped]) {
        for option in [nbd::OPT_INFO, nbd::OPT_GO] {
            let refusal = peer.info_or_go(option, name, &[]).expect_err("there is no such export");
            assert!(!refusal.data.is_empty(), "the refusal of {name:?} says why");
        }
        let refusal = peer.contexts(nbd::OPT_SET_META_CONTEXT, name, &["base:allocation"]);
        assert!(!refusal.expect_err("there is no such export").data.is_empty());
    }
    for (name, description) in peer.list() {
        assert!(!name.is_empty() && name.len() <= 256 && description.len() <= 256);
    }
}

#[test]
fn size_constraints_are_those_that_the_specification_allows() {
    let (_dir, _image, server) = serve();
    // Told without being asked for, so that every client knows.
    for wanted in [&[][..], &[nbd::INFO_BLOCK_SIZE]] {
        let export = started(&server).info("base", wanted).expect("offered");
        let (minimum, preferred, maximum) = export.block_sizes.expect("they are told");
        assert!(minimum.is_power_of_two() && minimum <= 65_536);
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512));
        assert!(maximum >= preferred && maximum >= 1 << 20);
        assert_eq!(export.size % u64::from(minimum), 0);
    }
}

#[test]
fn listed_contexts_have_no_number_and_selected_ones_have_one_each() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    for queries in [&[][..], &["base:"], &["base:allocation", "base:"]] {
        let listed = peer.contexts(nbd::OPT_LIST_META_CONTEXT, "base", queries).expect("accepted");
        assert!(listed.iter().all(|(id, _)| *id == 0), "the number is reserved: {listed:?}");
        let mut names: Vec<&String> = listed.iter().map(|(_, name)| name).collect();
        names.dedup();
        assert_eq!(names.len(), listed.len(), "each is listed once");
        assert!(names.iter().all(|name| name.split(':').count() == 2), "NAMESPACE:LEAF");
    }
    let all: Vec<String> = peer
        .contexts(nbd::OPT_LIST_META_CONTEXT, "base", &[])
        .expect("accepted")
        .into_iter()
        .map(|(_, name)| name)
        .collect();
    let queries: Vec<&str> = all.iter().map(String::as_str).collect();
    let selected = peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", &queries).expect("accepted");
    assert_eq!(selected.len(), all.len(), "what is listed can be selected");
    let mut ids: Vec<u32> = selected.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all.len(), "no two have the same number");
}

#[test]
fn queries_of_unknown_namespaces_are_no_error() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    for queries in [&["x-unknown:"][..], &["x-unknown:leaf", "qemu:dirty-bitmap:b"], &["base:", "base:none"]]
    {
        let data = context_data(b"base", queries);
        let replies = peer.option(nbd::OPT_SET_META_CONTEXT, &data);
        assert_eq!(replies.len(), 1, "{queries:?} select nothing");
        assert_eq!(replies[0].kind, nbd::REP_ACK);
    }
    let replies = peer.option(nbd::OPT_LIST_META_CONTEXT, &context_data(b"base", &["x-unknown:"]));
    assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [nbd::REP_ACK]);
}

// Transmission.

#[test]
fn cookies_are_the_clients_business() {
    let (_dir, image, server) = serve();
    for structured in [false, true] {
        let mut client = if structured { server.client("base") } else { server.simple("base") };
        // The same one three times, and all that could be special.
        let cookies = [7, 7, 7, 0, u64::MAX, 1 << 63, u64::from(nbd::SIMPLE_REPLY_MAGIC) << 32];
        let bytes: Vec<u8> =
            (0..).zip(cookies).flat_map(|(n, cookie)| Request::read(n * 512, 512).bytes(cookie)).collect();
        let peer = client.peer();
        peer.send(&bytes);
        for (n, cookie) in (0..).zip(cookies) {
            if structured {
                assert_eq!(peer.u32(), nbd::STRUCTURED_REPLY_MAGIC);
                assert_eq!((peer.u16(), peer.u16()), (nbd::REPLY_DONE, nbd::REPLY_OFFSET_DATA));
                assert_eq!((peer.u64(), peer.u32(), peer.u64()), (cookie, 8 + 512, n * 512));
            } else {
                assert_eq!((peer.u32(), peer.u32(), peer.u64()), (nbd::SIMPLE_REPLY_MAGIC, 0, cookie));
            }
            assert_bytes(&peer.receive_vec(512), &image.bytes(n * 512, 512), n * 512);
        }
    }
}

#[test]
fn a_refused_request_has_exactly_one_error_and_no_content() {
    let (_dir, _image, server) = serve();
    let mut client = server.client("base");
    for (request, errno) in [
        (Request::read(EXPORT, 1), nbd::EINVAL),
        (Request::read(0, 512).with(nbd::REQ_ONE), nbd::EINVAL),
        (Request::read(0, 32 * MIB + 1), nbd::EOVERFLOW),
        (Request::write(EXPORT, b"beyond"), nbd::ENOSPC),
        (Request::trim(EXPORT, 1), nbd::EINVAL),
        (Request::zeroes(EXPORT, 1), nbd::ENOSPC),
        (Request::cache(EXPORT, 1), nbd::EINVAL),
        (Request::status(EXPORT, 1), nbd::EINVAL),
        (Request::new(4242, 0, 0), nbd::EINVAL),
    ] {
        let reply = client.call(&request);
        assert!(reply.structured && !reply.message.is_empty(), "there are words with it");
        assert_eq!(reply.chunks, [Chunk::Error(errno, None)], "{request:?}");
    }
}

#[test]
fn only_a_read_too_long_for_structured_replies_is_told_eoverflow() {
    let (_dir, _image, server) = serve();
    every_style(&server, |client| {
        let structured = client.export.flags & nbd::SEND_DF != 0;
        let errno = if structured { nbd::EOVERFLOW } else { nbd::EINVAL };
        client.call(&Request::read(0, 32 * MIB + 1)).fails(errno);
        client.call(&Request::read(0, u64::from(u32::MAX))).fails(errno);
        // Commands that carry no payload are only looked at for their range.
        client.call(&Request::trim(0, u64::from(u32::MAX))).fails(nbd::EINVAL);
        client.call(&Request::cache(0, u64::from(u32::MAX))).fails(nbd::EINVAL);
        let zeroes = Request::zeroes(0, u64::from(u32::MAX));
        client.call(&zeroes).fails(nbd::ENOSPC);
        client.call(&zeroes.with(nbd::FAST_ZERO)).fails(nbd::ENOSPC);
    });
}

#[test]
fn a_read_has_no_more_chunks_than_it_has_stretches() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    // Neighbours of one kind from the base and from the session are one chunk.
    client.write(MIB + 64 * KIB, &[1; 64 << 10]);
    client.zeroes(3 * MIB, 64 * KIB);
    let chunks =
        |client: &mut Client, offset, length| client.call(&Request::read(offset, length)).ok().chunks;
    assert_eq!(chunks(&mut client, MIB, 256 * KIB), [Chunk::Data(MIB, 256 * KIB)]);
    assert_eq!(chunks(&mut client, 3 * MIB - 512, 128 * KIB), [Chunk::Hole(3 * MIB - 512, 128 * KIB)]);
    let border = MIB - 64 * KIB;
    let two = [Chunk::Hole(border, 64 * KIB), Chunk::Data(MIB, 64 * KIB)];
    assert_eq!(chunks(&mut client, border, 128 * KIB), two);
}

#[test]
fn neighbouring_extents_differ_and_are_few_and_round() {
    let dir = scratch();
    let image = Image::sparse(dir.path().join("base.img"), 32 * MIB, &[0..MIB, 3 * MIB..4 * MIB], 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    // What the session has stands beside what the base has, of the same kind and of another.
    client.write(MIB, &[1; 8192]);
    client.zeroes(2 * MIB, 4096);
    let writes: Vec<Request> = (0..1500).map(|n| Request::write(5 * MIB + n * 12_288, &[9; 700])).collect();
    client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
    for (offset, length) in [(0, 32 * MIB), (100, 32 * MIB - 200), (5 * MIB, 20 * MIB), (MIB - 1, 2)] {
        let reply = client.call(&Request::status(offset, length)).ok();
        assert!((1..=1 << 20).contains(&reply.extents.len()));
        let mut at = offset;
        for (n, (extent, state)) in reply.extents.iter().enumerate() {
            assert!(
                n == 0 || reply.extents[n - 1].1 != *state,
                "extents {n} and the one before it are alike"
            );
            at += *extent;
            assert!(at % 512 == 0 || at == offset + length, "an extent ends at {at}");
        }
    }
}

#[test]
fn cache_and_flush_leave_what_follows_as_it_was() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        client.write(4096, b"before");
        let mixed = [
            Request::cache(0, MIB),
            Request::flush(),
            Request::read(4096, 6),
            Request::cache(EXPORT - 1, 1),
            Request::read(0, 512),
        ];
        let replies = client.pipeline(&mixed);
        assert_eq!(replies[2].clone().ok().data, b"before");
        assert_bytes(&replies[4].clone().ok().data, &image.bytes(0, 512), 0);
        // Reserved fields that are not zero.
        client.call(&Request::new(nbd::CMD_FLUSH, 512, 0)).fails(nbd::EINVAL);
        client.call(&Request::new(nbd::CMD_FLUSH, 0, 512)).fails(nbd::EINVAL);
    });
}

#[test]
fn a_request_with_a_magic_of_old_or_of_an_extension_is_none() {
    let (_dir, _image, server) = serve();
    // Historic, the transaction log's, and that of extended headers, which were not negotiated.
    for magic in [0x1256_0953_u32, 0x2560_9514, 0x21e4_1c71] {
        let mut client = server.client("base");
        let mut bytes = Request::read(0, 512).header(1);
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        bytes.extend([0; 8]);
        client.peer().send(&bytes);
        client.peer().expect_end();
    }
}

#[test]
fn what_the_server_keeps_back_is_not_done_by_half() {
    // Structured replies withheld: neither DF nor contexts, nor a chunk of any kind.
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Serve::image(&image).args(["--no-structured-replies"]).start();
    let mut peer = started(&server);
    for option in [nbd::OPT_LIST_META_CONTEXT, nbd::OPT_SET_META_CONTEXT] {
        let refusal = peer.contexts(option, "base", &["base:allocation"]).expect_err("refused");
        assert_eq!(refusal.kind, nbd::REP_ERR_INVALID);
    }
    let export = peer.go("base").expect("offered");
    assert_eq!(export.flags & nbd::SEND_DF, 0);
    let mut client = Client::new(peer, export, false, None);
    client.call(&Request::status(0, 4096)).fails(nbd::EINVAL);
    assert_bytes(&client.read_all(), &image.all(), 0);
}
