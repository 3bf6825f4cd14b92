//! What a person sees of `memdev run`: the command's output, its exit status, and the options that container tools have.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Stdio;

use super::machine::{Place, image};
use crate::interop_support::said;

#[test]
fn the_exit_status_is_the_commands() {
    let place = Place::new();
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)] {
        assert_eq!(place.attempt(&[], script).status.code(), Some(status), "{script}");
    }
    let output = place.run(&[], &["/no/such/program"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    let text = said(&output);
    assert!(text.starts_with("memdev: Cannot run /no/such/program: no such file"), "{text}");
    let output = place.run(&[], &["/etc/passwd"]).output().unwrap();
    assert_eq!(output.status.code(), Some(126), "{}", said(&output));
    place.assert_empty();
}

#[test]
fn standard_input_output_and_error_are_the_commands() {
    let place = Place::new();
    let mut command = place.run(&[], &["sh", "-c", "tr a-z A-Z; echo problem >&2"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"HELLO\n"[..], &b"problem\n"[..]));
    // A shell is what there is by default.
    let mut command = place.run(&[], &[]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo $((6 * 7)); exit 5\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((&output.stdout[..], output.status.code()), (&b"42\n"[..], Some(5)));
    place.assert_empty();
}

#[test]
fn what_is_changed_is_seen_by_nobody_and_gone_afterwards() {
    let place = Place::new();
    let before = fs::metadata(image()).unwrap();
    let script = "echo changed >/etc/hostname; rm -rf /usr/share/doc; echo new >/root/new; cat /etc/hostname /root/new";
    assert_eq!(place.sh(&[], script), "changed\nnew\n");
    let script = "cat /etc/hostname; ls -d /usr/share/doc /root/new 2>&1 | grep -c No";
    assert_eq!(place.sh(&[], script), "memdev\n1\n");
    let after = fs::metadata(image()).unwrap();
    assert_eq!((before.mtime_nsec(), before.mtime()), (after.mtime_nsec(), after.mtime()));
    assert!(!fs::exists("/root/new").unwrap());
}

#[test]
fn the_environment_is_the_commands_own() {
    let place = Place::new();
    let mut command = place.run(&["--env", "A=b c", "-e", "PASSED", "--name", "box"], &["env"]);
    let output = command.env("PASSED", "on").env("SECRET", "x").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    let expected = [
        "A=b c",
        "HOME=/root",
        "LOGNAME=root",
        "MEMDEV_SESSION=box",
        "PASSED=on",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SHELL=/bin/bash",
        "USER=root",
        "container=memdev",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn user_directory_and_host_name_are_chosen() {
    let place = Place::new();
    assert_eq!(place.sh(&["--hostname", "kiosk"], "hostname; pwd; id -u; id -G"), "kiosk\n/\n0\n0\n");
    let text = place.sh(&["--user", "www-data", "--workdir", "/var/mail"], "id -un; id -gn; pwd");
    assert_eq!(text, "www-data\nwww-data\n/var/mail\n");
    assert_eq!(place.sh(&["--user", "4242:50"], "id -u; id -g"), "4242\n50\n");
    let output = place.attempt(&["--user", "nosuchuser"], "true");
    assert_eq!(
        said(&output),
        "memdev: The image has no user 'nosuchuser'; give one of its names, or a number\n"
    );
    assert_eq!(output.status.code(), Some(1));
    // It is not the program that is missing, so the statuses of shells are not for this.
    let output = place.attempt(&["--workdir", "/no/such"], "true");
    let line =
        "memdev: Cannot begin in /no/such: no such file or directory; make it, or give another --workdir\n";
    assert_eq!((output.status.code(), &*said(&output)), (Some(1), line));
    let output = place.attempt(&["--workdir", "/root", "--user", "www-data"], "true");
    let line = "memdev: Cannot begin in /root: permission denied; give another --workdir\n";
    assert_eq!((output.status.code(), &*said(&output)), (Some(1), line));
}

#[test]
fn directories_and_files_of_the_host_are_seen_where_asked_for() {
    let place = Place::new();
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "of the host\n").unwrap();
    fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let source = shared.to_str().unwrap();

    let text = place
        .sh(&["--bind", &format!("{source}:/deep/er:ro")], "cat /deep/er/file; touch /deep/er/x 2>&1; :");
    assert!(text.starts_with("of the host\n") && text.contains("Read-only"), "{text}");
    let text = place.sh(&["--bind", &format!("{source}/file:/etc/hostname")], "cat /etc/hostname");
    assert_eq!(text, "of the host\n");

    // What belongs to a user of the host belongs to the same user inside, who can change it.
    chown(&shared, Some(4242), Some(4242)).unwrap();
    let options = ["--bind", &format!("{source}:/home/x"), "--user", "4242"];
    assert_eq!(place.sh(&options, "echo mine >/home/x/mine; stat -c %u:%g /home/x/mine"), "4242:4242\n");
    let made = fs::metadata(shared.join("mine")).unwrap();
    assert_eq!((made.uid(), made.gid()), (4242, 4242));
    // No file of anybody else's can be made there, the host's root's above all.
    let options = ["--bind", &format!("{source}:/home/x")];
    let script = "cp /bin/true /home/x/t 2>/dev/null || echo refused; chown 0 /home/x/mine 2>/dev/null || echo refused";
    assert_eq!(place.sh(&options, script), "refused\nrefused\n");

    let output = place.attempt(&["--bind", "/no/such:/x"], "true");
    let line = "memdev: Cannot bind /no/such: no such file or directory; make it, or bind another path\n";
    assert_eq!(said(&output), line);
}

#[test]
fn without_a_network_there_is_a_loopback_interface() {
    let place = Place::new();
    let text = place.sh(&["--net", "none"], "ls /sys/class/net; cat /proc/net/dev | tail -n +3 | wc -l");
    assert_eq!(text, "lo\n1\n");
    // It is up: a datagram to a port that nobody has is refused, not unreachable.
    let script = "exec 3<>/dev/udp/127.0.0.1/9 && echo x >&3; sleep 0.1; echo x >&3; echo $?";
    let output = place.run(&["--net", "none"], &["bash", "-c", script]).output().unwrap();
    assert!(!said(&output).contains("unreachable"), "{}", said(&output));
    let own = fs::read_dir("/sys/class/net").unwrap().count();
    assert_eq!(place.sh(&[], "ls /sys/class/net | wc -l"), format!("{own}\n"));
}

#[test]
fn what_is_written_has_a_limit() {
    let place = Place::new();
    let script = "dd if=/dev/urandom of=/big bs=1M count=64 conv=fsync 2>&1; echo $?";
    let text = place.attempt(&["--memory", "16M"], script);
    assert!(said(&text).ends_with("1\n"), "{}", said(&text));
    assert!(place.sh(&["--memory", "256M"], script).ends_with("0\n"));
}

#[test]
fn a_dry_run_prints_the_steps_and_does_nothing() {
    let place = Place::new();
    let output = place.run(&["--dry-run", "--net", "none"], &["id"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let text = said(&output);
    assert!(text.starts_with(" 1  launcher  write the session down"), "{text}");
    assert!(text.contains("pivot_root") && text.ends_with("start id as root\n"), "{text}");
    assert!(!place.state().exists());
}

#[test]
fn what_cannot_be_a_root_is_refused() {
    let place = Place::new();
    let output = place.memdev("run", &["/no/such.img"]).output().unwrap();
    assert!(said(&output).contains("/no/such.img: no such file"), "{}", said(&output));
    let zeroes = place.path("zeroes.img");
    fs::File::create(&zeroes).unwrap().set_len(1 << 20).unwrap();
    let output = place.memdev("run", &["--backend", "fuse", zeroes.to_str().unwrap()]).output().unwrap();
    assert!(said(&output).contains("No file system that can be a root is on"), "{}", said(&output));
    assert_eq!(output.status.code(), Some(1));
    // Who has an image of another kind is told what to do with it.
    let qcow2 = place.path("small.qcow2");
    fs::write(&qcow2, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 8192]].concat()).unwrap();
    let output = place.memdev("run", &["--backend", "fuse", qcow2.to_str().unwrap()]).output().unwrap();
    let line =
        format!("memdev: Cannot make a root of {}, which is no raw disk (qcow2 image)", qcow2.display());
    assert!(said(&output).starts_with(&line), "{}", said(&output));
    assert!(said(&output).contains("; convert it first: qemu-img convert -O raw"), "{}", said(&output));
    assert_eq!((output.status.code(), said(&output).lines().count()), (Some(1), 1));
    // From a directory that is open one would get to the rest of the host.
    let output = place.run(&[], &["true"]).stdin(fs::File::open("/").unwrap()).output().unwrap();
    assert!(said(&output).contains("Descriptor 0 is a directory"), "{}", said(&output));
    place.assert_empty();
}

#[test]
fn a_partition_of_a_disk_is_a_root() {
    use std::os::unix::fs::FileExt;
    const START: u64 = 2048 * 512;
    let place = Place::new();
    let size = fs::metadata(image()).unwrap().len();
    let path = place.path("disk.img");
    // A table with one Linux partition; behind it comes the image.
    let copy = ["conv=sparse,notrunc", "bs=1M", "seek=1", "status=none"].map(String::from);
    let files = [format!("if={}", image().display()), format!("of={}", path.display())];
    crate::interop_support::run("dd", files.iter().chain(&copy));
    let disk = fs::File::options().write(true).open(&path).unwrap();
    disk.set_len(START + size + (1 << 20)).unwrap();
    let mut sector = [0; 512];
    sector[446 + 16 + 4] = 0x83;
    for (at, number) in [(446 + 16 + 8, 2048_u32), (446 + 16 + 12, u32::try_from(size / 512).unwrap())] {
        let mut bytes = number.to_be_bytes();
        bytes.reverse();
        sector[at..at + 4].copy_from_slice(&bytes);
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write_all_at(&sector, 0).unwrap();

    let attempt = |number: &str| {
        let mut command = place.memdev("run", &["--partition", number, "--backend", "fuse"]);
        let output =
            command.arg(&path).args(["--", "sh", "-c", "echo x >/x; cat /etc/hostname"]).output().unwrap();
        place.assert_empty();
        said(&output)
    };
    assert_eq!(attempt("2"), "memdev\n");
    let line = attempt("1");
    assert!(line.starts_with("memdev: The image has no partition 1, but 2"), "{line}");
    let output = place.run(&["--partition", "1"], &["true"]).output().unwrap();
    assert!(said(&output).contains("has no partition table"), "{}", said(&output));
    place.assert_empty();
}
