//! The base: truncated, replaced, sparse, of any size.

mod support;

use std::fs::{self, OpenOptions};
use std::sync::atomic::{AtomicBool, Ordering};

use support::server::{Serve, scratch};
use support::{Checked, Client, GIB, Image, KIB, MIB, Random, Request, Server, Style, assert_bytes, nbd};

fn truncate(image: &Image, size: u64) {
    OpenOptions::new()
        .write(true)
        .open(&image.path)
        .and_then(|file| file.set_len(size))
        .expect("truncating the image");
}

// Truncated.

#[test]
fn requests_that_touch_a_truncated_part_get_eio_and_the_rest_is_fine() {
    for style in Style::ALL {
        let dir = scratch();
        let image = Image::random(dir.path().join("base.img"), 8 * MIB, 11);
        let mut server = Server::of(&image);
        let attach = || server.client_in(style, "base");
        let mut client = attach();
        let mut fresh = attach();
        // Everything has been read once: what was resident must not count as being there.
        assert_bytes(&client.read_all(), &image.all(), 0);
        client.write(5 * MIB, &[1; 8192]);
        client.zeroes(6 * MIB, 8192);
        truncate(&image, 2 * MIB);

        for client in [&mut client, &mut fresh] {
            assert_bytes(&client.read(0, 2 * MIB), &image.bytes(0, 2 * MIB), 0);
            for (offset, length) in
                [(4 * MIB, 4096), (2 * MIB, 1), (2 * MIB - 4096, 8192), (0, 8 * MIB), (8 * MIB - 1, 1)]
            {
                client.call(&Request::read(offset, length)).fails(nbd::EIO);
            }
            // Part of a block: the rest of it would have to come from the base.
            client.call(&Request::write(4 * MIB + 10, &[5; 100])).fails(nbd::EIO);
            client.call(&Request::read(4 * MIB, 4096)).fails(nbd::EIO);
            // A whole block needs nothing of it.
            client.write(4 * MIB, &[6; 4096]);
            assert_eq!(client.read(4 * MIB, 4096), [6; 4096]);
            client.write(MIB + 10, &[7; 100]);
            assert_eq!(client.read(MIB + 10, 100), [7; 100]);
        }
        assert_eq!(client.read(5 * MIB, 8192), [1; 8192]);
        assert_eq!(client.read(6 * MIB, 8192), [0; 8192]);
        drop((client, fresh));
        server.assert_alive();
    }
}

#[test]
fn reading_a_truncated_base_amid_a_pipeline_fails_only_there() {
    for style in Style::ALL {
        let dir = scratch();
        let image = Image::random(dir.path().join("base.img"), 8 * MIB, 11);
        let server = Server::of(&image);
        let mut client = server.client_in(style, "base");
        truncate(&image, 4 * MIB);
        let requests: Vec<Request> =
            (0..400).map(|n| Request::read(n % 2 * 4 * MIB + n / 2 * 4096, 4096)).collect();
        for (reply, request) in client.pipeline(&requests).into_iter().zip(&requests) {
            if request.offset < 4 * MIB {
                assert_bytes(&reply.ok().data, &image.bytes(request.offset, 4096), request.offset);
            } else {
                reply.fails(nbd::EIO);
            }
        }
    }
}

