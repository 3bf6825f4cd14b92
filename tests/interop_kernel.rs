//! The Linux kernel's NBD driver as the client, in emulated machines with Debian's kernels 6.1 and 6.12 (`tools/vm`).
//!
//! They take minutes, so a plain `cargo test` leaves them out; `tools/test` runs them and lets none be missing. What is
//! checked is in the jobs, `tests/vm/*.sh`; here are the servers that they talk to, and what must be true of these.

mod interop_support;
mod support;

use std::fs;
use std::path::Path;

use interop_support::run;
use interop_support::vm::{Vm, failure, turn};
use support::server::{Serve, scratch};
use support::{Image, MIB, Server};

fn sum_of_first_mib(image: &Image) -> String {
    let command = format!("head -c 1M '{}' | sha256sum", image.path.display());
    run("sh", ["-c", &command])[..64].to_owned()
}

/// A script for a guest.
fn script(dir: &Path, text: &str) -> std::path::PathBuf {
    let path = dir.join("job.sh");
    fs::write(&path, text).expect("writing a job");
    path
}

fn tcp_server(image: &Image) -> Server {
    Serve::image(image).tcp().start()
}

/// Every way of nbd-client; see the job.
fn attaches(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::partly(dir.path().join("disk.img"), 16 * MIB, 0..8 * MIB, 1);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    Vm::job(kernel, "attach.sh")
        .memdev(dir.path())
        .add(&image.path, "/disk.img")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .env("SUM", sum_of_first_mib(&image))
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn nbd_client_attaches_in_every_way_linux_6_1() {
    attaches("6.1");
}

#[test]
fn nbd_client_attaches_in_every_way_linux_6_12() {
    attaches("6.12");
}

/// Four connections are refused on a private copy and one device on a named session; see the job.
fn connections(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 2);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    let port: u16 =
        server.tcp_address().rsplit(':').next().expect("an address has a port").parse().expect("a port");
    // Local address and port in hexadecimal; state 01 is an established connection.
    let established = format!("awk '$2 ~ /:{port:04X}$/ && $4 == \"01\"' /proc/net/tcp | wc -l");
    Vm::job(kernel, "connections.sh")
        .program("fio")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .call("connections", &established)
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn several_connections_need_a_named_session_linux_6_1() {
    connections("6.1");
}

#[test]
fn several_connections_need_a_named_session_linux_6_12() {
    connections("6.12");
}

/// A file system from its making to its finding again, and the server's memory meanwhile; see the job.
fn file_system(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("empty.img"), 256 * MIB);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    Vm::job(kernel, "filesystem.sh")
        .program("fio")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .call_memory(&server)
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn a_file_system_lives_in_a_named_session_linux_6_1() {
    file_system("6.1");
}

#[test]
fn a_file_system_lives_in_a_named_session_linux_6_12() {
    file_system("6.12");
}

/// Servers die under mounted file systems; see the job.
fn killed(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("disk.img"), 64 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let (first, second, third) = (tcp_server(&image), tcp_server(&image), tcp_server(&image));
    Vm::job(kernel, "killed.sh")
        .port("FIRST", &first)
        .port("SECOND", &second)
        .port("THIRD", &third)
        .env("SIZE", image.size)
        .call("kill_netlink", &format!("kill -KILL {}", first.pid()))
        .call("kill_ioctl", &format!("kill -KILL {}", second.pid()))
        .succeed();
    assert_eq!(image.fingerprint(), before);
    third.stop();
}

#[test]
fn a_killed_server_is_an_error_and_no_hang_linux_6_1() {
    killed("6.1");
}

#[test]
fn a_killed_server_is_an_error_and_no_hang_linux_6_12() {
    killed("6.12");
}

/// The harness's own promise: whatever happens to a guest, it is told as what it is.
#[test]
fn a_guest_that_does_not_end_as_it_should_is_told_apart() {
    let _turn = turn();
    let dir = scratch();
    let outcome_on = |kernel: &str, text: &str, options: &[(&str, &str)]| {
        let vm = Vm::script(kernel, &script(dir.path(), text)).program("chrt");
        let vm = options.iter().fold(vm, |vm, (name, value)| vm.option(name, value));
        let ended = vm.env("WORDS", "it's \"one\" $word").argument("a b").end();
        (ended.status.code(), ended.output)
    };

    let outcome = |text: &str, options: &[(&str, &str)]| outcome_on("6.12", text, options);

    // The job's own status, environment, arguments, and calls to this machine with their status.
    let (status, output) = outcome(
        "echo \"$# $1, $WORDS\"; on-host speak; on-host fail; echo \"status $?\"; on-host other; echo \"status $?\"; exit 7",
        &[("--call", "speak=echo spoken"), ("--call", "fail=exit 3")],
    );
    assert_eq!(status, Some(7), "{output}");
    for words in ["1 a b, it's \"one\" $word", "spoken", "status 3", "status 127"] {
        assert!(output.contains(words), "{words:?} is missing in {output}");
    }

    let (status, output) =
        outcome("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 99", &[]);
    assert_eq!(status, Some(failure::PANICKED), "{output}");

    let (status, output) = outcome("poweroff -f; sleep 99", &[]);
    assert_eq!(status, Some(failure::NO_STATUS), "{output}");

    // Nothing else gets the guest's only processor any more. (6.12 keeps a part of it for ordinary processes.)
    let hang = "echo -1 >/proc/sys/kernel/sched_rt_runtime_us; chrt -f 99 sh -c 'while :; do :; done'";
    let (status, output) = outcome_on("6.1", hang, &[("--hang-limit", "20")]);
    assert_eq!(status, Some(failure::HUNG), "{output}");

    let (status, output) = outcome("sleep 999", &[("--time-limit", "25")]);
    assert_eq!(status, Some(failure::TIME_LIMIT), "{output}");
}
