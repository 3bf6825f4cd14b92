//! fio's nbd engine (libnbd) as a client that checks every block it wrote, with deep queues.

mod interop_support;
mod support;

use interop_support::{command, succeed, uri};
use serde_json::Value;
use support::server::scratch;
use support::{Image, MIB, Server};

/// Runs one fio job on the URI; everything it wrote was read back and verified. Returns what the job did.
#[track_caller]
fn fio(directory: &std::path::Path, uri: &str, options: &[&str]) -> Value {
    let common =
        ["--name=job", "--ioengine=nbd", "--output-format=json", "--verify_state_save=0", "--verify_fatal=1"];
    let target = format!("--uri={uri}");
    let mut command = command("fio", common.iter().chain(options).chain([&target.as_str()]));
    // fio leaves its working files where it stands.
    command.current_dir(directory);
    let text = succeed("fio", command);
    // Warnings may stand before the JSON.
    let start = text.find('{').unwrap_or_else(|| panic!("fio printed no JSON:\n{text}"));
    let report: Value = serde_json::from_str(&text[start..]).expect("fio prints JSON");
    let job = report["jobs"][0].clone();
    assert_eq!(job["error"], 0, "{job}");
    job
}

#[track_caller]
fn moved(job: &Value, direction: &str) -> u64 {
    job[direction]["io_bytes"].as_u64().expect("fio counts bytes")
}

#[test]
fn random_writes_verify_in_a_private_copy() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 32 * MIB, 1);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let options = [
        "--rw=randwrite",
        "--bs=4k",
        "--size=32m",
        "--iodepth=64",
        "--verify=crc32c",
        "--verify_backlog=512",
    ];
    let job = fio(dir.path(), &uri(&server, "disk"), &options);
    assert_eq!(moved(&job, "write"), 32 * MIB);
    assert_eq!(moved(&job, "read"), 32 * MIB, "everything was read back");
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn odd_sizes_verify_in_a_private_copy() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 2);
    let server = Server::of(&image);
    // 512-byte granularity: most requests are partial blocks, next to each other and in flight at once.
    let options = [
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--blockalign=512",
        "--bs_unaligned=1",
        "--size=16m",
        "--iodepth=32",
        "--verify=crc32c",
        "--fsync=100",
    ];
    let job = fio(dir.path(), &uri(&server, "disk"), &options);
    assert!(moved(&job, "write") > 8 * MIB, "{job}");
    server.stop();
}

#[test]
fn a_second_client_verifies_what_the_first_wrote() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 32 * MIB, 3);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let session = uri(&server, "disk@one");
    let shape =
        ["--rw=randwrite", "--bs=16k", "--size=32m", "--iodepth=32", "--verify=crc32c", "--randseed=7"];
    fio(dir.path(), &session, &[&shape[..], &["--do_verify=0", "--end_fsync=1"]].concat());
    // The same job again, its writes left out: only what the first one left is checked.
    let job = fio(dir.path(), &session, &[&shape[..], &["--verify_only=1"]].concat());
    assert_eq!(moved(&job, "read"), 32 * MIB);
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn trims_among_writes_verify() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 4);
    let server = Server::of(&image);
    // fio trims a block and writes it; with both in flight at once their order would be nobody's promise.
    let options = ["--rw=randtrimwrite", "--bs=4k", "--size=16m", "--iodepth=1", "--verify=crc32c"];
    fio(dir.path(), &uri(&server, "disk"), &options);
    server.stop();
}

#[test]
fn jobs_on_two_sessions_verify_at_the_same_time() {
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 5);
    let before = image.fingerprint();
    let server = Server::of(&image);
    let options = ["--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=32", "--verify=crc32c", "--loops=2"];
    std::thread::scope(|scope| {
        for (session, seed) in [("disk@one", "--randseed=1"), ("disk@two", "--randseed=2")] {
            let uri = uri(&server, session);
            let directory = dir.path().join(session);
            std::fs::create_dir(&directory).expect("creating a directory");
            scope.spawn(move || fio(&directory, &uri, &[&options[..], &[seed]].concat()));
        }
    });
    assert_eq!(image.fingerprint(), before);
    server.stop();
}
