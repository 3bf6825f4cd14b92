//! libnbd's programs and its Python module as clients: the reference client of the protocol.

mod interop_support;
mod support;

use interop_support::door::Door;
use interop_support::{assert_same, attempt, libnbd_script, run, said, uri};
use serde_json::Value;
use support::server::{Serve, scratch};
use support::{Image, KIB, MIB, Server};

fn nbdinfo(args: &[&str]) -> Value {
    let text = run("nbdinfo", ["--json"].iter().chain(args));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("nbdinfo printed no JSON ({error}):\n{text}"))
}

/// `nbdinfo --map` as (offset, length, flags), with equal neighbours merged: a server may report a run in parts.
fn map(uri: &str) -> Vec<(u64, u64, u64)> {
    map_of("base:allocation", uri)
}

/// The same of any metadata context.
fn map_of(context: &str, uri: &str) -> Vec<(u64, u64, u64)> {
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    for extent in nbdinfo(&[&format!("--map={context}"), uri]).as_array().expect("the map is a list") {
        let field = |name: &str| extent[name].as_u64().unwrap_or_else(|| panic!("no {name} in {extent}"));
        let (offset, length, flags) = (field("offset"), field("length"), field("type"));
        match runs.last_mut() {
            Some(last) if last.2 == flags => last.1 += length,
            _ => runs.push((offset, length, flags)),
        }
    }
    runs
}

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

const DATA: u64 = 0;
const HOLE_AND_ZERO: u64 = 3;

#[test]
fn nbdinfo_shows_what_is_offered() {
    let dir = scratch();
    let size = 3 * MIB + 777;
    let server = Server::of(&Image::random(dir.path().join("disk.img"), size, 1));

    let info = nbdinfo(&[&uri(&server, "disk")]);
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["export-size"], size);
    for flag in ["can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_cache", "can_fast_zero"] {
        assert_eq!(export[flag], true, "{flag} of {export}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["is_rotational"], false);
    assert_eq!(export["can_multi_conn"], false, "a private copy per connection is no place for a second one");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "memdev:dirty"]));
    let minimum = export["block_size_minimum"].as_u64().expect("a minimum block size is advertised");
    let preferred = export["block_size_preferred"].as_u64().expect("a preferred block size is advertised");
    let maximum = export["block_size_maximum"].as_u64().expect("a maximum payload is advertised");
    assert!(minimum == 1 && preferred == 4096 && maximum >= 32 * MIB, "{minimum} {preferred} {maximum}");

    let shared = nbdinfo(&[&uri(&server, "disk@one")]);
    assert_eq!(shared["exports"][0]["can_multi_conn"], true);
    assert_eq!(run("nbdinfo", ["--size", &uri(&server, "disk")]).trim(), size.to_string());
    server.stop();
}

#[test]
fn the_list_has_images_and_no_sessions() {
    let dir = scratch();
    let one = Image::random(dir.path().join("one.img"), MIB, 1);
    let two = Image::random(dir.path().join("two.img"), 2 * MIB, 2);
    let server = Serve::image(&one).and_named("second", &two).start();
    run("nbdinfo", [uri(&server, "one@secret")]);

    let list = nbdinfo(&["--list", &uri(&server, "")]);
    let exports = list["exports"].as_array().expect("a list of exports");
    let mut names: Vec<_> =
        exports.iter().map(|export| export["export-name"].as_str().expect("a name")).collect();
    names.sort_unstable();
    assert_eq!(names, ["one", "second"]);

    let empty = nbdinfo(&[&uri(&server, "")]);
    assert_eq!(empty["exports"][0]["export-size"], MIB, "the first image is the empty export too");
}

#[test]
fn an_unknown_export_is_refused_and_the_server_goes_on() {
    let dir = scratch();
    let server = Server::of(&Image::random(dir.path().join("disk.img"), MIB, 1));
    let output = attempt("nbdinfo", [uri(&server, "nothing")]);
    assert!(!output.status.success(), "{}", said(&output));
    run("nbdinfo", [uri(&server, "disk")]);
}

