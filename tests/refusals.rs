//! Requests that must be refused: with which error, with nothing done, and with the stream in step afterwards.

mod support;

use support::in_step::{EXPORT, every_style, serve};
use support::{Checked, MIB, Random, Request, Style, assert_bytes, nbd};

#[test]
fn out_of_range_requests_get_the_specified_error() {
    let (_dir, image, server) = serve();
    let ranges = [
        (EXPORT, 1),
        (EXPORT - 1, 2),
        (EXPORT - 4096, 4097),
        (EXPORT + 1, 1),
        (0, EXPORT + 1),
        (u64::MAX, 1),
        (u64::MAX - 1, 2),
        (u64::MAX - 511, 4096),
        (1 << 63, 4096),
    ];
    every_style(&server, |client| {
        for (offset, length) in ranges {
            client.call(&Request::read(offset, length)).fails(nbd::EINVAL);
            client.call(&Request::trim(offset, length)).fails(nbd::EINVAL);
            client.call(&Request::cache(offset, length)).fails(nbd::EINVAL);
            client.call(&Request::status(offset, length)).fails(nbd::EINVAL);
            client.call(&Request::zeroes(offset, length)).fails(nbd::ENOSPC);
            let payload = vec![0x33; support::size(length)];
            client.call(&Request::write(offset, &payload)).fails(nbd::ENOSPC);
        }
        assert_bytes(&client.read_all(), &image.all(), 0);
    });
}

#[test]
fn refused_reads_carry_no_data_and_the_next_reply_is_found() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        let requests: Vec<Request> = (0..100)
            .flat_map(|n| [Request::read(EXPORT - 100, 200), Request::read(n * 4096, 4096)])
            .collect();
        for (n, pair) in client.pipeline(&requests).chunks(2).enumerate() {
            pair[0].clone().fails(nbd::EINVAL);
            let offset = n as u64 * 4096;
            assert_bytes(&pair[1].clone().ok().data, &image.bytes(offset, 4096), offset);
        }
    });
}

#[test]
fn the_payload_of_a_refused_write_is_drained() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        for length in [1, 28, 4096, 65_536, MIB, 5 * MIB] {
            // A payload made of request headers: were it parsed, bytes would change.
            let trap = Request::zeroes(0, 4096).header(99);
            let mut payload = trap.repeat(support::size(length / 28 + 1));
            payload.truncate(support::size(length));
            client.call(&Request::write(EXPORT, &payload)).fails(nbd::ENOSPC);
            client.call(&Request::write(0, &payload).with(nbd::NO_HOLE)).fails(nbd::EINVAL);
        }
        assert_bytes(&client.read(0, 4096), &image.bytes(0, 4096), 0);
    });
}

#[test]
fn refused_writes_amid_a_pipeline_disturb_nobody() {
    let (_dir, image, server) = serve();
    for style in Style::ALL {
        let client = server.client_in(style, "base");
        let mut checked = Checked::new(client, &image);
        let mut random = Random::new(11);
        let mut requests = Vec::new();
        for n in 0..300 {
            let data = random.bytes(random.clone().between(1, 9000));
            if n % 3 == 0 {
                requests.push(Request::write(EXPORT - 1, &[data, vec![1, 2]].concat()));
            } else {
                checked.model.write(n * 20_000, &data);
                requests.push(Request::write(n * 20_000, &data));
            }
        }
        for (n, reply) in checked.client.pipeline(&requests).into_iter().enumerate() {
            if n % 3 == 0 {
                reply.fails(nbd::ENOSPC)
            } else {
                reply.ok()
            };
        }
        checked.read_all();
    }
}

#[test]
fn unknown_commands_are_invalid() {
    let (_dir, _image, server) = serve();
    every_style(&server, |client| {
        for command in [8, 9, 42, 0x7fff, 0xffff] {
            for (offset, length) in [(0, 0), (0, 4096), (u64::MAX, 0xffff_ffff)] {
                client.call(&Request::new(command, offset, length)).fails(nbd::EINVAL);
            }
        }
    });
}

#[test]
fn flags_that_do_not_belong_to_a_command_are_invalid() {
    let (_dir, image, server) = serve();
    every_style(&server, |client| {
        let commands = [
            (Request::read(0, 4096), nbd::FUA | nbd::DF),
            (Request::write(0, &[1; 4096]), nbd::FUA),
            (Request::flush(), nbd::FUA),
            (Request::trim(0, 4096), nbd::FUA),
            (Request::cache(0, 4096), nbd::FUA),
            (Request::zeroes(0, 4096), nbd::FUA | nbd::NO_HOLE | nbd::FAST_ZERO),
            (Request::status(0, 4096), nbd::FUA | nbd::REQ_ONE),
        ];
        for (request, known) in commands {
            // With extended headers this one announces a payload: it has tests of its own.
            let known = known | if client.style == Style::Extended { nbd::PAYLOAD_LEN } else { 0 };
            for bit in (0..16).map(|bit| 1 << bit).filter(|bit| known & bit == 0) {
                let reply = client.call(&request.clone().with(bit));
                assert_eq!(reply.error, Some(nbd::EINVAL), "{:?} with flag {bit:#x}", request.command);
                client.call(&request.clone().with(bit | nbd::FUA)).fails(nbd::EINVAL);
            }
        }
        assert_bytes(&client.read(0, 8192), &image.bytes(0, 8192), 0);
    });
}

#[test]
fn a_wrong_request_magic_ends_the_connection_and_nobody_elses() {
    let (_dir, image, server) = serve();
    let mut other = server.client("base");
    let mut client = server.client("base");
    let mut bytes = Request::read(0, 512).header(1);
    bytes[0] ^= 0xff;
    client.peer().send(&bytes);
    client.peer().expect_end();
    assert_bytes(&other.read(0, 512), &image.bytes(0, 512), 0);
}
