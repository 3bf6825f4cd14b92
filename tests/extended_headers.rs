//! Extended headers: how they are agreed on, what a payload length means, and lengths beyond 32 bits.

mod support;

use support::haggling::{serve, started};
use support::in_step::{self, EXPORT};
use support::server::{Serve, scratch};
use support::{Checked, Client, Image, KIB, MIB, Peer, Random, Request, Server, Style, assert_bytes, nbd};

const BOTH: [&str; 2] = ["base:allocation", "memdev:dirty"];

fn attach(server: &Server, name: &str) -> Client {
    server.client_with_contexts(Style::Extended, name)
}

// The handshake.

#[test]
fn they_are_granted_and_a_second_time_too() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    assert_eq!(peer.ask(nbd::OPT_EXTENDED_HEADERS, b"data"), nbd::REP_ERR_INVALID);
    peer.extended();
    peer.extended();
    assert_eq!(peer.ask(nbd::OPT_STRUCTURED_REPLY, &[]), nbd::REP_ERR_EXT_HEADER_REQD);
    peer.assert_usable();
    let export = peer.go("base").expect("offered");
    let mut client = Client::in_style(peer, export, Style::Extended, Vec::new());
    client.write(0, b"extended");
    assert_eq!(client.read(0, 8), b"extended");
    client.disconnect();
}

#[test]
fn data_with_the_option_grants_nothing() {
    let (_dir, image, server) = serve();
    for length in [1, 4096, 100_000] {
        let mut peer = started(&server);
        let answer = peer.ask(nbd::OPT_EXTENDED_HEADERS, &vec![0; length]);
        let expected = if length > 32 << 10 { nbd::REP_ERR_TOO_BIG } else { nbd::REP_ERR_INVALID };
        assert_eq!(answer, expected);
        let export = peer.go("base").expect("offered");
        let mut client = Client::new(peer, export, false, None);
        assert_bytes(&client.read(0, 512), &image.bytes(0, 512), 0);
    }
}

#[test]
fn they_take_the_place_of_structured_replies_asked_for_before() {
    let (_dir, image, server) = serve();
    let mut peer = started(&server);
    peer.structured();
    let contexts = peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", &BOTH).expect("accepted");
    peer.extended();
    let export = peer.go("base").expect("offered");
    let mut client = Client::in_style(peer, export, Style::Extended, contexts);
    assert_eq!(client.status(0, MIB), [(MIB, 0)]);
    assert_bytes(&client.read_all(), &image.all(), 0);
}

#[test]
fn export_name_does_not_go_with_them() {
    let (_dir, _image, server) = serve();
    let mut peer = started(&server);
    peer.extended();
    peer.send_option(nbd::OPT_EXPORT_NAME, b"base");
    peer.expect_end();
}

#[test]
fn the_server_can_be_told_not_to_offer_them() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    for (knob, structured) in [("--no-extended-headers", true), ("--no-structured-replies", false)] {
        let server = Serve::image(&image).args([knob]).start();
        let mut peer = started(&server);
        for data in [&[][..], b"data", &[0; 50_000]] {
            assert_eq!(peer.ask(nbd::OPT_EXTENDED_HEADERS, data), nbd::REP_ERR_UNSUP);
        }
        let answer = peer.ask(nbd::OPT_STRUCTURED_REPLY, &[]);
        assert_eq!(answer, if structured { nbd::REP_ACK } else { nbd::REP_ERR_UNSUP });
        let export = peer.go("base").expect("offered");
        assert_eq!(export.flags & nbd::SEND_DF != 0, structured);
        let mut client = Client::new(peer, export, structured, None);
        assert_bytes(&client.read_all(), &image.all(), 0);
    }
}

