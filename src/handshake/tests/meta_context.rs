//! `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`.

use super::*;

/// The contexts that came back, and then the type of the final reply.
fn contexts(talk: &Talk, option: OptionCode) -> (Vec<(u32, String)>, Reply) {
    let mut replies: Vec<_> = talk.replies().into_iter().filter(|reply| reply.0 == option).collect();
    let last = replies.pop().unwrap().1;
    let parse = |(_, reply, payload): (_, Reply, Vec<u8>)| {
        assert_eq!(reply, Reply::MetaContext);
        let context = MetaContext::parse(&payload).unwrap();
        (context.id, context.name.to_owned())
    };
    (replies.into_iter().map(parse).collect(), last)
}

fn listed(queries: &[&str]) -> Vec<(u32, String)> {
    let talk = Client::new().structured().list_meta_context("vm", queries).talk();
    let (contexts, last) = contexts(&talk, OptionCode::ListMetaContext);
    assert_eq!(last, Reply::Ack);
    talk.assert_usable();
    contexts
}

fn selected(queries: &[&str]) -> Vec<(u32, String)> {
    let talk = Client::new().structured().set_meta_context("vm", queries).go("vm").talk();
    let (contexts, last) = contexts(&talk, OptionCode::SetMetaContext);
    assert_eq!(last, Reply::Ack);
    let negotiated: Vec<_> = talk.negotiated().contexts.iter().map(KnownContext::on_the_wire).collect();
    assert_eq!(
        contexts,
        negotiated.iter().map(|known| (known.id, known.name.to_owned())).collect::<Vec<_>>()
    );
    contexts
}

/// Contexts as a list has them: the number is reserved there.
fn unnumbered(names: &[&str]) -> Vec<(u32, String)> {
    names.iter().map(|&name| (0, name.to_owned())).collect()
}

const BOTH: [&str; 2] = ["base:allocation", "memdev:dirty"];

#[test]
fn a_list_without_queries_names_all() {
    assert_eq!(listed(&[]), unnumbered(&BOTH));
}

#[test]
fn a_list_finds_by_name_and_by_namespace_and_names_each_once() {
    for queries in [&["base:allocation"][..], &["base:"], &["base:", "base:allocation", "base:"]] {
        assert_eq!(listed(queries), unnumbered(&BOTH[..1]));
    }
    for queries in [&["memdev:dirty"][..], &["memdev:"], &["memdev:", "memdev:dirty"]] {
        assert_eq!(listed(queries), unnumbered(&BOTH[1..]));
    }
    for queries in
        [&["memdev:", "base:"][..], &["memdev:dirty", "base:"], &["x:", "base:allocation", "memdev:"]]
    {
        assert_eq!(listed(queries), unnumbered(&BOTH));
    }
}

#[test]
fn a_list_finds_nothing_else_and_that_is_no_error() {
    for query in [
        "",
        ":",
        "base",
        "base:alloc",
        "base:allocation2",
        "BASE:",
        "qemu:",
        "x-mine:",
        "base:allocation:",
        "memdev",
        "memdev:base",
    ] {
        assert_eq!(listed(&[query]), [], "{query:?}");
    }
}

#[test]
fn a_selection_has_a_number_and_holds_for_its_export() {
    let one = [(crate::proto::META_CONTEXT_BASE_ALLOCATION, "base:allocation".to_owned())];
    assert_eq!(selected(&["base:allocation"]), one);
    assert_eq!(selected(&["qemu:allocation-depth", "base:allocation", "base:allocation"]), one);
    let other = [(crate::proto::META_CONTEXT_MEMDEV_DIRTY, "memdev:dirty".to_owned())];
    assert_eq!(selected(&["memdev:dirty"]), other);
    let both = [one, other].concat();
    assert_eq!(selected(&["memdev:dirty", "base:allocation"]), both);
    assert_eq!(selected(&BOTH), both);
}

#[test]
fn no_query_and_wildcards_select_nothing() {
    for queries in
        [&[][..], &["base:"], &["memdev:", "base:"], &["qemu:dirty-bitmap:x"], &["base:nothing"], &[""]]
    {
        assert_eq!(selected(queries), [], "{queries:?}");
    }
}

