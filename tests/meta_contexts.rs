//! Metadata contexts: during option haggling, and what block status tells of them afterwards.

mod support;

use support::haggling::{serve, started};
use support::peer::context_data;
use support::server::{Serve, scratch};
use support::{Client, Image, KIB, MIB, Peer, Request, Server, Style, assert_bytes, nbd};

const BASE: &str = "base:allocation";
const DIRTY: &str = "memdev:dirty";
const HOLE: u32 = nbd::STATE_HOLE | nbd::STATE_ZERO;
const DIRTY_AND_ZERO: u32 = nbd::DIRTY | nbd::DIRTY_ZERO;

/// The styles that have block status.
const CHUNKED: [Style; 2] = [Style::Structured, Style::Extended];

#[test]
fn meta_contexts_need_structured_replies() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    let refusal = peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", &["base:allocation"]);
    assert_eq!(refusal.expect_err("refused").kind, nbd::REP_ERR_INVALID);
    peer.assert_usable();
}

#[test]
fn listing_contexts_finds_base_allocation_by_no_query_by_wildcard_and_by_name() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    for queries in [&[][..], &["base:"], &["base:allocation"], &["qemu:dirty-bitmap:b", "base:allocation"]] {
        let found = peer.contexts(nbd::OPT_LIST_META_CONTEXT, "base", queries).expect("accepted");
        assert!(found.iter().any(|(_, name)| name == "base:allocation"), "{queries:?} finds {found:?}");
    }
    let mut names = |queries: &[&str]| -> Vec<String> {
        let found = peer.contexts(nbd::OPT_LIST_META_CONTEXT, "base", queries).expect("accepted");
        assert!(found.iter().all(|(id, _)| *id == 0), "there are no numbers in a list");
        found.into_iter().map(|(_, name)| name).collect()
    };
    for queries in [&[][..], &["memdev:", "base:"], &[DIRTY, "base:"], &["base:", BASE, DIRTY, "memdev:"]] {
        assert_eq!(names(queries), [BASE, DIRTY], "{queries:?}");
    }
    for queries in [&["memdev:"][..], &[DIRTY], &["qemu:", "memdev:"]] {
        assert_eq!(names(queries), [DIRTY], "{queries:?}");
    }
    for queries in [&[""][..], &[":"], &["memdev"], &["memdev:d"], &["MEMDEV:"]] {
        assert_eq!(names(queries), [""; 0], "{queries:?}");
    }
    for queries in [&["qemu:"][..], &["x-unknown:leaf"]] {
        let found = peer.contexts(nbd::OPT_LIST_META_CONTEXT, "base", queries).expect("accepted");
        assert!(found.is_empty(), "{queries:?} finds {found:?}");
    }
}

#[test]
fn setting_contexts_selects_only_what_is_named_in_full() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let mut set = |queries: &[&str]| peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", queries);
    for queries in
        [&[][..], &["base:"], &["memdev:"], &["base:nonsense"], &["memdev:"], &["x-unknown:leaf", "base:"]]
    {
        let selected = set(queries).expect("accepted");
        assert!(selected.is_empty(), "{queries:?} selects {selected:?}");
    }
    let selected = set(&["x-unknown:leaf", "base:allocation"]).expect("accepted");
    assert_eq!(selected.len(), 1);
    // Both, in whatever order they are named; each has a number of its own, and always the same.
    let both = set(&[DIRTY, BASE]).expect("accepted");
    assert_eq!(both.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), [BASE, DIRTY]);
    assert_eq!(both[0], selected[0]);
    assert_ne!(both[0].0, both[1].0);
    assert_eq!(set(&[DIRTY]).expect("accepted"), both[1..]);
    // Named twice it is still one context.
    let selected = set(&["base:allocation", "base:allocation"]).expect("accepted");
    assert_eq!(selected.len(), 1);
}

#[test]
fn contexts_of_an_unknown_export_are_refused() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    for option in [nbd::OPT_LIST_META_CONTEXT, nbd::OPT_SET_META_CONTEXT] {
        let refusal = peer.contexts(option, "nothing", &["base:allocation"]).expect_err("refused");
        assert_eq!(refusal.kind, nbd::REP_ERR_UNKNOWN);
    }
    peer.assert_usable();
}

