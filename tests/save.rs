//! `memdev save`: what a session holds, as a file that QEMU reads.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::server::Serve;
use support::{Client, Image, MIB, Server, Stream, wait_until};

fn memdev() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
    command.stdin(Stdio::null());
    command
}

fn save(server: &Server, session: &str, file: &Path, more: &[&str]) -> Output {
    let uri = format!("nbd+unix:///{session}?socket={}", server.socket().display());
    memdev().arg("save").arg(uri).arg(file).args(more).output().expect("memdev")
}

fn check(what: &str, command: &mut Command) {
    let out = command.output().expect("qemu-img, which tools/setup installs");
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{what}: {said}");
}

/// An image, a session on it that was written to in every way, and what that holds now, as a file.
fn written(dir: &Path) -> (Image, Server, Client) {
    let image = Image::sparse(dir.join("root.img"), 24 * MIB + 512, &[0..8 * MIB, 9 * MIB..20 * MIB], 3);
    let server = Serve::image(&image).start();
    let mut client = Client::attach(Stream::unix(server.socket()).unwrap(), "root@x").unwrap();
    client.write(5000, &[7; 100]);
    client.write(3 * MIB - 10, &[8; 1 << 20]);
    client.write(20 * MIB, &[9; 3 << 20]);
    client.write(24 * MIB + 100, &[5; 412]);
    client.zeroes(6 * MIB + 1, 3 * MIB);
    client.trim(12 * MIB, 5 * MIB);
    (image, server, client)
}

#[test]
fn every_kind_of_file_is_what_the_session_holds() {
    let dir = support::server::scratch();
    let (image, server, mut client) = written(dir.path());
    let before = image.fingerprint();
    let (expected, file) = (dir.path().join("expected"), dir.path().join("saved"));
    fs::write(&expected, client.read_all()).unwrap();
    let base = image.path.to_str().unwrap();
    for (format, more) in
        [("qcow2", vec!["--base", base]), ("qcow2", vec![]), ("raw", vec!["--format", "raw"])]
    {
        let out = save(&server, "root@x", &file, &more);
        assert!(out.status.success() && out.stderr.is_empty() && out.stdout.is_empty(), "{out:?}");
        if format == "qcow2" {
            check("check", Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&file));
        }
        let mut compare = Command::new("qemu-img");
        check("compare", compare.args(["compare", "-f", "raw", "-F", format]).args([&expected, &file]));
    }
    // Only what was written: 4 MiB and a few blocks.
    save(&server, "root@x", &file, &["--base", base]);
    assert!(fs::metadata(&file).unwrap().len() < 5 * MIB);
    assert_eq!(image.fingerprint(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left");
}

#[test]
fn what_cannot_be_saved_is_said_in_one_line() {
    let dir = support::server::scratch();
    let (image, server, _client) = written(dir.path());
    let other = Image::random(dir.path().join("other.img"), MIB, 1);
    let file = dir.path().join("saved");
    let base = image.path.to_str().unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let cases = [
        (file.clone(), vec!["--base", base, "--format", "raw"], "A raw image has no base"),
        (file.clone(), vec!["--base", other.path.to_str().unwrap()], "its base cannot have 1048576"),
        (image.path.clone(), vec!["--base", base], "This would replace the base"),
        (dir.path().join("no/such"), vec![], "Cannot write"),
        (dir.path().to_owned(), vec![], "Cannot write"),
    ];
    for (file, more, expected) in cases {
        let out = save(&server, "root@x", &file, &more);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains(expected), "{}: {said}", path(&file));
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    assert!(!file.exists());
}

#[test]
fn a_save_that_is_killed_leaves_nothing() {
    let dir = support::server::scratch();
    let image = Image::random(dir.path().join("root.img"), 64 * MIB, 3);
    // Slow enough not to be over before it is killed, whenever that can be done.
    let server = Serve::image(&image).args(["--session-bandwidth", "4M"]).start();
    let uri = format!("nbd+unix:///root@x?socket={}", server.socket().display());
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let mut command = memdev();
    let mut saving = command.arg("save").arg(uri).arg(folder.join("saved")).spawn().unwrap();
    // Something of the file is on its way: the process has it open, without a name.
    let files = format!("/proc/{}/fd", saving.id());
    wait_until("it has begun", || {
        let open = fs::read_dir(&files).into_iter().flatten().flatten();
        let mut targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
        targets.any(|target| target.starts_with(&folder)) || saving.try_wait().unwrap().is_some()
    });
    saving.kill().unwrap();
    assert!(!saving.wait().unwrap().success(), "it was over before it could be killed");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}