#[test]
fn both_need_structured_replies_or_extended_headers_first() {
    let talk = Client::new()
        .list_meta_context("vm", &[])
        .set_meta_context("vm", &["base:allocation"])
        .structured()
        .go("vm")
        .talk();
    assert_eq!(talk.types()[..3], [Reply::ErrInvalid, Reply::ErrInvalid, Reply::Ack]);
    assert!(talk.negotiated().contexts.is_empty());
    let talk = Client::new().extended().set_meta_context("vm", &BOTH).go("vm").talk();
    assert_eq!(talk.negotiated().contexts.len(), 2);
}

#[test]
fn the_last_selection_counts() {
    let base = &["base:allocation"];
    let client = Client::new().structured().set_meta_context("vm", base);
    assert!(client.clone().set_meta_context("vm", &[]).go("vm").talk().negotiated().contexts.is_empty());
    assert!(
        client
            .set_meta_context("vm", &[])
            .set_meta_context("vm", base)
            .go("vm")
            .talk()
            .negotiated()
            .contexts
            .contains(KnownContext::BaseAllocation)
    );
}

#[test]
fn a_selection_that_fails_drops_the_one_before() {
    let client = Client::new().structured().set_meta_context("vm", &["base:allocation"]);
    let failures = [
        client.clone().set_meta_context("nowhere", &["base:allocation"]),
        client.clone().option(OptionCode::SetMetaContext, b"\x00\x00\x00\x02vm"),
        client.clone().option(OptionCode::SetMetaContext, &[0; 40_000]),
    ];
    for (client, reply) in failures.into_iter().zip([Reply::ErrUnknown, Reply::ErrInvalid, Reply::ErrTooBig])
    {
        let talk = client.go("vm").talk();
        assert_eq!(talk.types()[3], reply);
        assert!(talk.negotiated().contexts.is_empty());
    }
}

#[test]
fn listing_drops_nothing() {
    let client = Client::new().structured().set_meta_context("vm", &["base:allocation"]);
    assert!(
        client
            .list_meta_context("vm", &[])
            .go("vm")
            .talk()
            .negotiated()
            .contexts
            .contains(KnownContext::BaseAllocation)
    );
}

#[test]
fn a_selection_for_another_export_does_not_hold() {
    let client = Client::new().structured().set_meta_context("größe", &["base:allocation"]);
    assert!(client.clone().go("vm").talk().negotiated().contexts.is_empty());
    // The default export is the same image, but the specification compares names.
    assert!(
        client.set_meta_context("vm", &["base:allocation"]).go("").talk().negotiated().contexts.is_empty()
    );
}

#[test]
fn a_refused_go_leaves_the_selection() {
    let client = Client::new().structured().set_meta_context("vm", &["base:allocation"]);
    assert!(
        client.go("nowhere").go("vm").talk().negotiated().contexts.contains(KnownContext::BaseAllocation)
    );
}

#[test]
fn an_unknown_export_has_no_contexts() {
    let talk = Client::new()
        .structured()
        .list_meta_context("nowhere", &[])
        .set_meta_context("forbidden", &[])
        .talk();
    assert_eq!(talk.types()[1..], [Reply::ErrUnknown, Reply::ErrPolicy]);
    talk.assert_usable();
}

#[test]
fn malformed_payloads_are_invalid_and_the_connection_goes_on() {
    let payloads: [&[u8]; 7] = [
        b"",
        b"\x00\x00\x00\x02vm",
        b"\x00\x00\x00\x02vm\x00\x00\x00\x01",
        b"\x00\x00\x00\x02vm\x00\x00\x00\x01\x00\x00\x00\x10base:allocation",
        b"\x00\x00\x00\x02vm\xff\xff\xff\xff\x00\x00\x00\x00",
        b"\x00\x00\x00\x02vm\x00\x00\x00\x00!",
        b"\x00\x00\x00\x02vm\x00\x00\x00\x01\x00\x00\x00\x01\xff",
    ];
    for option in [OptionCode::ListMetaContext, OptionCode::SetMetaContext] {
        for payload in payloads {
            let talk = Client::new().structured().option(option, payload).go("vm").talk();
            assert_eq!(talk.types()[1], Reply::ErrInvalid, "{payload:?}");
            assert_eq!(talk.opened, ["vm"]);
        }
    }
}
