//! Metadata contexts during option haggling, and what they allow afterwards.

mod support;

use support::haggling::{serve, started};
use support::peer::context_data;
use support::server::{Serve, scratch};
use support::{Client, Image, MIB, Peer, Request, assert_bytes, nbd};

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
    for queries in [&[][..], &["base:"], &["base:nonsense"], &["x-unknown:leaf", "base:"]] {
        let selected = set(queries).expect("accepted");
        assert!(selected.is_empty(), "{queries:?} selects {selected:?}");
    }
    let selected = set(&["x-unknown:leaf", "base:allocation"]).expect("accepted");
    assert_eq!(selected.len(), 1);
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
