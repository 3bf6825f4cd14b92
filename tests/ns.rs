//! `memdev ns`: a copy of the mount table, as root and as an ordinary user. Needs root, to be both.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use support::server::scratch;
use support::wait_until;
use tempfile::TempDir;

const MEMDEV: &str = env!("CARGO_BIN_EXE_memdev");
/// A user that need not exist.
const UID: u32 = 54_321;

/// What an ordinary user is told.
const WITHOUT_ROOT: &str = "memdev: without root: you can mount tmpfs, binds and overlays here; you cannot mount disks, \
    become another user, or use setuid programs\n";

/// Who runs it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Root,
    Ordinary,
}

const BOTH: [Who; 2] = [Who::Root, Who::Ordinary];

impl Who {
    fn command(self, program: &str) -> Command {
        let mut command = match self {
            Who::Root => Command::new(program),
            Who::Ordinary => {
                let mut command = Command::new("setpriv");
                let ids = [format!("--reuid={UID}"), format!("--regid={UID}")];
                command.args(ids).args(["--clear-groups", "--inh-caps=-all", "--", program]);
                command
            }
        };
        command.env_remove("MEMDEV_LOG").stdin(Stdio::null());
        command
    }

    fn ns(self) -> Command {
        let mut command = self.command(MEMDEV);
        command.arg("ns");
        command
    }

    /// Runs a script in a copy; it succeeds.
    #[track_caller]
    fn script(self, script: &str, dir: &Path) -> String {
        let output = self.ns().args(["--", "sh", "-euc", script]).env("D", dir).output().unwrap();
        assert!(output.status.success(), "{self:?}: {}", said(&output));
        let told = if self == Who::Root { "" } else { WITHOUT_ROOT };
        assert_eq!(String::from_utf8_lossy(&output.stderr), told);
        String::from_utf8(output.stdout).unwrap()
    }
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}: {}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// A directory in which that user may make files.
fn place(who: Who) -> (TempDir, PathBuf) {
    let dir = scratch();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = dir.path().join("place");
    fs::create_dir(&path).unwrap();
    if who == Who::Ordinary {
        std::os::unix::fs::chown(&path, Some(UID), Some(UID)).unwrap();
    }
    (dir, path)
}

fn mount_table() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn what_is_mounted_inside_is_seen_by_nobody_else() {
    for who in BOTH {
        let (_dir, place) = place(who);
        let seen = who.script("mount -t tmpfs none $D; echo inside >$D/file; grep -c \" $D \" /proc/self/mountinfo; cat $D/file", &place);
        assert_eq!(seen, "1\ninside\n");
        assert_eq!(entries(&place), 0, "the file was in the mount");
        assert!(!mount_table().contains(place.to_str().unwrap()));
    }
}

