//! What a second login of the same user gets.

use std::io::Write;

use super::machine::{DIR, Machine};
use crate::interop_support::said;
use crate::support::wait_until;

fn machine(second: &str) -> Machine {
    let machine = Machine::new();
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nuser = 'root'\nsecond = '{second}'\n"));
    machine
}

#[test]
fn own() {
    let machine = machine("own");
    let mut first = machine.start("echo one >/etc/mine; echo done; read x; cat /etc/mine /usr/other");
    assert_eq!(first.line(), "done\n");
    assert_eq!(
        machine.sh("echo two >/usr/other; ls /etc/mine 2>&1 || ls /usr/other"),
        "ls: cannot access '/etc/mine': No such file or directory\n/usr/other\n"
    );
    assert_eq!(machine.sessions().len(), 1);
    first.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let (status, told) = first.finish();
    assert_eq!((status, told.as_str()), (Some(1), "one\ncat: /usr/other: No such file or directory\n"));
    assert_eq!(machine.sh("ls /etc/mine /usr/other 2>&1 | wc -l"), "2\n");
}

#[test]
fn refuse() {
    let machine = machine("refuse");
    let first = machine.start("read x");
    let second = machine.login(&["-c", "true"]).output().unwrap();
    machine.assert_refused(&second, "The user is logged in already");
    assert!(said(&second).contains("you are logged in already"));
    assert_eq!(first.finish().0, Some(1));
    wait_until("the first is over", || machine.login(&["-c", "true"]).status().unwrap().success());
}

#[test]
fn join() {
    let machine = machine("join");
    let mut first = machine.start("echo one >/etc/mine; echo done; read x; exit 3");
    assert_eq!(first.line(), "done\n");
    let mut second = machine.start("cat /etc/mine; uname -n; read x; cat /etc/mine");
    assert_eq!((second.line(), second.line()), ("one\n".to_owned(), "login-4711\n".to_owned()));
    assert_eq!(machine.sessions().len(), 1);
    // It stays when the first goes.
    assert_eq!(first.finish().0, Some(3));
    assert_eq!(machine.sh("cat /etc/mine; ls /proc/1/comm"), "one\n/proc/1/comm\n");
    let sessions = machine.sessions();
    second.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(second.finish(), (Some(0), "one\n".to_owned()));
    // And ends with the last.
    machine.assert_gone(&sessions);
    assert_eq!(machine.sh("ls /etc/mine 2>/dev/null || echo fresh"), "fresh\n");
}

/// Those that come while the root is about to end get another one, or the same one, but get through.
#[test]
fn join_while_it_ends() {
    let machine = machine("join");
    for round in 0..6 {
        std::thread::scope(|scope| {
            let logins: Vec<_> =
                (0..3).map(|_| scope.spawn(|| machine.login(&["-c", "echo in"]).output().unwrap())).collect();
            for login in logins {
                let output = login.join().unwrap();
                assert_eq!(said(&output), "in\n", "round {round}: {}", machine.log());
            }
        });
    }
}

/// Whoever joined goes with the root, if that is killed; and the next login gets another one.
#[test]
fn join_and_killed_keeper() {
    let machine = machine("join");
    let first = machine.start("sleep 1000");
    let second = machine.start("sleep 1000");
    let sessions = machine.sessions();
    let init = i32::try_from(sessions[0]["init"].as_i64().unwrap()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(init).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert_eq!((first.finish().0, second.finish().0), (Some(137), Some(137)));
    machine.assert_gone(&sessions);
    assert_eq!(machine.sh("echo again"), "again\n");
}
