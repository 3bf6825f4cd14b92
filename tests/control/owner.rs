//! Who may use the control socket, and what is left of it.

use super::support::server::{Serve, scratch};
use super::support::{Image, MIB, as_user, wait_until};
use super::{House, read_answer};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let mut house = House::with(&["--unix-mode", "0666"]);
    let (socket, file) = (house.socket(), fs::metadata(house.socket()).unwrap());
    assert_eq!((file.uid(), file.mode() & 0o777), (rustix::process::geteuid().as_raw(), 0o600));
    house.server.wait_for_line(&format!("control socket at {}", socket.display()), 1);
    house.server.stop();
    assert!(!socket.exists());
}

/// Even where the file lets others in, the server does not.
#[test]
fn another_user_is_refused() {
    let mut house = House::new();
    fs::set_permissions(house.server.dir(), Permissions::from_mode(0o755)).unwrap();
    let connect = || UnixStream::connect(house.socket());
    let Some(refused) = as_user(54_321, || connect().unwrap_err()) else {
        // Nobody but root can be another user. That the owner is let in, others' tests show.
        assert!(connect().is_ok() && !rustix::process::geteuid().is_root());
        return;
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    fs::set_permissions(house.socket(), Permissions::from_mode(0o666)).unwrap();
    let mut stream = as_user(54_321, || connect().unwrap()).expect("as before");
    let answer = read_answer(&mut stream, false).expect("it is told why");
    assert_eq!((answer.status, answer.kind().as_str()), (403, "denied"));
    assert!(read_answer(&mut stream, false).is_none(), "and hung up on");
    house.server.wait_for_line("peer=uid 54321", 1);
    assert_eq!(house.get("/v1/server")["connections"]["now"], 0);
}

#[test]
fn a_server_that_became_another_user_listens_to_that_one_and_to_root() {
    if !rustix::process::geteuid().is_root() {
        return another_user_is_refused();
    }
    let (dir, sockets) = (scratch(), scratch());
    for dir in [&dir, &sockets] {
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    }
    std::os::unix::fs::chown(sockets.path(), Some(54_321), Some(54_321)).unwrap();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    fs::set_permissions(&image.path, Permissions::from_mode(0o644)).unwrap();
    let control = sockets.path().join("control.sock");
    let server = Serve::image(&image)
        .args(["--user".as_ref(), "54321:54321".as_ref(), "--control".as_ref(), control.as_os_str()])
        .dir(sockets)
        .start();
    assert_eq!(fs::metadata(&control).unwrap().uid(), 54_321);
    let mut own = as_user(54_321, || UnixStream::connect(&control).unwrap()).expect("root can be anybody");
    let mut root = UnixStream::connect(&control).unwrap();
    for stream in [&mut own, &mut root] {
        assert_eq!(super::ask_on(stream, "GET", "/v1/server", "").status, 200);
    }
    server.stop();
    assert!(!control.exists());
}

/// The control thread gives up what all threads of the server do.
#[test]
fn its_thread_is_confined_as_the_others() {
    let house = House::new();
    let control = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", house.server.pid())).unwrap();
        // One that ends meanwhile is none.
        let status = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
        status.filter(|status| status.starts_with("Name:\tcontrol\n")).collect::<Vec<_>>()
    };
    // It gives itself its name.
    wait_until("it is there", || !control().is_empty());
    let status = control();
    let [status] = &status[..] else { panic!("one such thread: {status:?}") };
    assert!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{status}");
}

#[test]
fn a_socket_that_cannot_be_made_is_one_line() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_memdev"));
    command.arg("serve").arg(&image.path).arg("--unix").arg(dir.path().join("nbd.sock"));
    let said = super::failure(command.arg("--control").arg(dir.path().join("none/control.sock")), 1);
    assert!(said.contains("none/control.sock") && said.contains("no such file or directory"), "{said}");
    assert!(!dir.path().join("nbd.sock").exists());
}
