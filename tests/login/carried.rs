//! Files that follow a user from login to login.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Output;

use rustix::process::Signal;
use serde_json::Value;

use super::machine::{DIR, Machine, USERS, digest, has_ended, send};
use crate::interop_support::said;
use crate::support::wait_until;

/// What the user has inside.
const HOME: &str = "/home/tester";

/// A machine whose users' homes are at `homes/NAME`, tester's being there; `more` is of the entry.
fn machine(more: &str) -> Machine {
    let machine = Machine::new();
    fs::create_dir(machine.file("homes")).unwrap();
    for (name, number) in USERS {
        let home = machine.file(&format!("homes/{name}"));
        fs::create_dir(&home).unwrap();
        chown(home, Some(number), Some(number)).unwrap();
    }
    let passwd = format!("root:x:0:0:root:/root:/bin/bash\ntester:x:4711:4711::{HOME}:/bin/sh\n");
    fs::write(machine.file("inside"), passwd).unwrap();
    settings(&machine, more);
    machine
}

/// The beginning of an entry, by which tester has a home inside.
fn entry() -> String {
    format!("[default]\nimage = '{DIR}/image'\nbinds = ['{DIR}/inside:/etc/passwd:ro']\n")
}

fn settings(machine: &Machine, more: &str) {
    machine.settings(&format!("{}carry = ['/home/{{user}}={DIR}/homes/{{user}}']\n{more}", entry()));
}

/// Has tester's home be a file system of its own, of so many bytes.
fn small_home(machine: &Machine, size: &str) {
    let options = format!("size={size},uid=4711,gid=4711,mode=700");
    let home = format!("{DIR}/homes/tester");
    let mounted = machine.command("mount").args(["-t", "tmpfs", "-o", &options, "none", &home]).status();
    assert!(mounted.unwrap().success());
}

fn memdev_carry(machine: &Machine, args: &[&str]) -> Output {
    let mut command = machine.command(&format!("{DIR}/memdev"));
    command.args(["carry", "--state", &format!("{DIR}/state")]).args(args).output().unwrap()
}

fn spooled(machine: &Machine) -> Vec<Value> {
    let output = memdev_carry(machine, &["status", "--json"]);
    let status: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    status["spooled"].as_array().unwrap().clone()
}

#[test]
fn a_home_is_there_at_the_next_login_and_the_system_is_not_changed() {
    let machine = machine("carry_deletes = true\n");
    let before = digest(&machine);
    let told = machine.sh(
        "echo $HOME; pwd; mkdir -p work/deep; echo mine >work/deep/notes; echo x >gone; ln -s work link; chmod 640 work/deep/notes; \
         echo lost >/tmp/x",
    );
    assert_eq!(told, format!("{HOME}\n{HOME}\n"));
    let home = |name: &str| machine.file(&format!("homes/tester/{name}"));
    assert_eq!(fs::read_to_string(home("work/deep/notes")).unwrap(), "mine\n");
    // In a private root of its own, of another daemon.
    let mut machine = machine;
    machine.kill_daemon();
    machine.start_daemon();
    let told = machine.sh(
        "cat link/deep/notes; stat -c %U:%a work/deep/notes; rm gone; ls -a /tmp; id -u >>work/deep/notes",
    );
    assert_eq!(told, "mine\ntester:640\n.\n..\n");
    assert_eq!(machine.sh("cat work/deep/notes; test -O work/deep/notes && ls"), "mine\n4711\nlink\nwork\n");
    for name in ["work", "work/deep/notes", "link"] {
        let meta = machine.file(&format!("homes/tester/{name}")).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (4711, 4711), "{name}");
    }
    assert!(!machine.file("homes/tester/gone").exists());
    assert_eq!(fs::read_dir(machine.file("homes/forced")).unwrap().count(), 0, "it is somebody else's");
    assert!(spooled(&machine).is_empty());
    assert_eq!(digest(&machine), before);
}