#[test]
fn block_status_with_a_payload_is_advertised_where_there_is_a_choice() {
    let (_dir, _image, server) = serve();
    let told = |prepare: &dyn Fn(&mut Peer)| {
        let mut peer = started(&server);
        prepare(&mut peer);
        let info = peer.info("base", &[]).expect("offered").flags;
        let go = peer.go("base").expect("offered").flags;
        assert_eq!(info, go, "INFO tells what GO tells");
        go & nbd::BLOCK_STATUS_PAYLOAD != 0
    };
    let set = |peer: &mut Peer, queries: &[&str]| {
        peer.contexts(nbd::OPT_SET_META_CONTEXT, "base", queries).expect("accepted");
    };
    assert!(!told(&|peer| peer.extended()));
    assert!(!told(&|peer| {
        peer.structured();
        set(peer, &BOTH);
    }));
    assert!(!told(&|peer| {
        peer.extended();
        set(peer, &["no:such"]);
    }));
    assert!(told(&|peer| {
        peer.extended();
        set(peer, &BOTH[1..]);
    }));
}

// Payloads.

#[test]
fn a_write_says_how_long_its_payload_is_or_does_not() {
    let (_dir, image, server) = in_step::serve();
    let mut checked = Checked::new(attach(&server, "base"), &image);
    let mut random = Random::new(3);
    let mut requests = Vec::new();
    for n in 0..200 {
        let data = random.bytes(random.clone().between(0, 60_000));
        checked.model.write(n * 40_000 + n, &data[..data.len().min(40_000)]);
        let request = Request::write(n * 40_000 + n, &data[..data.len().min(40_000)]);
        requests.push(if n % 2 == 0 { request.with(nbd::PAYLOAD_LEN) } else { request });
    }
    for reply in checked.client.pipeline(&requests) {
        reply.ok();
    }
    checked.read_all();
    // One large enough to be received straight into its blocks.
    let large = random.bytes(5 * MIB + 3);
    checked.model.write(77, &large);
    checked.client.call(&Request::write(77, &large).with(nbd::PAYLOAD_LEN | nbd::FUA)).ok();
    checked.read_all();
    checked.client.disconnect();
}

#[test]
fn a_payload_that_no_command_takes_is_drained() {
    let (_dir, image, server) = in_step::serve();
    let mut client = attach(&server, "base");
    // Made of headers: were one parsed, bytes would change.
    let trap = Request::zeroes(0, EXPORT).extended_header(99);
    let commands =
        [nbd::CMD_READ, nbd::CMD_FLUSH, nbd::CMD_TRIM, nbd::CMD_CACHE, nbd::CMD_WRITE_ZEROES, 8, 42, 0xffff];
    let mut requests = Vec::new();
    for length in [0, 1, 31, 32, 4096, 70_000, 3 * MIB] {
        let mut payload = trap.repeat(support::size(length / 32 + 1));
        payload.truncate(support::size(length));
        for command in commands {
            requests
                .push(Request::new(command, 0, length).carrying(&payload).with(nbd::PAYLOAD_LEN | nbd::FUA));
        }
        // A write that is refused all the same.
        requests.push(Request::write(EXPORT, &payload).with(nbd::PAYLOAD_LEN | nbd::NO_HOLE));
    }
    for reply in client.pipeline(&requests) {
        reply.fails(nbd::EINVAL);
    }
    assert_bytes(&client.read_all(), &image.all(), 0);
    in_step::assert_in_step(&mut client);
    client.disconnect();
}

