//! More commands in a private root that runs.

use rustix::process::Signal;

use super::machine::{Place, kill};
use crate::interop_support::said;

#[test]
fn the_second_command_sees_what_the_first_does() {
    let place = Place::new();
    for mode in [&["--name", "box"][..], &["--name", "box", "--privileged", "--net", "none"]] {
        // Who has entered goes with the session: so that ends when they have left, and are told of.
        let script = "mkfifo /run/fifo; trap 'cat /etc/two; exit 0' USR1; echo one >/etc/one; mkdir -p /run/x; \
            sleep 1000 & echo set; read x </run/fifo; echo $x; while :; do sleep 0.05; done";
        let mut running = place.start(mode, script);
        assert_eq!(running.line(), "set\n");
        let enter = |script: &str| {
            let mut command = place.memdev("enter", &["box", "--"]);
            let output = command.args(["sh", "-c", script]).output().expect("memdev can be run");
            assert!(output.status.success(), "{script}: {}", said(&output));
            said(&output)
        };
        assert_eq!(
            enter("cat /etc/one; hostname; ls -d /run/x; cat /proc/1/comm"),
            "one\nbox\n/run/x\nmemdev-init\n"
        );
        let script = "grep -E 'Cap(Eff|Bnd|Prm)|Uid' /proc/self/status; cat /proc/self/uid_map";
        let own = enter(&format!("nsenter --help >/dev/null; {script}"));
        let uids = if mode.len() > 2 { "0 0 4294967295" } else { "65536" };
        let shown = own.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(shown.ends_with(uids), "{shown}");
        assert!(!own.contains("CapBnd:\t000001ffffffffff") || mode.len() == 2, "{own}");
        // Nothing of the host came along.
        assert_eq!(enter("ls /proc/self/fd | wc -l"), "4\n");
        assert_eq!(enter("mknod /tmp/n b 7 0 2>/dev/null || echo refused"), "refused\n");
        enter("echo two >/etc/two; echo through >/run/fifo");
        assert_eq!(running.line(), "through\n");
        running.tell();
        assert_eq!(running.finish(), (Some(0), "two\n".to_owned()), "{mode:?}");
        place.assert_empty();
    }
}

#[test]
fn its_status_is_the_commands() {
    let place = Place::new();
    let running = place.start(&["--name", "box"], "sleep 1000");
    let enter = |command: &[&str]| {
        let mut enter = place.memdev("enter", &["box", "--user", "www-data", "--"]);
        enter.args(command).output().expect("memdev can be run")
    };
    assert_eq!(enter(&["sh", "-c", "exit 9"]).status.code(), Some(9));
    assert_eq!(enter(&["sh", "-c", "kill -USR1 $$"]).status.code(), Some(138));
    let missing = enter(&["/no/such"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(said(&missing).starts_with("memdev: Cannot run /no/such"), "{}", said(&missing));
    let mut nowhere = place.memdev("enter", &["box", "--workdir", "/no/such", "--", "id"]);
    let nowhere = nowhere.output().expect("memdev can be run");
    let line =
        "memdev: Cannot begin in /no/such: no such file or directory; make it, or give another --workdir\n";
    assert_eq!((nowhere.status.code(), &*said(&nowhere)), (Some(1), line));
    assert_eq!(said(&enter(&["id", "-un"])), "www-data\n");
    let list = place.memdev("enter", &["--list"]).output().unwrap();
    assert!(said(&list).starts_with("box: "), "{}", said(&list));
    let output = place.memdev("enter", &["other"]).output().unwrap();
    assert_eq!(said(&output), "memdev: No private root is called 'other': there is box\n");
    kill(&running.launcher(), Signal::TERM);
    running.finish();
    assert_eq!(said(&place.memdev("enter", &["--list"]).output().unwrap()), "");
}

#[test]
fn it_ends_with_the_session() {
    let place = Place::new();
    let running = place.start(&["--name", "box"], "sleep 1000");
    let (processes, device) = (running.processes(), running.device());
    let mut command = place.memdev("enter", &["box", "--", "sh", "-c", "echo inside; sleep 1000"]);
    let mut entered = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 7];
    std::io::Read::read_exact(&mut entered.stdout.take().unwrap(), &mut said).unwrap();
    assert_eq!(&said, b"inside\n");
    kill(&running.session()["init"], Signal::KILL);
    assert_eq!(entered.wait().unwrap().code(), Some(137));
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn it_ends_with_whoever_entered() {
    let place = Place::new();
    let mut running = place.start(&["--name", "box"], "sleep 1000 & echo set; wait");
    assert_eq!(running.line(), "set\n");
    let before = running.processes();
    let mut command = place.memdev("enter", &["box", "--", "sh", "-c", "echo inside; sleep 1000"]);
    let mut entered = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 7];
    std::io::Read::read_exact(entered.stdout.as_mut().unwrap(), &mut said).unwrap();
    let inside = running.processes();
    let shell = inside.iter().find(|pid| !before.contains(pid)).expect("it is inside").clone();
    entered.kill().unwrap();
    entered.wait().unwrap();
    crate::support::wait_until("it has gone", || super::machine::has_ended(&shell));
}
