//! The whole world twice: private roots that are forks of others.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::machine::{Place, Running, has_ended, image, kill};
use crate::interop_support::{run, said, uri};
use crate::support::server::Serve;
use crate::support::{Image, wait_until};

/// What a command in a fork of `session` says, which has to succeed.
#[track_caller]
fn fork(place: &Place, session: &str, options: &[&str], script: &str) -> String {
    let mut command = place.memdev("fork", options);
    let output = command.args([session, "--", "sh", "-c", script]).output().expect("memdev can be run");
    assert!(output.status.success(), "{script}: {}\n{}", output.status, said(&output));
    said(&output)
}

/// What a command in the session says.
#[track_caller]
fn enter(place: &Place, session: &str, script: &str) -> String {
    let mut command = place.memdev("enter", &[session]);
    let output = command.args(["--", "sh", "-c", script]).output().expect("memdev can be run");
    assert!(output.status.success(), "{script}: {}\n{}", output.status, said(&output));
    said(&output)
}

#[track_caller]
fn end(running: Running<'_>) {
    let (processes, device) = (running.processes(), running.device());
    kill(&running.launcher(), Signal::HUP);
    running.assert_gone(&processes, &device);
}

#[test]
fn a_fork_is_the_same_and_apart_from_then_on() {
    let place = Place::new();
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "of the host\n").unwrap();
    let bind = format!("{}:/bound:ro", shared.display());
    for mode in [&[][..], &["--privileged", "--net", "none"]] {
        let options = [&["--name", "one", "--bind", &bind], mode].concat();
        let script = "echo etc >/etc/made; echo tmp >/tmp/made; echo run >/run/made; chmod 600 /tmp/made; \
            chown www-data /tmp/made; echo set; sleep 1000";
        let mut running = place.start(&options, script);
        assert_eq!(running.line(), "set\n");
        let script = "cat /etc/made /tmp/made /run/made /bound/file; stat -c '%U %a' /tmp/made; hostname; ls /sys/class/net | wc -l; \
            ls -d /proc/[0-9]* | wc -l; echo fork >/etc/made; echo fork >/tmp/made; touch /etc/forks; touch /bound/x 2>/dev/null || echo ro";
        let text = fork(&place, "one", &["--name", "two"], script);
        let networks = if mode.is_empty() { fs::read_dir("/sys/class/net").unwrap().count() } else { 1 };
        // Processes are not copied: there are the shell's, process 1, and those of the pipe.
        let expected = format!("etc\ntmp\nrun\nof the host\nwww-data 600\ntwo\n{networks}\n");
        assert!(text.starts_with(&expected) && text.ends_with("\nro\n"), "{mode:?}: {text}");
        let text = enter(
            &place,
            "one",
            "cat /etc/made /tmp/made; ls /etc/forks 2>&1 | grep -c No; touch /etc/later",
        );
        assert_eq!(text, "etc\ntmp\n1\n", "{mode:?}");
        let rights = enter(&place, "one", "cat /proc/self/uid_map | wc -c; grep CapBnd /proc/self/status");
        assert_eq!(
            fork(&place, "one", &[], "cat /proc/self/uid_map | wc -c; grep CapBnd /proc/self/status"),
            rights
        );
        end(running);
        place.assert_empty();
    }
}

#[test]
fn what_is_mounted_inside_is_mounted_in_the_fork() {
    let place = Place::new();
    let script = "set -e; mkdir /m /o /p; mount -t tmpfs -o size=3m,noexec none /m; echo one >/m/file; ln /m/file /m/same
        mkfifo /m/fifo; mount -t tmpfs -o size=1m none '/m/fifo' 2>/dev/null || :
        mkdir '/m/a b'; mount -t tmpfs -o ro,size=1m none '/m/a b'
        mount --bind /usr /opt; mount --bind -o ro /m /srv; mount -t proc none /p
        mkdir /tmp/u /tmp/w; mount -t overlay -o lowerdir=/etc,upperdir=/tmp/u,workdir=/tmp/w none /o; echo new >/o/new; rm /o/hostname
        echo set; sleep 1000";
    let mut running = place.start(&["--name", "one"], script);
    assert_eq!(running.line(), "set\n");
    let script = "set -e; cat /m/file /o/new; test -p /m/fifo; test /m/file -ef /m/same; test -x /opt/bin/env; test ! -e /o/hostname; test -d /p/1
        cat /srv/file; touch /srv/x 2>/dev/null || echo ro; touch '/m/a b/x' 2>/dev/null || echo ro
        grep ' /m ' /proc/mounts | grep -o -e noexec -e size=3072k
        echo two >/m/file; echo two >/o/new; dd if=/dev/zero of=/m/big bs=1M count=5 2>/dev/null || echo full";
    let text = fork(&place, "one", &[], script);
    assert_eq!(text, "one\nnew\none\nro\nro\nnoexec\nsize=3072k\nfull\n");
    assert_eq!(enter(&place, "one", "cat /m/file /o/new; ls /m | wc -l"), "one\nnew\n4\n");
    end(running);
    place.assert_empty();
}

