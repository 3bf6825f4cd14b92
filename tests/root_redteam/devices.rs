//! Device nodes that are there already, and file systems that bring some along.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::machine::{
    MODES, Mode, attack, attack_in, attack_outside, changed_image, image, program, run, sh, sh_outside,
    small_image, succeed, with_descriptor,
};
use crate::support::server::scratch;

/// Nodes in an image, as `debugfs` makes them: a loop device, memory, `null`, the kernel's log.
const NODES: &[&str] =
    &["mknod rt-loop b 7 0", "mknod rt-null c 1 3", "mknod rt-zero c 1 5", "mknod rt-kmsg c 1 11"];
/// Anybody may read and write them, as far as their mode goes.
const MODES_OF_NODES: &[&str] = &[
    "set_inode_field rt-loop mode 060666",
    "set_inode_field rt-null mode 020666",
    "set_inode_field rt-zero mode 020666",
    "set_inode_field rt-kmsg mode 020666",
];

fn nodes() -> Vec<&'static str> {
    [NODES, MODES_OF_NODES].concat()
}

/// Opens the nodes in each of the directories given.
const OPEN: &str = r#"
    for my $dir (@ARGV) { opens("$dir/rt-$_", O_RDONLY) for qw(loop null zero kmsg) }
"#;

/// Mounts the image at `$1` on the directory `$2`, where devices work; then runs the rest.
const MOUNT: &str = r#"mount -o "loop,${3-dev}" "$1" "$2"; shift 3; exec "$@""#;

#[test]
fn device_nodes_that_are_in_the_image_cannot_be_opened() {
    let dir = scratch();
    let image = changed_image(dir.path(), &nodes());
    let (image_text, point) = (image.to_str().unwrap(), dir.path().join("point"));
    std::fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    let outside = sh_outside(MOUNT, &[image_text, point, "dev,ro", "perl", "-e", &program(OPEN), point]);
    assert!(outside.lines().count() == 4 && outside.lines().all(|line| line.ends_with("\tOK")), "{outside}");
    for mode in MODES {
        attack_in(mode, &image, &[], OPEN, &["/"]).assert_all_refused(mode, &["EACCES"]);
    }
}

/// Everything that could take the flag off, or put the same files where it is not; then the nodes are tried.
const REMOUNT: &str = r#"
    my ($root, $point) = @ARGV;
    my ($REMOUNT, $BIND, $REC, $NODEV) = (32, 4096, 16384, 4);
    # What was refused is not told: what counts is whether a node can be opened then.
    try(SYS_mount, "none", $root, 0, $REMOUNT, 0);
    try(SYS_mount, "none", $root, 0, $REMOUNT | $BIND, 0);
    try(SYS_mount_setattr, -100, $root, 0x8000, pack("QQQQ", 0, $NODEV, 0, 0), 32);
    try(SYS_mount_setattr, -100, $root, 0, pack("QQQQ", 0, $NODEV, 0, 0), 32);
    opens("$root/rt-$_", O_RDONLY) for qw(loop null);
    # A copy of the mount, by each of the interfaces.
    try(SYS_mount, $root, $point, 0, $BIND, 0);
    try(SYS_mount, "none", $point, 0, $REMOUNT | $BIND, 0);
    try(SYS_mount_setattr, -100, $point, 0, pack("QQQQ", 0, $NODEV, 0, 0), 32);
    opens("$point/rt-$_", O_RDONLY) for qw(loop null);
    my $tree = try(SYS_open_tree, -100, $root, 1);
    if ($tree >= 0) {
        try(SYS_mount_setattr, $tree, "", 0x1000, pack("QQQQ", 0, $NODEV, 0, 0), 32);
        opens("/proc/self/fd/$tree/rt-$_", O_RDONLY) for qw(loop null);
    }
    # What lies under the root.
    try(SYS_umount2, $root, 2);
    opens("$root/rt-$_", O_RDONLY) for qw(loop null);
"#;

#[test]
fn nodev_cannot_be_taken_off_the_root() {
    let dir = scratch();
    let image = changed_image(dir.path(), &nodes());
    let (image_text, point) = (image.to_str().unwrap(), dir.path().join("point"));
    std::fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    // Outside, nothing locks the flag: the first attempt has it off.
    let outside =
        sh_outside(MOUNT, &[image_text, point, "nodev,ro", "perl", "-e", &program(REMOUNT), point, "/mnt"]);
    let mut first = outside.lines();
    assert!(first.by_ref().take(2).all(|line| line.ends_with("\tOK")), "{outside}");
    let reasons = ["EACCES", "ENOENT"];
    for mode in MODES {
        let plain = attack_in(mode, &image, &[], REMOUNT, &["/", "/mnt"]);
        plain.assert_all_refused(mode, &reasons);
        assert_eq!(plain.of("//rt-loop"), "EACCES", "the node is there");
        for unshare in
            [&["unshare", "-m"][..], &["unshare", "-Ur"], &["unshare", "-Urm"], &["unshare", "-Urmpf"]]
        {
            if unshare == ["unshare", "-m"] && mode == Mode::Privileged {
                continue;
            }
            let mut command = run(mode, &image, &[]);
            let command = command.args(unshare).args(["perl", "-e", &program(REMOUNT), "/", "/mnt"]);
            let text = succeed(command);
            assert!(text.lines().count() >= 6, "{text}");
            let refused = |line: &str| reasons.iter().any(|reason| line.ends_with(&format!("\t{reason}")));
            assert!(text.lines().all(refused), "{mode:?} {unshare:?}: {text}");
        }
    }
}

