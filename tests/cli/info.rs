//! `memdev info`.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;

use super::serve::Server;
use super::{MEMDEV, failure, memdev, with_image};

#[test]
fn info_shows_size_data_holes_and_contents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.img");
    let mut file = File::create(&path).unwrap();
    // The magic and the name of an ext file system, in its superblock, whose block is all the data there is.
    file.seek(SeekFrom::Start(1024)).unwrap();
    let mut superblock = [0; 3072];
    superblock[56..58].copy_from_slice(b"\x53\xef");
    superblock[96] = 0x42;
    superblock[120..124].copy_from_slice(b"root");
    file.write_all(&superblock).unwrap();
    file.set_len(3 << 20).unwrap();

    let text = String::from_utf8(memdev().arg("info").arg(&path).output().unwrap().stdout).unwrap();
    for line in [
        "    format: raw",
        "    size: 3145728 (3 MiB)",
        "    data: 4096 (4 KiB) in 1 run",
        "    holes: 3141632 (2.9 MiB)",
        "    holds: ext4 file system, label 'root'",
        "    block sizes: minimum 1, preferred 4096, maximum 33554432",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in:\n{text}");
    }

    let json = memdev().args(["info", "--json"]).arg(&path).output().unwrap().stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["size"], 3 << 20);
    assert_eq!(json["data"], 4096);
    assert_eq!(json["holes"], (3 << 20) - 4096);
    assert_eq!(json["format"], "raw");
    assert_eq!(json["contents"][0]["type"], "ext4");
    assert_eq!(json["contents"][0]["label"], "root");
    assert_eq!(json["block-sizes"]["preferred"], 4096);
}

#[test]
fn info_warns_of_images_that_are_not_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    fs::write(&path, [b"QFI\xfb".as_slice(), &[0; 1020]].concat()).unwrap();
    let text = String::from_utf8(memdev().arg("info").arg(&path).output().unwrap().stdout).unwrap();
    assert!(text.contains("note: this looks like a qcow2 image; it would be served as raw bytes"), "{text}");
    assert!(text.contains("qemu-img convert -O raw"), "{text}");
    let json = memdev().args(["info", "--json"]).arg(&path).output().unwrap().stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let advice = json["contents"][0]["advice"].as_str().unwrap();
    assert!(advice.starts_with("it would be served as raw bytes; convert it first: qemu-img"), "{advice}");
}

#[test]
fn info_of_a_server_that_is_not_there_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("no-server");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let line = failure(memdev().args(["info", &uri]), 1);
    assert_eq!(
        line,
        format!("Cannot connect to {uri}: no such file or directory; check that a server is running there")
    );
    for (uri, why) in [
        ("nbd://", "No host"),
        ("nbd+unix:///x", "No 'socket='"),
        ("nbd+tcp://localhost", "Unknown scheme"),
        ("nbds://localhost?tls-certificates=/nowhere", "Cannot read TLS file /nowhere/ca-cert.pem"),
        ("nbd://localhost:99999", "over 65535"),
    ] {
        let line = failure(memdev().args(["info", uri]), 1);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn what_is_no_file_may_have_been_meant_as_something_else() {
    for subcommand in ["info", "map"] {
        let line = failure(memdev().args([subcommand, "http://x"]), 1);
        assert!(line.starts_with("Unknown scheme in URI 'http://x'; there are nbd, nbd+unix"), "{line}");
        let line = failure(memdev().args([subcommand, "root@x"]), 1);
        assert!(line.contains("root@x: no such file or directory; name a session by its URI"), "{line}");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("root@x"), [1; 4096]).unwrap();
    memdev().args(["info", "root@x"]).current_dir(dir.path()).assert().success();
}

#[test]
fn info_of_what_is_no_nbd_server_is_one_line() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = stream.read(&mut [0; 16]);
    });
    let line = failure(memdev().args(["info", &uri]), 1);
    assert!(line.contains("no NBD server") && line.contains(&uri), "{line}");
    thread.join().unwrap();
}

#[test]
fn info_shows_the_exports_of_a_running_server() {
    let (dir, image) = with_image();
    let other = dir.path().join("second.img");
    fs::write(&other, [2; 1000]).unwrap();
    let mut command = std::process::Command::new(MEMDEV);
    command.arg("serve").arg(&image).arg(&other).arg("--unix").arg(dir.path().join("s"));
    let server = Server::start(command, 1);
    let uri = &server.uris[0];

    let text = String::from_utf8(memdev().args(["info", uri]).output().unwrap().stdout).unwrap();
    for line in [
        "    protocol: newstyle-fixed without TLS, structured replies",
        "export: 'root'",
        "    size: 8192 (8 KiB)",
        "export: 'second'",
        "    size: 1000 (1000 bytes)",
        "    block sizes: minimum 1, preferred 4096, maximum 33554432",
        "    contexts: base:allocation memdev:dirty",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in:\n{text}");
    }

    let one = uri.replace("///", "///second@some-session");
    let json = memdev().args(["info", "--json", &one]).output().unwrap().stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["exports"].as_array().unwrap().len(), 1);
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], 1000);
    assert_eq!(export["can_multi_conn"], true);
    assert_eq!(export["is_read_only"], false);
    for key in ["can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_cache"] {
        assert_eq!(export[key], true, "{key}");
    }

    let line = failure(memdev().args(["info", &uri.replace("///", "///nothing")]), 1);
    assert!(line.starts_with("The server refuses to describe the export: there is no such export"), "{line}");
    assert!(line.ends_with("list what there is with 'memdev info'"), "{line}");
}
