//! `memdev login` as a user runs it.

use std::io::{Read, Write};
use std::process::Stdio;

use rustix::process::Signal;

use super::machine::{DIR, Machine, USERS, parent, send};
use crate::interop_support::said;
use crate::interop_support::terminal::Terminal;
use crate::support::{Random, Stream, wait_until};

#[test]
fn the_user_is_the_hosts_where_the_image_does_not_know_it() {
    let machine = Machine::new();
    let told =
        machine.sh("id -u; id -g; id -G; echo $USER $LOGNAME $HOME $SHELL $PWD; test -O / || echo not mine");
    assert_eq!(told, "4711\n4711\n4711\ntester tester / /bin/sh /\nnot mine\n");
    // Its root is not the host's.
    assert_eq!(machine.sh("test -e /run/t || cat /proc/1/comm"), "memdev-init\n");
}

#[test]
fn the_user_is_the_images_where_that_knows_the_name() {
    let machine = Machine::new();
    let passwd = "root:x:0:0:root:/root:/bin/bash\ntester:x:1234:5::/srv:/bin/bash\n";
    std::fs::write(machine.file("inside"), passwd).unwrap();
    let entry = |more: &str| {
        machine.settings(&format!(
            "[default]\nimage = '{DIR}/image'\nbinds = ['{DIR}/inside:/etc/passwd:ro']\n{more}"
        ));
    };
    entry("");
    assert_eq!(
        machine.sh("id -u; id -g; echo $HOME $SHELL $PWD $0"),
        "1234\n5\n/srv /bin/bash /srv /bin/bash\n"
    );
    entry("user = 'root'\nhostname = 'box-{user}'\nenv = { A = 'b c' }\n");
    let told =
        machine.sh("id -u; uname -n; echo \"$A\"; touch /usr/here && rm /usr/here; mount -t tmpfs none /mnt");
    assert_eq!(told, "0\nbox-tester\nb c\n");
    // There a number inside is one outside: the image does not say who somebody is.
    entry("privileged = true\n");
    assert_eq!(machine.sh("id -u; id -g"), "4711\n4711\n");
}

#[test]
fn exit_statuses_are_the_shells() {
    let machine = Machine::new();
    for (line, status) in [("true", 0), ("exit 7", 7), ("kill -9 $$", 137), ("no-such-command", 127)] {
        let output = machine.login(&["-c", line]).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {}", said(&output));
    }
}

#[test]
fn what_sshd_was_asked_for_is_done() {
    let machine = Machine::new();
    let output = machine.login(&[]).env("SSH_ORIGINAL_COMMAND", "echo $((40 + 2))").output().unwrap();
    assert_eq!(said(&output), "42\n");
    // Without anything to do the shell is one that was logged in to, and reads what it is to do.
    let mut command = machine.login(&[]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo $0; exit 4\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((String::from_utf8_lossy(&output.stdout).as_ref(), output.status.code()), ("-sh\n", Some(4)));
}

#[test]
fn bytes_come_through_as_they_are() {
    let machine = Machine::new();
    let bytes = Random::new(6).bytes(10 << 20);
    let mut command = machine.login(&["-c", "cat; echo over >&2"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut got = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(&bytes).unwrap();
            drop(stdin);
        });
        child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    });
    let output = child.wait_with_output().unwrap();
    assert!(got == bytes, "{} of {} bytes, and not the same", got.len(), bytes.len());
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), "over\n"));
}

#[test]
fn little_of_the_environment_comes_along() {
    let machine = Machine::new();
    let mut command = machine.login(&["-c", "env"]);
    for (key, value) in [
        ("LANG", "de_DE.UTF-8"),
        ("LC_TIME", "C"),
        ("SSH_CONNECTION", "a b"),
        ("SSH_AUTH_SOCK", "/tmp/x"),
        ("LD_LIBRARY_PATH", "/x"),
        ("BASH_ENV", "/x"),
        ("ENV", "/x"),
        ("HOME", "/x"),
        ("PATH", "/usr/bin:/bin:/x"),
    ] {
        command.env(key, value);
    }
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    for there in ["LANG=de_DE.UTF-8\n", "LC_TIME=C\n", "SSH_CONNECTION=a b\n", "HOME=/\n"] {
        assert!(told.contains(there), "{there} is not in {told}");
    }
    for gone in ["SSH_AUTH_SOCK", "LD_LIBRARY_PATH", "ENV=", "/x"] {
        assert!(!told.contains(gone), "{gone} is in {told}");
    }
}

#[test]
fn signals_are_the_shells() {
    let machine = Machine::new();
    let mut running =
        machine.start("trap 'echo got it; exit 9' TERM; echo set; while :; do sleep 0.05; done");
    assert_eq!(running.line(), "set\n");
    // nsenter and setpriv become the client.
    send(running.child.id(), Signal::TERM);
    assert_eq!(running.finish(), (Some(9), "got it\n".to_owned()));
}