#[test]
fn the_map_has_the_holes_of_the_image_and_of_the_session() {
    let dir = scratch();
    let data = [64 * KIB..128 * KIB, MIB..MIB + 64 * KIB];
    let image = Image::sparse(dir.path().join("disk.img"), 4 * MIB, &data, 1);
    let server = Server::of(&image);

    let untouched = [
        (0, 64 * KIB, HOLE_AND_ZERO),
        (64 * KIB, 64 * KIB, DATA),
        (128 * KIB, 896 * KIB, HOLE_AND_ZERO),
        (MIB, 64 * KIB, DATA),
        (MIB + 64 * KIB, 3 * MIB - 64 * KIB, HOLE_AND_ZERO),
    ];
    assert_eq!(map(&uri(&server, "disk")), untouched);

    let session = uri(&server, "disk@one");
    libnbd_script("write_and_trim.py", &[&session]);
    let changed = [
        (0, 64 * KIB, HOLE_AND_ZERO),
        (64 * KIB, 32 * KIB, DATA),
        (96 * KIB, MIB - 96 * KIB, HOLE_AND_ZERO),
        (MIB, 64 * KIB, DATA),
        (MIB + 64 * KIB, 2 * MIB - 64 * KIB, HOLE_AND_ZERO),
        (3 * MIB, 16 * KIB, DATA),
        (3 * MIB + 16 * KIB, MIB - 16 * KIB, HOLE_AND_ZERO),
    ];
    assert_eq!(map(&session), changed);
    // Bit 0: the session wrote it; bit 1: and it reads as zeroes.
    let dirty = [
        (0, 96 * KIB, 0),
        (96 * KIB, 32 * KIB, 3),
        (128 * KIB, 3 * MIB - 128 * KIB, 0),
        (3 * MIB, 16 * KIB, 1),
        (3 * MIB + 16 * KIB, MIB - 16 * KIB, 0),
    ];
    assert_eq!(map_of("memdev:dirty", &session), dirty);
    assert_eq!(map_of("memdev:dirty", &uri(&server, "disk")), [(0, 4 * MIB, 0)]);
    assert_eq!(map(&uri(&server, "disk")), untouched, "the neighbour sees the image as it is");
}

#[test]
fn nbdcopy_takes_the_whole_image_out() {
    let dir = scratch();
    let size = 24 * MIB + 777;
    let data = [0..5 * MIB, 7 * MIB + 4096..7 * MIB + 8192, 20 * MIB..size];
    let image = Image::sparse(dir.path().join("disk.img"), size, &data, 3);
    let server = Serve::image(&image).tcp().start();
    let out = dir.path().join("out.img");
    let out_name = out.to_str().expect("the temporary directory's path is text");

    run("nbdcopy", [&uri(&server, "disk"), out_name]);
    assert_same(&out, &image.path);

    // A shared session, so that nbdcopy opens several connections.
    std::fs::remove_file(&out).expect("the copy is there");
    run("nbdcopy", ["--connections=4", "--requests=64", &uri(&server, "disk@one"), out_name]);
    assert_same(&out, &image.path);
}

