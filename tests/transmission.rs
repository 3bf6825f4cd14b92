//! The transmission phase: every command in every style of headers, every flag, every refusal, and the stream in step.

mod support;

use support::in_step::{EXPORT, every_style, serve};
use support::server::{Serve, scratch};
use support::{Checked, Chunk, GIB, Image, KIB, MIB, Random, Request, Server, Style, assert_bytes, nbd};

// What is advertised.

#[test]
fn the_advertised_flags_are_those_that_work() {
    let (_dir, _image, server) = serve();
    let always = nbd::HAS_FLAGS
        | nbd::SEND_FLUSH
        | nbd::SEND_FUA
        | nbd::SEND_TRIM
        | nbd::SEND_WRITE_ZEROES
        | nbd::SEND_CACHE
        | nbd::SEND_FAST_ZERO;
    assert_eq!(server.simple("base").export.flags, always);
    assert_eq!(server.client("base").export.flags, always | nbd::SEND_DF);
    assert_eq!(server.simple("base@x").export.flags, always | nbd::CAN_MULTI_CONN);
    assert_eq!(server.client("base@x").export.flags, always | nbd::SEND_DF | nbd::CAN_MULTI_CONN);
    let extended = always | nbd::SEND_DF | nbd::BLOCK_STATUS_PAYLOAD;
    assert_eq!(server.client_in(Style::Extended, "base").export.flags, extended);

    every_style(&server, |client| {
        let flags = client.export.flags;
        client.call(&Request::write(0, b"data").with(nbd::FUA)).ok();
        client.call(&Request::trim(4096, 4096).with(nbd::FUA)).ok();
        client.call(&Request::zeroes(8192, 4096).with(nbd::FUA)).ok();
        client.call(&Request::flush()).ok();
        client.call(&Request::cache(0, 8192)).ok();
        client.call(&Request::zeroes(0, 4096).with(nbd::NO_HOLE)).ok();
        let fast = client.call(&Request::zeroes(0, 4096).with(nbd::FAST_ZERO));
        assert!(matches!(fast.error, None | Some(nbd::ENOTSUP)), "{:?}", fast.error);
        let unfragmented = client.call(&Request::read(0, 4096).with(nbd::DF));
        if flags & nbd::SEND_DF == 0 {
            unfragmented.fails(nbd::EINVAL)
        } else {
            unfragmented.ok()
        };
    });
}

// READ and WRITE.

#[test]
fn reads_give_the_base_and_writes_are_read_back() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        assert_bytes(&client.read_all(), &image.all(), 0);
        let data = Random::new(5).bytes(64 * KIB);
        client.write(MIB, &data);
        let mut expected = image.all();
        expected[1 << 20..(1 << 20) + data.len()].copy_from_slice(&data);
        assert_bytes(&client.read_all(), &expected, 0);
    });
}

#[test]
fn any_offset_and_length_is_served() {
    let (_dir, image, server) = serve();
    let lengths = [1, 2, 511, 512, 513, KIB, 4095, 4096, 4097, 8191, 12_289, 65_537];
    let offsets = [0, 1, 511, 512, 4095, 4096, 4097, 65_535];
    for style in Style::ALL {
        let client = server.client_in(style, "base");
        let mut checked = Checked::new(client, &image);
        let mut random = Random::new(7);
        for length in lengths {
            for offset in offsets {
                checked.read(offset, length);
                let data = random.bytes(length);
                checked.write(offset, &data);
                checked.read(offset.saturating_sub(5000), length + 10_000);
                // And at the very end.
                checked.write(EXPORT - length, &data);
            }
        }
        checked.read_all();
    }
}

