//! Kernels that cannot do all of it, played by a filter of system calls around the server.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::support::server::scratch;
use super::support::{Image, KIB};

/// Calls, by the names that [`run`] has for them.
fn calls(name: &str) -> Vec<libc::c_long> {
    match name {
        "landlock" => vec![libc::SYS_landlock_create_ruleset],
        "seccomp" => vec![libc::SYS_seccomp],
        "capset" => vec![libc::SYS_capset],
        _ => vec![libc::SYS_landlock_create_ruleset, libc::SYS_seccomp],
    }
}

/// Becomes a server on a kernel without what `MEMDEV_TEST_WITHOUT` names.
#[test]
#[ignore = "run by the tests here, in a process of its own"]
fn old_kernel() {
    let without = std::env::var("MEMDEV_TEST_WITHOUT").expect("told what to do without");
    let arguments = std::env::var("MEMDEV_TEST_ARGUMENTS").expect("told what to serve");
    let filter = SeccompFilter::new(
        calls(&without).into_iter().map(|call| (call, Vec::new())).collect::<BTreeMap<_, _>>(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
    let error = Command::new(env!("CARGO_BIN_EXE_memdev")).args(arguments.split('\n')).exec();
    panic!("cannot become memdev: {error}");
}

/// What a server says on such a kernel; it is ended after it listens, if it does.
fn run(without: &str, confine: &str) -> Output {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 64 * KIB, 1);
    let socket = dir.path().join("socket");
    let arguments =
        ["serve", image.path.to_str().unwrap(), "--unix", socket.to_str().unwrap(), "--confine", confine];
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["kernels::old_kernel", "--exact", "--ignored", "--nocapture"])
        .env("MEMDEV_TEST_WITHOUT", without)
        .env("MEMDEV_TEST_ARGUMENTS", arguments.join("\n"))
        .env_remove("MEMDEV_LOG")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    super::wait_until("the server listens or has ended", || {
        server.try_wait().unwrap().is_some() || serves(&socket)
    });
    // Once it has ended its number may be somebody else's.
    if server.try_wait().unwrap().is_none() {
        let pid = rustix::process::Pid::from_child(&server);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
    let output = server.wait_with_output().unwrap();
    assert!(!socket.exists(), "the socket is removed");
    output
}

fn serves(socket: &std::path::Path) -> bool {
    let greeted =
        super::support::Stream::unix(socket).and_then(|stream| super::support::Peer::new(stream).try_u64());
    greeted.is_ok()
}

fn said(output: &Output) -> Vec<String> {
    String::from_utf8(output.stderr.clone()).unwrap().lines().map(ToOwned::to_owned).collect()
}

const MISSING: [(&str, &[&str]); 3] = [
    ("landlock", &["this kernel has no landlock (Linux 5.13 can have), so files and ports are not denied"]),
    ("seccomp", &["system calls are not denied (function not implemented)"]),
    ("both", &["this kernel has no landlock", "; system calls are not denied"]),
];

#[test]
fn what_a_kernel_cannot_do_is_said_in_one_line_and_the_server_serves() {
    for (without, why) in MISSING {
        let output = run(without, "auto");
        let said = said(&output);
        assert!(output.status.success(), "{said:?}");
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("Not fully confined: "), "{said:?}");
        assert!(why.iter().all(|why| said[0].contains(why)), "{said:?}");
        assert!(said[1].starts_with("listening on "), "{said:?}");
    }
}

#[test]
fn what_is_required_and_cannot_be_had_is_a_refusal() {
    for (without, why) in MISSING {
        let output = run(without, "require");
        let said = said(&output);
        assert_eq!((output.status.code(), said.len()), (Some(1), 1), "{said:?}");
        assert!(said[0].starts_with("memdev: Cannot confine the server: "), "{said:?}");
        assert!(said[0].contains(why[0]) && said[0].contains("; use --confine auto"), "{said:?}");
    }
}

/// As the unit in `docs/systemd` does, so that nobody can set capabilities, and nobody has any.
#[test]
fn capabilities_that_cannot_be_dropped_are_missed_by_who_has_them() {
    let output = run("capset", "auto");
    let said = said(&output);
    assert!(output.status.success(), "{said:?}");
    let missing = said.iter().any(|line| line.contains("capabilities are not denied (function not"));
    assert_eq!(missing, rustix::process::geteuid().is_root(), "{said:?}");
}

#[test]
fn what_is_not_wanted_is_not_missed() {
    let output = run("both", "off");
    assert!(output.status.success() && said(&output).len() == 1, "{:?}", said(&output));
}