#[test]
fn a_payload_beyond_the_maximum_ends_the_connection_and_nobody_elses() {
    let (_dir, image, server) = in_step::serve();
    let mut other = attach(&server, "base");
    for (command, flags) in [
        (nbd::CMD_WRITE, nbd::PAYLOAD_LEN),
        (nbd::CMD_WRITE, 0),
        (nbd::CMD_TRIM, nbd::PAYLOAD_LEN),
        (nbd::CMD_BLOCK_STATUS, nbd::PAYLOAD_LEN),
        (77, nbd::PAYLOAD_LEN),
    ] {
        for length in [32 * MIB + 1, 1 << 32, u64::MAX] {
            let mut client = attach(&server, "base");
            let before: Vec<Request> = (0..20).map(|n| Request::read(n * 4096, 4096)).collect();
            let fatal = Request::new(command, 0, length).with(flags).extended_header(1);
            for (n, reply) in (0..).zip(client.pipeline_then(&before, &fatal)) {
                assert_bytes(&reply.ok().data, &image.bytes(n * 4096, 4096), n * 4096);
            }
            client.peer().expect_end();
        }
    }
    assert_bytes(&other.read_all(), &image.all(), 0);
    // Exactly as much is none too much.
    let most = vec![0; support::size(32 * MIB)];
    other.call(&Request::write(0, &most).with(nbd::PAYLOAD_LEN)).fails(nbd::ENOSPC);
    other
        .call(&Request::new(nbd::CMD_TRIM, 0, 32 * MIB).carrying(&most).with(nbd::PAYLOAD_LEN))
        .fails(nbd::EINVAL);
    in_step::assert_in_step(&mut other);
}

#[test]
fn headers_of_the_other_kind_end_the_connection() {
    let (_dir, image, server) = in_step::serve();
    let mut extended = attach(&server, "base");
    extended.peer().send(&Request::read(0, 512).header(1));
    // More than a whole extended header, so that nothing is waited for.
    extended.peer().send(&[0; 32]);
    extended.peer().expect_end();
    let mut compact = server.client("base");
    compact.peer().send(&Request::read(0, 512).extended_header(1));
    compact.peer().expect_end();
    assert_bytes(&attach(&server, "base").read(0, 512), &image.bytes(0, 512), 0);
}

#[test]
fn requests_with_payloads_are_put_together_from_any_pieces() {
    let (_dir, image, server) = in_step::serve();
    let mut client = attach(&server, "base");
    let dirty = client.context("memdev:dirty");
    let requests = [
        Request::write(5000, &[0x5a; 3000]).with(nbd::PAYLOAD_LEN),
        Request::chosen_status(0, 64 * KIB, &[dirty]),
        Request::new(nbd::CMD_TRIM, 0, 100).carrying(&[7; 100]).with(nbd::PAYLOAD_LEN),
        Request::write(9000, &[0x5b; 100]),
        Request::read(4096, 8192),
    ];
    for size in [1, 7, 31, 33, 41] {
        let mut bytes = Vec::new();
        let mut cookies = Vec::new();
        for request in &requests {
            let cookie = client.expect(request);
            cookies.push(cookie);
            bytes.extend(request.bytes_in(Style::Extended, cookie));
        }
        bytes.chunks(size).for_each(|piece| client.peer().send(piece));
        let replies: Vec<_> = cookies.into_iter().map(|cookie| client.wait(cookie)).collect();
        replies[0].clone().ok();
        let status = replies[1].clone().ok().extents;
        assert_eq!((status[0], status[1].1), ((4096, 0), nbd::DIRTY), "pieces of {size}");
        replies[2].clone().fails(nbd::EINVAL);
        replies[3].clone().ok();
        let mut expected = image.bytes(4096, 8192);
        expected[904..3904].fill(0x5a);
        expected[4904..5004].fill(0x5b);
        assert_bytes(&replies[4].clone().ok().data, &expected, 4096);
    }
}

// Block status with a payload.