#[test]
fn thirty_two_mebibytes_are_served_and_one_byte_more_is_refused() {
    let dir = scratch();
    let most = 32 * MIB;
    let image = Image::random(dir.path().join("base.img"), 40 * MIB, 3);
    let server = Server::of(&image);
    let data = Random::new(8).bytes(most + 1);
    let exactly = &data[..data.len() - 1];
    for style in Style::ALL {
        let mut client = server.client_in(style, "base");
        assert_bytes(&client.read(4 * MIB + 1, most), &image.bytes(4 * MIB + 1, most), 4 * MIB + 1);
        client.write(MIB + 3, exactly);
        assert_bytes(&client.read(MIB + 3, most), exactly, MIB + 3);

        let refused = client.call(&Request::read(0, most + 1)).error;
        assert!(matches!(refused, Some(nbd::EINVAL | nbd::EOVERFLOW)), "a read too long gives {refused:?}");
        // Were the payload not drained, the next request would be read from its midst. With extended headers, the
        // server hangs up instead.
        if style != Style::Extended {
            client.call(&Request::write(0, &data)).fails(nbd::EINVAL);
        }
        assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
        assert_bytes(&client.read(MIB + 3, most), exactly, MIB + 3);
        client.disconnect();
    }
}

#[test]
fn fua_is_accepted_on_every_command() {
    let (_dir, _image, server) = serve();
    let client = server.client("base");
    let mut checked = client;
    for request in [
        Request::read(0, 512),
        Request::write(0, b"fua"),
        Request::flush(),
        Request::trim(4096, 4096),
        Request::cache(0, 4096),
        Request::zeroes(0, 4096),
        Request::status(0, 4096),
    ] {
        checked.call(&request.with(nbd::FUA)).ok();
    }
}

#[test]
fn zero_length_requests_are_answered_and_change_nothing() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        for offset in [0, 1, 4096, EXPORT - 1, EXPORT] {
            for request in [
                Request::read(offset, 0),
                Request::write(offset, b""),
                Request::trim(offset, 0),
                Request::cache(offset, 0),
                Request::zeroes(offset, 0),
                Request::status(offset, 0),
            ] {
                let reply = client.call(&request);
                assert!(
                    matches!(reply.error, None | Some(nbd::EINVAL | nbd::ENOSPC)),
                    "{request:?} gives {:?}",
                    reply.error
                );
            }
        }
        assert_bytes(&client.read_all(), &image.all(), 0);
    });
}

// Structured replies.

