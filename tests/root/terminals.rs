//! A private root on a terminal.

use rustix::process::Signal;
use rustix::termios::{LocalModes, tcgetattr};

use super::machine::{Place, kill};
use crate::interop_support::terminal::{Terminal, is_in_foreground};
use crate::support::wait_until;

#[test]
fn a_shell_has_a_terminal_of_its_own() {
    let place = Place::new();
    let mut terminal = Terminal::new();
    let before = tcgetattr(&terminal.slave).unwrap();
    assert!(before.local_modes.contains(LocalModes::ECHO));
    let mut child = terminal.start(place.run(&[], &["bash", "--norc"]));
    terminal.expect("# ");
    assert!(
        !tcgetattr(&terminal.slave).unwrap().local_modes.contains(LocalModes::ECHO),
        "keys go through as they are"
    );
    terminal.write("tty; stty size; echo $TERM-$((1+1))\n");
    terminal.expect("/dev/pts/0\r\n30 100\r\ndumb-2\r\n");
    // Job control, and a key that interrupts what is in the foreground only.
    terminal.write("sleep 1000\n");
    terminal.expect("sleep 1000\r\n");
    let init = place.written("root")[0]["init"].clone();
    let sleeps = || wait_until("it has the terminal", || is_in_foreground(&init, "sleep"));
    sleeps();
    terminal.write("\x1a");
    terminal.expect("Stopped");
    terminal.write("fg\n");
    terminal.expect("sleep 1000");
    sleeps();
    terminal.write("\x03");
    terminal.write("echo $((20 + 3))\n");
    terminal.expect("23\r\n");
    terminal.enlarge(|| kill(&child.id().into(), Signal::WINCH));
    terminal.write("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let after = tcgetattr(&terminal.slave).unwrap();
    assert_eq!(after.local_modes, before.local_modes, "the terminal is left as it was");
    place.assert_empty();
}

#[test]
fn what_is_no_terminal_stays_what_it_is() {
    let place = Place::new();
    let terminal = Terminal::new();
    let script = "test -t 0 && echo input; test -t 1 && echo output; test -t 2 && echo error; tty <&2";
    let mut command = place.run(&[], &["sh", "-c", script]);
    command.stderr(terminal.slave.try_clone().unwrap());
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "error\n/dev/pts/0\n");
    place.assert_empty();
}

/// Of much that is written last, nothing is lost.
#[test]
fn everything_is_shown_before_the_end() {
    let place = Place::new();
    let mut terminal = Terminal::new();
    let mut child = terminal.start(place.run(&[], &["sh", "-c", "seq 20000; echo the-end"]));
    terminal.expect("1\r\n2\r\n3\r\n");
    terminal.expect("19999\r\n20000\r\nthe-end\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    place.assert_empty();
}