#[test]
fn a_fork_outlives_what_it_is_of_and_can_be_forked() {
    let place = Place::new();
    let mut one = place.start(&["--name", "one"], "echo 1 >/etc/1; dd if=/dev/urandom of=/big bs=1M count=30 2>/dev/null; md5sum /big >/sum; echo set; sleep 1000");
    assert_eq!(one.line(), "set\n");
    let mut two = place.start_fork("one", &["--name", "two"], "echo 2 >/etc/2; echo set; sleep 1000");
    assert_eq!(two.line(), "set\n");
    let mut three = place.start_fork("two", &["--name", "three"], "echo 3 >/etc/3; echo set; sleep 1000");
    assert_eq!(three.line(), "set\n");
    let daemon = one.attachment()["pid"].clone();
    assert_eq!(
        (two.attachment()["pid"].clone(), three.attachment()["pid"].clone()),
        (daemon.clone(), daemon.clone())
    );
    // The first goes in order, the second is killed: neither is missed.
    let (processes, device) = (one.own_processes(), one.device());
    kill(&one.launcher(), Signal::TERM);
    one.assert_gone(&processes, &device);
    assert_eq!(enter(&place, "two", "cat /etc/1 /etc/2; ls /etc/3 2>&1 | grep -c No"), "1\n2\n1\n");
    let (processes, device) = (two.own_processes(), two.device());
    kill(&two.launcher(), Signal::KILL);
    two.assert_gone(&processes, &device);
    assert!(!has_ended(&daemon));
    let script = "cat /etc/1 /etc/2 /etc/3; md5sum --quiet -c /sum && echo whole";
    assert_eq!(enter(&place, "three", script), "1\n2\n3\nwhole\n");
    let (processes, device) = (three.processes(), three.device());
    kill(&three.launcher(), Signal::TERM);
    three.assert_gone(&processes, &device);
    wait_until("the daemon has ended", || has_ended(&daemon));
    // What the killed launcher has written down.
    place.sh(&[], "true");
    place.assert_empty();
}

#[test]
fn a_daemon_that_dies_ends_all_that_it_serves() {
    let place = Place::new();
    let one = place.start(&["--name", "one"], "sleep 1000");
    let two = place.start_fork("one", &["--name", "two"], "while :; do date >/file; sync /file; done");
    let (of_one, of_two) = ((one.processes(), one.device()), (two.processes(), two.device()));
    kill(&one.attachment()["pid"], Signal::KILL);
    one.assert_gone(&of_one.0, &of_one.1);
    two.assert_gone(&of_two.0, &of_two.1);
    place.assert_empty();
}

/// The kernel lets go of the file of one fork, not of the daemon's others.
#[test]
fn an_aborted_file_ends_one_fork_only() {
    let place = Place::new();
    let one = place.start(&["--name", "one"], "sleep 1000");
    let two = place.start_fork("one", &["--name", "two"], "while :; do date >/file; sync /file; done");
    let of_two = (two.own_processes(), two.device());
    let path = two.attachment()["device"].as_str().expect("a device").to_owned();
    let connections = place.path("connections");
    fs::create_dir(&connections).unwrap();
    run("mount", ["-t".as_ref(), "fusectl".as_ref(), "none".as_ref(), connections.as_os_str()]);
    let number = run("losetup", ["--list", "--noheadings", "--output", "BACK-MAJ:MIN", &path]);
    let number = number.trim().rsplit_once(':').expect("a device's numbers").1;
    fs::write(connections.join(number).join("abort"), "1").unwrap();
    run("umount", [&connections]);
    fs::remove_dir(&connections).unwrap();
    kill(&two.launcher(), Signal::HUP);
    two.assert_gone(&of_two.0, &of_two.1);
    assert_eq!(enter(&place, "one", "echo it goes on >/file; sync /file; cat /file"), "it goes on\n");
    assert_eq!(fork(&place, "one", &[], "cat /file"), "it goes on\n");
    end(one);
    place.assert_empty();
}

