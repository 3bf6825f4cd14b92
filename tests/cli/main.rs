//! The command line, as scripts and people meet it: exit statuses, one-line failures, what is left behind.
//!
//! Here is what all subcommands have in common.

mod info;
mod map;
mod serve;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");

/// A command that nothing in the environment of whoever runs the tests has a say in.
fn memdev() -> Command {
    let mut command = Command::new(MEMDEV);
    command.env_remove("MEMDEV_LOG").timeout(Duration::from_secs(60));
    command
}

/// Runs it to its failure; the one line on stderr, without `memdev: `.
fn failure(command: &mut Command, status: i32) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert_eq!(output.stdout, b"", "nothing on stdout");
    let line = stderr.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains(char::is_control), "one line: {stderr:?}");
    line.strip_prefix("memdev: ").expect(line).to_owned()
}

/// A directory with one small image in it, `root.img`.
fn with_image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.img");
    fs::write(&image, [1; 8192]).unwrap();
    (dir, image)
}

#[test]
fn help_and_version_go_to_stdout() {
    for args in [
        &["--help"][..],
        &["-h"],
        &["serve", "--help"],
        &["serve", "-h"],
        &["info", "--help"],
        &["map", "--help"],
    ] {
        let output = memdev().args(args).output().unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("Usage: memdev"));
        assert!(output.stderr.is_empty());
    }
    for (asked, as_option) in [(&["help"][..], &["--help"][..]), (&["help", "serve"], &["serve", "--help"])] {
        let [asked, as_option] = [asked, as_option].map(|args| memdev().args(args).output().unwrap());
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        assert_eq!(asked.stdout, as_option.stdout);
    }
    assert!(failure(memdev().args(["help", "srve"]), 2).starts_with("Unrecognized subcommand 'srve'"));
    let version = memdev().arg("--version").output().unwrap();
    assert_eq!(version.stdout, format!("memdev {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
}

#[test]
fn help_of_serve_has_its_options_defaults_and_examples_but_not_the_knobs() {
    let help = String::from_utf8(memdev().args(["serve", "--help"]).output().unwrap().stdout).unwrap();
    for text in [
        "--unix <PATH>",
        "--unix-mode <OCTAL>",
        "--tcp <HOST:PORT>",
        "--vsock <[CID:]PORT>",
        "--insecure",
        "--fd <N>",
        "--control <PATH>",
        "--memory <SIZE>",
        "--session-memory <SIZE>",
        "--block-size <SIZE>",
        "[default: 4K]",
        "--linger <DURATION>",
        "[default: 30s]",
        "--workers <N>",
        "--max-connections <N>",
        "--reply-timeout <DURATION>",
        "--confine <auto|require|off>",
        "--user <USER[:GROUP]>",
        "127.0.0.1:10809",
        "NAME=PATH",
        "Examples:",
    ] {
        assert!(help.contains(text), "{text} in:\n{help}");
    }
    for knob in ["--mask-handshake", "--no-structured-replies", "--no-extended-headers"] {
        assert!(!help.contains(knob), "{knob} in:\n{help}");
    }
}

#[test]
fn no_arguments_is_a_usage_error_that_shows_help() {
    let output = memdev().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Usage: memdev"));
}

#[test]
fn a_wrong_command_line_is_one_line_and_status_2() {
    let long = "s".repeat(108);
    for (args, expected) in [
        (&["srve"][..], "Unrecognized subcommand 'srve'"),
        (
            &["serve", "x.img", "--memry", "1G"],
            "a similar argument exists: '--memory'; see 'memdev serve --help'",
        ),
        (&["serve"], "required arguments were not provided: <[NAME=]IMAGE>"),
        (&["info"], "required arguments were not provided: <IMAGE|URI>"),
        (&["info", "a", "b"], "Unexpected argument 'b' found"),
        (&["serve", "x.img", "--memory", "lots"], "'--memory <SIZE>': not a size; write one as 512M"),
        (&["serve", "x.img", "--memory", "16E"], "too large"),
        (&["serve", "x.img", "--memory", "12MB"], "write M or MiB"),
        (
            &["serve", "x.img", "--memory", "-1"],
            "Unexpected argument '-1' found; if it is a size, number or duration: none can be negative; see 'memdev serve",
        ),
        (&["serve", "x.img", "--memory=-1"], "a size cannot be negative"),
        (
            &["serve", "x.img", "--memory", "0"],
            "--memory 0 is too little: one session with one block takes 5.3 KiB",
        ),
        (&["serve", "x.img", "--memory", "1M", "--block-size", "1M"], "--memory 1048576 is too little"),
        (&["serve", "x.img", "--session-memory", "1.5"], "a byte has no fractions"),
        (&["serve", "x.img", "--block-size", "5000"], "power of two from 4K to 1M"),
        (&["serve", "x.img", "--block-size", "512"], "power of two from 4K to 1M"),
        (&["serve", "x.img", "--linger", "soon"], "not a duration; write one as 30s"),
        (&["serve", "x.img", "--workers", "0"], "not in 1..=1024"),
        (&["serve", "x.img", "--workers", "many"], "'--workers <N>'"),
        (&["serve", "x.img", "--tcp", "::1"], "put an IPv6 address in brackets"),
        (&["serve", "x.img", "--tcp", "10809"], "No host in address '10809'"),
        (&["serve", "x.img", "--tcp", "localhost:http"], "No port number"),
        (&["serve", "x.img", "--confine", "none"], "possible values: auto, require, off"),
        (&["serve", "x.img", "--unix", ""], "A value is required for '--unix <PATH>'"),
        (
            &["serve", "x.img", "--unix", "/s", "--unix", "/s"],
            "--unix /s is given twice; leave one of the two away",
        ),
        (&["serve", "x.img", "--tcp", "127.0.0.1:9", "--tcp", "127.0.0.1:9"], "127.0.0.1:9 is given twice"),
        (
            &["serve", "x.img", "--unix", "/s", "--control", "/s"],
            "/s is given with --unix and with --control; choose two paths",
        ),
        (&["serve", "x.img", "--unix", &long], "has 108 bytes and may have 107; use a shorter one"),
        (&["serve", "=x.img"], "the export name is empty"),
        (&["serve", "x="], "no image after 'x='"),
        (&["serve", "a@b.img"], "give it a name: NAME=a@b.img"),
        (&["serve", "a\nb=c"], "control character"),
        (
            &["serve", "/a/root.img", "/b/root.img"],
            "both be named 'root'; name one of them, as root2=/b/root.img",
        ),
        (&["serve", "x.img", "--mask-handshake", "0x10000"], "not 16 bits"),
        (&["attach"], "required arguments were not provided: <IMAGE|EXPORT-URI>"),
        (&["attach", "x.img", "--list"], "cannot be used with"),
        (&["attach", "x.img", "--connections", "17"], "17 is not in 1..=16"),
        (&["attach", "x.img", "--backend", "smb"], "possible values: auto, nbd, fuse"),
        (&["attach", "a@b.img"], "give it a name: NAME=a@b.img"),
        (&["detach"], "required arguments were not provided: <DEVICE>"),
        (&["run"], "required arguments were not provided: <IMAGE|EXPORT-URI>"),
        (&["run", "x.img", "--bind", "/a:b"], "write SRC:DST or SRC:DST:ro"),
        (&["run", "x.img", "--net", "bridge"], "possible values: none, host"),
        (&["run", "--session", "x.img"], "'x.img' is no URI"),
        (
            &["run", "x.img", "ls", "-l"],
            "Unexpected argument 'ls' found; put -- before the command; see 'memdev run --help'",
        ),
        (&["enter", "box", "ls"], "Unexpected argument 'ls' found; put -- before the command"),
        (&["run", "x.img", "--nosuch"], "Unexpected argument '--nosuch' found"),
        (&["enter"], "required arguments were not provided: <SESSION>"),
        (&["generate", "jokes", "."], "possible values: man, completions"),
    ] {
        let line = failure(memdev().args(args), 2);
        assert!(line.contains(expected), "{args:?}: {line}");
    }
}

#[test]
fn a_log_filter_that_cannot_be_read_is_a_usage_error() {
    let (_dir, image) = with_image();
    let line = failure(memdev().env("MEMDEV_LOG", "a=b=c").arg("info").arg(&image), 2);
    assert!(line.contains("MEMDEV_LOG='a=b=c'") && line.contains("write a level"), "{line}");
    memdev().env("MEMDEV_LOG", "memdev=trace").arg("info").arg(&image).assert().success();
    for (filter, lines) in [("bogus", 1), ("warn", 0), ("memdev::net=info,off", 0)] {
        let output = memdev().env("MEMDEV_LOG", filter).arg("info").arg(&image).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "it is a warning: {said}");
        assert_eq!(said.lines().count(), lines, "{said}");
        assert_eq!(
            said.contains("MEMDEV_LOG has \"bogus\", which is no level; write error, warn"),
            lines > 0,
            "{said}"
        );
    }
}

