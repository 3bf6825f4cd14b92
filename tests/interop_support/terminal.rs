//! A terminal for programs that want one.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The longest that nothing comes. It only catches hangs: this process has the other end, too, and so there is no end of it.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A terminal, with somebody at it who reads everything.
pub struct Terminal {
    master: File,
    /// The end that a program has.
    pub slave: OwnedFd,
    seen: String,
}

impl Terminal {
    /// One of 30 rows and 100 columns.
    pub fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let terminal = Self { master: master.into(), slave, seen: String::new() };
        terminal.resize(30, 100);
        terminal
    }

    /// Makes the window another size; nobody is told.
    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    /// Makes the window larger, has the program told so by `tell`, and waits until the shell inside has it so. The shell's
    /// command waits for that from before: at a prompt, Readline sets the size that it has just asked for (`set_winsize`
    /// in its rltty.c), and would undo a change that comes between.
    #[track_caller]
    pub fn enlarge(&mut self, tell: impl FnOnce()) {
        let wait = "until [ \"$(stty size)\" = '50 132' ]; do sleep 0.1; done";
        self.write(&format!("echo waits-$((1+1)); {wait}; echo larger-$((1+1))\n"));
        self.expect("waits-2");
        self.resize(50, 132);
        tell();
        self.expect("larger-2");
    }

    /// Starts a program that has it as standard input, output and error.
    pub fn start(&self, mut command: Command) -> Child {
        let slave = || self.slave.try_clone().unwrap();
        command.stdin(slave()).stdout(slave()).stderr(slave()).env("TERM", "dumb").spawn().unwrap()
    }

    /// Types this.
    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Reads until `text` is seen; what came before it is forgotten.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
            let come = poll(&mut fds, Some(&PATIENCE)).unwrap();
            assert!(come > 0, "{text:?} does not come after {:?}", self.seen);
            let mut bytes = [0; 4096];
            let got = self.master.read(&mut bytes).unwrap();
            assert!(got > 0, "{text:?} does not come after {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..got]));
        }
    }
}

/// Whether a program of this name has the terminal, in the namespace of processes that `init` is the first of: before
/// that, keys are the shell's.
pub fn is_in_foreground(init: impl Display, name: &str) -> bool {
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = space(&init.to_string()).expect("process 1 runs");
    let all = fs::read_dir("/proc").expect("reading /proc").flatten();
    all.filter_map(|entry| entry.file_name().into_string().ok()).any(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((before, rest)) = stat.rsplit_once(") ") else { return false };
        // State, parent, process group, session, terminal, and the group that has that.
        let fields: Vec<_> = rest.split(' ').collect();
        let is_it = before.ends_with(&format!("({name}")) && fields[0] != "T" && fields[2] == fields[5];
        is_it && space(&pid).as_ref() == Some(&own)
    })
}