#[test]
fn malformed_context_options_are_invalid() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let good = context_data(b"base", &["base:allocation"]);
    let mut trailing = good.clone();
    trailing.push(0);
    let mut long_name = good.clone();
    long_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut many = good.clone();
    many[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut long_query = good.clone();
    long_query[12..16].copy_from_slice(&16_u32.to_be_bytes());
    let bad: [&[u8]; 8] =
        [&[], &[0; 3], &good[..8], &good[..good.len() - 1], &trailing, &long_name, &many, &long_query];
    for option in [nbd::OPT_LIST_META_CONTEXT, nbd::OPT_SET_META_CONTEXT] {
        for data in bad {
            assert_eq!(peer.ask(option, data), nbd::REP_ERR_INVALID, "option {option} with {data:02x?}");
        }
    }
    peer.assert_usable();
}

#[test]
fn block_status_needs_a_context_that_was_set_for_this_very_export() {
    let dir = scratch();
    let first = Image::random(dir.path().join("first.img"), MIB, 1);
    let second = Image::random(dir.path().join("second.img"), MIB, 2);
    let server = Serve::image(&first).and(&second).start();
    let refused = |prepare: &dyn Fn(&mut Peer)| {
        let mut peer = started(&server);
        peer.structured();
        prepare(&mut peer);
        let export = peer.go("second").expect("offered");
        let mut client = Client::new(peer, export, true, Some(0));
        client.call(&Request::status(0, 4096)).fails(nbd::EINVAL);
        assert_bytes(&client.read(0, 512), &second.bytes(0, 512), 0);
    };
    let set = |peer: &mut Peer, name: &str, queries: &[&str]| {
        peer.contexts(nbd::OPT_SET_META_CONTEXT, name, queries).is_ok()
    };
    refused(&|_| {});
    refused(&|peer| assert!(set(peer, "first", &["base:allocation"])));
    refused(&|peer| assert!(set(peer, "second", &[])));
    // The last one counts, also when it fails.
    refused(&|peer| {
        assert!(set(peer, "second", &["base:allocation"]));
        assert!(set(peer, "second", &["base:"]));
    });
    refused(&|peer| {
        assert!(set(peer, "second", &["base:allocation"]));
        assert!(!set(peer, "nothing", &["base:allocation"]));
    });
    refused(&|peer| {
        assert!(set(peer, "second", &["base:allocation"]));
        assert_eq!(peer.ask(nbd::OPT_SET_META_CONTEXT, &[1, 2, 3]), nbd::REP_ERR_INVALID);
    });
}

#[test]
fn listing_contexts_does_not_change_what_was_set() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let set = peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", &["base:allocation"]).expect("accepted");
    peer.contexts(nbd::OPT_LIST_META_CONTEXT, "base", &["qemu:"]).expect("accepted");
    let export = peer.go("base").expect("offered");
    let mut client = Client::new(peer, export, true, Some(set[0].0));
    assert_eq!(client.status(0, MIB).iter().map(|(length, _)| length).sum::<u64>(), MIB);
}

// What block status tells.

/// Sparse: 1 MiB of data from 1 MiB on, in 8 MiB.
fn serve_sparse() -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), 8 * MIB, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    (dir, image, server)
}

#[test]
fn dirty_is_what_the_session_wrote() {
    let (_dir, _image, server) = serve_sparse();
    for style in CHUNKED {
        let mut client = server.client_with_contexts(style, "base");
        let dirty = client.context(DIRTY);
        assert_eq!(client.status_of(dirty, 0, 8 * MIB), [(8 * MIB, 0)], "at first nothing");

        // A byte makes its block dirty; over data and over a hole of the base alike.
        client.write(MIB + 5000, b"!");
        client.write(5 * MIB, &[1; 8192]);
        // What is zeroed or trimmed where there was data is dirty, and zero.
        client.zeroes(MIB + 64 * KIB, 64 * KIB);
        client.trim(MIB + 256 * KIB, 4096);
        // Zeroes that are written are no more than that.
        client.write(6 * MIB, &[0; 4096]);
        assert_eq!(
            client.status_of(dirty, 0, 8 * MIB),
            [
                (MIB + 4096, 0),
                (4096, nbd::DIRTY),
                (56 * KIB, 0),
                (64 * KIB, DIRTY_AND_ZERO),
                (128 * KIB, 0),
                (4096, DIRTY_AND_ZERO),
                (4 * MIB - 260 * KIB, 0),
                (8192, nbd::DIRTY),
                (MIB - 8192, 0),
                (4096, DIRTY_AND_ZERO),
                (2 * MIB - 4096, 0),
            ]
        );
        // It stays dirty, whatever is written there: the base's own bytes, or zeroes.
        client.zeroes(5 * MIB, 4096);
        assert_eq!(client.status_of(dirty, 5 * MIB, 8192), [(4096, DIRTY_AND_ZERO), (4096, nbd::DIRTY)]);
        // Extents are cut to the range that was asked for.
        assert_eq!(
            client.status_of(dirty, 5 * MIB + 100, 5000),
            [(3996, DIRTY_AND_ZERO), (1004, nbd::DIRTY)]
        );
        client.disconnect();
    }
}