/// A daemon that does not answer: the session that ends takes its forks with it, rather than stay for ever.
#[test]
fn a_stopped_daemon_is_not_waited_for() {
    let place = Place::new();
    let one = place.start(&["--name", "one"], "while :; do date >/file; sync /file; done");
    let two = place.start_fork("one", &["--name", "two"], "sleep 1000");
    let (of_one, of_two) = ((one.processes(), one.device()), (two.processes(), two.device()));
    kill(&one.attachment()["pid"], Signal::STOP);
    std::thread::sleep(Duration::from_millis(300));
    kill(&one.session()["init"], Signal::KILL);
    one.assert_gone(&of_one.0, &of_one.1);
    two.assert_gone(&of_two.0, &of_two.1);
    place.assert_empty();
}

/// The disk of a fork, copied while it stands still.
fn copy_of_disk(place: &Place, running: &Running<'_>) -> std::path::PathBuf {
    let copy = place.path("copy.img");
    let root = format!("/proc/{}/root", running.session()["init"]);
    run("fsfreeze", ["--freeze", &root]);
    let device = running.attachment()["device"].as_str().unwrap().to_owned();
    let done = Command::new("dd")
        .args([format!("if={device}"), format!("of={}", copy.display())])
        .args(["bs=1M", "conv=sparse", "status=none"])
        .status();
    run("fsfreeze", ["--unfreeze", &root]);
    assert!(done.unwrap().success());
    copy
}

#[test]
fn what_is_forked_under_load_is_in_order() {
    let place = Place::new();
    // Each line of the second file comes after the same of the first; files come and go, one stays open without a name.
    let script = "exec 5>/unnamed; rm /unnamed; for n in $(seq 100000); do echo $n >>/a; echo $n >>/b; echo x >&5; \
        dd if=/dev/urandom of=/f$((n % 9)) bs=64k count=3 2>/dev/null; rm -f /f$(((n + 4) % 9)); done";
    let running = place.start(&["--name", "one"], script);
    for n in 0..3 {
        wait_until("something is written", || {
            enter(&place, "one", "cat /b 2>/dev/null | wc -l").trim().parse::<u32>().unwrap() > 20 * (n + 1)
        });
        let two = place.start_fork("one", &["--name", "two"], "sleep 1000");
        let script = "echo $(tail -n 1 /a) $(tail -n 1 /b)";
        let lines = enter(&place, "two", script);
        let numbers: Vec<u32> = lines.split_whitespace().map(|word| word.parse().unwrap()).collect();
        assert!(numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1, "{lines}");
        let copy = copy_of_disk(&place, &two);
        // What was open without a name is on the list of orphans, which is no damage.
        let repaired = Command::new("e2fsck").args(["-p".as_ref(), copy.as_os_str()]).output().unwrap();
        assert!(matches!(repaired.status.code(), Some(0 | 1)), "{}", said(&repaired));
        run("e2fsck", ["-fn".as_ref(), copy.as_os_str()]);
        let (processes, device) = (two.own_processes(), two.device());
        kill(&two.launcher(), Signal::HUP);
        two.assert_gone(&processes, &device);
    }
    // It goes on.
    let before = enter(&place, "one", "wc -l </a");
    wait_until("it goes on", || enter(&place, "one", "wc -l </a") != before);
    end(running);
    place.assert_empty();
}

/// Whether the session's file system takes a write, and does not hold up who wants to.
#[track_caller]
fn assert_goes_on(place: &Place) {
    let mut child = place
        .memdev("enter", &["one", "--", "sh", "-c", "date >/etc/goes-on && sync /etc/goes-on"])
        .spawn()
        .unwrap();
    wait_until("its file system is thawed", || child.try_wait().unwrap().is_some());
    assert!(child.wait().unwrap().success());
}

#[test]
fn who_freezes_and_is_killed_leaves_it_thawed() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "while :; do date >>/file; sync /file; done");
    for n in 0..25 {
        let mut command = place.memdev("fork", &["one", "--", "true"]);
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(n * 6));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_goes_on(&place);
    }
    end(running);
    // What the killed ones have written down.
    place.sh(&[], "true");
    place.assert_empty();
}

