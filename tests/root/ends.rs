//! However a private root ends, nothing of it is left: no process, no device, no mount, no file.

use std::fs;

use rustix::process::Signal;

use super::machine::{Place, kill, once_told};

/// Processes inside that do not want to end, beside the shell.
const STUBBORN: &str =
    "trap '' HUP TERM INT; (trap '' HUP TERM; sleep 1000) & setsid sleep 1000 & wait; sleep 1000";

#[test]
fn background_processes_do_not_outlive_it() {
    let place = Place::new();
    assert_eq!(place.sh(&[], "setsid sleep 1000 >/dev/null 2>&1 & echo over"), "over\n");
    // Not those either that nobody waits for any more.
    let script = format!("(setsid sleep 1000 >/dev/null &); sleep 1000 & {}", once_told("exit 3"));
    let mut running = place.start(&[], &script);
    assert_eq!(running.line(), "set\n");
    let (processes, device) = (running.processes(), running.device());
    assert!(processes.len() >= 6, "{processes:?}");
    running.tell();
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn killed_launcher() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.device());
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
    let (processes, device) = (running.processes(), running.device());
    kill(&running.session()["init"], Signal::KILL);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn killed_server() {
    let place = Place::new();
    let running = place.start(&[], STUBBORN);
    let (processes, device) = (running.processes(), running.device());
    kill(&running.attachment()["pid"], Signal::KILL);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

/// A server that does not answer keeps whoever waits for it from being killed; so the server has to go, too.
#[test]
fn stopped_server_and_killed_process_1() {
    let place = Place::new();
    let running = place.start(&[], "while :; do date >/file; sync; done");
    let (processes, device) = (running.processes(), running.device());
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
    let (processes, device) = (running.processes(), running.device());
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

/// What on this machine names the directory of this test: processes by their arguments, mounts, sockets, cgroups. (Others
/// work on it, too, so not everything that is there afterwards and was not before has been left by this.)
fn holdings(place: &Place) -> Vec<String> {
    let own = place.state().display().to_string();
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        all.push(String::from_utf8_lossy(&arguments).replace('\0', " "));
    }
    for table in ["/proc/self/mountinfo", "/proc/net/unix"] {
        all.extend(fs::read_to_string(table).unwrap().lines().map(str::to_owned));
    }
    all.retain(|line| line.contains(&own));
    all
}

#[test]
fn many_leave_nothing() {
    let place = Place::new();
    for n in 0..25 {
        let options = if n % 5 == 0 { &["--privileged", "--net", "none"][..] } else { &[] };
        let write = "setsid sleep 1000 >/dev/null & dd if=/dev/zero of=/x bs=1M count=4 2>/dev/null";
        let mut running = place.start(options, &format!("{write}; {}", once_told("exit 0")));
        assert_eq!(running.line(), "set\n");
        let (processes, device) = (running.processes(), running.device());
        assert!(holdings(&place).len() >= 2, "launcher and process 1 are found");
        running.tell();
        running.assert_gone(&processes, &device);
        place.assert_empty();
    }
    assert_eq!(holdings(&place), [""; 0]);
}

/// Neither while it runs nor afterwards is anything of it to be seen in another mount table.
#[test]
fn nobody_sees_the_mounts() {
    let place = Place::new();
    // Others mount on this machine, too, so not everything that comes and goes is this one's.
    let table = |device: &str| {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines().filter(|line| line.contains(&format!(" {device} "))).count()
    };
    // All that it starts is there when it says so.
    let script = "mount -t tmpfs none /srv; sleep 1000 & echo set; wait";
    let mut running = place.start(&["--bind", "/usr:/mnt"], script);
    assert_eq!(running.line(), "set\n");
    let device = running.attachment()["device"].as_str().unwrap().to_owned();
    assert_eq!(table(&device), 0);
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
    place.assert_empty();
}
