//! A session's processes are in a control group of its own: limits hold for all of them, and it goes with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use super::machine::{Place, Running, has_ended, kill};
use crate::interop_support::said;
use crate::support::wait_until;

impl Running<'_> {
    /// Its control groups.
    #[track_caller]
    pub fn groups(&self) -> Vec<PathBuf> {
        let session = self.session();
        let paths = session["cgroups"].as_array().expect("a list").iter();
        let paths: Vec<PathBuf> = paths.map(|path| path.as_str().expect("text").into()).collect();
        assert!(!paths.is_empty(), "it has none: {session}");
        paths
    }

    /// What is written in a file of one of them.
    #[track_caller]
    fn setting(&self, file: &str) -> String {
        let texts = self.groups().into_iter().filter_map(|group| fs::read_to_string(group.join(file)).ok());
        texts.map(|text| text.trim_end().to_owned()).next().unwrap_or_else(|| panic!("no {file}"))
    }

    /// Who is in the group that processes are in.
    #[track_caller]
    fn members(&self) -> Vec<String> {
        self.setting("inside/cgroup.procs").lines().map(str::to_owned).collect()
    }
}

#[track_caller]
fn assert_removed(groups: &[PathBuf]) {
    for group in groups {
        wait_until("the control group has been removed", || !group.exists());
    }
}

#[track_caller]
fn enter(place: &Place, session: &str, script: &str) -> (Option<i32>, String) {
    let mut command = place.memdev("enter", &[session, "--", "sh", "-c", script]);
    let output = command.output().expect("memdev can be run");
    (output.status.code(), said(&output))
}

#[test]
fn all_that_is_inside_is_in_a_group_that_looks_like_the_topmost() {
    let place = Place::new();
    for mode in [&["--name", "box"][..], &["--name", "box", "--privileged"]] {
        let running = place.start(mode, "sleep 1000 & setsid sleep 1000 & wait");
        let groups = running.groups();
        let (status, text) = enter(&place, "box", "cut -d: -f3 /proc/self/cgroup | sort -u; sleep 0.2");
        assert_eq!((status, &*text), (Some(0), "/\n"), "{mode:?}");
        // Process 1, the shell, and what it has started; the launcher and the daemon are not.
        wait_until("all are there", || running.members().len() == 4);
        let members = running.members();
        assert!(members.contains(&running.session()["init"].to_string()));
        assert!(!members.contains(&running.launcher().to_string()));
        assert!(!members.contains(&running.attachment()["pid"].to_string()));
        let mut command = place.memdev("enter", &["box", "--", "sleep", "1000"]);
        let mut entered = command.spawn().expect("memdev can be run");
        wait_until("the one that entered is there", || running.members().len() == 5);
        kill(&running.launcher(), Signal::TERM);
        assert_eq!(running.finish().0, Some(143));
        entered.wait().unwrap();
        assert_removed(&groups);
        place.assert_empty();
    }
}

#[test]
fn there_are_no_more_processes_than_the_limit() {
    let place = Place::new();
    for mode in [&["--name", "box"][..], &["--name", "box", "--privileged"]] {
        let options = [mode, &["--pids-limit", "20"]].concat();
        let running = place.start(&options, "bomb() { bomb | bomb & }; bomb 2>/dev/null; exec sleep 1000");
        let groups = running.groups();
        wait_until("processes have been refused", || {
            // The first version counts where it was tried, the second where the limit is.
            let counts = running.groups().into_iter().flat_map(|group| {
                ["pids.events", "inside/pids.events"].map(|file| fs::read_to_string(group.join(file)).ok())
            });
            counts.flatten().any(|text| text.split_whitespace().last().is_some_and(|count| count != "0"))
        });
        assert_eq!(running.setting("pids.max"), "20");
        for _ in 0..20 {
            let now: u32 = running.setting("pids.current").parse().unwrap();
            assert!(now <= 20, "{now} processes");
        }
        // Others are not hindered.
        assert_eq!(place.run(&[], &["true"]).output().unwrap().status.code(), Some(0));
        kill(&running.launcher(), Signal::TERM);
        assert_eq!(running.finish().0, Some(143), "{mode:?}");
        assert_removed(&groups);
        place.assert_empty();
    }
}