#[test]
fn block_status_tells_of_the_contexts_that_were_chosen() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    let mut client = attach(&server, "base");
    let (base, dirty) = (client.context(BOTH[0]), client.context(BOTH[1]));
    client.write(4 * MIB, &[1; 4096]);
    client.zeroes(MIB, 8192);

    let hole = nbd::STATE_HOLE | nbd::STATE_ZERO;
    let allocation =
        [(MIB + 8192, hole), (MIB - 8192, 0), (2 * MIB, hole), (4096, 0), (EXPORT - 4 * MIB - 4096, hole)];
    let written = [
        (MIB, 0),
        (8192, nbd::DIRTY | nbd::DIRTY_ZERO),
        (3 * MIB - 8192, 0),
        (4096, nbd::DIRTY),
        (EXPORT - 4 * MIB - 4096, 0),
    ];
    for contexts in [&[base][..], &[dirty], &[base, dirty], &[dirty, base]] {
        let reply = client.call(&Request::chosen_status(0, EXPORT, contexts)).ok();
        assert_eq!(reply.statuses.len(), contexts.len());
        for &context in contexts {
            let expected = if context == base { &allocation } else { &written };
            assert_eq!(reply.status_of(context), expected);
        }
    }
    // The range counts from the request's offset, and REQ_ONE holds for every context.
    let request = Request::chosen_status(MIB + 4096, 4 * MIB, &[base, dirty]);
    let one = client.call(&request.clone().with(nbd::PAYLOAD_LEN | nbd::REQ_ONE)).ok();
    assert_eq!(one.statuses, [(base, vec![(4096, hole)]), (dirty, vec![(4096, 3)])]);
    // Without a payload it tells of all.
    assert_eq!(client.call(&Request::status(0, EXPORT)).ok().statuses.len(), 2);
    client.disconnect();
}

#[test]
fn block_status_with_a_payload_that_makes_no_sense_is_refused_and_in_step() {
    let (_dir, _image, server) = in_step::serve();
    let mut client =
        Client::attach_as(server.stream(), "base", Style::Extended, &BOTH[1..]).expect("offered");
    let dirty = client.context(BOTH[1]);
    let with = |payload: &[u8]| {
        Request::new(nbd::CMD_BLOCK_STATUS, 0, payload.len() as u64).carrying(payload).with(nbd::PAYLOAD_LEN)
    };
    let good = Request::chosen_status(0, 4096, &[dirty]);
    let mut bad = vec![
        Request::chosen_status(0, 4096, &[]),
        Request::chosen_status(0, 4096, &[dirty, dirty]),
        Request::chosen_status(0, 4096, &[0]),
        // It exists, but was not selected.
        Request::chosen_status(0, 4096, &[if dirty == 1 { 2 } else { 1 }]),
        Request::chosen_status(0, 4096, &[dirty; 50]),
        Request::chosen_status(0, 0, &[dirty]),
        Request::chosen_status(0, EXPORT + 1, &[dirty]),
        Request::chosen_status(1, u64::MAX, &[dirty]),
        Request::chosen_status(EXPORT, 1, &[dirty]),
        with(&vec![0; support::size(MIB)]),
        Request::chosen_status(0, 4096, &[dirty]).with(nbd::PAYLOAD_LEN | nbd::DF),
    ];
    bad.extend([0, 1, 4, 7, 8, 11].map(|length| with(&good.payload[..length])));
    bad.extend([13, 14, 15].map(|length| with(&[&good.payload[..], &[0; 3]].concat()[..length])));
    let requests: Vec<Request> = bad.into_iter().flat_map(|bad| [bad, good.clone()]).collect();
    for (pair, asked) in client.pipeline(&requests).chunks(2).zip(requests.chunks(2)) {
        assert_eq!(pair[0].error, Some(nbd::EINVAL), "{:?}", asked[0]);
        assert_eq!(pair[1].clone().ok().extents, [(4096, 0)]);
    }
    in_step::assert_in_step(&mut client);

    let mut peer = started(&server);
    peer.extended();
    let export = peer.go("base").expect("offered");
    let mut without = Client::in_style(peer, export, Style::Extended, Vec::new());
    without.call(&good).fails(nbd::EINVAL);
    without.call(&Request::status(0, 4096)).fails(nbd::EINVAL);
    in_step::assert_in_step(&mut without);
}

// Lengths beyond 32 bits.

const TIB: u64 = 1 << 40;

