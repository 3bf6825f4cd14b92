//! What is not visible: the host's files from inside, the session's from any other process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::machine::{Held, MODES, Mode, attack, attack_outside, image, program, run, sh, succeed};
use crate::support::server::scratch;

/// What the host's processes see: the mount table of each that is not the session's.
fn tables(without: &[u32]) -> BTreeMap<u32, String> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let table = |pid: u32| Some((pid, fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?));
    numbers.filter(|pid| !without.contains(pid)).filter_map(table).collect()
}

/// The device that a process has as its root.
fn root_device(pid: u32) -> String {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let line = table.lines().find(|line| line.split(' ').nth(4) == Some("/")).expect("a root");
    line.split(' ').nth(2).unwrap().to_owned()
}

#[test]
fn the_session_is_in_no_other_processs_mount_table() {
    // Others may mount something meanwhile, but not each time.
    for mode in MODES {
        assert!((0..5).any(|_| is_not_seen(mode)), "{mode:?}: not a byte is different");
    }
}

/// Panics if anybody has the session's device in their mount table; whether this process's was the same all the time.
fn is_not_seen(mode: Mode) -> bool {
    let own = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = own();
    let held = Held::start(mode, &[]);
    let processes = held.processes();
    let device = root_device(processes.inside[0]);
    let device = format!(" {device} ");
    assert!(
        fs::read_to_string(format!("/proc/{}/mountinfo", processes.inside[0])).unwrap().contains(&device),
        "its own has it"
    );
    for (pid, table) in tables(&processes.inside) {
        assert!(
            !table.contains(&device),
            "{mode:?}: process {pid} sees it (launcher: {:?})",
            processes.outside
        );
    }
    let meanwhile = own();
    held.end();
    meanwhile == before && own() == before
}

#[test]
fn the_host_is_in_no_mount_table_inside() {
    for mode in MODES {
        let table = sh(mode, &[], "cat /proc/self/mountinfo");
        let host: Vec<_> = fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|line| {
                line.contains(" - ext4 ") || line.contains(" - xfs ") || line.contains(" - btrfs ")
            })
            .map(|line| format!(" {} ", line.split(' ').nth(2).unwrap()))
            .collect();
        assert!(!host.is_empty(), "the host has disks");
        for device in host {
            assert!(!table.contains(&device), "{mode:?}: {table}");
        }
        let root = table.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        assert!(root.split(' ').nth(5).unwrap().split(',').any(|flag| flag == "nodev"), "{root}");
        assert!(!table.contains(image().to_str().unwrap()), "{mode:?}: it does not tell where the image is");
    }
}

/// Looks for a file that only the host has, in every way that a path can be written.
const FIND: &str = r#"
    my ($path) = @ARGV;
    my @ways = ($path, "/proc/1/root$path", "/proc/self/root$path", "/proc/1/cwd/$path", "../" x 40 . $path, ".$path");
    for my $process (glob("/proc/[0-9]*")) {
        push @ways, "$process/root$path", "$process/cwd$path", "$process/cwd/" . "../" x 40 . $path;
        push @ways, map { ("$_$path", "$_/" . "../" x 40 . $path) } glob("$process/fd/*"), glob("$process/map_files/*");
    }
    my $found = grep { -e } @ways;
    report("find", $found ? "OK" : "nowhere");
    report("here", -e ((split "/", $path)[-1]) ? "OK" : "nowhere");
"#;

#[test]
fn no_path_leads_to_the_host() {
    let dir = scratch();
    let marker = dir.path().join("marker");
    fs::write(&marker, "the host's\n").unwrap();
    let marker = marker.to_str().unwrap();
    let mut outside = std::process::Command::new("perl");
    let text = succeed(outside.args(["-e", &program(FIND), marker]).current_dir(dir.path()));
    assert_eq!(text, "find\tOK\nhere\tOK\n", "outside it is found");
    for mode in MODES {
        // It is started where the file is.
        let mut command = run(mode, &image(), &[]);
        command.args(["perl", "-e", &program(FIND), marker]).current_dir(dir.path());
        assert_eq!(succeed(&mut command), "find\tnowhere\nhere\tnowhere\n", "{mode:?}");
        let mut command = run(mode, &image(), &[]);
        command.args(["sh", "-c", "pwd; pwd -P; readlink /proc/1/cwd || :"]).current_dir(dir.path());
        let text = succeed(&mut command);
        assert!(text.lines().all(|line| line == "/" || line == "/root"), "{mode:?}: {text}");
        let everywhere = sh(mode, &[], "find / -name marker 2>/dev/null | head -n 3");
        assert_eq!(everywhere, "", "{mode:?}");
    }
}