#[test]
fn a_base_truncated_under_load_harms_nobody_but_the_requests_that_touch_it() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 16 * MIB, 11);
    let keep = 4 * MIB;
    let mut server = Serve::image(&image).args(["--workers", "2"]).start();
    let truncated = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for n in 0..6_u64 {
            let (server, image, truncated) = (&server, &image, &truncated);
            scope.spawn(move || {
                let attach = || if n % 2 == 0 { server.client("base") } else { server.simple("base") };
                let mut client = attach();
                let mut random = Random::new(n);
                let mut rounds_after = 0;
                while rounds_after < 30 {
                    let certain = truncated.load(Ordering::SeqCst);
                    let requests: Vec<Request> =
                        (0..64).map(|_| Request::read(random.below(4000) * 4096, 16 * KIB)).collect();
                    let mut hung_up = false;
                    for (reply, request) in client.try_pipeline(&requests, &[]).into_iter().zip(&requests) {
                        let Ok(reply) = reply else {
                            // The file lost its end in the middle of a reply: there is no other way to say so.
                            assert!(!certain, "a reply to come can say EIO");
                            hung_up = true;
                            continue;
                        };
                        let expected = image.bytes(request.offset, 16 * KIB);
                        match reply.error {
                            None => {
                                assert!(!certain || request.offset + 16 * KIB <= keep, "bytes that are gone");
                                assert_bytes(&reply.data, &expected, request.offset);
                            }
                            Some(error) => {
                                assert_eq!(error, nbd::EIO);
                                assert!(request.offset + 16 * KIB > keep, "these bytes are there");
                            }
                        }
                    }
                    if hung_up {
                        client = attach();
                    }
                    rounds_after += u32::from(certain);
                }
            });
        }
        // Under way: no condition to wait for, any moment will do.
        std::thread::sleep(std::time::Duration::from_millis(100));
        truncate(&image, keep);
        truncated.store(true, Ordering::SeqCst);
    });
    server.assert_alive();
}

#[test]
fn nothing_but_zeroes_or_eio_comes_from_behind_an_odd_end() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 11);
    let server = Server::of(&image);
    let mut client = server.client("base");
    truncate(&image, 10_000);
    assert_bytes(&client.read(0, 10_000), &image.bytes(0, 10_000), 0);
    let reply = client.call(&Request::read(10_000, 100));
    match reply.error {
        None => assert_eq!(reply.data, [0; 100]),
        Some(error) => assert_eq!(error, nbd::EIO),
    }
    client.call(&Request::read(16_384, 100)).fails(nbd::EIO);
}

#[test]
fn a_base_that_grows_is_served_at_its_old_size() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB + 100, 11);
    let server = Server::of(&image);
    let mut client = server.client("base");
    truncate(&image, 4 * MIB);
    assert_bytes(&client.read_all(), &image.all(), 0);
    client.call(&Request::read(MIB + 100, 1)).fails(nbd::EINVAL);
}

// Replaced.

#[test]
fn an_image_replaced_by_rename_is_seen_by_new_sessions_only() {
    let dir = scratch();
    let old = Image::random(dir.path().join("base.img"), 4 * MIB, 1);
    let new = Image::random(dir.path().join("next.img"), 6 * MIB + 5, 2);
    let server = Server::of(&old);
    let mut before = Checked::new(server.client("base"), &old);
    let mut named = Checked::new(server.client("base@kept"), &old);
    before.write(MIB, &[1; 5000]);
    fs::rename(&new.path, &old.path).expect("replacing the image");

    let mut after = Checked::new(server.client("base"), &new);
    assert_eq!(after.client.size(), new.size);
    after.read_all();
    after.write(MIB, &[2; 5000]);
    after.read_all();
    before.read_all();
    before.write(2 * MIB + 10, &[3; 50]);
    before.read_all();
    named.read_all();
    // Another connection to a session that has begun is in that session's world.
    let mut again = Checked::new(server.client("base@kept"), &old);
    assert_eq!(again.client.size(), old.size);
    again.read_all();
    let mut fresh = Checked::new(server.client("base@other"), &new);
    fresh.read_all();
}

#[test]
fn an_image_that_is_deleted_stays_for_those_who_have_it() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 2 * MIB, 1);
    let mut server = Server::of(&image);
    let mut client = Checked::new(server.client("base"), &image);
    client.write(5, b"mine");
    fs::remove_file(&image.path).expect("deleting the image");
    client.read_all();
    client.write(MIB + 7, &[8; 10_000]);
    client.read_all();
    // Whether new sessions get the old image or a refusal, nothing else suffers.
    if let Ok(late) = server.try_client("base") {
        Checked::new(late, &image).read_all();
    }
    client.read_all();
    server.assert_alive();
}

// Sparse, and of any size.

