//! The `nbd` crate's client, an independent minimal one: `EXPORT_NAME` only, simple replies, every cookie zero, and
//! each header written field by field.

mod support;

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use nbd::client::{NbdClient, NbdExt, handshake};
use support::server::{Serve, scratch};
use support::{Image, MIB, Random, Server, assert_bytes};

#[test]
fn it_reads_seeks_writes_and_flushes() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 2 * MIB + 300, 41);
    let server = Server::of(&image);
    let mut stream = UnixStream::connect(server.socket()).expect("connecting");
    let export = handshake(&mut stream, b"base").expect("the export is offered");
    assert_eq!(export.size, image.size);
    assert!(!export.readonly && export.send_trim && export.send_flush);
    assert!(!export.rotational && !export.resizeable);
    let mut client = NbdClient::new(stream, &export);

    let mut seen = Vec::new();
    client.read_to_end(&mut seen).expect("reading everything");
    assert_bytes(&seen, &image.all(), 0);

    let data = Random::new(1).bytes(100_000);
    client.seek(SeekFrom::Start(777)).expect("seeking");
    client.write_all(&data).expect("writing");
    client.flush().expect("flushing");
    client.seek(SeekFrom::End(-300)).expect("seeking");
    client.write_all(b"the end").expect("writing");

    let mut expected = image.all();
    expected[777..777 + data.len()].copy_from_slice(&data);
    let end = expected.len() - 300;
    expected[end..end + 7].copy_from_slice(b"the end");
    client.rewind().expect("seeking");
    let mut seen = Vec::new();
    client.read_to_end(&mut seen).expect("reading everything");
    assert_bytes(&seen, &expected, 0);

    client.seek(SeekFrom::Start(MIB)).expect("seeking");
    client.trim(8192).expect("trimming");
    let mut trimmed = [1; 8192];
    client.read_exact(&mut trimmed).expect("reading");
    assert_eq!(trimmed, [0; 8192]);
}

#[test]
fn it_is_told_of_errors() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 41);
    let server = Server::of(&image);
    let mut stream = UnixStream::connect(server.socket()).expect("connecting");
    let mut export = handshake(&mut stream, b"").expect("the export is offered");
    // The client checks bounds by what it believes the size to be.
    export.size += 4096;
    let mut client = NbdClient::new(stream, &export);
    client.seek(SeekFrom::Start(MIB)).expect("seeking");
    let error = client.write(b"beyond").expect_err("there is nothing beyond the end");
    assert!(error.to_string().contains("ENOSPC"), "{error}");
    let error = client.read(&mut [0; 10]).expect_err("there is nothing beyond the end");
    assert!(error.to_string().contains("EINVAL"), "{error}");
    let error = client.resize(5).expect_err("there is no such command");
    assert!(error.to_string().contains("EINVAL"), "{error}");
    client.rewind().expect("seeking");
    let mut seen = [0; 100];
    client.read_exact(&mut seen).expect("the stream is in step");
    assert_bytes(&seen, &image.bytes(0, 100), 0);
}

#[test]
fn an_unknown_export_is_closed_on_it() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 41);
    let server = Server::of(&image);
    let mut stream = UnixStream::connect(server.socket()).expect("connecting");
    handshake(&mut stream, b"nothing").expect_err("not offered");
}

#[test]
fn two_of_them_over_tcp_have_a_session_each_or_share_a_named_one() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 41);
    let server = Serve::image(&image).tcp().start();
    let attach = |name: &str| {
        let mut stream = TcpStream::connect(server.tcp_address()).expect("connecting");
        let export = handshake(&mut stream, name.as_bytes()).expect("the export is offered");
        NbdClient::new(stream, &export)
    };
    for (name, shared) in [("base", false), ("base@both", true)] {
        let (mut one, mut two) = (attach(name), attach(name));
        one.write_all(&[1; 512]).expect("writing");
        one.flush().expect("flushing");
        let mut seen = vec![0; 512];
        two.read_exact(&mut seen).expect("reading");
        let expected = if shared { vec![1; 512] } else { image.bytes(0, 512) };
        assert_bytes(&seen, &expected, 0);
    }
}