/// The classic way out: a root within the root, and a working directory outside of that.
const BREAK_OUT: &str = r#"
    my ($dir, $path) = @ARGV;
    mkdir "$dir/jail";
    opendir(my $here, "/");
    chdir "/"; chroot "$dir/jail" or report("chroot", why());
    chdir ".." for 1 .. 60;
    report("above", -e ".$path" ? "OK" : "nowhere");
    chroot "." ;
    report("above and chroot", -e $path ? "OK" : "nowhere");
    chdir $here; chdir ".." for 1 .. 60; chroot ".";
    report("by a directory", -e $path ? "OK" : "nowhere");
"#;

#[test]
fn chroot_and_dot_dot_lead_nowhere() {
    let dir = scratch();
    fs::write(dir.path().join("marker"), "").unwrap();
    let marker = dir.path().join("marker").to_str().unwrap().to_owned();
    // Out of a plain chroot, there is a way.
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let inner = r#"mount -o loop,ro "$1" "$2"; mount -t tmpfs none "$2/tmp"; shift; root=$1; shift; exec chroot "$root" "$@""#;
    let text = crate::machine::sh_outside(
        inner,
        &[
            image().to_str().unwrap(),
            root.to_str().unwrap(),
            "perl",
            "-e",
            &program(BREAK_OUT),
            "/tmp",
            &marker,
        ],
    );
    assert!(text.contains("above\tOK\n"), "out of a chroot there is: {text}");
    for mode in MODES {
        for place in ["/tmp", "/root"] {
            let found = attack(mode, &[], BREAK_OUT, &[place, &marker]);
            assert_eq!(found.iter().count(), 3, "chroot works: {found:?}");
            found.assert_all_refused(mode, &["nowhere"]);
        }
    }
}

/// A file handle is a number for an inode: on the same file system, no path is needed.
#[test]
fn file_handles_do_not_lead_to_the_host() {
    const HANDLE: &str = r#"
        my ($path) = @ARGV;
        my $handle = pack("Ll", 128, 0) . "\0" x 128; my $mount = pack("l", 0);
        syscall(SYS_name_to_handle_at, -100, $path, $handle, $mount, 0) == 0 or die "no handle: $!";
        print unpack("H*", $handle), "\n";
    "#;
    const OPEN: &str = r#"
        my ($handle, @dirs) = @ARGV;
        $handle = pack("H*", $handle);
        for my $dir (@dirs) {
            sysopen(my $mount, $dir, O_RDONLY) or next;
            my $fd = syscall(SYS_open_by_handle_at, fileno($mount), $handle, O_RDONLY);
            if ($fd == -1) { report($dir, "refused"); next }
            open(my $file, "<&=", $fd); my $line = <$file>; report($dir, $line eq "the host's\n" ? "OK" : "another file");
        }
    "#;
    // On a disk: what is in memory has other handles.
    let dir = tempfile::Builder::new().prefix("memdev-redteam-").tempdir_in("/var/tmp").unwrap();
    let marker = dir.path().join("marker");
    fs::write(&marker, "the host's\n").unwrap();
    let mut command = std::process::Command::new("perl");
    let handle = succeed(command.args(["-e", &program(HANDLE), marker.to_str().unwrap()]));
    let handle = handle.trim_end();
    attack_outside(OPEN, &[handle, dir.path().to_str().unwrap()]).assert_all_ok();
    for mode in MODES {
        let places = ["/", "/proc", "/sys", "/dev", "/dev/shm", "/dev/pts", "/run", "/tmp", "/dev/mqueue"];
        let args: Vec<_> = std::iter::once(handle).chain(places).collect();
        attack(mode, &[], OPEN, &args).assert_all_refused(mode, &["refused", "another file"]);
    }
}

/// Mounts that the session is allowed, taken off again: under them lies nothing of the host's.
#[test]
fn nothing_lies_under_the_roots_mounts() {
    let dir = scratch();
    let marker = dir.path().join("marker");
    fs::write(&marker, "").unwrap();
    let script = format!(
        "for d in /proc /sys /dev/pts /dev/shm /dev/mqueue /dev /run /tmp /; do umount -l $d 2>/dev/null || :; \
         test ! -e {0} || echo $d; test ! -e ./../../..{0} || echo $d; done; echo end",
        marker.display()
    );
    for mode in MODES {
        assert_eq!(sh(mode, &[], &script), "end\n", "{mode:?}");
        let mut command = run(mode, &image(), &[]);
        assert_eq!(succeed(command.args(["unshare", "-Urm", "sh", "-uc", &script])), "end\n", "{mode:?}");
    }
    assert!(Path::new(&marker).exists());
}
