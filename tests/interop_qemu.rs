//! qemu-img and qemu-io as clients: the block layer that virtual machines use.

mod interop_support;
mod support;

use std::path::Path;

use interop_support::door::Door;
use interop_support::{assert_same, attempt, run, said, uri};
use serde_json::Value;
use support::server::{Serve, scratch};
use support::{GIB, Image, KIB, MIB, Server};

fn json(args: &[&str]) -> Value {
    let text = run("qemu-img", args);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("qemu-img printed no JSON ({error}):\n{text}"))
}

/// Runs qemu-io commands; all of them have to work, patterns that are read have to be there.
#[track_caller]
fn io(uri: &str, commands: &[&str]) -> String {
    let arguments = commands.iter().flat_map(|command| ["-c", command]);
    let output = attempt("qemu-io", ["-f", "raw"].into_iter().chain(arguments).chain([uri]));
    let said = said(&output);
    // A pattern that is not there is said, but is no exit status in older versions.
    let bad = ["failed", "error", "rror:", "invalid"].iter().any(|word| said.to_lowercase().contains(word));
    assert!(output.status.success() && !bad, "qemu-io {commands:?} on {uri} ({}):\n{said}", output.status);
    said
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the temporary directory's path is text")
}

#[test]
fn qemu_img_shows_size_and_map() {
    let dir = scratch();
    let data = [64 * KIB..128 * KIB, MIB..MIB + 64 * KIB];
    let image = Image::sparse(dir.path().join("disk.img"), 4 * MIB, &data, 1);
    let server = Server::of(&image);
    let uri = uri(&server, "disk");

    let info = json(&["info", "--output=json", "-f", "raw", &uri]);
    assert_eq!(info["virtual-size"], 4 * MIB);

    let map = json(&["map", "--output=json", "-f", "raw", &uri]);
    let mut data_found = Vec::new();
    let mut end = 0;
    for extent in map.as_array().expect("the map is a list") {
        let field = |name: &str| extent[name].as_u64().unwrap_or_else(|| panic!("no {name} in {extent}"));
        assert_eq!(field("start"), end, "the map has no gaps");
        end += field("length");
        if extent["data"] == true {
            data_found.push(field("start")..end);
        } else {
            assert_eq!(extent["zero"], true, "what is no data reads as zeroes: {extent}");
        }
    }
    assert_eq!(end, 4 * MIB);
    assert_eq!(data_found, data);
}

