//! Named sessions of a running server as private roots: what is changed is there the next time.

use std::fs;

use rustix::process::Signal;

use super::machine::{Place, image, kill};
use crate::interop_support::{run, said, uri};
use crate::support::Image;
use crate::support::server::Serve;

/// A copy of Debian's image, as the tests' server takes it.
fn debian(place: &Place) -> Image {
    let size = fs::metadata(image()).expect("the image is there").len();
    let copy = Image::empty(place.path("debian.img"), size);
    run("cp", ["--sparse=always".as_ref(), image().as_os_str(), copy.path.as_os_str()]);
    copy
}

#[test]
fn a_named_session_is_gone_on_with() {
    let place = Place::new();
    let server = Serve::image(&debian(&place)).start();
    let session = uri(&server, "debian@kept");
    let attempt = |uri: &str, script: &str| {
        let mut command =
            place.memdev("run", &["--backend", "fuse", "--session", uri, "--", "sh", "-c", script]);
        let output = command.output().expect("memdev can be run");
        place.assert_empty();
        assert!(output.status.success(), "{script}: {}", said(&output));
        said(&output)
    };
    attempt(
        &session,
        "echo first >/root/first; dd if=/dev/urandom of=/root/big bs=1M count=20 2>/dev/null; md5sum /root/big >/root/sum",
    );
    assert_eq!(attempt(&session, "cat /root/first; md5sum --quiet -c /root/sum"), "first\n");
    let other = uri(&server, "debian@other");
    assert_eq!(attempt(&other, "ls -A /root | grep -c first || :"), "0\n");
    // The file system was left in order.
    let copy = place.path("copy.img");
    run("nbdcopy", [session.as_ref(), copy.as_os_str()]);
    run("e2fsck", ["-fn".as_ref(), copy.as_os_str()]);
    server.stop();
}

/// Two kernels, or one twice, that write to one disk break its file system.
#[test]
fn a_session_that_somebody_else_writes_to_is_warned_of() {
    let place = Place::new();
    let server = Serve::image(&debian(&place)).start();
    let session = uri(&server, "debian@m");
    let attachments = place.state().join("attach");
    let attach = |subcommand: &str, args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg(subcommand).arg("--state").arg(&attachments).args(args);
        let output = command.output().expect("memdev can be run");
        assert!(output.status.success(), "{}", said(&output));
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let warning = |who: &str| {
        format!(
            "memdev: {session} has {who} already, and a file system that more than one of them writes to breaks"
        )
    };
    let run = ["--backend", "fuse", "--name", "kiosk", "--session", &session, "--", "sh", "-c"];

    let (device, _) = attach("attach", &["--backend", "fuse", &session]);
    // That is not for -q to keep quiet.
    let output = place.memdev("run", &[&["-q"], &run[..], &["true"]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let text = said(&output);
    assert!(text.starts_with(&warning(device.trim_end())) && text.lines().count() == 1, "{text}");
    attach("detach", &[device.trim_end()]);

    let running = place.begin(place.memdev("run", &[&run[..], &["echo ready; sleep 1000"]].concat()));
    let (device, text) = attach("attach", &["--backend", "fuse", &session]);
    assert!(text.starts_with(&warning("the private root kiosk")) && text.lines().count() == 1, "{text}");
    assert!(attach("attach", &["--list"]).0.contains(", for the private root kiosk; "));
    attach("detach", &[device.trim_end()]);
    kill(&running.launcher(), Signal::TERM);
    running.finish();
    place.assert_empty();
    server.stop();
}

#[test]
fn a_server_that_ends_ends_the_private_root() {
    let place = Place::new();
    let server = Serve::image(&debian(&place)).start();
    let session = uri(&server, "debian@x");
    // The first sleep brings the program in: without the device it could not be loaded any more.
    let script = "sleep 0; echo ready; exec sleep 1000";
    let options = ["--backend", "fuse", "--session", &session, "--", "sh", "-c", script];
    let mut command = place.memdev("run", &options);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    server.stop();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("has died, and the session with it"), "{}", said(&output));
    place.assert_empty();
}