/// A new root, without the old one's flags: the nodes are the same files.
#[test]
fn nodev_cannot_be_left_behind_by_a_root_of_ones_own() {
    let dir = scratch();
    let image = changed_image(dir.path(), &nodes());
    let script = r#"mkdir -p /tmp/new; mount --bind / /tmp/new 2>/dev/null || mount --rbind / /tmp/new
        cd /tmp/new; mkdir -p mnt; pivot_root . mnt 2>/dev/null || :; exec chroot . perl -e "$0" / /mnt"#;
    for mode in MODES {
        let mut command = run(mode, &image, &[]);
        let command = command.args(["unshare", "-Urm", "sh", "-euc", script, &program(OPEN)]);
        let text = succeed(command);
        let (first, _) = text.split_at(text.find("//mnt").or_else(|| text.find("/mnt")).unwrap());
        assert!(
            first.lines().count() == 4 && first.lines().all(|line| line.ends_with("\tEACCES")),
            "{mode:?}: {text}"
        );
        assert!(!text.contains("\tOK"), "{mode:?}: {text}");
    }
}

/// An overlay, whose lower directory is the root with the nodes: it is another file system, with flags of its own.
#[test]
fn nor_by_an_overlay_over_the_root() {
    let dir = scratch();
    let image = changed_image(dir.path(), &nodes());
    let script = r#"mkdir /srv/nodes; mv /rt-* /srv/nodes; mount -t tmpfs none /mnt; mkdir /mnt/up /mnt/work /mnt/all
        mount -t overlay -o lowerdir=/srv/nodes,upperdir=/mnt/up,workdir=/mnt/work none /mnt/all
        exec perl -e "$0" /mnt/all"#;
    // Where root inside may mount by itself, it does.
    for mode in MODES {
        let mut command = run(mode, &image, &[]);
        if mode == Mode::Privileged {
            command.args(["unshare", "-Urm"]);
        }
        let text = succeed(command.args(["sh", "-euc", script, &program(OPEN)]));
        assert!(
            text.lines().count() == 4 && text.lines().all(|line| line.ends_with("\tEACCES")),
            "{mode:?}: {text}"
        );
    }
}

/// A crafted image that the session brings along, mounted by itself.
#[test]
fn an_image_with_device_nodes_cannot_be_mounted() {
    let dir = scratch();
    let small = dir.path().join("small.img");
    small_image(&small, &nodes());
    let small_text = small.to_str().unwrap();
    let point = dir.path().join("point");
    std::fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    let outside = sh_outside(MOUNT, &[small_text, point, "dev", "perl", "-e", &program(OPEN), point]);
    assert!(outside.lines().count() == 4 && outside.lines().all(|line| line.ends_with("\tOK")), "{outside}");
    let bind = format!("{small_text}:/opt/small.img");
    let script = r#"cp /opt/small.img /root/small.img; out=0
        for image in /opt/small.img /root/small.img; do
            ! mount -o loop $image /mnt 2>/dev/null || out=1
            ! mount -t ext4 $image /mnt 2>/dev/null || out=1
            ! losetup -f $image 2>/dev/null || out=1
            ! unshare -Urm mount -o loop $image /mnt 2>/dev/null || out=1
            ! unshare -Urm mount -t ext4 $image /mnt 2>/dev/null || out=1
        done
        echo $out; ls -A /mnt; ls /dev | grep -c -e loop -e fuse -e mapper || :"#;
    for mode in MODES {
        assert_eq!(sh(mode, &["--bind", &bind], script), "0\n0\n", "{mode:?}");
    }
}

/// File systems that hold the machine's devices, or open the way to them; by the old call and by the new ones.
const MOUNT_TYPES: &str = r#"
    my ($point, @types) = @ARGV;
    for my $type (@types) {
        call("mount $type", SYS_mount, "none", $point, $type, 0, 0);
        try(SYS_umount2, $point, 2);
        my $context = try(SYS_fsopen, $type, 0);
        if ($context == -1) { report("fsopen $type", why()) }
        else { call("fsconfig $type", SYS_fsconfig, $context, 6, 0, 0, 0) }
    }
"#;