#[test]
fn holes_are_read_as_hole_chunks_and_data_as_data_chunks() {
    let dir = scratch();
    let image = Image::sparse(dir.path().join("base.img"), EXPORT, &[MIB..2 * MIB, 4 * MIB..5 * MIB], 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let reply = client.call(&Request::read(0, 6 * MIB)).ok();
    assert_bytes(&reply.data, &image.bytes(0, 6 * MIB), 0);
    let sum = |wanted: fn(&Chunk) -> Option<u64>| reply.chunks.iter().filter_map(wanted).sum::<u64>();
    let holes = sum(|chunk| if let Chunk::Hole(_, length) = chunk { Some(*length) } else { None });
    let data = sum(|chunk| if let Chunk::Data(_, length) = chunk { Some(*length) } else { None });
    assert_eq!((holes, data), (4 * MIB, 2 * MIB));

    // What the session zeroes is a hole on the wire too, what it writes is data.
    client.zeroes(MIB, 64 * KIB);
    client.trim(MIB + 64 * KIB, 64 * KIB);
    client.write(0, &[7; 4096]);
    let zeroed = client.call(&Request::read(MIB, 128 * KIB)).ok();
    assert!(zeroed.chunks.iter().all(|chunk| matches!(chunk, Chunk::Hole(..) | Chunk::None)), "{zeroed:?}");
    assert!(zeroed.data.iter().all(|&byte| byte == 0));
    let written = client.call(&Request::read(0, 4096)).ok();
    assert!(written.chunks.iter().all(|chunk| matches!(chunk, Chunk::Data(..) | Chunk::None)));
}

#[test]
fn chunks_are_whole_multiples_of_512_where_the_request_allows() {
    let dir = scratch();
    let image = Image::sparse(dir.path().join("base.img"), EXPORT, &[0..MIB, 2 * MIB..3 * MIB], 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    client.write(5 * MIB + 100, b"a few bytes amid a hole");
    for (offset, length) in [(0, EXPORT), (1, EXPORT - 2), (MIB - 1000, 2000), (5 * MIB, 64 * KIB)] {
        for chunk in client.call(&Request::read(offset, length)).ok().chunks {
            if let Chunk::Data(at, count) | Chunk::Hole(at, count) = chunk {
                assert!(at == offset || at % 512 == 0, "a chunk starts at {at}");
                let end = at + count;
                assert!(end == offset + length || end % 512 == 0, "a chunk ends at {end}");
            }
        }
    }
}

#[test]
fn df_gives_one_chunk_even_across_holes() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    client.write(3 * MIB, &[9; 10_000]);
    let mut expected = image.all();
    expected[3 << 20..(3 << 20) + 10_000].fill(9);
    for (offset, length) in
        [(0, 512), (MIB - 32 * KIB, 64 * KIB), (3 * MIB - 1, 65_536), (2 * MIB - 1, 2), (0, 4096)]
    {
        let reply = client.call(&Request::read(offset, length).with(nbd::DF)).ok();
        assert_eq!(reply.content_chunks(), 1);
        let start = support::size(offset);
        assert_bytes(&reply.data, &expected[start..start + support::size(length)], offset);
    }
    // Longer ones may be refused, but never fragmented.
    let long = client.call(&Request::read(0, EXPORT).with(nbd::DF));
    match long.error {
        None => assert_bytes(&long.data, &expected, 0),
        Some(error) => assert_eq!(error, nbd::EOVERFLOW),
    }
    assert_eq!(client.read(3 * MIB, 1), [9]);
}

// BLOCK_STATUS.

#[test]
fn block_status_tells_data_holes_and_zeroes() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let hole = nbd::STATE_HOLE | nbd::STATE_ZERO;
    assert_eq!(client.status(0, EXPORT), [(MIB, hole), (MIB, 0), (6 * MIB, hole)]);

    client.write(0, &[1; 8192]);
    client.zeroes(MIB, 8192);
    client.trim(MIB + 64 * KIB, 8192);
    let status = client.status(0, EXPORT);
    let state = |at: u64| {
        let mut end = 0;
        let found = status.iter().find(|(length, _)| {
            end += length;
            at < end
        });
        found.expect("the whole export is covered").1
    };
    assert_eq!(state(0), 0, "written data");
    assert_eq!(state(8192), hole, "a hole next to it");
    assert_ne!(state(MIB) & nbd::STATE_ZERO, 0, "zeroed");
    assert_eq!(state(MIB + 8192), 0, "base data next to it");
    assert_ne!(state(MIB + 64 * KIB) & nbd::STATE_ZERO, 0, "trimmed");
}

#[test]
fn no_hole_zeroes_are_zero_and_no_hole() {
    let (_dir, _image, server) = serve();
    let mut client = server.client("base");
    client.call(&Request::zeroes(MIB, MIB).with(nbd::NO_HOLE)).ok();
    assert!(client.read(MIB, MIB).iter().all(|&byte| byte == 0));
    let status = client.status(MIB, MIB);
    assert!(status.iter().all(|(_, state)| state & nbd::STATE_HOLE == 0), "{status:?}");
}

#[test]
fn block_status_asks_for_one_extent_with_req_one() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), EXPORT, MIB..2 * MIB, 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    for (offset, length) in [(0, EXPORT), (0, 512), (MIB - 1, 4096), (MIB + 5, 1), (EXPORT - 1, 1)] {
        let reply = client.call(&Request::status(offset, length).with(nbd::REQ_ONE)).ok();
        assert_eq!(reply.extents.len(), 1);
    }
    let reply = client.call(&Request::status(0, EXPORT).with(nbd::REQ_ONE)).ok();
    assert_eq!(reply.extents[0].0, MIB);
}

#[test]
fn block_status_of_a_fragmented_session_covers_everything() {
    let dir = scratch();
    let image = Image::empty(dir.path().join("base.img"), 64 * MIB);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let writes: Vec<Request> = (0..4096).map(|n| Request::write(n * 16 * KIB, &[1; 4096])).collect();
    client.pipeline(&writes).into_iter().for_each(|reply| drop(reply.ok()));
    let status = client.status(0, 64 * MIB);
    assert_eq!(status.len(), 8192);
    let hole = nbd::STATE_HOLE | nbd::STATE_ZERO;
    for pair in status.chunks(2) {
        assert_eq!(pair, [(4 * KIB, 0), (12 * KIB, hole)]);
    }
}