#[test]
fn what_cannot_be_delivered_is_told_and_kept_and_delivered_later() {
    // Long enough for it to be tried.
    let machine = machine("carry_wait = '3s'\n");
    small_home(&machine, "64k");
    let output = machine
        .login(&["-c", "echo small >a; head -c 1000000 /dev/urandom >big; exec true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(74), "{}", said(&output));
    let rest = spooled(&machine);
    assert_eq!(rest.len(), 1, "{rest:?}");
    let id = rest[0]["id"].as_str().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.starts_with("memdev: ") && told.contains(&format!("changes in {HOME} (")), "{told}");
    assert!(
        told.contains(&format!("tell the administrator '{id}'")) && told.matches('\n').count() == 1,
        "{told}"
    );
    assert!(!told.contains(DIR), "{told} tells of the host");
    let log = machine.log();
    assert!(
        log.contains("Files of a login were not delivered") && log.contains("no space left on device"),
        "{log}"
    );
    assert!(log.contains(&format!("memdev carry resume {id}")), "{log}");
    // The command's own status is kept, and the rest is told all the same.
    let output = machine.login(&["-c", "head -c 1000000 /dev/urandom >other; exit 3"]).output().unwrap();
    assert_eq!((output.status.code(), spooled(&machine).len()), (Some(3), 2), "{}", said(&output));
    assert!(machine.command("umount").arg(format!("{DIR}/homes/tester")).status().unwrap().success());
    let resumed = memdev_carry(&machine, &["resume"]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    for name in ["big", "other"] {
        let meta = machine.file(&format!("homes/tester/{name}")).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.len()), (4711, 4711, 1_000_000), "{name}");
    }
    assert!(spooled(&machine).is_empty());
    assert_eq!(machine.sh("test -O big && wc -c <other"), "1000000\n");
}

/// Whoever hangs up is out within a second, and the files are delivered all the same; and of what is not, the log tells.
#[test]
fn hung_up() {
    let machine = machine("");
    let mut running = machine.start("echo done >x; echo written; sleep 1000");
    assert_eq!(running.line(), "written\n");
    let sessions = machine.sessions();
    send(running.child.id(), Signal::KILL);
    machine.assert_gone(&sessions);
    assert_eq!(machine.sh("cat x"), "done\n");
    small_home(&machine, "64k");
    // Longer than a launcher has that does not carry.
    settings(&machine, "carry_wait = '2s'\n");
    let mut running = machine.start("head -c 1000000 /dev/urandom >big; echo written; sleep 1000");
    assert_eq!(running.line(), "written\n");
    let sessions = machine.sessions();
    send(running.child.id(), Signal::HUP);
    wait_until("everything inside has ended", || has_ended(&sessions[0]["init"]));
    drop(running);
    wait_until("the log tells", || machine.log().contains("Files of a login were not delivered"));
    machine.assert_gone(&sessions);
    assert_eq!(spooled(&machine).len(), 1);
}

/// Nothing that a user does, inside or at the destination, makes files somebody else's, or anybody root.
#[test]
fn everything_is_the_users() {
    let machine = machine("user = 'root'\n");
    machine.sh(
        "cd /home/tester; echo >root; echo >other; chown 4713:1 other; cp /bin/true suid; chmod 6755 suid",
    );
    for name in ["root", "other", "suid"] {
        let meta = machine.file(&format!("homes/tester/{name}")).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o6000), (4711, 4711, 0), "{name}");
    }
    // What is noted of a file at the destination the user could have written.
    settings(&machine, "");
    let forged = machine.file("homes/tester/forged");
    fs::copy("/bin/true", &forged).unwrap();
    fs::set_permissions(&forged, fs::Permissions::from_mode(0o6755)).unwrap();
    let seconds = forged.metadata().unwrap().mtime();
    let note = format!("6755 0 0 {seconds} 0 x");
    rustix::fs::setxattr(&forged, "user.memdev", note.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
    assert_eq!(
        machine.sh("stat -c %u:%g:%a forged suid other"),
        "4711:4711:755\n".repeat(2) + "4711:4711:644\n"
    );
    // A link that leads out is a link.
    symlink("/etc/shadow", machine.file("homes/tester/l")).unwrap();
    assert_eq!(machine.sh("readlink l"), "/etc/shadow\n");
}

