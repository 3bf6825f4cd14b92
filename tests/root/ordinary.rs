//! Private roots of an ordinary user: the same command line, and the same inside, by FUSE.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::process::{Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use super::machine::{FIRST_SUBORDINATE, Place, USER, has_ended, image, kill};
use crate::interop_support::{run, said, uri};
use crate::support::Image;
use crate::support::server::Serve;
use crate::support::wait_until;

/// Runs a script that has to succeed, and says nothing to standard error.
#[track_caller]
fn sh(place: &Place, options: &[&str], script: &str) -> String {
    place.sh(&[&["-q"], options].concat(), script)
}

#[test]
fn root_inside_is_a_subordinate_id() {
    let place = Place::of_user(true);
    let mut running = place.start(&["-q"], "cat /proc/self/uid_map | wc -l; id -u; sleep 1000");
    assert_eq!((running.line(), running.line()), ("3\n".to_owned(), "0\n".to_owned()));
    let processes = running.processes();
    let status = fs::read_to_string(format!("/proc/{}/status", processes.last().unwrap())).unwrap();
    let id = FIRST_SUBORDINATE;
    assert!(status.contains(&format!("Uid:\t{id}\t{id}\t{id}\t{id}\n")), "{status}");
    // Nor has who serves it any rights of the user's that it does not need.
    let status = fs::read_to_string(format!("/proc/{}/status", running.child("fuse2fs"))).unwrap();
    assert!(status.contains(&format!("Uid:\t{id}\t{id}\t{id}\t{id}\n")), "{status}");
    kill(&running.launcher(), Signal::TERM);
    running.assert_ended(&processes);
    place.assert_empty();
}