#[test]
fn holes_of_the_base_are_reported_as_holes() {
    let dir = scratch();
    let size = 3 * GIB;
    let data = [0..64 * KIB, GIB..GIB + MIB, 2 * GIB + 512 * KIB..2 * GIB + MIB, size - MIB..size];
    let image = Image::sparse(dir.path().join("base.img"), size, &data, 13);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let hole = nbd::STATE_HOLE | nbd::STATE_ZERO;
    let mut expected = Vec::new();
    let mut at = 0;
    for range in &data {
        if range.start > at {
            expected.push((range.start - at, hole));
        }
        expected.push((range.end - range.start, 0));
        at = range.end;
    }
    assert_eq!(client.status(0, size), expected);

    let reply = client.call(&Request::read(GIB - MIB, 3 * MIB)).ok();
    assert_bytes(&reply.data, &image.bytes(GIB - MIB, 3 * MIB), GIB - MIB);
    let holes: u64 = reply
        .chunks
        .iter()
        .filter_map(|chunk| if let support::Chunk::Hole(_, length) = chunk { Some(*length) } else { None })
        .sum();
    assert_eq!(holes, 2 * MIB);
}

#[test]
fn a_sparse_image_of_many_gibibytes_is_no_burden() {
    let dir = scratch();
    let size = 64 * GIB + 12_345;
    let image = Image::partly(dir.path().join("base.img"), size, 40 * GIB..40 * GIB + MIB, 13);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let private = server.usage().private;
    assert_eq!(client.size(), size);
    for offset in [0, 40 * GIB, 40 * GIB + MIB - 100, size - 5000] {
        let data = Random::new(offset).bytes(5000);
        assert_bytes(&client.read(offset, 5000), &image.bytes(offset, 5000), offset);
        client.write(offset, &data);
        assert_bytes(&client.read(offset, 5000), &data, offset);
    }
    assert_eq!(client.status(0, size).iter().map(|(length, _)| length).sum::<u64>(), size);
    assert!(server.usage().private <= private + 32 * MIB, "the image's size costs no memory");
}

#[test]
fn images_of_any_size_are_served_to_the_last_byte() {
    for size in [1, 2, 511, 512, 513, 4095, 4096, 4097, 65_537, MIB - 1, MIB + 1, 2 * MIB + 4095] {
        let dir = scratch();
        let image = Image::random(dir.path().join("base.img"), size, size);
        let before = image.fingerprint();
        let server = Server::of(&image);
        for style in Style::ALL {
            let client = server.client_in(style, "base");
            let mut checked = Checked::new(client, &image);
            assert_eq!(checked.client.size(), size);
            checked.read_all();
            if style.has_chunks() {
                checked.status(0, size);
            }
            checked.write(size - 1, b"!");
            checked.read_all();
            checked.client.call(&Request::write(size, b"!")).fails(nbd::ENOSPC);
            checked.client.call(&Request::write(size - 1, b"!!")).fails(nbd::ENOSPC);
            checked.client.call(&Request::read(size - 1, 2)).fails(nbd::EINVAL);
            checked.zeroes(size - size.min(3), size.min(3), 0);
            checked.read_all();
            checked.trim(0, size);
            checked.read_all();
            let data = Random::new(size).bytes(size);
            for offset in (0..size).step_by(1 << 20) {
                let length = support::size((size - offset).min(MIB));
                let start = support::size(offset);
                checked.write(offset, &data[start..start + length]);
            }
            checked.read_all();
            if style.has_chunks() {
                checked.status(0, size);
            }
        }
        server.stop();
        assert_eq!(image.fingerprint(), before);
    }
}

#[test]
fn the_part_of_the_last_block_beyond_the_end_never_shows() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 4096 * 3 + 100, 17);
    let server = Server::of(&image);
    let mut client: Client = server.client("base");
    client.write(4096 * 3, &[1; 100]);
    client.call(&Request::read(4096 * 3, 101)).fails(nbd::EINVAL);
    let status = client.status(0, image.size);
    assert_eq!(status.iter().map(|(length, _)| length).sum::<u64>(), image.size);
    client.zeroes(4096 * 3 + 50, 50);
    assert_eq!(client.read(4096 * 3, 100), [[1; 50], [0; 50]].concat());
}
