//! The client of the library, `memdev::client`, against a running server.

mod support;

use memdev::ErrorKind;
use memdev::client::{Client, Haggling};
use memdev::net::{Address, Uri};
use memdev::proto::{CommandFlags, STATE_HOLE, STATE_ZERO, TransmissionFlags};
use support::server::{Serve, scratch};
use support::{Image, KIB, MIB, Server};

const SIZE: u64 = 40 * MIB;

fn serve(args: &[&str]) -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::partly(dir.path().join("root.img"), SIZE, 0..MIB, 3);
    let server = Serve::image(&image).tcp().args(args).start();
    (dir, image, server)
}

fn haggle(server: &Server) -> Haggling {
    Haggling::connect(&Uri::from(Address::unix(server.socket()).unwrap())).unwrap()
}

fn read(client: &mut Client, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![9; usize::try_from(length).unwrap()];
    client.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn it_finds_out_what_there_is() {
    let (_dir, _image, server) = serve(&[]);
    let mut haggling = haggle(&server);
    assert!(haggling.structured_replies());
    let names: Vec<_> = haggling.list().unwrap().into_iter().map(|listed| listed.name).collect();
    assert_eq!(names, ["root"]);
    let export = haggling.info("").unwrap();
    assert_eq!((export.name.as_str(), export.size), ("root", SIZE));
    assert!(!export.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    assert!(haggling.info("root@x").unwrap().flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    assert_eq!(haggling.info("nothing").unwrap_err().kind(), ErrorKind::NotFound);
    let contexts = haggling.list_meta_contexts("root", &[]).unwrap();
    assert!(contexts.iter().any(|context| context.name == "base:allocation"));
    haggling.abort().unwrap();
}

#[test]
fn it_reads_and_writes_with_either_kind_of_reply_over_either_kind_of_socket() {
    for args in [&[][..], &["--no-structured-replies"], &["--mask-handshake", "0x1"]] {
        let (_dir, image, server) = serve(args);
        let tcp = Uri::from(Address::tcp(server.tcp_address()).unwrap());
        let over_tcp = Haggling::connect(&tcp).unwrap().go("root").unwrap();
        for mut client in [haggle(&server).go("root").unwrap(), over_tcp] {
            assert_eq!(client.size(), SIZE);
            assert_eq!(read(&mut client, MIB - 100, 200), image.bytes(MIB - 100, 200));
            client.write(KIB + 1, b"mine", CommandFlags::FUA).unwrap();
            assert_eq!(read(&mut client, KIB + 1, 4), b"mine");
            client.write_zeroes(KIB + 2, 2, CommandFlags::NONE).unwrap();
            assert_eq!(read(&mut client, KIB + 1, 4), b"m\0\0e");
            client.trim(0, 4096, CommandFlags::NONE).unwrap();
            client.cache(0, 4096).unwrap();
            client.flush().unwrap();
            // More than one request may carry.
            assert_eq!(read(&mut client, 0, 36 * MIB)[4096..], image.bytes(4096, 36 * MIB - 4096));
            assert_eq!(client.read(SIZE, &mut [0]).unwrap_err().kind(), ErrorKind::Invalid);
            assert_eq!(
                client.write(SIZE, b"x", CommandFlags::NONE).unwrap_err().kind(),
                ErrorKind::OutOfSpace
            );
            assert_eq!(read(&mut client, SIZE - 1, 1), [0], "the connection goes on");
            client.disconnect().unwrap();
        }
    }
}

#[test]
fn it_sees_where_data_is() {
    let (_dir, _image, server) = serve(&[]);
    let mut haggling = haggle(&server);
    let contexts = haggling.set_meta_contexts("root", &["base:allocation"]).unwrap();
    assert_eq!(contexts.len(), 1);
    let mut client = haggling.go("root").unwrap();
    client.write(8 * MIB, &[1; 4096], CommandFlags::NONE).unwrap();
    let extents = client.block_status(0, 10 << 20, CommandFlags::NONE).unwrap();
    let hole = STATE_HOLE | STATE_ZERO;
    let seen: Vec<_> = extents.iter().map(|extent| (extent.offset, extent.length, extent.flags)).collect();
    let expected =
        [(0, MIB, 0), (MIB, 7 * MIB, hole), (8 * MIB, 4096, 0), (8 * MIB + 4096, 2 * MIB - 4096, hole)];
    assert_eq!(seen, expected);
}