#[test]
fn file_systems_of_the_machine_cannot_be_mounted() {
    let dir = scratch();
    let point = dir.path().to_str().unwrap();
    let types = ["devtmpfs", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore", "efivarfs"];
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    let known: Vec<_> = types
        .into_iter()
        .filter(|kind| known.lines().any(|line| line.ends_with(&format!("\t{kind}"))))
        .collect();
    assert!(known.contains(&"devtmpfs"), "the kernel has {known:?}");
    let outside = attack_outside(MOUNT_TYPES, &[&[point], &known[..]].concat());
    assert_eq!(outside.of("mount devtmpfs"), "OK");
    for mode in MODES {
        let args = [&["/mnt"], &known[..]].concat();
        attack(mode, &[], MOUNT_TYPES, &args).assert_all_refused(mode, &["EPERM"]);
        let mut command = run(mode, &image(), &[]);
        command.args(["unshare", "-Urmpf", "perl", "-e", &program(MOUNT_TYPES)]).args(args);
        let text = succeed(&mut command);
        assert!(text.lines().all(|line| line.ends_with("\tEPERM")), "{mode:?}: {text}");
    }
}

/// Whoever starts a session may have descriptors open that it should not get.
#[test]
fn no_descriptor_of_the_hosts_is_left_open() {
    const LOOK: &str = r#"
        for my $fd (7, 8, 9) { report("descriptor $fd", -e "/proc/self/fd/$fd" ? "OK" : "closed") }
        report("by way of 7", -e "/proc/self/fd/7/null" ? "OK" : "closed");
    "#;
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let (dev, root, control) = (open("/dev"), open("/"), open("/dev/loop-control"));
    let through = |command: &std::process::Command| {
        let command = with_descriptor(command, 7, &dev);
        let command = with_descriptor(&command, 8, &root);
        succeed(&mut with_descriptor(&command, 9, &control))
    };
    let mut outside = std::process::Command::new("perl");
    outside.args(["-e", &program(LOOK)]);
    assert!(through(&outside).lines().all(|line| line.ends_with("\tOK")), "outside they are inherited");
    for mode in MODES {
        let mut command = run(mode, &image(), &[]);
        command.args(["perl", "-e", &program(LOOK)]);
        let text = through(&command);
        assert!(
            text.lines().count() == 4 && text.lines().all(|line| line.ends_with("\tclosed")),
            "{mode:?}: {text}"
        );
    }
}

/// A directory as standard input is a way into it: to pass it on would be to give the host away.
#[test]
fn a_directory_as_standard_input_is_no_way_out() {
    let dir = scratch();
    std::fs::write(dir.path().join("marker"), "").unwrap();
    for number in [0, 1, 2] {
        for mode in MODES {
            let script = format!("test ! -e /proc/self/fd/{number}/marker");
            let mut command = run(mode, &image(), &[]);
            command.args(["sh", "-c", &script]);
            let directory = OwnedFd::from(File::open(dir.path()).unwrap());
            let status = match number {
                0 => command.stdin(directory),
                1 => command.stdout(directory),
                _ => command.stderr(directory),
            }
            .status()
            .unwrap();
            // Either it is refused, or it is not there.
            assert!(matches!(status.code(), Some(0 | 1)), "{status}");
            if status.code() == Some(1) {
                // `test` says 1, too: so it must not have run at all.
                let mut again = run(mode, &image(), &[]);
                again.args(["sh", "-c", "exit 0"]);
                let directory = OwnedFd::from(File::open(dir.path()).unwrap());
                let status = match number {
                    0 => again.stdin(directory),
                    1 => again.stdout(directory),
                    _ => again.stderr(directory),
                }
                .status()
                .unwrap();
                assert_eq!(status.code(), Some(1), "{mode:?}: it leads to the host");
            }
        }
    }
}

/// What is in `/dev`: nothing that reaches the machine.
#[test]
fn dev_has_the_harmless_devices_and_no_others() {
    let list = "cd /dev; find . ! -type d ! -path './pts/*' | sort";
    let harmless = ["full", "null", "ptmx", "random", "tty", "urandom", "zero"];
    let links = ["core", "fd", "stdin", "stdout", "stderr", "ptmx", "console", "log"];
    for mode in MODES {
        let found = sh(mode, &[], list);
        for name in found.lines() {
            let name = name.trim_start_matches("./");
            assert!(harmless.contains(&name) || links.contains(&name), "{mode:?}: /dev/{name}");
        }
        for name in harmless {
            assert!(
                found.lines().any(|line| Path::new(line) == Path::new(".").join(name)),
                "{mode:?}: {name}"
            );
        }
        let works = "echo x >/dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; ! echo x 2>/dev/null >/dev/full; test -d /dev/shm -a -d /dev/pts; echo ok";
        assert_eq!(sh(mode, &[], works), "3\n3\nok\n", "{mode:?}");
    }
}