#[test]
fn dirty_is_told_of_a_session_and_not_of_its_neighbours() {
    let (_dir, _image, server) = serve_sparse();
    let mut one = server.client_with_contexts(Style::Structured, "base@one");
    one.write(0, &[1; 4096]);
    let shown = |name: &str, style| {
        let mut client = server.client_with_contexts(style, name);
        let dirty = client.context(DIRTY);
        client.status_of(dirty, 0, 8 * MIB)
    };
    for style in CHUNKED {
        assert_eq!(shown("base@one", style), [(4096, nbd::DIRTY), (8 * MIB - 4096, 0)]);
        assert_eq!(shown("base@two", style), [(8 * MIB, 0)]);
        assert_eq!(shown("base", style), [(8 * MIB, 0)]);
    }
}

#[test]
fn one_answer_tells_of_every_context_selected() {
    let (_dir, _image, server) = serve_sparse();
    for style in CHUNKED {
        let mut client = server.client_with_contexts(style, "base");
        let (base, dirty) = (client.context(BASE), client.context(DIRTY));
        client.write(MIB, &[1; 4096]);
        client.write(4 * MIB, &[1; 4096]);
        let reply = client.call(&Request::status(0, 8 * MIB)).ok();
        assert_eq!(reply.statuses.len(), 2);
        assert_eq!(
            reply.status_of(base),
            [(MIB, HOLE), (MIB, 0), (2 * MIB, HOLE), (4096, 0), (4 * MIB - 4096, HOLE)]
        );
        assert_eq!(
            reply.status_of(dirty),
            [(MIB, 0), (4096, nbd::DIRTY), (3 * MIB - 4096, 0), (4096, nbd::DIRTY), (4 * MIB - 4096, 0)]
        );
        let one = client.call(&Request::status(MIB + 1, 6 * MIB).with(nbd::REQ_ONE)).ok();
        assert_eq!(one.status_of(base), [(MIB - 1, 0)]);
        assert_eq!(one.status_of(dirty), [(4095, nbd::DIRTY)]);

        // One of them alone.
        let mut alone = Client::attach_as(server.stream(), "base", style, &[DIRTY]).expect("offered");
        let reply = alone.call(&Request::status(0, 8 * MIB)).ok();
        assert_eq!(reply.statuses, [(dirty, vec![(8 * MIB, 0)])]);
    }
}

#[test]
fn an_answer_has_1024_extents_of_a_context_at_most_and_the_next_goes_on_there() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), 64 * MIB);
    let server = Server::of(&image);
    for style in CHUNKED {
        let mut client = server.client_with_contexts(style, "base");
        let (base, dirty) = (client.context(BASE), client.context(DIRTY));
        let writes: Vec<Request> = (0..3000).map(|n| Request::write(n * 16 * KIB, &[1; 4096])).collect();
        client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
        let reply = client.call(&Request::status(0, 64 * MIB)).ok();
        assert_eq!((reply.status_of(base).len(), reply.status_of(dirty).len()), (1024, 1024));
        for (context, clean, written) in [(base, HOLE, 0), (dirty, 0, nbd::DIRTY)] {
            let all = client.status_of(context, 0, 64 * MIB);
            assert_eq!(all.len(), 6000);
            for pair in all[..5998].chunks(2) {
                assert_eq!(pair, [(4 * KIB, written), (12 * KIB, clean)]);
            }
        }
    }
}

#[test]
fn what_one_context_has_too_much_of_does_not_shorten_the_other() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 32 * MIB, 3);
    let server = Server::of(&image);
    for style in CHUNKED {
        let mut client = server.client_with_contexts(style, "base");
        // All is data; every other block is the session's.
        let writes: Vec<Request> = (0..4096).map(|n| Request::write(n * 8192, &[1; 4096])).collect();
        client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
        let reply = client.call(&Request::status(0, 32 * MIB)).ok();
        assert_eq!(reply.status_of(client.context(BASE)), [(32 * MIB, 0)]);
        assert_eq!(reply.status_of(client.context(DIRTY)), [[(4096, 1), (4096, 0)]; 512].concat());
    }
}