/// Takes 256 MiB of memory.
const HOG: &str = "exec dd if=/dev/zero of=/dev/null bs=256M count=1 2>/dev/null";

#[test]
fn who_takes_more_memory_than_the_limit_is_killed_inside() {
    let (place, elsewhere) = (Place::new(), Place::new());
    let other = elsewhere.start(&["--name", "other"], "sleep 1000");
    for mode in [&[][..], &["--privileged"]] {
        let options = [&["--memory-limit", "64M"], mode].concat();
        let hog = place.run(&options, &["sh", "-c", HOG]).output().unwrap();
        assert_eq!((hog.status.code(), &*said(&hog)), (Some(137), ""), "{mode:?}");
        // Without the limit it is not: so it was the limit.
        let script = "head -c 256M /dev/zero | tail -c 128M | wc -c";
        assert_eq!(place.sh(mode, script), "134217728\n");
        let limited = place.run(&options, &["sh", "-c", script]).output().unwrap();
        assert!(!said(&limited).contains("134217728"), "{mode:?}: {}", said(&limited));
        // What is in files in memory counts, too.
        for path in ["/tmp/x", "/run/x", "/dev/shm/x"] {
            let script = format!("head -c 100M /dev/zero >{path}; echo $?");
            let filled = place.run(&options, &["sh", "-c", &script]).output().unwrap();
            // The shell as well, if it wants any more.
            let killed = filled.status.code() == Some(137) || filled.stdout == b"137\n";
            assert!(killed, "{mode:?}: {path}: {}", said(&filled));
        }
        // What the kernel keeps of files on the disk goes when room is needed.
        let script = "head -c 200M /dev/zero >/root/x && sync && cat /root/x /root/x | wc -c";
        assert_eq!(place.sh(&options, script), "419430400\n", "{mode:?}");
    }
    assert_eq!(enter(&elsewhere, "other", "echo here"), (Some(0), "here\n".to_owned()));
    kill(&other.launcher(), Signal::TERM);
    other.finish();
    elsewhere.assert_empty();
}

#[test]
fn a_fork_has_the_limits_of_what_it_is_of() {
    let place = Place::new();
    let one = place.start(&["--name", "one", "--pids-limit", "30", "--memory-limit", "64M"], "sleep 1000");
    let two = place.start_fork("one", &["--name", "two"], "sleep 1000");
    assert_eq!(two.setting("pids.max"), "30");
    assert_eq!(two.session()["limits"], one.session()["limits"]);
    let (own, forks) = (one.groups(), two.groups());
    assert!(own.iter().all(|group| !forks.contains(group)), "each has its own: {own:?} {forks:?}");
    assert_eq!(enter(&place, "two", HOG).0, Some(137));
    kill(&one.launcher(), Signal::TERM);
    one.finish();
    assert_removed(&own);
    assert!(forks.iter().all(|group| group.exists()));
    kill(&two.launcher(), Signal::TERM);
    two.finish();
    assert_removed(&forks);
    place.assert_empty();
}

