//! Logins by way of PAM: the login program itself is put inside.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

use rustix::process::Signal;

use super::machine::{DIR, Machine, send, state_of_image};
use super::sshd::{HOST, Sshd};
use crate::interop_support::said;
use crate::interop_support::terminal::Terminal;
use crate::support::wait_until;

/// The module, which is built with these tests (`[target.'cfg(not(loom))'.dev-dependencies]`).
fn module() -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name("libpam_memdev.so");
    assert!(path.exists(), "{} is built with the tests", path.display());
    path
}

/// A machine whose sshd and su have the module, in PAM settings of its own; its user `forced` has a shell of the host's.
fn machine() -> Machine {
    let machine = Machine::new();
    fs::copy(module(), machine.file("pam_memdev.so")).unwrap();
    for service in ["su", "su-l", "sshd", "login"] {
        let lines = format!(
            "auth required pam_permit.so\naccount required pam_permit.so\nsession required {DIR}/pam_memdev.so\n"
        );
        fs::write(machine.file("pam.d").join(service), lines).unwrap();
    }
    let status = machine.command("mount").args(["--bind", &format!("{DIR}/pam.d"), "/etc/pam.d"]).status();
    assert!(status.unwrap().success());
    machine
}

/// Debian's `su`, by root.
fn su(machine: &Machine, line: &str) -> Command {
    let mut command = machine.command("/usr/bin/su");
    command.args(["forced", "-c", line]);
    command
}

#[track_caller]
fn succeed(machine: &Machine, mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}\n{}\n{}", said(&output), machine.log(), Sshd::log(machine));
    said(&output)
}

const WHO: &str = "id -u; cat /proc/1/comm; test -e /run/t && echo host; true";

#[test]
fn su_and_sshd_are_inside() {
    let machine = machine();
    assert_eq!(succeed(&machine, su(&machine, WHO)), "4712\nmemdev-init\n");
    wait_until("it is gone", || machine.sessions().is_empty());
    let sshd = Sshd::start(&machine, "UsePAM yes");
    assert_eq!(succeed(&machine, sshd.ssh("forced", &[], &[WHO])), "4712\nmemdev-init\n");
    wait_until("it is gone", || machine.sessions().is_empty());
    let output = sshd.ssh("forced", &[], &["exit 9"]).output().unwrap();
    assert_eq!(output.status.code(), Some(9));
    wait_until("it is gone", || machine.sessions().is_empty());
}

/// Nothing of what a login has is the host's: no id, no capability, no namespace, no descriptor; also not sshd's own.
#[test]
fn nothing_is_left_of_the_host() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let mut running = machine.begin(sshd.ssh("forced", &[], &["echo ready; readlink /proc/self/cwd /proc/self/root; ls /proc/self/fd | tr '\\n' ' '; grep CapBnd /proc/self/status; echo over; read x"]));
    // Then no program but the shell runs inside any more.
    let told: Vec<_> = (0..4).map(|_| running.line()).collect();
    assert_eq!(told[3], "over\n", "{told:?}");
    assert_eq!(told[..2], ["/\n".to_owned(), "/\n".to_owned()], "{told:?}");
    assert!(told[2].starts_with("0 1 2 3 "), "{told:?}");
    let session = machine.sessions().remove(0);
    let init = session["init"].as_u64().unwrap();
    let space = |pid: u64, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    let mounts = space(init, "mnt");
    let first = session["first_id"].as_u64().unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) else {
            continue;
        };
        if space(pid, "mnt") != mounts {
            continue;
        }
        for name in ["user", "ipc", "uts", "cgroup"] {
            assert_eq!(space(pid, name), space(init, name), "{name} of {pid}");
        }
        let status = fs::read_to_string(entry.path().join("status")).unwrap();
        let name = status.lines().next().unwrap().trim_start_matches("Name:").trim().to_owned();
        for line in
            status.lines().filter(|line| ["Uid:", "Gid:", "Groups:"].iter().any(|key| line.starts_with(key)))
        {
            let numbers = line.split_whitespace().skip(1).map(|number| number.parse::<u64>().unwrap());
            for number in numbers {
                assert!((first..first + 65536).contains(&number), "{name}, {pid}: {line}");
            }
        }
        names.push(name);
    }
    names.sort();
    assert!(
        names.iter().filter(|name| *name == "sshd").count() >= 1,
        "sshd's own process is inside: {names:?}"
    );
    assert!(names.len() >= 4, "{names:?}");
    drop(running);
    machine.assert_gone(&[session]);
}