#[test]
fn nbdcopy_fills_a_session_over_several_connections() {
    let dir = scratch();
    let size = 24 * MIB + 512;
    let image = Image::random(dir.path().join("disk.img"), size, 1);
    // Holes in the new content lie over data of the base: nbdcopy zeroes or trims them.
    let data = [4096..MIB, 3 * MIB..9 * MIB, 16 * MIB..size];
    let content = Image::sparse(dir.path().join("new.img"), size, &data, 2);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let session = uri(&server, "disk@one");
    let out = dir.path().join("out.img");
    let (content_name, out_name) = (content.path.to_str().expect("text"), out.to_str().expect("text"));

    // One request at a time on each connection: with more, nbdcopy 1.14 can trip over a reply that comes while it is
    // still sending ("external event 1 is invalid in state READY"), whatever the server.
    run("nbdcopy", ["--connections=4", "--requests=1", "--flush", content_name, &session]);
    run("nbdcopy", [&session, out_name]);
    assert_same(&out, &content.path);

    // From session to session, both ends NBD.
    run("nbdcopy", ["--connections=4", "--requests=1", "--flush", &session, &uri(&server, "disk@two")]);
    run("nbdcopy", [&uri(&server, "disk@two"), out_name]);
    assert_same(&out, &content.path);

    run("nbdcopy", [&uri(&server, "disk"), out_name]);
    assert_same(&out, &image.path);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn python_client_meets_every_command() {
    let dir = scratch();
    let size = 8 * MIB;
    let data = [0..MIB, 2 * MIB..8 * MIB];
    let image = Image::sparse(dir.path().join("disk.img"), size, &data, 5);
    let before = image.fingerprint();
    let server = Server::of(&image);
    libnbd_script("commands.py", &[&uri(&server, "disk"), image.path.to_str().expect("text")]);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn python_client_asks_for_both_contexts() {
    let dir = scratch();
    let image = Image::partly(dir.path().join("disk.img"), 8 * MIB, 0..2 * MIB, 5);
    let server = Server::of(&image);
    libnbd_script("contexts.py", &[&uri(&server, "disk")]);
    server.stop();
}

#[test]
fn python_clients_share_a_session() {
    let dir = scratch();
    let server = Server::of(&Image::random(dir.path().join("disk.img"), 8 * MIB, 6));
    libnbd_script("sessions.py", &[server.socket().to_str().expect("text"), "disk"]);
    server.stop();
}

#[test]
fn python_client_haggles() {
    let dir = scratch();
    let server = Server::of(&Image::random(dir.path().join("disk.img"), MIB, 7));
    libnbd_script("haggling.py", &[server.socket().to_str().expect("text"), "disk"]);
    server.stop();
}

#[test]
fn python_client_starts_its_own_server() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), MIB, 8);
    libnbd_script("started_by_client.py", &[MEMDEV, image.path.to_str().expect("text")]);
}

#[test]
fn nbdinfo_and_nbdcopy_start_their_own_server() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 24 * MIB + 512, 9);
    let path = image.path.to_str().expect("text");
    let info = nbdinfo(&["--", "[", MEMDEV, "serve", path, "]"]);
    assert_eq!(info["exports"][0]["export-size"], image.size);
    let out = dir.path().join("out.img");
    run("nbdcopy", ["--", "[", MEMDEV, "serve", path, "]", out.to_str().expect("text")]);
    assert_same(&out, &image.path);
}

/// A plain name is a private copy for each connection: several behind one copying would mix them up. nbdcopy looks at
/// CAN_MULTI_CONN before it makes more than one.
#[test]
fn nbdcopy_makes_several_connections_only_to_a_named_session() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 64 * MIB, 4);
    let other = Image::random(dir.path().join("other.img"), 64 * MIB, 5);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let door = Door::new(dir.path(), &server);
    let copy = dir.path().join("copy.img");
    let several = ["--connections=4", "--threads=4"];
    let copy = copy.to_str().expect("text");

    run("nbdcopy", several.into_iter().chain([door.uri("disk").as_str(), copy]));
    assert_eq!(door.connections(), 1, "to a private copy");
    assert_same(&image.path, copy.as_ref());

    // Out of a named session, and into it: four connections are one device. (One request at a time: nbdcopy 1.14 aborts
    // by itself when it copies in with more.)
    let session = door.uri("disk@one");
    run("nbdcopy", several.into_iter().chain([session.as_str(), copy]));
    assert_eq!(door.connections(), 4, "to a named session");
    assert_same(&image.path, copy.as_ref());
    let source = other.path.to_str().expect("text");
    run("nbdcopy", several.into_iter().chain(["--requests=1", source, session.as_str()]));
    assert_eq!(door.connections(), 4, "to a named session");
    run("nbdcopy", several.into_iter().chain([session.as_str(), copy]));
    assert_same(&other.path, copy.as_ref());
    assert_eq!(image.fingerprint(), before);
    server.stop();
}