#[test]
fn nor_does_the_death_of_who_watches_over_that() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "while :; do date >>/file; sync /file; done");
    let mut killed = 0;
    while killed < 5 {
        let child = place.memdev("fork", &["one", "--", "true"]).stderr(Stdio::piped()).spawn().unwrap();
        let own = format!("/proc/{0}/task/{0}/children", child.id());
        // It lives for some milliseconds.
        let watchdog = loop {
            let Ok(children) = fs::read_to_string(&own) else { break None };
            let is_it = |pid: &&str| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "memdev-freeze\n")
            };
            if let Some(pid) = children.split_whitespace().find(is_it) {
                break pid.parse::<i64>().ok();
            }
            if has_ended(&child.id().into()) {
                break None;
            }
        };
        if let Some(pid) =
            watchdog.and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
            && rustix::process::kill_process(pid, Signal::KILL).is_ok()
        {
            killed += 1;
        }
        let output = child.wait_with_output().unwrap();
        let text = said(&output);
        assert!(output.status.success() || text.starts_with("memdev: "), "{text}");
        assert_goes_on(&place);
    }
    end(running);
    place.assert_empty();
}

/// Both at once: then it is the session's own end that thaws it.
#[test]
fn a_session_that_stays_frozen_can_be_ended() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "while :; do date >>/file; sync /file; done");
    let (processes, device) = (running.processes(), running.device());
    run("fsfreeze", ["--freeze", &format!("/proc/{}/root", running.session()["init"])]);
    std::thread::sleep(Duration::from_millis(200));
    kill(&running.launcher(), Signal::HUP);
    running.assert_gone(&processes, &device);
    place.assert_empty();
}

#[test]
fn two_at_once_wait_for_each_other() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "while :; do date >>/file; done");
    let start = || {
        place
            .memdev("fork", &["one", "--", "cat", "/etc/hostname"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let all: Vec<_> = (0..6).map(|_| start()).collect();
    for child in all {
        let output = child.wait_with_output().unwrap();
        assert_eq!(said(&output), "memdev\n");
    }
    end(running);
    place.assert_empty();
}

#[test]
fn status_options_and_refusals() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "sleep 1000");
    let attempt = |options: &[&str], command: &[&str]| {
        let mut fork = place.memdev("fork", options);
        fork.arg("--").args(command).output().expect("memdev can be run")
    };
    assert_eq!(attempt(&["one"], &["sh", "-c", "exit 9"]).status.code(), Some(9));
    assert_eq!(attempt(&["one"], &["sh", "-c", "kill -USR1 $$"]).status.code(), Some(138));
    assert_eq!(attempt(&["one"], &["/no/such"]).status.code(), Some(127));
    let options =
        ["one", "--hostname", "kiosk", "--user", "www-data", "--workdir", "/var/mail", "--env", "A=b"];
    assert_eq!(
        said(&attempt(&options, &["sh", "-c", "hostname; id -un; pwd; echo $A"])),
        "kiosk\nwww-data\n/var/mail\nb\n"
    );
    let plan = said(&attempt(&["one", "--dry-run"], &["ls"]));
    assert!(
        plan.contains("freeze the file system of one, fork its disk") && plan.contains("mount anew"),
        "{plan}"
    );
    let refused = [
        (&["other"][..], 1, "No private root is called 'other': there is one"),
        (&["one", "--name", "one"], 1, "There is a session already that is called one"),
        (&["one", "--id", "x"], 2, "--id is for sessions of a server"),
        (&["a@b", "--name", "x"], 2, "--name is for private roots"),
        (&["a@b", "--control", "/no/such"], 2, "a command is for private roots"),
    ];
    for (options, status, expected) in refused {
        let output = attempt(options, &["true"]);
        let text = said(&output);
        assert!(text.contains(expected) && text.lines().count() == 1, "{options:?}: {text}");
        assert_eq!(output.status.code(), Some(status), "{options:?}");
    }
    end(running);
    place.assert_empty();

    let place = Place::of_user(true);
    let running = place.start(&["-q", "--name", "one"], "sleep 1000");
    let processes = running.processes();
    let output = place.memdev("fork", &["one"]).output().unwrap();
    assert!(said(&output).contains("without the rights of root cannot be forked"), "{}", said(&output));
    kill(&running.launcher(), Signal::HUP);
    running.assert_ended(&processes);
}