#[test]
fn two_logins_at_once_see_nothing_of_each_other() {
    let machine = machine();
    let before = state_of_image(&machine);
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let script = |mine: &str, other: &str| {
        format!(
            "echo ready; echo {mine} >/tmp/{mine}; echo written; read x; ls /tmp/{mine} /tmp/{other} 2>/dev/null; echo over"
        )
    };
    let mut one = machine.begin(sshd.ssh("forced", &[], &[&script("one", "two")]));
    let mut two = machine.begin(su(&machine, &script("two", "one")));
    assert_eq!((one.line(), two.line()), ("written\n".to_owned(), "written\n".to_owned()));
    let sessions = machine.sessions();
    assert_eq!(sessions.len(), 2);
    for running in [&mut one, &mut two] {
        running.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
    assert_eq!(one.finish(), (Some(0), "/tmp/one\nover\n".to_owned()));
    assert_eq!(two.finish(), (Some(0), "/tmp/two\nover\n".to_owned()));
    machine.assert_gone(&sessions);
    assert_eq!(state_of_image(&machine), before);
}

#[test]
fn policies() {
    let machine = machine();
    let entry = |second: &str| {
        machine.settings(&format!("[default]\nimage = '{DIR}/image'\nsecond = '{second}'\n"));
    };
    entry("join");
    let mut first = machine.begin(su(&machine, "echo ready; echo one >/tmp/mine; echo written; read x"));
    assert_eq!(first.line(), "written\n");
    assert_eq!(succeed(&machine, su(&machine, "cat /tmp/mine")), "one\n");
    drop(first);
    wait_until("it is gone", || machine.sessions().is_empty());
    entry("refuse");
    let first = machine.begin(su(&machine, "echo ready; read x"));
    refused(&machine, &su(&machine, &format!("echo {HOST}")).output().unwrap());
    assert!(machine.log().contains("The user is logged in already"));
    let sessions = machine.sessions();
    drop(first);
    machine.assert_gone(&sessions);
}

/// Whoever asks is root, for everybody: so logins by PAM were counted among those of all only, and one user could have a thousand
/// by way of ssh who could have sixty-four by a login shell.
#[test]
fn logins_count_for_who_logs_in() {
    let mut machine = machine();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nlogins = 2\n"));
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let first = machine.begin(su(&machine, "echo ready; read x"));
    // By whatever way, and whoever takes them in.
    machine.kill_daemon();
    machine.start_daemon();
    let mut direct = machine.command_of(4712, &format!("{DIR}/memdev"));
    direct.args(["login", "-c", "echo ready; read x"]);
    let second = machine.begin(direct);
    let say = format!("echo {HOST}");
    refused(&machine, &su(&machine, &say).output().unwrap());
    refused(&machine, &sshd.ssh("forced", &[], &[&say]).output().unwrap());
    let mut direct = machine.command_of(4712, &format!("{DIR}/memdev"));
    let output = direct.args(["login", "-c", &say]).output().unwrap();
    machine.assert_refused(&output, "The user has as many logins as there may be at once: 2");
    assert!(said(&output).contains("you have too many logins"), "{}", said(&output));
    // Others have not.
    assert_eq!(machine.sh("echo in"), "in\n");
    drop(first);
    wait_until("one is over", || {
        let output = su(&machine, "echo in").output().unwrap();
        output.status.success() && said(&output) == "in\n"
    });
    assert_eq!(second.finish().0, Some(1));
}

#[track_caller]
fn refused(machine: &Machine, output: &Output) {
    assert!(!output.status.success(), "{}", said(output));
    assert!(!said(output).contains(HOST), "{}\n{}", said(output), machine.log());
    assert!(said(output).contains("memdev: Login refused"), "{}\n{}", said(output), Sshd::log(machine));
}

/// Whatever is wrong, neither su nor sshd start anything on the host.
#[test]
fn refusals() {
    let mut machine = machine();
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let say = format!("echo {HOST}; touch {DIR}/reached");
    let attempt = || {
        refused(&machine, &su(&machine, &say).output().unwrap());
        refused(&machine, &sshd.ssh("forced", &[], &[&say]).output().unwrap());
    };
    machine.settings("nonsense");
    attempt();
    machine.settings(&format!("[default]\nimage = '{DIR}/none'\n"));
    attempt();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nprivileged = true\n"));
    attempt();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nuser = 'root'\n"));
    attempt();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\npids_limit = 100\n"));
    attempt();
    // The image has the user under another number: sshd would become the host's.
    fs::write(machine.file("inside"), "root:x:0:0:root:/root:/bin/bash\nforced:x:77:77::/:/bin/bash\n")
        .unwrap();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nbinds = ['{DIR}/inside:/etc/passwd:ro']\n"));
    attempt();
    assert!(
        machine.log().contains("The image has the user forced as 77, the host as 4712"),
        "{}",
        machine.log()
    );
    machine.settings("");
    attempt();
    machine.kill_daemon();
    refused(&machine, &su(&machine, &say).output().unwrap());
    refused(&machine, &sshd.ssh("forced", &[], &[&say]).output().unwrap());
    assert!(!machine.file("reached").exists());
}

#[test]
fn killed_programs() {
    let machine = machine();
    for signal in [Signal::KILL, Signal::TERM] {
        let running =
            machine.begin(su(&machine, "trap '' HUP TERM; echo ready; (setsid sleep 1000 &); sleep 1000"));
        let sessions = machine.sessions();
        send(running.child.id(), signal);
        machine.assert_gone(&sessions);
    }
}

#[test]
fn terminals() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let mut terminal = Terminal::new();
    let mut child = terminal.start(sshd.ssh("forced", &["-tt"], &[]));
    terminal.expect("$ ");
    // One of the private root's own.
    terminal.write("tty; stty size; cat /proc/1/comm; id -un; ls -x /dev/pts\n");
    terminal.expect("/dev/pts/0\r\n30 100\r\nmemdev-init\r\nforced\r\n0  ptmx\r\n");
    terminal.write("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    wait_until("it is gone", || machine.sessions().is_empty());
}

/// `su --pty` makes a terminal after it has gone inside, and so it is the private root's.
#[test]
fn su_with_a_terminal_of_its_own() {
    let machine = machine();
    let mut command = machine.command("/usr/bin/su");
    command.args(["--pty", "forced"]);
    let mut terminal = Terminal::new();
    let mut child = terminal.start(command);
    terminal.expect("$ ");
    terminal.write("tty; cat /proc/1/comm; id -un; echo $((40+2))\n");
    terminal.expect("/dev/pts/0\r\nmemdev-init\r\nforced\r\n42\r\n");
    terminal.write("exit 5\n");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    wait_until("it is gone", || machine.sessions().is_empty());
}

/// As getty starts it: root's, the leader of a session on a terminal of the host's.
#[test]
fn login_on_a_terminal() {
    let machine = machine();
    let mut command = machine.command("setsid");
    command.args(["--ctty", "--wait", "/usr/bin/login", "-f", "forced"]);
    let mut terminal = Terminal::new();
    let mut child = terminal.start(command);
    terminal.expect("$ ");
    terminal.write("cat /proc/1/comm; id -un; test -e /run/t && echo host; echo $((40+2))\n");
    terminal.expect("memdev-init\r\nforced\r\n42\r\n");
    terminal.write("exit\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    wait_until("it is gone", || machine.sessions().is_empty());
}

/// What sshd forks is in the private root's namespace of processes before it is another program, and its memory is a copy of
/// sshd's own, with the host's keys: nobody inside can look into it, neither as the same user nor as root there.
#[test]
fn sshds_own_processes_cannot_be_looked_into() {
    let machine = machine();
    let sshd = Sshd::start(&machine, "UsePAM yes");
    let running = machine.begin(sshd.ssh("forced", &[], &["echo ready; read x"]));
    let look = "for p in /proc/[0-9]*; do test \"$(cat $p/comm)\" = sshd || continue; echo found; \
        for f in exe root cwd; do readlink $p/$f && echo HOLE; done; ls $p/fd && echo HOLE; \
        head -c 1 $p/mem && echo HOLE; cat $p/environ && echo HOLE; done 2>/dev/null; true";
    let session = machine.sessions().remove(0)["name"].as_str().unwrap().to_owned();
    for user in ["4712", "root"] {
        let mut enter = machine.command(&format!("{DIR}/memdev"));
        enter.args([
            "enter",
            "--state",
            &format!("{DIR}/state"),
            "--user",
            user,
            &session,
            "--",
            "sh",
            "-c",
            look,
        ]);
        assert_eq!(succeed(&machine, enter), "found\n", "as {user}");
    }
    assert_eq!(running.finish().0, Some(1));
}