#[test]
fn commands_without_payload_take_the_whole_of_a_device_of_many_tebibytes() {
    let dir = scratch();
    let total = 7 * TIB + 12_345;
    let data = [0..64 * KIB, 3 * TIB..3 * TIB + MIB, total - 4096..total];
    let image = Image::sparse(dir.path().join("base.img"), total, &data, 3);
    let server = Server::of(&image);
    let mut client = attach(&server, "base");
    let dirty = client.context(BOTH[1]);
    assert_eq!(client.size(), total);
    let private = server.usage().private;

    client.call(&Request::cache(0, total)).ok();
    let found = client.status(0, total);
    let stored: u64 =
        found.iter().filter(|(_, state)| state & nbd::STATE_HOLE == 0).map(|(length, _)| length).sum();
    assert!((64 * KIB + MIB + 4096..64 * KIB + MIB + 3 * 4096).contains(&stored), "{found:?}");
    assert_eq!(client.call(&Request::status(0, total).with(nbd::REQ_ONE)).ok().extents, [(64 * KIB, 0)]);
    assert_eq!(client.status_of(dirty, 0, total), [(total, 0)]);

    client.write(5 * TIB, &[5; 4096]);
    client.write(6 * TIB + 1, b"far out");
    assert_eq!(
        client.status_of(dirty, 4 * TIB, 2 * TIB).iter().map(|extent| extent.1).collect::<Vec<_>>(),
        [0, 1, 0]
    );
    client.trim(5, total - 5);
    for (offset, length) in [(3 * TIB, MIB), (5 * TIB, 4096), (6 * TIB, 4096), (total - 4096, 4096)] {
        assert!(client.read(offset, length).iter().all(|&byte| byte == 0), "trimmed at {offset}");
    }
    assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
    client.call(&Request::zeroes(0, total).with(nbd::FAST_ZERO)).ok();
    assert_eq!(client.read(0, 4096), [0; 4096]);
    let hole = nbd::STATE_HOLE | nbd::STATE_ZERO;
    assert_eq!(client.call(&Request::status(0, total)).ok().extents, [(total, hole)]);
    assert!(server.usage().private <= private + 32 * MIB, "the device's size costs no memory");

    // A neighbour sees nothing of all that, and many such requests are no trouble to it.
    let mut neighbour = attach(&server, "base");
    let long: Vec<Request> = (0..300)
        .flat_map(|n| {
            [Request::zeroes(n, total - n), Request::trim(n, total - n), Request::status(n, total - n)]
        })
        .collect();
    client.send_all(&long);
    assert_bytes(&neighbour.read(3 * TIB, MIB), &image.bytes(3 * TIB, MIB), 3 * TIB);
}

#[test]
fn lengths_that_wrap_or_reach_beyond_the_end_are_refused() {
    let (_dir, image, server) = in_step::serve();
    let mut client = attach(&server, "base");
    for (offset, length) in [
        (0, EXPORT + 1),
        (0, 1 << 32),
        (1 << 32, 1 << 32),
        (1, u64::MAX),
        (u64::MAX, u64::MAX),
        (EXPORT, u64::MAX),
    ] {
        client.call(&Request::trim(offset, length)).fails(nbd::EINVAL);
        client.call(&Request::cache(offset, length)).fails(nbd::EINVAL);
        client.call(&Request::status(offset, length)).fails(nbd::EINVAL);
        client.call(&Request::zeroes(offset, length)).fails(nbd::ENOSPC);
        client.call(&Request::new(nbd::CMD_FLUSH, offset, length)).fails(nbd::EINVAL);
        let read = client.call(&Request::read(offset, length)).error;
        let long = length > 32 * MIB;
        assert_eq!(read, Some(if long { nbd::EOVERFLOW } else { nbd::EINVAL }), "a read of {length}");
    }
    assert_bytes(&client.read_all(), &image.all(), 0);
    client.disconnect();
}