#[test]
fn a_partition_stays_one() {
    let place = Place::new();
    let disk = place.path("disk.img");
    let size = fs::metadata(image()).unwrap().len();
    fs::File::create(&disk).unwrap().set_len(size + (4 << 20)).unwrap();
    let mut table = Command::new("sfdisk").arg("-q").arg(&disk).stdin(Stdio::piped()).spawn().unwrap();
    let lines = format!("label: gpt\n4096,{}\n", size / 512);
    std::io::Write::write_all(&mut table.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    assert!(table.wait().unwrap().success());
    let (from, to) = (format!("if={}", image().display()), format!("of={}", disk.display()));
    run("dd", [from.as_str(), to.as_str(), "bs=1M", "seek=2", "conv=notrunc,sparse", "status=none"]);
    let mut command = place.memdev("run", &["--name", "one", "--backend", "fuse", "--partition", "1"]);
    command.arg(&disk).args(["--", "sh", "-c", "echo made >/etc/made; echo ready; sleep 1000"]);
    let running = place.begin(command);
    assert_eq!(fork(&place, "one", &[], "cat /etc/made"), "made\n");
    end(running);
    place.assert_empty();
}

/// The server forks the session; neither the fork nor the original is lost when the private roots end.
#[test]
fn a_named_session_is_forked_by_its_server() {
    let place = Place::new();
    let copy = Image::empty(place.path("debian.img"), fs::metadata(image()).unwrap().len());
    run("cp", ["--sparse=always".as_ref(), image().as_os_str(), copy.path.as_os_str()]);
    let socket = place.path("control");
    // Sessions stay for as long as it takes to come back to them.
    let server = Serve::image(&copy).args(["--linger", "1h", "--control", socket.to_str().unwrap()]).start();
    let session = uri(&server, "debian@kept");
    let mut command = place.memdev("run", &["--name", "one", "--backend", "fuse", "--session", &session]);
    command.args(["--", "sh", "-c", "echo made >/etc/made; echo tmp >/tmp/made; echo ready; sleep 1000"]);
    let one = place.begin(command);
    let output = place.memdev("fork", &["one", "--", "true"]).env_remove("MEMDEV_CONTROL").output().unwrap();
    assert!(said(&output).contains("say where its control socket is: --control PATH"), "{}", said(&output));
    let options = ["--control", socket.to_str().unwrap(), "--name", "two"];
    let mut two = place.start_fork(
        "one",
        &options,
        "cat /etc/made /tmp/made; echo two >/etc/made; sync /etc/made; sleep 1000",
    );
    assert_eq!((two.line(), two.line()), ("made\n".to_owned(), "tmp\n".to_owned()));
    let source = two.session()["source"].as_str().unwrap().to_owned();
    assert!(source.contains("debian@") && source != session, "{source}");
    assert_eq!(fork(&place, "two", &options[..2], "cat /etc/made"), "two\n");
    for running in [one, two] {
        let (processes, device) = (running.processes(), running.device());
        kill(&running.launcher(), Signal::TERM);
        running.assert_gone(&processes, &device);
    }
    place.assert_empty();
    for (uri, expected) in [(&session, "made\n"), (&source, "two\n")] {
        let mut command =
            place.memdev("run", &["--backend", "fuse", "--session", uri, "--", "cat", "/etc/made"]);
        assert_eq!(said(&command.output().unwrap()), expected);
    }
    server.stop();
}

#[test]
fn many_leave_nothing() {
    let place = Place::new();
    let running = place.start(&["--name", "one"], "sleep 1000");
    let daemon = running.attachment()["pid"].clone();
    let descriptors = |daemon: &Value| fs::read_dir(format!("/proc/{daemon}/fd")).unwrap().count();
    // Those that wait for the disk are started once for all, when something of the image is not in memory.
    let is_counted = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim_end() != "warmer")
    };
    let threads = |daemon: &Value| {
        fs::read_dir(format!("/proc/{daemon}/task")).unwrap().flatten().filter(is_counted).count()
    };
    let write = || fork(&place, "one", &[], "dd if=/dev/zero of=/x bs=1M count=4 2>/dev/null; echo x");
    assert_eq!(write(), "x\n");
    let before = (descriptors(&daemon), threads(&daemon));
    for _ in 0..20 {
        assert_eq!(write(), "x\n");
    }
    wait_until("the daemon has let go of them", || {
        descriptors(&daemon) <= before.0 && threads(&daemon) <= before.1
    });
    assert_eq!(place.written("attach").len(), 1);
    end(running);
    place.assert_empty();
}