// TRIM, WRITE_ZEROES, CACHE, FLUSH.

#[test]
fn zeroes_and_trims_at_any_offset_leave_neighbours_alone() {
    let (_dir, image, server) = serve();
    for style in Style::ALL {
        let client = server.client_in(style, "base");
        let mut checked = Checked::new(client, &image);
        let mut offset = 0;
        for length in [1, 511, 512, 513, 4095, 4096, 4097, 8192, 12_288, 70_001] {
            for shift in [0, 1, 512, 4095] {
                // Half on the base, half on data of the session's own.
                checked.write(offset, &[0xee; 20_000]);
                checked.zeroes(offset + shift, length, 0);
                checked.read(offset, 100_000);
                checked.write(offset + 100_000, &[0xdd; 20_000]);
                checked.trim(offset + 100_000 + shift, length);
                checked.read(offset + 100_000, 80_000);
                offset += 180_000 + 7;
            }
        }
        checked.zeroes(EXPORT - 5, 5, 0);
        checked.trim(EXPORT - 5000, 5000);
        checked.read_all();
    }
}

#[test]
fn commands_without_payload_take_lengths_beyond_the_largest_payload() {
    let dir = scratch();
    let total = 6 * GIB;
    let image = Image::sparse(dir.path().join("base.img"), total, &[0..MIB, 5 * GIB..5 * GIB + MIB], 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let long = u64::from(u32::MAX);
    client.zeroes(0, long);
    assert!(client.read(0, 2 * MIB).iter().all(|&byte| byte == 0));
    client.trim(total - long, long);
    assert!(client.read(5 * GIB, MIB).iter().all(|&byte| byte == 0));
    client.call(&Request::cache(0, long)).ok();
    let covered: u64 = client.status(0, total).iter().map(|(length, _)| length).sum();
    assert_eq!(covered, total);
}

#[test]
fn fast_zero_either_works_at_once_or_changes_nothing() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        for flags in [nbd::FAST_ZERO, nbd::FAST_ZERO | nbd::NO_HOLE] {
            for (offset, length) in [(0, 4096), (MIB, MIB), (100, 100), (3 * MIB + 1, 10_000)] {
                let before = client.read(offset, length);
                let reply = client.call(&Request::zeroes(offset, length).with(flags));
                let after = client.read(offset, length);
                match reply.error {
                    None => assert!(after.iter().all(|&byte| byte == 0)),
                    Some(error) => {
                        assert_eq!(error, nbd::ENOTSUP);
                        assert_bytes(&after, &before, offset);
                    }
                }
            }
        }
        assert_bytes(&client.read(6 * MIB, 4096), &image.bytes(6 * MIB, 4096), 6 * MIB);
    });
}

#[test]
fn cache_changes_nothing() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        client.write(0, b"mine");
        for (offset, length) in [(0, EXPORT), (1, 1), (EXPORT - 1, 1)] {
            client.call(&Request::cache(offset, length)).ok();
        }
        let mut expected = image.all();
        expected[..4].copy_from_slice(b"mine");
        assert_bytes(&client.read_all(), &expected, 0);
    });
}

#[test]
fn other_block_sizes_serve_the_same_bytes() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 2 * MIB + 777, 3);
    for block in ["4K", "16K", "64K"] {
        let server = Serve::image(&image).args(["--block-size", block]).start();
        let mut client = server.client("base");
        let mut expected = image.all();
        let mut random = Random::new(19);
        for _ in 0..300 {
            let (offset, length) = support::model::random_range(&mut random, image.size, 100_000);
            let at = support::size(offset)..support::size(offset + length);
            if random.below(4) == 0 {
                client.zeroes(offset, length);
                expected[at].fill(0);
            } else {
                let data = random.bytes(length);
                client.write(offset, &data);
                expected[at].copy_from_slice(&data);
            }
        }
        assert_bytes(&client.read_all(), &expected, 0);
    }
}
