//! A private root on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::machine::{Place, kill};

/// A terminal, with somebody at it who reads everything.
struct Terminal {
    master: File,
    slave: OwnedFd,
    seen: String,
}

impl Terminal {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let terminal = Self { master: master.into(), slave, seen: String::new() };
        terminal.resize(30, 100);
        terminal
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn start(&self, mut command: Command) -> Child {
        let slave = || self.slave.try_clone().unwrap();
        command.stdin(slave()).stdout(slave()).stderr(slave()).env("TERM", "dumb").spawn().unwrap()
    }

    fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Reads until `text` is seen; what came before it is forgotten.
    #[track_caller]
    fn expect(&mut self, text: &str) {
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let mut bytes = [0; 4096];
            let got = self.master.read(&mut bytes).unwrap();
            assert!(got > 0, "{text:?} does not come after {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..got]));
        }
    }
}

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
    std::thread::sleep(std::time::Duration::from_millis(200));
    terminal.write("\x1a");
    terminal.expect("Stopped");
    terminal.write("fg\n");
    terminal.expect("sleep 1000");
    std::thread::sleep(std::time::Duration::from_millis(200));
    terminal.write("\x03");
    terminal.write("echo $((20 + 3))\n");
    terminal.expect("23\r\n");
    // The window is made larger.
    terminal.resize(50, 132);
    kill(&child.id().into(), Signal::WINCH);
    terminal.write("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.1; done; echo larger-$((1+1))\n");
    terminal.expect("larger-2");
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
