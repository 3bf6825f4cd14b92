//! The other direction: an unprivileged user of the host, and the session of somebody else.

use std::fs;
use std::process::Command;

use crate::machine::{Held, MODES, Mode, Outcomes, program, succeed};

/// A user of the host's that need not exist.
const STRANGER: u32 = 54_321;

/// All that one may try with the number of a process. (Its mount table anybody may read, as that of every process.)
const REACH: &str = r#"
    my ($pid) = @ARGV;
    for my $what ("root/etc/hostname", "cwd/.", "mem", "maps", "environ", "fd/0", "ns/mnt", "ns/user") {
        report("proc $what", sysopen(my $file, "/proc/$pid/$what", O_RDONLY) ? "OK" : why());
    }
    report("signal", kill(0, $pid) ? "OK" : why());
    call("ptrace attach", SYS_ptrace, 16, $pid + 0, 0, 0); waitpid($pid, 0x40000000); syscall(SYS_ptrace, 17, $pid + 0, 0, 0);
"#;

#[track_caller]
fn reach(uid: Option<u32>, pid: u32) -> Outcomes {
    let mut command = match uid {
        None => Command::new("perl"),
        Some(uid) => {
            let mut command = Command::new("setpriv");
            let ids = [format!("--reuid={uid}"), format!("--regid={uid}")];
            command.args(ids).args(["--clear-groups", "--inh-caps=-all", "--", "perl"]);
            command
        }
    };
    Outcomes::parse(&succeed(command.args(["-e", &program(REACH), &pid.to_string()])))
}

#[test]
fn another_user_of_the_host_cannot_get_into_a_session() {
    for mode in MODES {
        let held = Held::start(mode, &[]);
        let processes = held.processes();
        // The command itself, which anybody may look at where it is theirs.
        let &command = processes.inside.last().unwrap();
        let outside = reach(None, command);
        assert_eq!(outside.of("proc root/etc/hostname"), "OK", "{mode:?}: the host's root can: {outside:?}");
        for &pid in processes.inside.iter().chain(&processes.outside) {
            reach(Some(STRANGER), pid).assert_all_refused(mode, &["EACCES", "EPERM"]);
        }
        held.end();
    }
}

/// Ids of a session's users are some user's of the host. Whoever has subordinate ids can become those: they must not be
/// the session's.
#[test]
fn nor_one_who_has_subordinate_ids() {
    let held = Held::start(Mode::User, &[]);
    let first = held.processes().inside[0];
    let map = fs::read_to_string(format!("/proc/{first}/uid_map")).unwrap();
    let numbers: Vec<u64> = map.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let (begin, end) = (numbers[1], numbers[1] + numbers[2]);
    assert!(begin > 65_535, "no user of the host's is mapped: {map}");
    for line in fs::read_to_string("/etc/subuid").unwrap_or_default().lines() {
        let fields: Vec<_> = line.split(':').collect();
        let (from, count): (u64, u64) = (fields[1].parse().unwrap(), fields[2].parse().unwrap());
        if fields[0] != "root" && fields[0] != "memdev" {
            assert!(from + count <= begin || end <= from, "{line} overlaps {map}");
        }
    }
    held.end();
}

/// The device has a name on the host; only root may open it.
#[test]
fn the_sessions_device_is_roots() {
    for mode in MODES {
        let held = Held::start(mode, &[]);
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", held.processes().inside[0])).unwrap();
        let root = table.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        let number = root.split(' ').nth(2).unwrap();
        let name = fs::read_link(format!("/sys/dev/block/{number}")).expect("a block device");
        let node = format!("/dev/{}", name.file_name().unwrap().to_str().unwrap());
        let open = format!("opens(\"{node}\", O_RDONLY)");
        let mut command = Command::new("setpriv");
        command.args([
            &format!("--reuid={STRANGER}"),
            &format!("--regid={STRANGER}"),
            "--clear-groups",
            "--",
        ]);
        let text = succeed(command.args(["perl", "-e", &program(&open)]));
        assert_eq!(text, format!("{node}\tEACCES\n"), "{mode:?}");
        held.end();
    }
}