#[test]
fn qemu_img_copies_out_and_compares() {
    let dir = scratch();
    let size = 24 * MIB + 512;
    let data = [0..5 * MIB, 7 * MIB + 4096..7 * MIB + 8192, 20 * MIB..size];
    let image = Image::sparse(dir.path().join("disk.img"), size, &data, 2);
    let server = Serve::image(&image).tcp().start();
    let uri = uri(&server, "disk");
    let out = dir.path().join("out.img");
    let qcow2 = dir.path().join("out.qcow2");

    run("qemu-img", ["convert", "-f", "raw", "-O", "raw", &uri, text(&out)]);
    assert_same(&out, &image.path);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", text(&image.path), &uri]);
    run("qemu-img", ["convert", "-W", "-m", "8", "-f", "raw", "-O", "qcow2", &uri, text(&qcow2)]);
    run("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), text(&image.path)]);
}

#[test]
fn qemu_img_copies_into_a_session() {
    let dir = scratch();
    let size = 24 * MIB + 512;
    let image = Image::random(dir.path().join("disk.img"), size, 3);
    // Its holes lie over data of the base, so that qemu has to zero them.
    let data = [4096..MIB, 3 * MIB..9 * MIB, 16 * MIB..size];
    let content = Image::sparse(dir.path().join("new.img"), size, &data, 4);
    let before = image.fingerprint();
    let server = Server::of(&image);

    for (session, options) in [("disk@ordered", &["-n"][..]), ("disk@wild", &["-n", "-W", "-m", "16"][..])] {
        let uri = uri(&server, session);
        let formats = ["-f", "raw", "-O", "raw", text(&content.path), &uri];
        run("qemu-img", ["convert"].iter().chain(options).chain(&formats));
        run("qemu-img", ["compare", "-f", "raw", "-F", "raw", text(&content.path), &uri]);
    }
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", text(&image.path), &uri(&server, "disk")]);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn qemu_io_writes_patterns_and_reads_them_back() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 5);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let uri = uri(&server, "disk@one");

    io(
        &uri,
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 512 512",
            "write -P 0x33 1000k 100k",
            "read -P 0x11 0 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1k 999k",
            "read -P 0x33 1000k 100k",
            // FUA, and several requests in flight that do not overlap.
            "write -f -P 0x44 2M 64k",
            "aio_write -P 0x55 3M 64k",
            "aio_write -P 0x66 3136k 64k",
            "aio_write -P 0x77 3200k 4k",
            "aio_flush",
            "read -P 0x44 2M 64k",
            "read -P 0x55 3M 64k",
            "read -P 0x66 3136k 64k",
            "read -P 0x77 3200k 4k",
            "flush",
        ],
    );
    // Discard; zeroes that have to be allocated; zeroes that may be a hole; and data over zeroes.
    io(
        &uri,
        &[
            "discard 0 512k",
            "read -P 0 0 512k",
            "read -P 0x11 512k 488k",
            "write -z 2M 32k",
            "read -P 0 2M 32k",
            "read -P 0x44 2080k 32k",
            "write -z -u 3M 64k",
            "read -P 0 3M 64k",
            "read -P 0x66 3136k 64k",
            "write -z -n 4M 1M",
            "read -P 0 4M 1M",
            "write -z 5000k 1500",
            "write -P 0x88 3100k 4k",
            "read -P 0x88 3100k 4k",
            "read -P 0 3M 28k",
        ],
    );
    // A connection of its own sees the session; another export name does not.
    io(&uri, &["read -P 0x88 3100k 4k", "read -P 0x33 1024k 76k"]);
    run(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", text(&image.path), &interop_support::uri(&server, "disk")],
    );
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn two_qemu_clients_write_different_bytes_at_the_same_place() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 8 * MIB, 6);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let (alice, bob) = (uri(&server, "disk@alice"), uri(&server, "disk@bob"));
    std::thread::scope(|scope| {
        scope.spawn(|| io(&alice, &["write -P 0xaa 0 8M", "read -P 0xaa 0 8M"]));
        scope.spawn(|| io(&bob, &["write -P 0xbb 0 8M", "read -P 0xbb 0 8M"]));
    });
    io(&alice, &["read -P 0xaa 0 8M"]);
    io(&bob, &["read -P 0xbb 0 8M"]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", text(&image.path), &uri(&server, "disk")]);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

/// What the server says about the connections that it served: the style of their replies.
fn styles(server: &Server) -> Vec<String> {
    let log = server.log();
    let style = |line: &String| {
        let rest = line.split_once("replies=")?.1;
        rest.split_whitespace().next().map(str::to_owned)
    };
    log.iter().filter(|line| line.contains("negotiated")).filter_map(style).collect()
}

/// QEMU 10 agrees on extended headers and then sends writes without `PAYLOAD_LEN`, against the letter of the extension,
/// with their payload behind them: a server that takes the letter for all there is cannot be written to.
#[test]
fn qemu_writes_and_reads_with_extended_headers_and_without() {
    let dir = scratch();
    let size = 24 * MIB + 512;
    let image = Image::random(dir.path().join("disk.img"), size, 3);
    let data = [4096..MIB, 3 * MIB..9 * MIB, 16 * MIB..size];
    let content = Image::sparse(dir.path().join("new.img"), size, &data, 4);
    for (knobs, style) in [
        (&["-vv"][..], "Extended"),
        (&["-vv", "--no-extended-headers"], "Structured"),
        (&["-vv", "--no-structured-replies"], "Simple"),
    ] {
        let server = Serve::image(&image).args(knobs).start();
        let uri = uri(&server, "disk@one");
        run(
            "qemu-img",
            ["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", text(&content.path), &uri],
        );
        run("qemu-img", ["compare", "-f", "raw", "-F", "raw", text(&content.path), &uri]);
        io(
            &uri,
            &[
                "write -P 0x11 0 8M",
                "write -P 0x22 1000 3000",
                "read -P 0x11 4000 100k",
                "read -P 0x22 1000 3000",
                "aio_write -P 0x33 9M 64k",
                "aio_write -P 0x44 10M 1M",
                "aio_flush",
                "read -P 0x33 9M 64k",
                "read -P 0x44 10M 1M",
                "write -z -u 2M 1M",
                "discard 4M 1M",
                "read -P 0 2M 1M",
                "read -P 0 4M 1M",
                "read -P 0x11 3M 1M",
                "flush",
            ],
        );
        let styles = styles(&server);
        assert!(styles.len() >= 3 && styles.iter().all(|found| found == style), "{styles:?} for {knobs:?}");
        server.stop();
    }
}

/// start, length, zero and data of every extent; neighbours that differ in nothing else are one.
fn extents(map: &Value) -> Vec<(u64, u64, bool, bool)> {
    let mut all: Vec<(u64, u64, bool, bool)> = Vec::new();
    for extent in map.as_array().expect("the map is a list") {
        let number = |name: &str| extent[name].as_u64().unwrap_or_else(|| panic!("no {name} in {extent}"));
        let flag = |name: &str| extent[name].as_bool().unwrap_or_else(|| panic!("no {name} in {extent}"));
        let (start, length, zero, data) = (number("start"), number("length"), flag("zero"), flag("data"));
        match all.last_mut() {
            Some(last) if (last.2, last.3) == (zero, data) => last.1 += length,
            _ => all.push((start, length, zero, data)),
        }
    }
    all
}

fn memdev_map(what: &str) -> Value {
    let text = run(env!("CARGO_BIN_EXE_memdev"), ["map", "--json", what]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("memdev printed no JSON ({error}):\n{text}"))
}

#[test]
fn memdev_map_prints_what_qemu_img_map_prints() {
    let dir = scratch();
    let size = 3 << 40;
    let data = [64 * KIB..128 * KIB, GIB..GIB + 64 * KIB, 5 * GIB..5 * GIB + 4096];
    let image = Image::sparse(dir.path().join("disk.img"), size, &data, 1);
    let server = Serve::image(&image).args(["-vv"]).start();
    let session = uri(&server, "disk@one");
    io(
        &session,
        &[
            "write -P 1 3G 64k",
            "write -P 1 1T 4k",
            "discard 64k 4k",
            "write -z 5G 4k",
            "write -P 1 1073745920 4k",
            "write -P 1 4294963200 8k",
        ],
    );

    // The image file, to the letter but for two keys that say nothing here.
    let mut theirs = json(&["map", "--output=json", "-f", "raw", text(&image.path)]);
    for extent in theirs.as_array_mut().expect("the map is a list") {
        let extent = extent.as_object_mut().expect("an extent is an object");
        extent.remove("offset");
        extent.remove("compressed");
    }
    assert_eq!(memdev_map(text(&image.path)), theirs);

    for export in ["disk", "disk@one"] {
        let uri = uri(&server, export);
        let theirs = json(&["map", "--output=json", "-f", "raw", &uri]);
        assert_eq!(extents(&memdev_map(&uri)), extents(&theirs), "{export}");
    }
    assert!(styles(&server).contains(&"Extended".to_owned()), "{:?}", styles(&server));
    server.stop();
}

/// QEMU's client can take any metadata context for a dirty bitmap: what has bit 0 then counts as no data, what has bit 1
/// as zero.
#[test]
fn qemu_img_sees_what_the_session_wrote() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 4 * MIB, 1);
    let server = Server::of(&image);
    let session = uri(&server, "disk@one");
    io(&session, &["write -P 1 1M 8k", "discard 2M 64k", "write -z -u 3M 4k"]);
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk@one,\
         file.x-dirty-bitmap=memdev:dirty",
        server.socket().display()
    );
    let map = json(&["map", "--output=json", "--image-opts", &options]);
    let (clean, dirty, dirty_zero) = ((false, true), (false, false), (true, false));
    let expected = [
        (0, MIB, clean),
        (MIB, 8 * KIB, dirty),
        (MIB + 8 * KIB, MIB - 8 * KIB, clean),
        (2 * MIB, 64 * KIB, dirty_zero),
        (2 * MIB + 64 * KIB, MIB - 64 * KIB, clean),
        (3 * MIB, 4 * KIB, dirty_zero),
        (3 * MIB + 4 * KIB, MIB - 4 * KIB, clean),
    ];
    let expected: Vec<_> =
        expected.into_iter().map(|(start, length, (zero, data))| (start, length, zero, data)).collect();
    assert_eq!(extents(&map), expected);

    // The same as seen by our own map, in which the session's layer has depth 0.
    let ours = memdev_map(&session);
    let own: u64 = ours
        .as_array()
        .expect("the map is a list")
        .iter()
        .filter(|extent| extent["depth"] == 0)
        .map(|extent| extent["length"].as_u64().expect("a length"))
        .sum();
    assert_eq!(own, 76 * KIB);
}

/// A plain name is a private copy for each connection. qemu makes one for a device, however many requests it has under
/// way at once.
#[test]
fn qemu_makes_one_connection() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 32 * MIB, 6);
    let server = Server::of(&image);
    let door = Door::new(dir.path(), &server);
    let copy = dir.path().join("copy.img");
    for export in ["disk", "disk@one"] {
        let uri = door.uri(export);
        run("qemu-img", ["convert", "-m", "16", "-W", "-f", "raw", "-O", "raw", &uri, text(&copy)]);
        assert_eq!(door.connections(), 1, "{export}");
        assert_same(&image.path, &copy);
    }
    server.stop();
}
