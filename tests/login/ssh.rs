//! Logins over ssh: a login shell, and ForceCommand.

use std::io::{Read, Write};
use std::process::Stdio;

use super::machine::{DIR, Machine, state_of_image};
use super::sshd::{HOST, Sshd};
use crate::interop_support::said;
use crate::interop_support::terminal::{Terminal, is_in_foreground};
use crate::support::{Random, wait_until};

/// Root inside, who may change everything.
fn machine() -> Machine {
    let machine = Machine::new();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nuser = 'root'\n"));
    machine
}

#[test]
fn two_logins_at_once_see_nothing_of_each_other() {
    let machine = machine();
    let before = state_of_image(&machine);
    let sshd = Sshd::start(&machine, "");
    let script = |mine: &str, other: &str| {
        format!(
            "echo ready; echo {mine} >/etc/{mine}; rm -rf /usr/share/doc; echo {mine} >/usr/bin/{mine}; \
             echo {mine} >/etc/debian_version; echo written; read x; cat /etc/debian_version; \
             ls /etc/{other} /usr/bin/{other} 2>/dev/null; ls -d /usr/share/doc 2>/dev/null; echo over"
        )
    };
    let mut one = machine.begin(sshd.ssh("tester", &[], &[&script("one", "two")]));
    let mut two = machine.begin(sshd.ssh("tester", &[], &[&script("two", "one")]));
    assert_eq!((one.line(), two.line()), ("written\n".to_owned(), "written\n".to_owned()));
    let sessions = machine.sessions();
    assert_eq!(sessions.len(), 2);
    for running in [&mut one, &mut two] {
        running.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
    assert_eq!(one.finish(), (Some(0), "one\nover\n".to_owned()));
    assert_eq!(two.finish(), (Some(0), "two\nover\n".to_owned()));
    machine.assert_gone(&sessions);
    wait_until("nothing is written down", || machine.sessions().is_empty());
    assert_eq!(state_of_image(&machine), before);
    let fresh =
        sshd.ssh("tester", &[], &["ls /etc/one /etc/two /usr/bin/one 2>/dev/null; ls -d /usr/share/doc"]);
    assert_eq!(said(&run(fresh)), "/usr/share/doc\n");
}

fn run(mut command: std::process::Command) -> std::process::Output {
    command.output().unwrap()
}

#[test]
fn login_shell() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "");
    for (line, status, told) in [
        ("echo $((6 * 7)); exit 5", 5, "42\n"),
        ("test -e /run/t || uname -n | cut -c1-11", 0, "login-4711-\n"),
        ("kill -9 $$", 137, ""),
    ] {
        let output = run(sshd.ssh("tester", &[], &[line]));
        assert_eq!((output.status.code(), said(&output).as_str()), (Some(status), told), "{line}");
    }
    let mut bare =
        sshd.ssh("tester", &["-o", "SetEnv=LC_TIME=de_DE FOO=bar"], &["echo $0-$LC_TIME-$FOO-$SSH_TTY-"]);
    let output = bare.output().unwrap();
    assert!(said(&output).ends_with("-de_DE---\n"), "{}", said(&output));
}

#[test]
fn force_command() {
    let machine = Machine::new();
    let sshd = Sshd::start(
        &machine,
        &format!("Match Group forced\n ForceCommand exec {DIR}/memdev login\n DisableForwarding yes"),
    );
    let output = run(sshd.ssh("forced", &[], &["id -u; cat /proc/1/comm; exit 6"]));
    assert_eq!((said(&output).as_str(), output.status.code()), ("4712\nmemdev-init\n", Some(6)));
    // Without a command it is a shell, also one that reads from a pipe.
    let mut child =
        sshd.ssh("forced", &[], &[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"cat /proc/1/comm; exit 3\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((said(&output).as_str(), output.status.code()), ("memdev-init\n", Some(3)));
    // A subsystem is one more command for the shell inside.
    let output = run(sshd.ssh("forced", &["-s"], &["sftp"]));
    assert_ne!(output.status.code(), Some(0));
}

#[test]
fn ten_mebibytes_there_and_back() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "");
    let bytes = Random::new(22).bytes(10 << 20);
    // As scp of old does it: a program at the other end that writes a file; then one that reads it.
    let mut command =
        sshd.ssh("tester", &[], &["cat >/root/copy && sha256sum </root/copy >&2 && cat /root/copy"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(got == bytes, "{} of {} bytes, and not the same", got.len(), bytes.len());
}

#[test]
fn terminal() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "");
    let mut terminal = Terminal::new();
    let mut child = terminal.start(sshd.ssh("tester", &["-tt"], &[]));
    terminal.expect("# ");
    terminal.write("tty; stty size; echo $TERM-$((1+1))-$0\n");
    terminal.expect("/dev/pts/0\r\n30 100\r\ndumb-2--bash\r\n");
    terminal.write("sleep 1000\n");
    terminal.expect("sleep 1000\r\n");
    let init = machine.sessions()[0]["init"].clone();
    wait_until("it has the terminal", || is_in_foreground(&init, "sleep"));
    terminal.write("\x03");
    terminal.write("echo $((20 + 3))\n");
    terminal.expect("23\r\n");
    terminal.write("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    // The window is closed, the network is gone.
    let mut child =
        terminal.start(sshd.ssh("tester", &["-tt"], &["trap '' HUP TERM; echo here-$((1+1)); sleep 1000"]));
    terminal.expect("here-2");
    let sessions = machine.sessions();
    child.kill().unwrap();
    child.wait().unwrap();
    machine.assert_gone(&sessions);
}

/// Whatever is wrong, sshd starts nothing on the host.
#[test]
fn refused() {
    let mut machine = Machine::new();
    let sshd = Sshd::start(&machine, &format!("Match Group forced\n ForceCommand exec {DIR}/memdev login"));
    let say = format!("echo {HOST}; touch {DIR}/reached");
    let attempt = |why: &str| {
        for user in ["tester", "forced"] {
            let output = run(sshd.ssh(user, &[], &[&say]));
            assert_eq!(output.status.code(), Some(125), "{user}, {why}: {}", said(&output));
            assert!(
                !said(&output).contains(HOST) && said(&output).starts_with("memdev: "),
                "{}",
                said(&output)
            );
            let output = run(sshd.ssh(user, &["-tt"], &[]));
            assert_eq!(output.status.code(), Some(125), "{user}, {why}: {}", said(&output));
        }
    };
    machine.settings("nonsense");
    attempt("mistake in the settings");
    machine.settings(&format!("[default]\nimage = '{DIR}/none'\n"));
    attempt("no image");
    machine.kill_daemon();
    attempt("no daemon");
    assert!(!machine.file("reached").exists());
    // Neither does the one that is not in the settings.
    machine.settings("");
    machine.start_daemon();
    let output = run(sshd.ssh("stranger", &[], &[&say]));
    machine.assert_refused(&output, "No entry of the settings is for the user stranger");
}