#[test]
fn what_cannot_be_done_is_said_at_start() {
    let place = Place::of_user(true);
    let output = place.attempt(&[], "echo inside");
    assert_eq!(output.stdout, b"inside\n");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("memdev: without root: ") && text.lines().count() == 1, "{text}");
    assert!(!text.contains("only user"), "{text}");
    let alone = Place::of_user(false);
    let text = String::from_utf8(alone.attempt(&[], "true").stderr).unwrap();
    assert!(text.contains("root is the only user") && text.contains("usermod --add-subuids"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_fuse_device_that_is_closed_is_to_be_opened() {
    let place = Place::of_user(true);
    let mode = |mode| fs::set_permissions(place.path("fuse"), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o600);
    let output = place.attempt(&["-q"], "true");
    let line = "memdev: Cannot open /dev/fuse: permission denied; open it to everybody, as udev does: 'chmod 666 /dev/fuse' \
        as root\n";
    assert_eq!((output.status.code(), &*said(&output)), (Some(1), line));
    mode(0o666);
    assert!(place.attempt(&["-q"], "true").status.success());
}

#[test]
fn what_is_not_possible_is_refused_in_a_line() {
    let place = Place::of_user(true);
    let refused = |mut command: Command, expected: &str| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let text = said(&output);
        assert!(text.contains(expected) && text.lines().count() == 1, "{text}");
        place.assert_empty();
    };
    refused(
        place.run(&["-q", "--privileged"], &["true"]),
        "--privileged is not possible without the rights of root",
    );
    let mut nbd = place.memdev("run", &["--backend", "nbd"]);
    nbd.arg(place.image());
    refused(nbd, "--backend nbd is not possible without the rights of root");
    let xfs = place.path("xfs.img");
    fs::File::create(&xfs).unwrap().set_len(400 << 20).unwrap();
    run("mkfs.xfs", ["-q".as_ref(), xfs.as_os_str()]);
    let mut command = place.memdev("run", &["-q"]);
    command.arg(&xfs);
    refused(command, "xfs takes root");
    // The beginning of one, and no more.
    let broken = place.path("broken.img");
    fs::File::create(&broken).unwrap().set_len(1 << 20).unwrap();
    fs::File::options().write(true).open(&broken).unwrap().write_all_at(&[0x53, 0xef], 1080).unwrap();
    let mut command = place.memdev("run", &["-q"]);
    command.arg(&broken);
    refused(command, "fuse2fs cannot mount the root: ");
    let mut command = place.run(&["-q"], &["true"]);
    command.env("PATH", "/usr/sbin:/sbin:/nonexistent");
    fs::set_permissions(place.path("fuse"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    refused(place.run(&["-q"], &["true"]), "Cannot open /dev/fuse");
}

#[test]
fn the_command_line_is_the_same() {
    let place = Place::of_user(true);
    for (script, status) in [("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)] {
        assert_eq!(place.attempt(&["-q"], script).status.code(), Some(status), "{script}");
    }
    assert_eq!(place.run(&["-q"], &["/no/such"]).output().unwrap().status.code(), Some(127));
    let script = "hostname; pwd; id -un; echo $A; ls /sys/class/net";
    let options = [
        "--hostname",
        "kiosk",
        "--workdir",
        "/var/mail",
        "--user",
        "www-data",
        "--env",
        "A=b",
        "--net",
        "none",
    ];
    assert_eq!(sh(&place, &options, script), "kiosk\n/var/mail\nwww-data\nb\nlo\n");
    let own = fs::read_dir("/sys/class/net").unwrap().count();
    assert_eq!(sh(&place, &[], "ls /sys/class/net | wc -l"), format!("{own}\n"));
    let output = place.run(&["-q", "--user", "nosuchuser"], &["true"]).output().unwrap();
    assert!(said(&output).contains("The image has no user 'nosuchuser'"), "{}", said(&output));
    let plan = place.run(&["--dry-run"], &["ls", "/"]).output().unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(
        plan.contains("fuse2fs") && plan.contains("newuidmap") && plan.ends_with("start ls / as root\n"),
        "{plan}"
    );
}

#[test]
fn there_is_the_same_inside() {
    let place = Place::of_user(true);
    let text = sh(&place, &[], "ls /dev | tr '\\n' ' '");
    assert_eq!(text, "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero ");
    let script = "awk '{print $2, $3}' /proc/mounts | grep -v -e '^/dev/[a-z]* devtmpfs' -e ^/sys/";
    let expected = "/ fuse.ext4\n/proc proc\n/sys sysfs\n/dev tmpfs\n/dev/shm tmpfs\n/run tmpfs\n/tmp tmpfs\n/dev/pts devpts\n";
    assert_eq!(sh(&place, &[], script), expected);
    let script = "cat /proc/1/comm; echo x >/dev/null; head -c 9 /dev/urandom | wc -c; touch /sys/x 2>&1 | grep -c Read-only; tty </dev/null || :";
    assert_eq!(sh(&place, &[], script), "memdev-init\n9\n1\nnot a tty\n");
}

#[test]
fn packages_users_and_owners() {
    let place = Place::of_user(true);
    let script = r"set -e; mkdir -p /p/DEBIAN /p/usr/bin; cd /
        printf 'Package: hello-root\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n' >/p/DEBIAN/control
        printf '#!/bin/sh\necho hello\n' >/p/usr/bin/hello-root; chmod 755 /p/usr/bin/hello-root
        printf '#!/bin/sh\nset -e\nchown root:tty /usr/bin/hello-root\n' >/p/DEBIAN/postinst; chmod 755 /p/DEBIAN/postinst
        dpkg-deb --root-owner-group --build /p /p.deb >/dev/null
        apt-get -q -y install /p.deb >/tmp/log 2>&1 || cat /tmp/log; hello-root; dpkg -s hello-root | grep Status
        stat -c %G /usr/bin/hello-root
        dpkg --purge hello-root >/dev/null; dpkg -i /p.deb >/dev/null 2>&1; hello-root
        useradd -m joe; su joe -c 'id -un'; chown joe:shadow /p.deb; stat -c %U:%G /p.deb
        touch /home/joe/roots; su joe -c 'echo mine >/home/joe/file; rm -f /home/joe/roots; stat -c %U /home/joe/file'
        su joe -c 'cat /etc/shadow' 2>&1 | grep -c denied; su joe -c 'touch /etc/x' 2>&1 | grep -c denied
        cp /bin/cat /usr/local/bin/suid; chmod 4755 /usr/local/bin/suid; su joe -c 'suid /etc/shadow' | grep -c root
        userdel -r joe 2>/dev/null; test ! -e /home/joe";
    let expected = "hello\nStatus: install ok installed\ntty\nhello\njoe\njoe:shadow\njoe\n1\n1\n1\n";
    assert_eq!(sh(&place, &[], script), expected);
}

#[test]
fn without_subordinate_ids_root_is_alone() {
    let place = Place::of_user(false);
    let script = "id -u; wc -l </proc/self/uid_map; touch /etc/new; rm -r /usr/share/doc; cat /etc/shadow | grep -c ^root; \
        mount -t tmpfs none /mnt; (chown 1000 /mnt || chgrp 5 /mnt) 2>/dev/null || echo alone";
    assert_eq!(sh(&place, &[], script), "0\n1\n1\nalone\n");
    let output = place.run(&["-q", "--user", "www-data"], &["true"]).output().unwrap();
    assert!(said(&output).contains("The session has no id for the user www-data"), "{}", said(&output));
    assert_eq!(output.status.code(), Some(1));
    let script = "set -e; mkdir -p /p/DEBIAN; printf 'Package: empty\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@example.org>\\nDescription: x\\n' >/p/DEBIAN/control
        dpkg-deb --root-owner-group --build /p /p.deb >/dev/null; dpkg -i /p.deb >/dev/null; dpkg -s empty | grep Status";
    assert_eq!(sh(&place, &[], script), "Status: install ok installed\n");
}

#[test]
fn what_is_changed_is_gone_and_the_image_unchanged() {
    let place = Place::of_user(true);
    let before = fs::metadata(image()).unwrap();
    let script = "echo changed >/etc/hostname; rm -rf /usr/share/doc; dd if=/dev/urandom of=/big bs=1M count=8 2>/dev/null; \
        sync /big; cat /etc/hostname";
    assert_eq!(sh(&place, &[], script), "changed\n");
    assert_eq!(sh(&place, &[], "cat /etc/hostname; ls -d /usr/share/doc"), "memdev\n/usr/share/doc\n");
    let after = fs::metadata(image()).unwrap();
    let all = |of: &fs::Metadata| (of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec(), of.blocks());
    assert_eq!(all(&before), all(&after));
}

#[test]
fn directories_of_the_users_own_are_its_own_inside() {
    let place = Place::of_user(true);
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "of the host\n").unwrap();
    chown(&shared, Some(USER), Some(USER)).unwrap();
    let bind = format!("{}:/home/x", shared.display());
    let options = ["--bind", &bind, "--user", &USER.to_string()];
    assert_eq!(
        sh(&place, &options, "cat /home/x/file; echo mine >/home/x/mine; stat -c %u /home/x/mine"),
        "of the host\n4711\n"
    );
    let made = fs::metadata(shared.join("mine")).unwrap();
    assert_eq!((made.uid(), made.gid()), (USER, USER));
    // What is the host's root's is nobody's.
    let script = "stat -c %U /home/x/file; (echo x >/home/x/file) 2>/dev/null || echo refused; cp /bin/true /home/x/t; chmod 4755 /home/x/t; stat -c %u /home/x/t";
    let text = sh(&place, &["--bind", &bind], script);
    assert_eq!(text, "nobody\nrefused\n0\n");
    assert_eq!(fs::metadata(shared.join("t")).unwrap().uid(), FIRST_SUBORDINATE);
    let bind = format!("{bind}:ro");
    assert_eq!(sh(&place, &["--bind", &bind], "touch /home/x/n 2>&1 | grep -c Read-only"), "1\n");
}

#[test]
fn a_partition_of_a_disk() {
    let place = Place::of_user(true);
    let disk = place.path("disk.img");
    let size = fs::metadata(image()).unwrap().len();
    fs::File::create(&disk).unwrap().set_len(size + (4 << 20)).unwrap();
    let mut table = Command::new("sfdisk").arg("-q").arg(&disk).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(
        &mut table.stdin.take().unwrap(),
        format!("label: gpt\n2048,1024\n4096,{}\n", size / 512).as_bytes(),
    )
    .unwrap();
    assert!(table.wait().unwrap().success());
    let of = format!("of={}", disk.display());
    let from = format!("if={}", image().display());
    run("dd", [from.as_str(), of.as_str(), "bs=1M", "seek=2", "conv=notrunc,sparse", "status=none"]);
    let attempt = |number: &str| {
        let mut command = place.memdev("run", &["-q", "--partition", number]);
        command.arg(&disk).args(["--", "sh", "-c", "echo $(cat /etc/hostname); touch /new"]).output().unwrap()
    };
    assert_eq!(said(&attempt("2")), "memdev\n");
    assert!(
        said(&attempt("1")).contains("No file system that can be a root is on"),
        "{}",
        said(&attempt("1"))
    );
    assert!(said(&attempt("3")).contains("partition"), "{}", said(&attempt("3")));
    place.assert_empty();
}

#[test]
fn a_session_that_another_root_writes_to_is_warned_of() {
    let place = Place::of_user(true);
    let copy = Image::empty(place.path("debian.img"), fs::metadata(image()).unwrap().len());
    run("cp", ["--sparse=always".as_ref(), image().as_os_str(), copy.path.as_os_str()]);
    let server = Serve::image(&copy).args(["--unix-mode", "666"]).start();
    let session = uri(&server, "debian@m");
    let options = ["-q", "--session", &session, "--name"];
    let begin = ["kiosk", "--", "sh", "-c", "echo ready; sleep 1000"];
    let running = place.begin(place.memdev("run", &[&options[..], &begin].concat()));
    // Whether fuse2fs takes what is mounted already is its own business.
    let output = place.memdev("run", &[&options[..], &["other", "--", "true"]].concat()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.starts_with(&format!("memdev: {session} has the private root kiosk already, and")),
        "{text}"
    );
    kill(&running.launcher(), Signal::TERM);
    running.finish();
    place.assert_empty();
    server.stop();
}

#[test]
fn a_named_session_is_gone_on_with() {
    let place = Place::of_user(true);
    let size = fs::metadata(image()).unwrap().len();
    let copy = Image::empty(place.path("debian.img"), size);
    run("cp", ["--sparse=always".as_ref(), image().as_os_str(), copy.path.as_os_str()]);
    // Over a unix socket a session belongs to who made it, who has to get there.
    let server = Serve::image(&copy).args(["--unix-mode", "666"]).start();
    let session = uri(&server, "debian@kept");
    let attempt = |script: &str| {
        let mut command = place.memdev("run", &["-q", "--session", &session, "--", "sh", "-c", script]);
        let output = command.output().expect("memdev can be run");
        place.assert_empty();
        assert!(output.status.success(), "{script}: {}", said(&output));
        said(&output)
    };
    attempt(
        "echo first >/root/first; dd if=/dev/urandom of=/root/big bs=1M count=20 2>/dev/null; md5sum /root/big >/root/sum",
    );
    assert_eq!(attempt("cat /root/first; md5sum --quiet -c /root/sum"), "first\n");
    server.stop();
}

fn enter(place: &Place, script: &str) -> Output {
    place.memdev("enter", &["box", "--", "sh", "-c", script]).output().expect("memdev can be run")
}

#[test]
fn the_second_command_sees_what_the_first_does() {
    let place = Place::of_user(true);
    let script = "echo one >/etc/one; echo set; sleep 1000";
    let mut running = place.start(&["-q", "--name", "box", "--net", "none"], script);
    assert_eq!(running.line(), "set\n");
    let script = "cat /etc/one; hostname; cat /proc/1/comm; ls /sys/class/net; ls /proc/self/fd | wc -l; echo two >/etc/two";
    assert_eq!(said(&enter(&place, script)), "one\nbox\nmemdev-init\nlo\n4\n");
    assert_eq!(enter(&place, "exit 9").status.code(), Some(9));
    assert_eq!(said(&enter(&place, "mknod /tmp/n b 7 0 2>/dev/null || echo refused")), "refused\n");
    // Nobody else finds it.
    let root = Place::new();
    let mut other = Command::new(env!("CARGO_BIN_EXE_memdev"));
    other.args(["enter", "--state"]).arg(root.state()).args(["box", "--", "true"]);
    assert!(said(&other.output().unwrap()).contains("No private root is called 'box'"));
    let list = place.memdev("enter", &["--list"]).output().unwrap();
    assert!(said(&list).starts_with("box: "), "{}", said(&list));
    let processes = running.processes();
    kill(&running.launcher(), Signal::TERM);
    running.assert_ended(&processes);
    assert_eq!(said(&enter(&place, "true")), "memdev: No private root is called 'box': there is none\n");
    place.assert_empty();
}

/// Processes inside that do not want to end, and write.
const STUBBORN: &str = "trap '' HUP TERM INT; (trap '' HUP TERM; while :; do date >/file; sync /file; done) & \
    setsid sleep 1000 & wait; sleep 1000";

#[test]
fn whoever_is_killed_nothing_is_left() {
    let place = Place::of_user(true);
    type Choose = fn(&super::machine::Running<'_>) -> Value;
    let victims: [(&str, Choose); 5] = [
        ("launcher", |running| running.launcher()),
        ("process 1", |running| running.session()["init"].clone()),
        ("daemon", |running| running.attachment()["pid"].clone()),
        ("fuse2fs", |running| running.child("fuse2fs")),
        ("porter", |running| running.session()["porter"]["pid"].clone()),
    ];
    for (n, (who, victim)) in victims.into_iter().enumerate() {
        let running = place.start(&["-q"], STUBBORN);
        let processes = running.processes();
        // At different moments of what they do.
        std::thread::sleep(std::time::Duration::from_millis(37 * n as u64));
        kill(&victim(&running), Signal::KILL);
        if who == "porter" {
            // It is for those who enter; the session goes on without.
            assert!(!has_ended(&running.launcher()));
            kill(&running.launcher(), Signal::HUP);
        }
        running.assert_ended(&processes);
        // What a killed launcher has written down is found to be abandoned by the next one.
        sh(&place, &[], "true");
        place.assert_empty();
    }
}

#[test]
fn a_launcher_that_is_killed_at_any_moment_leaves_nothing() {
    const ROUNDS: u32 = 30;
    let place = Place::of_user(true);
    // How long it takes to start here, at this moment.
    let start = std::time::Instant::now();
    let first = place.start(&["-q"], "sleep 1000");
    let longest = start.elapsed() * 3 / 2;
    drop(first);
    for n in 0..=ROUNDS {
        wait_until("all its processes have ended", || place.of_this_user().is_empty());
        let mut child = place.run(&["-q"], &["sh", "-c", "while :; do date >/file; done"]).spawn().unwrap();
        if n < ROUNDS {
            std::thread::sleep(longest * n / ROUNDS);
        } else {
            wait_until("launcher, daemon, fuse2fs and process 1 are found", || {
                place.of_this_user().len() >= 4
            });
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_until("all its processes have ended", || place.of_this_user().is_empty());
    sh(&place, &[], "true");
    place.assert_empty();
}

/// A server that does not answer keeps whoever waits for it from being killed; so the server has to go, too.
#[test]
fn stopped_servers_are_not_waited_for() {
    let place = Place::of_user(true);
    for server in ["fuse2fs", "memdev-attach"] {
        let running = place.start(&["-q"], STUBBORN);
        let processes = running.processes();
        kill(&running.child(server), Signal::STOP);
        std::thread::sleep(std::time::Duration::from_millis(300));
        kill(&running.session()["init"], Signal::KILL);
        running.assert_ended(&processes);
        place.assert_empty();
    }
}

#[test]
fn neither_devices_nor_the_host_are_within_reach() {
    let place = Place::of_user(true);
    let host = place.path("secret");
    fs::write(&host, "secret\n").unwrap();
    // Device nodes in the image, of a disk and of memory, for everybody.
    let image = place.path("nodes.img");
    run("cp", ["--sparse=always".as_ref(), super::machine::image().as_os_str(), image.as_os_str()]);
    for (name, kind) in [("loop", "b 7 0"), ("mem", "c 1 1"), ("null", "c 1 3")] {
        for request in [
            format!("mknod {name} {kind}"),
            format!("sif {name} mode {}", if kind.starts_with('b') { "060666" } else { "020666" }),
        ] {
            run("debugfs", ["-w".as_ref(), "-R".as_ref(), request.as_ref(), image.as_os_str()]);
        }
    }
    let script = format!(
        r#"for n in loop mem null; do test -e /$n || echo missing; (exec 3</$n) 2>/dev/null && echo $n; done
        mknod /b b 7 0 2>/dev/null && echo b; mknod /tmp/c c 1 3 2>/dev/null && echo c
        unshare -Urm sh -c 'mount -t tmpfs none /mnt && mknod /mnt/b b 7 0' 2>/dev/null && echo nested
        mount -o remount,bind,dev / 2>/dev/null && echo remounted; (exec 3</null) 2>/dev/null && echo live
        mkdir /mnt/r; mount --bind / /mnt/r 2>/dev/null && mount -o remount,bind,dev /mnt/r 2>/dev/null && (exec 3</mnt/r/null) 2>/dev/null && echo bound
        for m in / /proc /sys; do umount -l $m 2>/dev/null && echo unmounted $m; done
        mount -t devtmpfs none /mnt 2>/dev/null && echo devtmpfs; mount -t ext4 /loop /mnt 2>/dev/null && echo ext4
        (echo x >/proc/sys/kernel/core_pattern) 2>/dev/null && echo pattern
        for p in /proc/1/root /proc/1/cwd /proc/1/exe /proc/1/fd /proc/self/root/.. /..; do cat $p{0} 2>/dev/null; done
        for f in root exe cwd ns/mnt; do readlink /proc/1/$f; done; kill -KILL 1; kill -TERM 1
        find / -xdev -name secret 2>/dev/null; mkfifo /f && test -p /f && echo fifo; echo over"#,
        host.display()
    );
    let mut command = place.memdev("run", &["-q"]);
    let output = command.arg(&image).args(["--", "sh", "-c", &script]).output().unwrap();
    assert_eq!(said(&output), "fifo\nover\n");
    place.assert_empty();
}

/// The mounts are in no other process's table, and the host's are in none inside.
#[test]
fn nobody_sees_the_mounts() {
    let place = Place::of_user(true);
    let mut running = place.start(&["-q"], "sleep 1000 & echo set; wait");
    assert_eq!(running.line(), "set\n");
    let processes = running.processes();
    let inside = fs::read_to_string(format!("/proc/{}/mountinfo", processes.last().unwrap())).unwrap();
    assert!(!inside.contains("/var/tmp") && !inside.contains(" /home"), "{inside}");
    // Others run such tests, too: this one's file system is known by its number.
    let root = inside.lines().find(|line| line.contains(" / / rw,nodev")).expect("there is a root");
    let number = format!(" {} ", root.split(' ').nth(2).unwrap());
    let mut seen = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().into_string().unwrap_or_default().parse::<u32>() else { continue };
        let Ok(text) = fs::read_to_string(entry.path().join("mountinfo")) else { continue };
        if text.contains(&number) {
            assert!(processes.contains(&pid.into()), "{pid}: {text}");
            seen += 1;
        }
    }
    assert!(seen >= 2, "those inside have it");
    kill(&running.launcher(), Signal::TERM);
    running.assert_ended(&processes);
}
