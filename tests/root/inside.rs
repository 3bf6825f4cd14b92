//! What there is inside a private root, what its root may do, and what not.

use std::fs;

use super::machine::{Place, kill};
use crate::interop_support::said;
use crate::support::wait_until;
use rustix::process::Signal;

#[test]
fn there_is_what_a_system_needs_and_nothing_of_the_host() {
    let place = Place::new();
    let text = place.sh(&[], "ls /dev");
    let expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";
    assert_eq!(text.split_whitespace().collect::<Vec<_>>().join(" "), expected);
    assert_eq!(place.sh(&[], "ls -A /dev/pts"), "ptmx\n");
    let script = "awk '{print $2, $3}' /proc/mounts | grep -v '^/dev/[a-z]* devtmpfs'";
    let expected = "/ ext4\n/proc proc\n/sys sysfs\n/dev tmpfs\n/dev/shm tmpfs\n/run tmpfs\n/tmp tmpfs\n/dev/pts devpts\n";
    assert_eq!(place.sh(&[], script), expected);
    let text = place.sh(&[], "cat /proc/1/comm; echo /proc/[0-9]*; touch /sys/x 2>&1; :");
    assert!(text.starts_with("memdev-init\n/proc/1 /proc/"), "{text}");
    assert!(text.contains("Read-only file system"), "{text}");
    let text = place.sh(&[], "for d in null zero full random tty; do test -c /dev/$d || echo $d; done; echo x >/dev/null; head -c 2 /dev/zero | od -An -tx1; head -c 9 /dev/urandom | wc -c");
    assert_eq!(text, " 00 00\n9\n");
}

#[test]
fn root_inside_is_nobody_outside() {
    let place = Place::new();
    let running = place.start(&[], "sleep 1000");
    let session = running.session();
    let first = session["first_id"].as_u64().unwrap();
    assert!(first >= 0x7000_0000);
    let processes = running.processes();
    let inside = processes.last().unwrap();
    let status = fs::read_to_string(format!("/proc/{inside}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{first}\t{first}\t{first}\t{first}\n")), "{status}");
    // Nor is anything to be seen of it, but processes.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let device = running.attachment()["device"].as_str().unwrap().to_owned();
    assert!(!mounts.contains(&format!(" {device} ")), "{mounts}");
    let init = &session["init"];
    for link in ["root", "exe", "cwd"] {
        assert!(fs::symlink_metadata(format!("/proc/{init}/{link}")).is_ok(), "the host's root may look");
    }
    kill(init, Signal::KILL);
    assert_eq!(running.finish().0, Some(137));
    place.assert_empty();
}