/// Images that cannot be served, and what must be said about each; shared by all that take images.
fn bad_images(dir: &Path) -> Vec<(PathBuf, &'static str)> {
    let path = |name: &str| dir.join(name);
    fs::create_dir(path("directory.img")).unwrap();
    File::create(path("empty.img")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo.img"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    let _socket = UnixListener::bind(path("socket.img")).unwrap();
    std::os::unix::fs::symlink("nowhere", path("dangling.img")).unwrap();
    vec![
        (path("missing.img"), "no such file or directory"),
        (path("dangling.img"), "no such file or directory"),
        (path("directory.img"), "directory"),
        (path("directory.img/x.img"), "no such file"),
        (path("empty.img"), "empty"),
        (path("empty.img/x.img"), "not a directory"),
        (path("fifo.img"), "neither a regular file nor a block device"),
        (path("socket.img"), "neither a regular file nor a block device"),
        ("/dev/null".into(), "neither a regular file nor a block device"),
    ]
}

#[test]
fn what_is_no_image_is_one_line_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    for (path, why) in bad_images(dir.path()) {
        let shown = path.to_str().unwrap();
        let socket = dir.path().join("s");
        let serve = ["serve".as_ref(), path.as_os_str(), "--unix".as_ref(), socket.as_os_str()];
        for args in [&["info".as_ref(), path.as_os_str()][..], &serve] {
            let line = failure(memdev().args(args), 1);
            assert!(line.contains(shown) && line.contains(why), "{args:?}: {line}");
            assert!(line.contains("; give the path of a"), "says what to do: {line}");
        }
        assert!(fs::symlink_metadata(socket).is_err(), "a server that does not start leaves no socket");
    }
}