/// The image's number of the user is not the host's.
#[test]
fn numbers_need_not_be_the_same() {
    let machine = Machine::new();
    let passwd = format!("root:x:0:0:root:/root:/bin/bash\ntester:x:1234:5::{HOME}:/bin/sh\n");
    fs::write(machine.file("inside"), passwd).unwrap();
    fs::create_dir(machine.file("home4711")).unwrap();
    chown(machine.file("home4711"), Some(4711), Some(4711)).unwrap();
    machine.settings(&format!(
        "[default]\nimage = '{DIR}/image'\nbinds = ['{DIR}/inside:/etc/passwd:ro']\ncarry = ['{HOME}={DIR}/home{{uid}}']\n"
    ));
    assert_eq!(machine.sh("echo mine >x; stat -c %u:%g . x"), "1234:5\n1234:5\n");
    let meta = machine.file("home4711/x").metadata().unwrap();
    assert_eq!((meta.uid(), meta.gid()), (4711, 4711));
    assert_eq!(machine.sh("stat -c %u:%g x; echo more >>x; cat x"), "1234:5\nmine\nmore\n");
}

#[test]
fn two_logins_that_changed_the_same_file_are_told() {
    let machine = machine("");
    let first = machine.start("read x; echo first >notes");
    let second = machine.start("read x; sleep 0; echo second >notes");
    assert_eq!(first.finish(), (Some(0), String::new()));
    let (status, told) = second.finish();
    assert_eq!(status, Some(0), "{told}");
    assert!(told.starts_with("memdev: notes was changed by another session as well"), "{told}");
    let third = machine.login(&["-c", "cat notes notes.conflict-*"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&third.stdout), "second\nfirst\n");
    assert!(said(&third).contains("there are 1 files that are called *.conflict-*"), "{}", said(&third));
}

#[test]
fn destinations_that_are_not_to_be_believed() {
    let machine = machine("");
    let attempt = || machine.login(&["-c", "echo in"]).output().unwrap();
    let entry = |carry: &str, more: &str| {
        machine.settings(&format!("{}carry = ['/home/{{user}}={DIR}/{carry}']\n{more}", entry()));
    };
    // Where the user could put a link in its place.
    fs::create_dir(machine.file("homes/tester/work")).unwrap();
    entry("homes/{user}/work", "");
    machine.assert_refused(&attempt(), "homes/tester: it is not root's");
    fs::set_permissions(machine.file("homes"), fs::Permissions::from_mode(0o1777)).unwrap();
    entry("homes/{user}", "");
    machine.assert_refused(&attempt(), "homes: others can write to it");
    fs::set_permissions(machine.file("homes"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink(format!("{DIR}/homes/forced"), machine.file("link")).unwrap();
    entry("link", "");
    machine.assert_refused(&attempt(), "link: it is a symbolic link");
    // An empty home would look as if all were lost.
    entry("none/{user}", "");
    machine.assert_refused(&attempt(), "none/tester: no such file or directory");
    let check = || {
        let mut command = machine.command(&format!("{DIR}/memdev"));
        command
            .args(["login", "--check", "tester", "--config", &format!("{DIR}/login.toml")])
            .output()
            .unwrap()
    };
    let output = check();
    assert!(
        !output.status.success() && said(&output).contains("make the directory, or mount it"),
        "{}",
        said(&output)
    );
    entry("homes/{user}", "second = 'join'\n");
    let output = check();
    assert!(
        !output.status.success() && said(&output).contains("carry: not with second = 'join'"),
        "{}",
        said(&output)
    );
    fs::write(machine.file("rules"), "x\n").unwrap();
    chown(machine.file("rules"), Some(4711), None).unwrap();
    entry("homes/{user}", &format!("carry_rules = ['{DIR}/rules']\n"));
    machine.assert_refused(&attempt(), "rules: it is not root's");
    chown(machine.file("rules"), Some(0), None).unwrap();
    let output = check();
    assert!(output.status.success(), "{}", said(&output));
    let told = said(&output);
    assert!(told.contains(&format!("carry      {HOME} to {DIR}/homes/tester\n")), "{told}");
    assert!(told.contains("by PAM     refused: A login program ends before files are delivered"), "{told}");
    assert_eq!(machine.sh("echo 1 >x; echo 2 >y"), "");
    assert!(!machine.file("homes/tester/x").exists() && machine.file("homes/tester/y").exists());
}
