//! `memdev map`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use memdev::client::{Client, Haggling};
use memdev::net::Address;
use memdev::proto::CommandFlags;
use serde_json::Value;

use super::serve::Server;
use super::{MEMDEV, failure, memdev};

const MIB: u64 = 1 << 20;

/// A directory with a sparse image in it: 64 KiB of data at 0 and 128 KiB at 1 MiB, of 4 MiB.
fn with_sparse_image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.img");
    let file = File::create(&path).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[1; 64 << 10], 0).unwrap();
    file.write_all_at(&[2; 128 << 10], MIB).unwrap();
    (dir, path)
}

fn serve(image: &Path, socket: &Path, args: &[&str]) -> Server {
    let mut command = std::process::Command::new(MEMDEV);
    command.arg("serve").arg(image).arg("--unix").arg(socket).args(args);
    Server::start(command, 1)
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn attach(socket: &Path, export: &str) -> Client {
    Haggling::connect(&Address::unix(socket).unwrap().into()).unwrap().go(export).unwrap()
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// start, length, depth, data of every extent; what is not data has to be zero.
fn json(what: &str) -> Vec<(u64, u64, u64, bool)> {
    let text = text(memdev().args(["map", "--json", what]).output().unwrap());
    let extents: Value = serde_json::from_str(&text).unwrap();
    let extent = |extent: &Value| {
        let number = |key: &str| extent[key].as_u64().unwrap_or_else(|| panic!("no {key} in {extent}"));
        let data = extent["data"].as_bool().unwrap();
        assert_eq!((extent["zero"].as_bool(), extent["present"].as_bool()), (Some(!data), Some(true)));
        (number("start"), number("length"), number("depth"), data)
    };
    extents.as_array().unwrap().iter().map(extent).collect()
}

#[test]
fn an_image_has_the_holes_that_its_server_sees() {
    let (_dir, image) = with_sparse_image();
    let shown = text(memdev().arg("map").arg(&image).output().unwrap());
    assert_eq!(
        shown,
        "Offset          Length          Depth   Holds\n\
         0x0             0x10000         0       data\n\
         0x10000         0xf0000         0       zeroes\n\
         0x100000        0x20000         0       data\n\
         0x120000        0x2e0000        0       zeroes\n"
    );
    let expected = [
        (0, 64 << 10, 0, true),
        (64 << 10, 960 << 10, 0, false),
        (MIB, 128 << 10, 0, true),
        (MIB + (128 << 10), 4 * MIB - MIB - (128 << 10), 0, false),
    ];
    assert_eq!(json(image.to_str().unwrap()), expected);
}

#[test]
fn a_session_has_what_it_wrote_over_what_the_image_has() {
    let (dir, image) = with_sparse_image();
    let socket = dir.path().join("s");
    let _server = serve(&image, &socket, &[]);
    let untouched = [
        (0, 64 << 10, 1, true),
        (64 << 10, 960 << 10, 1, false),
        (MIB, 128 << 10, 1, true),
        (MIB + (128 << 10), 4 * MIB - MIB - (128 << 10), 1, false),
    ];
    assert_eq!(json(&uri(&socket, "root")), untouched);
    assert_eq!(json(&uri(&socket, "")), untouched);

    let mut client = attach(&socket, "root@one");
    client.write(3 * MIB + 5, b"mine", CommandFlags::NONE).unwrap();
    client.write_zeroes(MIB, 8192, CommandFlags::NONE).unwrap();
    let written = [
        (0, 64 << 10, 1, true),
        (64 << 10, 960 << 10, 1, false),
        (MIB, 8192, 0, false),
        (MIB + 8192, (128 << 10) - 8192, 1, true),
        (MIB + (128 << 10), 2 * MIB - (128 << 10), 1, false),
        (3 * MIB, 4096, 0, true),
        (3 * MIB + 4096, MIB - 4096, 1, false),
    ];
    assert_eq!(json(&uri(&socket, "root@one")), written);
    let _neighbour = attach(&socket, "root@two");
    assert_eq!(json(&uri(&socket, "root@two")), untouched, "the neighbour");
    let shown = text(memdev().args(["map", &uri(&socket, "root@one")]).output().unwrap());
    for line in
        ["0x100000        0x2000          0       zeroes", "0x300000        0x1000          0       data"]
    {
        assert!(shown.lines().any(|found| found == line), "{line} in:\n{shown}");
    }
}

/// Whoever maps a session under a mistyped name, or before it has begun, once made it: it was the mapper's then, and a map
/// of nothing was shown.
#[test]
fn a_session_that_is_not_there_is_not_made_by_looking() {
    let (dir, image) = with_sparse_image();
    let socket = dir.path().join("s");
    let _server = serve(&image, &socket, &["--max-sessions", "1"]);
    for _ in 0..2 {
        let line = failure(memdev().args(["map", &uri(&socket, "root@one")]), 1);
        assert!(line.starts_with("No such session root@one; one begins when"), "{line}");
    }
    let line = failure(memdev().args(["map", &uri(&socket, "other@one")]), 1);
    assert!(line.contains("there is no such export"), "{line}");
    // There is room for one: nobody else has it.
    let _client = attach(&socket, "root@one");
    assert_eq!(json(&uri(&socket, "root@one")).len(), 4);
}

#[test]
fn a_device_of_tebibytes_with_much_in_it_is_shown_whole() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.img");
    let size = 3 << 40;
    File::create(&image).unwrap().set_len(size).unwrap();
    let socket = dir.path().join("s");
    let _server = serve(&image, &socket, &[]);
    let mut client = attach(&socket, "root@one");
    // More extents than one answer has, on both sides of where one request ends, and at the very end.
    let four_gib = 4 << 30;
    for n in 0..1500 {
        client.write(four_gib - 8 * MIB + n * 8192, &[1; 4096], CommandFlags::NONE).unwrap();
    }
    client.write(size - 4096, &[1; 4096], CommandFlags::NONE).unwrap();
    let extents = json(&uri(&socket, "root@one"));
    assert_eq!(extents.len(), 3002);
    let mut end = 0;
    for (start, length, depth, data) in extents {
        assert_eq!((start, data), (end, depth == 0));
        assert!(!data || length == 4096, "{length} bytes at {start}");
        end += length;
    }
    assert_eq!(end, size);
}

#[test]
fn what_cannot_be_mapped_is_one_line() {
    let (dir, image) = with_sparse_image();
    let missing = dir.path().join("none.img");
    let line = failure(memdev().arg("map").arg(&missing), 1);
    assert!(line.contains(missing.to_str().unwrap()) && line.contains("no such file"), "{line}");
    let line = failure(memdev().arg("map").arg(dir.path()), 1);
    assert!(line.contains("it is a directory"), "{line}");
    let line = failure(memdev().args(["map", &uri(&missing, "root")]), 1);
    assert!(line.contains("check that a server is running there"), "{line}");

    let socket = dir.path().join("s");
    {
        let _server = serve(&image, &socket, &[]);
        let line = failure(memdev().args(["map", &uri(&socket, "nothing")]), 1);
        assert!(line.contains("there is no such export"), "{line}");
    }
    let _server = serve(&image, &socket, &["--no-structured-replies"]);
    let line = failure(memdev().args(["map", &uri(&socket, "root")]), 1);
    assert!(
        line.starts_with("The server cannot tell where there is data: it has no structured replies"),
        "{line}"
    );

    assert!(failure(memdev().arg("map"), 2).contains("required arguments were not provided: <IMAGE|URI>"));
    assert!(failure(memdev().args(["map", "a", "b"]), 2).contains("Unexpected argument 'b' found"));
}
