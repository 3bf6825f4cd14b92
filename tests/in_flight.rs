//! Many requests at once, in pieces, over both kinds of socket, and what becomes of them when the client says goodbye.

mod support;

use support::in_step::{every_style, serve};
use support::server::{Serve, scratch};
use support::{Checked, Client, Image, MIB, Random, Request, Server, Style, assert_bytes, nbd};

// Many in flight.

#[test]
fn a_thousand_requests_in_flight_are_all_answered() {
    let (_dir, image, server) = serve();
    for style in Style::ALL {
        let client = server.client_in(style, "base");
        let mut checked = Checked::new(client, &image);
        let mut random = Random::new(13);
        // Disjoint slots of 8,000 bytes: a write to one, a read of another, in one stream.
        let mut slots: Vec<u64> = (0..1000).collect();
        for n in (1..slots.len()).rev() {
            slots.swap(n, support::size(random.below(n as u64 + 1)));
        }
        let (written, read) = slots.split_at(500);
        let mut requests = Vec::new();
        for (write, read) in written.iter().zip(read) {
            let data = random.bytes(7001);
            checked.model.write(write * 8000 + 13, &data);
            requests.push(Request::write(write * 8000 + 13, &data));
            requests.push(Request::read(read * 8000, 8000));
        }
        let replies = checked.client.pipeline(&requests);
        assert_eq!(replies.len(), 1000);
        for (reply, request) in replies.into_iter().zip(&requests) {
            let reply = reply.ok();
            if request.command == nbd::CMD_READ {
                assert_bytes(&reply.data, checked.model.read(request.offset, 8000), request.offset);
            }
        }
        checked.read_all();
    }
}

#[test]
fn requests_arriving_in_pieces_are_put_together() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        let requests = [
            Request::write(5000, &[0x5a; 3000]),
            Request::read(0, 512),
            Request::flush(),
            Request::write(9000, &[0x5b; 100]),
        ];
        let mut bytes = Vec::new();
        let cookies: Vec<u64> = requests
            .iter()
            .map(|request| {
                let cookie = client.expect(request);
                bytes.extend(request.bytes_in(client.style, cookie));
                cookie
            })
            .collect();
        for piece in bytes.chunks(11) {
            client.peer().send(piece);
        }
        for cookie in cookies {
            client.wait(cookie).ok();
        }
        let mut expected = image.bytes(4000, 6000);
        expected[1000..4000].fill(0x5a);
        expected[5000..5100].fill(0x5b);
        assert_bytes(&client.read(4000, 6000), &expected, 4000);
    });
}

#[test]
fn writes_and_reads_larger_than_the_socket_buffers_do_not_deadlock() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * MIB, 3);
    let server = Server::of(&image);
    let mut client = server.client("base");
    let data = Random::new(17).bytes(4 * MIB);
    let mut requests = Vec::new();
    for n in 0..6 {
        requests.push(Request::read(n * 4 * MIB, 4 * MIB));
        requests.push(Request::write(32 * MIB + n * 4 * MIB, &data));
    }
    for (n, pair) in client.pipeline(&requests).chunks(2).enumerate() {
        let offset = n as u64 * 4 * MIB;
        assert_bytes(&pair[0].clone().ok().data, &image.bytes(offset, 4 * MIB), offset);
        pair[1].clone().ok();
        assert_bytes(&client.read(32 * MIB + offset, 4 * MIB), &data, offset);
    }
}

#[test]
fn over_tcp_it_is_the_same() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 40 * MIB + 77, 3);
    let server = Serve::image(&image).tcp().start();
    for style in Style::ALL {
        let stream = server.tcp_stream();
        let contexts: &[&str] = if style.has_chunks() { &["base:allocation"] } else { &[] };
        let client = Client::attach_as(stream, "base", style, contexts).expect("offered");
        let mut checked = Checked::new(client, &image);
        checked.read(5, 32 * MIB);
        let data = Random::new(43).bytes(32 * MIB);
        checked.write(8 * MIB + 1, &data);
        let mut random = Random::new(47);
        for _ in 0..500 {
            checked.random_step(&mut random, 200_000, style.has_chunks());
        }
        let requests: Vec<Request> =
            (0..1000).map(|n| Request::read(random.below(39 * MIB), n * 64 + 1)).collect();
        for (reply, request) in checked.client.pipeline(&requests).into_iter().zip(&requests) {
            let expected = checked.model.read(request.offset, request.length);
            assert_bytes(&reply.ok().data, expected, request.offset);
        }
        checked.read_all();
        checked.client.disconnect();
    }
}

// DISC and the end of input.

#[test]
fn disc_finishes_what_is_in_flight() {
    let (_dir, image, server) = serve();
    for round in 0..20_u8 {
        let mut client = server.client("base@disc");
        let requests: Vec<Request> = (0..200)
            .flat_map(|n| {
                [Request::write(n * 8192, &[round + 1; 4096]), Request::read(n * 8192 + 4096, 1024)]
            })
            .collect();
        let replies = client.pipeline_then(&requests, &Request::disconnect());
        for (n, pair) in replies.chunks(2).enumerate() {
            pair[0].clone().ok();
            let offset = n as u64 * 8192 + 4096;
            assert_bytes(&pair[1].clone().ok().data, &image.bytes(offset, 1024), offset);
        }
        client.peer().expect_end();
        let mut after = server.client("base@disc");
        for n in 0..200 {
            assert_eq!(after.read(n * 8192, 4096), [round + 1; 4096]);
        }
        after.disconnect();
    }
}

#[test]
fn nothing_after_disc_is_executed() {
    let (_dir, image, server) = serve();
    let mut keeper = server.client("base@after-disc");
    let mut client = server.client("base@after-disc");
    let mut bytes = Request::disconnect();
    bytes.extend(Request::write(0, &[0xdd; 4096]).bytes(2));
    // The server may close before all of it is taken.
    let _ = client.peer().try_send(&bytes);
    client.peer().expect_end();
    assert_bytes(&keeper.read(0, 4096), &image.bytes(0, 4096), 0);
}

#[test]
fn a_client_that_stops_sending_still_gets_its_replies() {
    let (_dir, image, server) = serve();
    let mut client = server.client("base");
    let reads: Vec<Request> = (0..64).map(|n| Request::read(n * 65_536, 65_536)).collect();
    let cookies = client.send_all(&reads);
    client.peer().stream().shutdown(std::net::Shutdown::Write).expect("shutting one direction down");
    for (n, cookie) in cookies.into_iter().enumerate() {
        let offset = n as u64 * 65_536;
        assert_bytes(&client.wait(cookie).ok().data, &image.bytes(offset, 65_536), offset);
    }
    client.peer().expect_end();
}
