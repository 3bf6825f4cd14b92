//! What a session had in memory and on its disk is nowhere when it has ended; and it is found, by the same means, while it lives.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use super::machine::{Place, Running, image, kill};
use crate::interop_support::terminal::Terminal;

/// 32 bytes that nobody else has. Inside they are put together from two halves, so that no command line has them.
struct Marker {
    halves: [String; 2],
}

impl Marker {
    fn new() -> Self {
        let random = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("a random number");
        let digits = random.replace('-', "");
        let (front, back) = digits.trim().split_at(16);
        Self { halves: [front.to_owned(), back.to_owned()] }
    }

    fn whole(&self) -> String {
        self.halves.concat()
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        let whole = self.whole();
        // Most bytes are zero, or at least not its first one.
        let first = whole.as_bytes()[0];
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|&byte| byte == first) {
            if rest[at..].starts_with(whole.as_bytes()) {
                return true;
            }
            rest = &rest[at + 1..];
        }
        false
    }

    /// Whether a file, or a device, holds it.
    fn is_in_file(&self, path: &Path) -> bool {
        let status = Command::new("grep").args(["-qaF", &self.whole()]).arg(path).status();
        status.expect("grep can be run").success()
    }

    /// Whether the memory of a process does.
    fn is_in_memory(&self, pid: &Value) -> bool {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
        let memory = File::open(format!("/proc/{pid}/mem")).expect("it runs");
        maps.lines().filter(|line| line.contains(" rw-p ")).any(|line| {
            let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
            let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).expect("a number"));
            let mut bytes = vec![0; usize::try_from(to - from).expect("it fits")];
            memory.read_exact_at(&mut bytes, from).is_ok() && self.is_in(&bytes)
        })
    }

    /// The files in a directory that hold it.
    fn files_in(&self, directory: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type());
            if kind.as_ref().is_ok_and(fs::FileType::is_dir) {
                found.extend(self.files_in(&path));
            } else if kind.is_ok_and(|kind| kind.is_file()) && self.is_in_file(&path) {
                found.push(path);
            }
        }
        found
    }
}

/// A shell, something like an editor with its file and the copy of it that editors make, a file in each place that is in memory.
fn script(marker: &Marker) -> String {
    let [front, back] = &marker.halves;
    format!(
        r#"a={front}; b={back}; kept=$a$b
        for file in /root/note /tmp/note.swp /run/note /dev/shm/note; do echo "$kept" >$file; done
        awk -v a=$a -v b=$b 'BEGIN {{ for (n = 0; n < 1000; n++) lines[n] = a b; print "set"; fflush(); while (1) system("sleep 1000") }}' &
        sync; sync /root/note; sleep 1000; echo "$kept""#
    )
}

fn named(running: &Running<'_>, name: &str) -> Value {
    let is_it = |pid: &&Value| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.trim_end().ends_with(name)
    };
    running.processes().iter().find(is_it).unwrap_or_else(|| panic!("{name} runs")).clone()
}

#[test]
fn nothing_is_left_of_what_it_had_in_memory() {
    let place = Place::new();
    let marker = Marker::new();
    let around = [place.path(""), "/dev/shm".into(), "/run/memdev".into(), "/run/lock".into()];
    for mode in [&[][..], &["--privileged"]] {
        for end in [Signal::TERM, Signal::KILL] {
            let mut running = place.start(mode, &script(&marker));
            assert_eq!(running.line(), "set\n");
            let device = PathBuf::from(running.attachment()["device"].as_str().expect("text"));
            let shell = named(&running, "sh");
            crate::support::wait_until("it is on the disk", || {
                let flushed = Command::new("blockdev").arg("--flushbufs").arg(&device).status();
                flushed.expect("blockdev can be run").success() && marker.is_in_file(&device)
            });
            // It is found where it is: so it would be found later.
            assert!(marker.is_in_memory(&shell), "{mode:?}: the shell's memory");
            assert!(marker.is_in_memory(&named(&running, "awk")), "{mode:?}: the editor's memory");
            for path in ["root/note", "tmp/note.swp", "run/note", "dev/shm/note"] {
                let seen = PathBuf::from(format!("/proc/{shell}/root")).join(path);
                assert!(marker.is_in_file(&seen), "{mode:?}: {path}");
            }
            let (processes, gone) = (running.processes(), running.device());
            kill(&running.launcher(), end);
            running.assert_gone(&processes, &gone);
            if end == Signal::KILL {
                place.sh(&[], "true");
            }
            assert!(!marker.is_in_file(&device), "{mode:?}: the device");
            assert!(!marker.is_in_file(&image()), "{mode:?}: the image");
            for directory in &around {
                assert_eq!(marker.files_in(directory), Vec::<PathBuf>::new(), "{mode:?}");
            }
            place.assert_empty();
        }
    }
}

/// What is typed and shown goes through the launcher's memory, which is in no control group that keeps it from swap. It lay on its
/// stack for as long as nothing else was shown.
#[test]
fn nothing_that_is_typed_or_shown_stays_with_the_launcher() {
    let place = Place::new();
    let marker = Marker::new();
    let [front, back] = &marker.halves;
    let mut terminal = Terminal::new();
    let line = format!(
        "a={front}; b={back}; kept=$a$b; echo \"$kept\"; read typed; echo taken; sleep 1000; echo $typed$kept"
    );
    let mut child = terminal.start(place.run(&[], &["sh", "-c", &line]));
    terminal.expect(&marker.whole());
    // Typed, it is shown, too.
    terminal.write(&format!("{}\n", marker.whole()));
    terminal.expect(&marker.whole());
    terminal.expect("taken");
    let written = &place.written("root")[0];
    let inside = place.written("root")[0]["init"].clone();
    let children = fs::read_to_string(format!("/proc/{inside}/task/{inside}/children")).expect("it runs");
    let shell: u64 = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("the shell");
    assert!(marker.is_in_memory(&shell.into()), "it is found where it is");
    // What is shown can be seen a moment before it is forgotten.
    crate::support::wait_until("the launcher has forgotten it", || {
        !marker.is_in_memory(&written["launcher"])
    });
    kill(&child.id().into(), Signal::TERM);
    child.wait().expect("its end");
    place.assert_empty();
}