#[test]
fn files_are_those_that_they_were() {
    for who in BOTH {
        let (_dir, place) = place(who);
        who.script("echo outside >$D/file", &place);
        let file = place.join("file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "outside\n");
        let owner = if who == Who::Root { 0 } else { UID };
        assert_eq!(fs::metadata(&file).unwrap().uid(), owner);
    }
}

/// Where the root is shared, as systemd makes it, a plain copy would show its mounts to all.
#[test]
fn nothing_propagates_in_either_direction() {
    let (_dir, place) = place(Who::Root);
    let script = |copy: &str| {
        // Of two points, one is mounted on inside and one, meanwhile, outside.
        let script = format!(
            r#"cd "$D"; mkdir -p in out; mkfifo a b
            {copy} sh -euc 'mount -t tmpfs none in; echo >a; read x <b; grep -c " $D/out " /proc/self/mountinfo || :' &
            read x <a; mount -t tmpfs none out; grep -c " $D/in " /proc/self/mountinfo || :; echo >b; wait; rm a b"#
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "shared", "bash", "-euc", &script]).env("D", &place);
        let output = command.env("MEMDEV", MEMDEV).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(script("unshare --mount --propagation unchanged"), "1\n1\n", "mounts do propagate here");
    assert_eq!(script("\"$MEMDEV\" ns --"), "0\n0\n");
}

/// The number of the loop device that has this file.
fn loop_device(file: &Path) -> Option<String> {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    devices
        .filter(|device| {
            fs::read_to_string(device.join("loop/backing_file"))
                .is_ok_and(|backing| Path::new(backing.trim_end()) == file)
        })
        .map(|device| device.display().to_string())
        .next()
}

/// A process that waits for something on its standard input, with a file system on a loop device mounted.
fn holder(image: &Path, script: &str) -> Child {
    let mut command = Who::Root.ns();
    command.args(["--", "sh", "-euc", script]).env("IMAGE", image).env("D", image.with_file_name("point"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn small_file_system(dir: &Path) -> PathBuf {
    let image = dir.join("image");
    fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    fs::create_dir(dir.join("point")).unwrap();
    let mut make = Command::new("mkfs.ext4");
    make.args(["-q", "-F"]).arg(&image).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    assert!(make.status().unwrap().success());
    image
}

#[test]
fn mounts_are_gone_when_the_last_process_has_ended_and_not_before() {
    let (_dir, place) = place(Who::Root);
    let image = small_file_system(&place);
    // The first process ends; one that it has started stays.
    let mut first = holder(&image, r#"mount -o loop "$IMAGE" "$D"; exec 3<&0; { read x <&3; } >/dev/null &"#);
    assert!(first.wait().unwrap().success());
    assert!(loop_device(&image).is_some(), "somebody still has it mounted");
    drop(first.stdin.take());
    wait_until("the mount is gone", || loop_device(&image).is_none());
}

#[test]
fn mounts_are_gone_when_the_last_process_is_killed() {
    let (_dir, place) = place(Who::Root);
    let image = small_file_system(&place);
    let mut child = holder(&image, r#"mount -o loop "$IMAGE" "$D"; echo; read x"#);
    let mut line = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert!(loop_device(&image).is_some());
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    wait_until("the mount is gone", || loop_device(&image).is_none());
}

#[test]
fn the_exit_status_is_the_commands() {
    for who in BOTH {
        for status in [0, 1, 7, 255] {
            let output = who.ns().args(["--", "sh", "-c", &format!("exit {status}")]).output().unwrap();
            assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        }
        let output = who.ns().args(["--quiet", "--", "sh", "-c", "kill -TERM $$"]).output().unwrap();
        assert_eq!(output.status.signal(), Some(15));
        assert_eq!(output.stderr, b"", "it was not to tell");
    }
}

#[test]
fn a_command_that_cannot_be_run_is_one_line_and_the_status_that_shells_give() {
    let (_dir, place) = place(Who::Root);
    let file = place.join("file");
    fs::write(&file, "").unwrap();
    for (program, status, why) in
        [("/no/such", 127, "no such file or directory"), (file.to_str().unwrap(), 126, "permission denied")]
    {
        let output = Who::Root.ns().args(["--", program]).output().unwrap();
        assert_eq!(output.status.code(), Some(status));
        assert_eq!(String::from_utf8_lossy(&output.stderr), format!("memdev: Cannot run {program}: {why}\n"));
    }
}

#[test]
fn without_a_command_it_is_the_shell() {
    for who in BOTH {
        let status = |shell: &str| who.ns().env("SHELL", shell).status().unwrap().code();
        assert_eq!((status("/bin/true"), status("/bin/false")), (Some(0), Some(1)));
        let mut child =
            who.ns().env_remove("SHELL").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"echo $0; exit 3\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(3), &b"/bin/sh\n"[..]));
    }
}

#[test]
fn copies_of_copies() {
    for who in BOTH {
        let (_dir, place) = place(who);
        fs::create_dir(place.join("a")).unwrap();
        fs::create_dir(place.join("b")).unwrap();
        let script = format!(
            r#"count() {{ grep -c " $D/$1 " /proc/self/mountinfo || :; }}
            mount -t tmpfs none $D/a
            {MEMDEV} ns -- sh -euc 'mount -t tmpfs none $D/b; umount $D/a; grep -c " $D/" /proc/self/mountinfo'
            count a; count b"#
        );
        assert_eq!(who.script(&script, &place), "1\n1\n0\n", "{who:?}");
    }
}

#[test]
fn what_an_ordinary_user_can_and_cannot() {
    let (_dir, place) = place(Who::Ordinary);
    let image = small_file_system(&place);
    let script = r#"id -u; id -g
        mkdir "$D/lower" "$D/up" "$D/all"; echo >"$D/lower/file"
        mount -t tmpfs none "$D/up"; mkdir "$D/up/upper" "$D/up/work"
        mount -t overlay -o "lowerdir=$D/lower,upperdir=$D/up/upper,workdir=$D/up/work" none "$D/all"; rm "$D/all/file"
        mount --bind "$D/all" "$D/point"
        ! test -e "$D/point/file"; test -e "$D/lower/file"
        ! mount -o loop "$D/image" "$D/point" 2>/dev/null
        ! chown 12345 "$D/lower/file" 2>/dev/null
        ! setpriv --reuid=12345 true 2>/dev/null
        ! mknod "$D/node" b 7 0 2>/dev/null
        echo all"#;
    assert_eq!(Who::Ordinary.script(script, &place), "0\n0\nall\n");
    assert!(image.exists() && !place.join("node").exists());
}

/// An administrator can forbid user namespaces; whoever cannot have one is told what to do.
#[test]
fn without_user_namespaces_it_says_so() {
    let script = format!(
        "echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin {MEMDEV} ns -- true"
    );
    let output =
        Command::new("unshare").args(["--user", "--map-root-user", "sh", "-euc", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let line = String::from_utf8(output.stderr).unwrap();
    let expected = "memdev: Cannot make a user namespace, in which an ordinary user may mount: no space left on device; \
        there are as many as this system allows (see user.max_user_namespaces)\n";
    assert_eq!(line, expected);
}