/// It once lost its end of what wakes it, and went round and round.
#[test]
fn process_1_sleeps_until_there_is_something_to_do() {
    let place = Place::new();
    let mut running = place.start(&[], "echo set; sleep 1000");
    assert_eq!(running.line(), "set\n");
    let init = running.session()["init"].clone();
    // Its state, and how much of a processor it has used, in hundredths of a second.
    let look = || {
        let stat = fs::read_to_string(format!("/proc/{init}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let used = fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap();
        (fields[0].to_owned(), used)
    };
    wait_until("it sleeps", || look().0 == "S");
    // What it took to start is not counted: that is more on a slow machine.
    let (_, before) = look();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let (state, after) = look();
    // It had most of the time, or its share of a processor that others want as well.
    assert!(after - before < 10, "{state}: {before}, {after}");
}

#[test]
fn process_1_is_not_to_be_looked_into() {
    let place = Place::new();
    for mode in [&[][..], &["--privileged"]] {
        let script = "for f in root exe cwd environ mem maps fd/0 fd/3 fd/4 ns/mnt; do cat /proc/1/$f >/dev/null 2>&1 && echo $f; \
            ls /proc/1/$f/ >/dev/null 2>&1 && echo $f/; readlink /proc/1/$f; done; kill -KILL 1; kill -TERM 1; echo alive";
        assert_eq!(place.sh(mode, script), "alive\n", "{mode:?}");
    }
}

#[test]
fn devices_are_neither_made_nor_used() {
    let place = Place::new();
    for mode in [&[][..], &["--privileged"]] {
        let script = "mknod /b b 7 0 2>&1; mknod /tmp/c c 1 3 2>&1; mount -o remount,bind,dev / 2>&1; \
            mount -t devtmpfs none /mnt 2>&1; mkfifo /f && test -p /f && echo fifo; \
            chmod 600 /dev/null 2>/dev/null || echo unchanged; umount / 2>/dev/null || echo stays";
        let text = place.sh(mode, script);
        assert_eq!(text.matches("not permitted").count(), 2, "{mode:?}: {text}");
        assert!(text.contains("permission denied"), "{mode:?}: {text}");
        assert!(text.ends_with("fifo\nunchanged\nstays\n"), "{mode:?}: {text}");
    }
    let mode = fs::metadata("/dev/null").unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o666);
}

#[test]
fn root_mounts_and_changes_users_as_it_likes() {
    let place = Place::new();
    let script = "set -e
        mount -t tmpfs none /mnt; mkdir /mnt/u /mnt/w /mnt/m
        mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w none /mnt/m; touch /mnt/m/new; test -e /mnt/u/new
        mkdir /b; mount --bind /usr /b; test -x /b/bin/env
        mkdir /p; mount -t proc none /p; test -d /p/1
        chroot / true; unshare -m true; unshare -Urm true
        hostname other; test $(hostname) = other
        useradd -m joe; chown joe /root; su joe -c 'id -un'; su joe -s /bin/sh -c 'cat /etc/shadow' 2>&1 | grep -c denied
        passwd -d joe >/dev/null; su joe -c 'su -c true' </dev/null 2>/dev/null || echo asked";
    assert_eq!(place.sh(&[], script), "joe\n1\nasked\n");
}

#[test]
fn packages_are_installed() {
    let place = Place::new();
    let script = "set -e; mkdir -p /p/DEBIAN /p/usr/bin; cd /
        printf 'Package: hello-root\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@example.org>\\nDescription: x\\n' >/p/DEBIAN/control
        printf '#!/bin/sh\\necho hello\\n' >/p/usr/bin/hello-root; chmod 755 /p/usr/bin/hello-root
        dpkg-deb --root-owner-group --build /p /p.deb >/dev/null
        apt-get -q -y install /p.deb >/tmp/log 2>&1 || cat /tmp/log; hello-root; dpkg -s hello-root | grep Status";
    for mode in [&[][..], &["--privileged"]] {
        assert_eq!(place.sh(mode, script), "hello\nStatus: install ok installed\n", "{mode:?}");
    }
}

#[test]
fn the_hosts_settings_are_not_to_be_changed() {
    let place = Place::new();
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let script = "for f in kernel/core_pattern vm/drop_caches kernel/hotplug; do (echo '|/x' >/proc/sys/$f) 2>/dev/null && echo $f; done; \
        (echo x >/proc/sysrq-trigger) 2>/dev/null && echo sysrq; \
        unshare -Urm sh -c 'mount -t proc none /mnt && echo x >/mnt/sys/kernel/core_pattern && echo fresh' 2>/dev/null; \
        unshare -Urm umount /proc/sys 2>/dev/null && echo uncovered; :";
    for mode in [&[][..], &["--privileged"]] {
        assert_eq!(place.sh(mode, script), "", "{mode:?}");
    }
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), before);
}

#[test]
fn privileged_means_the_hosts_user_0_with_what_cannot_hurt() {
    let place = Place::new();
    let script = "cat /proc/self/uid_map; grep -E 'CapEff|CapBnd' /proc/self/status";
    let text = place.sh(&["--privileged"], script);
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words[..3], ["0", "0", "4294967295"]);
    assert_eq!(words[4], "00000000b00485fb");
    let text = place.sh(&["--privileged", "--net", "none"], script);
    assert!(text.contains("00000000b004b5fb"), "{text}");
    let output = place.attempt(&["--privileged"], "mount -t tmpfs none /mnt");
    assert!(!output.status.success(), "{}", said(&output));
    assert_eq!(
        place.sh(
            &["--privileged"],
            "useradd -m joe; su joe -c 'id -un'; unshare -Urm mount -t tmpfs none /mnt"
        ),
        "joe\n"
    );
}