#[test]
fn a_login_has_a_terminal_of_its_own() {
    let machine = Machine::new();
    let mut terminal = Terminal::new();
    let before = rustix::termios::tcgetattr(&terminal.slave).unwrap();
    let mut child = terminal.start(machine.login(&[]));
    terminal.expect("$ ");
    terminal.write("tty; stty size; echo $TERM-$((1+1))\n");
    terminal.expect("/dev/pts/0\r\n30 100\r\ndumb-2\r\n");
    terminal.enlarge(|| send(child.id(), Signal::WINCH));
    terminal.write("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let after = rustix::termios::tcgetattr(&terminal.slave).unwrap();
    assert_eq!(after.local_modes, before.local_modes, "the terminal is left as it was");
}

/// However a login ends, its private root does.
#[test]
fn nothing_outlives_the_client() {
    let machine = Machine::new();
    let stubborn =
        "trap '' HUP TERM INT; (trap '' HUP TERM; sleep 1000) & setsid sleep 1000 & wait; sleep 1000";
    for signal in [Signal::KILL, Signal::HUP] {
        let running = machine.start(stubborn);
        let sessions = machine.sessions();
        send(running.child.id(), signal);
        machine.assert_gone(&sessions);
    }
    // A terminal that nobody reads any more, so that whoever writes to it waits.
    let mut terminal = Terminal::new();
    let mut child = terminal.start(machine.login(&["-c", "echo begun; exec yes"]));
    terminal.expect("begun");
    let sessions = machine.sessions();
    std::thread::sleep(std::time::Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    machine.assert_gone(&sessions);
}

#[test]
fn a_login_outlives_the_daemon_but_not_its_worker() {
    let mut machine = Machine::new();
    let mut first = machine.start("read x; echo still here");
    machine.kill_daemon();
    let output = machine.login(&["-c", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    first.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(first.finish(), (Some(0), "still here\n".to_owned()));
    machine.start_daemon();
    let second = machine.start("sleep 1000");
    let sessions = machine.sessions();
    send(parent(&sessions[0]["launcher"]), Signal::KILL);
    let (status, told) = second.finish();
    assert_eq!(status, Some(125));
    assert_eq!(told, "memdev: The login has been broken off: its worker has died\n");
    machine.assert_gone(&sessions);
}

/// What is changed in a server's session is there at the next login, and is the user's alone.
#[test]
fn a_session_of_a_server_stays() {
    let machine = Machine::new();
    machine.settings(&format!(
        "[default]\nsession = 'nbd+unix:///root@{{user}}?socket={DIR}/nbd.sock'\nuser = 'root'\n"
    ));
    let mut server = machine.daemon(&format!("{DIR}/memdev"));
    server.args([
        "serve",
        &format!("root={DIR}/image"),
        "--unix",
        &format!("{DIR}/nbd.sock"),
        "--linger",
        "1h",
    ]);
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the server listens", || Stream::unix(&machine.file("nbd.sock")).is_ok());
    assert_eq!(machine.sh("echo kept >/etc/mine"), "");
    // Also when the login was killed: what it had written is written to the server.
    let mut second = machine.start("cat /etc/mine; echo more >>/etc/mine; sync; echo synced; sleep 1000");
    assert_eq!((second.line(), second.line()), ("kept\n".to_owned(), "synced\n".to_owned()));
    let sessions = machine.sessions();
    send(second.child.id(), Signal::KILL);
    machine.assert_gone(&sessions);
    assert_eq!(machine.sh("cat /etc/mine"), "kept\nmore\n");
    let mut other = machine.command_of(USERS[1].1, &format!("{DIR}/memdev"));
    let output = other.args(["login", "-c", "cat /etc/mine || echo none"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("none\n"), "{}", said(&output));
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn limits_hold_for_all_that_is_inside() {
    let machine = Machine::new();
    for second in ["own", "join"] {
        machine.settings(&format!("[default]\nimage = '{DIR}/image'\npids_limit = 8\nsecond = '{second}'\n"));
        let script = "for n in 1 2 3 4 5 6 7 8 9 10; do sleep 1000 & done 2>/dev/null; echo all";
        let output = machine.login(&["-c", script]).output().unwrap();
        assert!(!said(&output).contains("all"), "{second}: {}", said(&output));
        wait_until("it is gone", || machine.sessions().is_empty());
        assert_eq!(machine.sh("sleep 0 & wait; echo few"), "few\n");
    }
}

#[test]
fn the_image_is_never_changed() {
    let machine = Machine::new();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nuser = 'root'\n"));
    let before = super::machine::digest(&machine);
    machine.sh("echo changed >/etc/debian_version; rm -rf /usr/share; sync");
    assert_eq!(super::machine::digest(&machine), before);
    assert!(machine.sh("cat /etc/debian_version; ls /usr | grep share").ends_with("\nshare\n"));
}

#[test]
fn logins_of_several_users_are_apart() {
    let machine = Machine::new();
    let mut one = machine.start("echo x >/tmp/mine; echo written; read x");
    assert_eq!(one.line(), "written\n");
    let mut other = machine.command_of(USERS[1].1, &format!("{DIR}/memdev"));
    other.args(["login", "-c", "cat /tmp/mine; id -u"]);
    // By its group.
    let output = other.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "4712\n", "{}", machine.log());
    wait_until("one is left", || machine.sessions().len() == 1);
}