/// memdev without the privilege to read what it may not: whoever runs the tests may be root, who can read everything.
fn memdev_without_privilege() -> Command {
    if !rustix::process::geteuid().is_root() {
        return memdev();
    }
    // Only the two capabilities go: the user stays, so that memdev and the temporary directory can still be reached.
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search", MEMDEV]).env_remove("MEMDEV_LOG");
    command
}

#[test]
fn an_image_that_may_not_be_read_is_one_line() {
    let (_dir, image) = with_image();
    fs::set_permissions(&image, Permissions::from_mode(0o000)).unwrap();
    for subcommand in ["info", "serve"] {
        let mut command = memdev_without_privilege();
        let line = failure(command.arg(subcommand).arg(&image).args(tcp_if(subcommand == "serve")), 1);
        assert!(line.contains(image.to_str().unwrap()) && line.contains("permission denied"), "{line}");
    }
}

/// Serving is tested on a port that is free, not on the default one, where somebody may be.
fn tcp_if(serve: bool) -> &'static [&'static str] {
    if serve { &["--tcp", "127.0.0.1:0"] } else { &[] }
}

#[test]
fn output_that_cannot_be_written_fails_unless_its_reader_has_seen_enough() {
    let (_dir, image) = with_image();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(MEMDEV).arg("info").arg(&image).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.starts_with(b"memdev: Cannot write to standard output: no space left"));

    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = std::process::Command::new(MEMDEV).arg("info").arg(&image).stdout(writer).status().unwrap();
    assert!(status.success());
}

#[test]
fn manual_and_completions_are_made_from_the_definition() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new/man");
    memdev().args(["generate", "man"]).arg(&target).assert().success();
    let page = fs::read_to_string(target.join("memdev-serve.1")).unwrap();
    assert!(page.contains("session\\-memory") && !page.contains("mask\\-handshake"), "{page}");
    let page = fs::read_to_string(target.join("memdev.1")).unwrap();
    assert!(!page.contains("memdev\\-help"), "there is no such page: {page}");
    let mut pages: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    pages.sort();
    assert_eq!(
        pages,
        [
            "memdev-attach.1",
            "memdev-carry.1",
            "memdev-changes.1",
            "memdev-checkpoint.1",
            "memdev-detach.1",
            "memdev-end.1",
            "memdev-enter.1",
            "memdev-fork.1",
            "memdev-image.1",
            "memdev-info.1",
            "memdev-load.1",
            "memdev-login.1",
            "memdev-logind.1",
            "memdev-map.1",
            "memdev-new.1",
            "memdev-ns.1",
            "memdev-ps.1",
            "memdev-reset.1",
            "memdev-rollback.1",
            "memdev-run.1",
            "memdev-save.1",
            "memdev-serve.1",
            "memdev-set.1",
            "memdev-stat.1",
            "memdev-top.1",
            "memdev.1"
        ]
    );
    memdev().args(["generate", "completions"]).arg(dir.path()).assert().success();
    assert!(fs::read_to_string(dir.path().join("memdev.bash")).unwrap().contains("--session-memory"));
}
