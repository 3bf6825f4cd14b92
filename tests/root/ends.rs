//! However a private root ends, nothing of it is left: no process, no device, no mount, no file.

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
