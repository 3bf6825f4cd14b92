//! `--user`: whose the server is, what of it that user must be able to do, and what root keeps without it.
//!
//! Only root can become somebody else; for whoever else runs the tests, that is what there is to see.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use super::support::server::{Serve, scratch};
use super::support::{Image, KIB, Stream, as_user};
use super::{assert_serves, capabilities, replace, threads};

/// A user and a group that need not exist.
const UID: u32 = 54_321;
const GID: u32 = 54_322;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory that others can search.
fn open_scratch() -> tempfile::TempDir {
    let dir = scratch();
    set_mode(dir.path(), 0o755);
    dir
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// What a server says that does not start.
fn refusal(image: &Image, socket: &Path, user: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
    command.arg("serve").arg(&image.path).arg("--unix").arg(socket).args(["--user", user]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!socket.exists(), "no socket is left");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
fn a_user_that_does_not_exist_is_refused() {
    let dir = open_scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    let said = refusal(&image, &dir.path().join("socket"), "nobody-has-this-name");
    assert!(said.contains("There is no user 'nobody-has-this-name'; give a user of this machine"), "{said}");
}

#[test]
fn only_root_becomes_another_user() {
    if is_root() {
        return every_thread_is_that_user_in_its_groups_and_no_others();
    }
    let dir = open_scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    let said = refusal(&image, &dir.path().join("socket"), &format!("{UID}:{GID}"));
    assert!(said.contains("Cannot become user 54321: operation not permitted; start as root"), "{said}");
}

fn every_thread_is_that_user_in_its_groups_and_no_others() {
    let (dir, sockets) = (open_scratch(), open_scratch());
    chown(sockets.path(), Some(UID), Some(GID)).unwrap();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    set_mode(&image.path, 0o644);
    for confine in ["--confine=require", "--confine=auto", "--confine=off"] {
        let server = Serve::image(&image)
            .args(["--user", &format!("{UID}:{GID}"), "--tcp", "127.0.0.1:0"])
            .args(["--unix".as_ref(), sockets.path().join("socket").as_os_str()])
            .dir(open_scratch_of(UID))
            .confine([confine])
            .start();
        for thread in threads(&server) {
            let name = &thread["Name"];
            assert_eq!(thread["Uid"], [UID; 4].map(|id| id.to_string()).join("\t"), "{name}");
            assert_eq!(thread["Gid"], [GID; 4].map(|id| id.to_string()).join("\t"), "{name}");
            assert_eq!(thread["Groups"], GID.to_string(), "{name}");
            assert_eq!(capabilities(&thread)[1..3], [("CapPrm", ""), ("CapEff", "")], "{name}");
        }
        // The socket is that user's, so that it and nobody else (but root) can connect.
        let socket = fs::metadata(server.socket()).unwrap();
        assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o7777), (UID, GID, 0o600));
        as_user(UID, || Stream::unix(server.socket()).unwrap()).expect("root can be anybody");
        as_user(UID + 1, || Stream::unix(server.socket()).map(drop).unwrap_err()).expect("root");

        assert_serves(&server, &image);
        set_mode(&image.path, 0o644);
        assert_serves(&server, &image);
        server.stop();
        assert!(!sockets.path().join("socket").exists());
    }
}

/// A directory of that user's own.
fn open_scratch_of(user: u32) -> tempfile::TempDir {
    let dir = open_scratch();
    chown(dir.path(), Some(user), Some(user)).unwrap();
    dir
}

#[test]
fn a_user_of_the_machine_has_the_groups_that_it_has_there() {
    if !is_root() {
        return a_user_that_does_not_exist_is_refused();
    }
    let groups = |user: &str| {
        let said = Command::new("id").args(["-G", user]).output().unwrap().stdout;
        let mut groups: Vec<u32> =
            String::from_utf8(said).unwrap().split_whitespace().map(|group| group.parse().unwrap()).collect();
        groups.sort_unstable();
        groups
    };
    let dir = open_scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    set_mode(&image.path, 0o644);
    // One of Debian's own, and one whose primary group is changed.
    for (argument, user, gid) in [("daemon", "daemon", "1"), ("games:users", "games", "100")] {
        let uid: u32 = String::from_utf8(Command::new("id").args(["-u", user]).output().unwrap().stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let server = Serve::image(&image).args(["--user", argument]).dir(open_scratch_of(uid)).start();
        for thread in threads(&server) {
            assert_eq!(thread["Uid"].split('\t').next(), Some(uid.to_string().as_str()));
            assert_eq!(thread["Gid"].split('\t').next(), Some(gid));
            let mut has: Vec<u32> =
                thread["Groups"].split_whitespace().map(|group| group.parse().unwrap()).collect();
            has.sort_unstable();
            let expected = if argument == user { groups(user) } else { vec![gid.parse().unwrap()] };
            for group in expected {
                assert!(has.contains(&group), "{group} in {has:?}");
            }
        }
        assert_serves(&server, &image);
    }
}

#[test]
fn an_image_that_the_user_may_not_read_is_refused() {
    if !is_root() {
        return only_root_becomes_another_user();
    }
    let (dir, sockets) = (open_scratch(), open_scratch_of(UID));
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    let socket = sockets.path().join("socket");
    let user = format!("{UID}:{GID}");
    set_mode(&image.path, 0o600);
    let said = refusal(&image, &socket, &user);
    let path = image.path.display();
    assert!(said.contains(&format!(
        "User {UID} may not read image {path}: permission denied; let that user read it"
    )));
    set_mode(&image.path, 0o644);
    set_mode(dir.path(), 0o700);
    assert!(refusal(&image, &socket, &user).contains("may not read image"));
}

#[test]
fn a_socket_that_the_user_could_not_remove_is_refused() {
    if !is_root() {
        return only_root_becomes_another_user();
    }
    let dir = open_scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    set_mode(&image.path, 0o644);
    let said = refusal(&image, &dir.path().join("socket"), &format!("{UID}:{GID}"));
    assert!(said.contains("permission denied; choose a directory you may write to"), "{said}");
    assert!(said.contains(&format!("(as user {UID})")), "{said}");
}

#[test]
fn root_serves_what_is_another_users_alone_and_keeps_no_more_than_that_takes() {
    if !is_root() {
        return only_root_becomes_another_user();
    }
    let dir = open_scratch_of(UID);
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    chown(&image.path, Some(UID), Some(GID)).unwrap();
    set_mode(&image.path, 0o600);
    let server = Serve::image(&image).args(["-v"]).start();
    let read_search = format!("{:x}", 1 << 2);
    for thread in threads(&server) {
        assert_eq!(
            capabilities(&thread)[1..4],
            [("CapPrm", read_search.as_str()), ("CapEff", &read_search), ("CapBnd", "")]
        );
    }
    assert!(server.log().iter().any(|line| line.contains("no capabilities but CAP_DAC_READ_SEARCH")));
    let next = replace(&image.path, 2);
    chown(&image.path, Some(UID), Some(GID)).unwrap();
    set_mode(&image.path, 0o600);
    assert_serves(&server, &next);

    // A socket in a directory that only its owner may write to is removed, too.
    let sockets = open_scratch_of(UID);
    let socket = sockets.path().join("socket");
    let server = Serve::image(&image).args(["--unix".as_ref(), socket.as_os_str()]).start();
    server.stop();
    assert!(!socket.exists());
}
