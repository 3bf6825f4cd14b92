//! However a private root ends, nothing of it is left: no process, no device, no mount, no file.

use std::fs;
use std::path::Path;

use rustix::process::Signal;

use super::machine::{Place, kill};

/// Processes inside that do not want to end, beside the shell.
const STUBBORN: &str =
    "trap '' HUP TERM INT; (trap '' HUP TERM; sleep 1000) & setsid sleep 1000 & wait; sleep 1000";

#[test]
fn background_processes_do_not_outlive_it() {
    let place = Place::new();
    assert_eq!(place.sh(&[], "setsid sleep 1000 >/dev/null 2>&1 & echo over"), "over\n");
    // Not those either that nobody waits for any more.
    let mut running = place.start(
        &[],
        "(setsid sleep 1000 >/dev/null &); sleep 1000 & echo set; read x </dev/tty; sleep 1; exit 3",
    );
    assert_eq!(running.line(), "set\n");
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    assert!(processes.len() >= 6, "{processes:?}");
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn killed_launcher() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    kill(&running.launcher(), Signal::KILL);
    running.assert_gone(&processes, &device);
    // Its files are found to be abandoned by the next one.
    place.sh(&[], "true");
    place.assert_empty();
}

#[test]
fn killed_process_1() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    kill(&running.session()["init"], Signal::KILL);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn killed_server() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    kill(&running.attachment()["pid"], Signal::KILL);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

/// A server that does not answer keeps whoever waits for it from being killed; so the server has to go, too.
#[test]
fn stopped_server_and_killed_process_1() {
    let place = Place::new();
    let running = place.start(&[], "while :; do date >/file; sync; done");
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    kill(&running.attachment()["pid"], Signal::STOP);
    std::thread::sleep(std::time::Duration::from_millis(300));
    kill(&running.session()["init"], Signal::KILL);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn hang_up() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.attachment()["device"].clone());
    kill(&running.launcher(), Signal::HUP);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn signals_are_the_commands() {
    let place = Place::new();
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::USR1, "USR1")] {
        let script = format!("trap 'echo got {name}; exit 9' {name}; echo set; while :; do sleep 0.05; done");
        let mut running = place.start(&[], &script);
        assert_eq!(running.line(), "set\n");
        kill(&running.launcher(), signal);
        assert_eq!(running.finish(), (Some(9), format!("got {name}\n")));
        place.assert_empty();
    }
    let mut running = place.start(&[], "echo set; exec sleep 1000");
    assert_eq!(running.line(), "set\n");
    kill(&running.launcher(), Signal::TERM);
    assert_eq!(running.finish().0, Some(143));
}

/// What the machine holds, as far as it could be left by private roots: mounts of this namespace, cgroups, sockets by
/// name, processes by name. Others work on it, too, so loop devices are looked for by what is written down of them.
fn holdings() -> Vec<String> {
    fn directories(path: &Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                all.push(entry.path().display().to_string());
                directories(&entry.path(), all);
            }
        }
    }
    let lines = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut all: Vec<_> = lines("/proc/self/mountinfo").lines().map(str::to_owned).collect();
    directories(Path::new("/sys/fs/cgroup"), &mut all);
    all.extend(
        lines("/proc/net/unix").lines().filter(|line| line.contains("memdev-root")).map(str::to_owned),
    );
    all
}

#[test]
fn many_leave_nothing() {
    let place = Place::new();
    place.sh(&[], "true");
    let before = holdings();
    for n in 0..25 {
        let options = if n % 5 == 0 { &["--privileged", "--net", "none"][..] } else { &[] };
        // A device of its own each: what `sh` looks for is that nothing is written down of it any more.
        assert_eq!(place.sh(options, "echo x >/x; setsid sleep 1000 >/dev/null & echo over"), "over\n");
    }
    assert_eq!(holdings(), before);
}

/// Neither while it runs nor afterwards is anything of it to be seen in another mount table.
#[test]
fn nobody_sees_the_mounts() {
    let place = Place::new();
    let table = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = table();
    let mut running = place.start(&["--bind", "/usr:/mnt"], "mount -t tmpfs none /srv; echo set; sleep 1000");
    assert_eq!(running.line(), "set\n");
    assert_eq!(table(), before);
    let device = running.attachment()["device"].as_str().unwrap().to_owned();
    let inside: Vec<_> = running.processes().iter().skip(2).map(ToString::to_string).collect();
    let mut seen = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Ok(text) = fs::read_to_string(entry.path().join("mountinfo")) else { continue };
        if text.contains(&format!(" {device} ")) {
            assert!(inside.contains(&name), "process {name} has it mounted: {text}");
            seen += 1;
        }
    }
    assert!(seen >= 2, "those inside have");
    kill(&running.launcher(), Signal::TERM);
    running.finish();
    assert_eq!(table(), before);
}