/// Groups below the session's own, which root inside can make only where it is the host's, are no reason to stay.
const NEST: &str = r#"unshare -UrmC sh -c 'for kind in "cgroup2 none" "cgroup -o pids"; do
    mount -t ${kind%% *} ${kind#* } none /mnt 2>/dev/null && mkdir -p /mnt/a/b && echo 0 >/mnt/a/b/cgroup.procs && echo nested && exec sleep 1000
done; echo nested; exec sleep 1000'"#;

#[test]
fn however_it_ends_the_group_goes_with_it() {
    let place = Place::new();
    for mode in [&[][..], &["--privileged"]] {
        for who in ["launcher", "init", "server", "command"] {
            let mut running = place.start(mode, NEST);
            assert_eq!(running.line(), "nested\n");
            let (processes, device, groups) = (running.processes(), running.device(), running.groups());
            match who {
                "launcher" => kill(&running.launcher(), Signal::KILL),
                "init" => kill(&running.session()["init"], Signal::KILL),
                "server" => kill(&running.attachment()["pid"], Signal::KILL),
                _ => kill(&running.launcher(), Signal::TERM),
            }
            running.assert_gone(&processes, &device);
            if who == "launcher" {
                // It is there until somebody finds the session abandoned.
                assert!(groups.iter().any(|group| group.exists()), "{groups:?}");
                place.sh(&[], "true");
            }
            assert_removed(&groups);
            place.assert_empty();
        }
    }
}

/// A process of the session's that nobody else would end is found by the group: here one that is in it, and no more inside than
/// this test is.
#[test]
fn what_an_abandoned_group_holds_is_killed() {
    let place = Place::new();
    let running = place.start(&[], "sleep 1000");
    let groups = running.groups();
    let mut stray = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
    for group in &groups {
        fs::write(group.join("inside/cgroup.procs"), stray.id().to_string()).expect("moving a process");
    }
    let (processes, device) = (running.processes(), running.device());
    kill(&running.launcher(), Signal::KILL);
    running.assert_gone(&processes, &device);
    assert!(!has_ended(&stray.id().into()));
    place.sh(&[], "true");
    assert_removed(&groups);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&stray.wait().unwrap()), Some(9));
    place.assert_empty();
}

#[test]
fn what_cannot_be_had_is_refused_in_a_line() {
    let place = Place::new();
    let refused = |options: &[&str], status: i32, expected: &str| {
        let output = place.run(options, &["true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
        place.assert_empty();
    };
    refused(&["--pids-limit", "1"], 2, "1 is not in 2..");
    refused(&["--memory-limit", "1M"], 1, "A session does not start in less than 4 MiB of memory");
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let line = "Cannot promise that nothing is swapped out: version 1 of control groups cannot keep a group from it; \
            use --swap avoid";
        refused(&["--swap", "never"], 1, line);
    }
    let plan = place.run(&["--dry-run", "--pids-limit", "9", "--memory-limit", "64M"], &[]).output().unwrap();
    let expected = "make a control group for its processes: at most 9 processes, at most 67108864 bytes of memory, no swap";
    assert!(said(&plan).contains(expected), "{}", said(&plan));
}

#[test]
fn an_ordinary_user_without_a_group_is_told_so() {
    let place = Place::of_user(true);
    let text = String::from_utf8(place.attempt(&[], "true").stderr).unwrap();
    assert!(text.contains("; no control group of its own (none is delegated to this user)"), "{text}");
    let output = place.run(&["-q", "--pids-limit", "9"], &["true"]).output().unwrap();
    let expected = "memdev: Cannot limit processes: none is delegated to this user; start it by 'systemd-run --user --scope'";
    assert!(said(&output).starts_with(expected), "{}", said(&output));
    assert_eq!((output.status.code(), said(&output).lines().count()), (Some(1), 1));
    place.assert_empty();
}

/// A crash leaves nothing of what was in memory, neither in a file nor with a program of the host's that collects cores.
#[test]
fn no_core_files() {
    let place = Place::new();
    for mode in [&["--name", "box"][..], &["--name", "box", "--privileged"]] {
        let running = place.start(mode, "sleep 1000");
        let script = "grep core /proc/self/limits | tr -s ' '; cat /proc/self/coredump_filter; ulimit -c unlimited 2>/dev/null || echo refused; \
            cd /tmp; sh -c 'kill -SEGV $$'; ls";
        let (_, text) = enter(&place, "box", script);
        let expected = "Max core file size 1 1 bytes \n00000000\nrefused\n";
        let none = expected.replace(" 1 1 ", " 0 0 ");
        assert!(text.starts_with(expected) || text.starts_with(&none), "{mode:?}: {text}");
        assert!(!text.contains("core."), "{text}");
        for pid in
            [running.launcher(), running.session()["init"].clone(), running.attachment()["pid"].clone()]
        {
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
            let words: Vec<_> = line.split_whitespace().skip(4).take(2).collect();
            assert!(words == ["1", "1"] || words == ["0", "0"], "{pid}: {line}");
        }
        kill(&running.launcher(), Signal::TERM);
        running.finish();
    }
}
