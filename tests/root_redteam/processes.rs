//! The host's processes: looking at them, stopping them, entering what they are in.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use crate::machine::{
    Held, MEMDEV, MODES, Mode, Victim, attack, attack_outside, image, program, run, said, sh,
};

/// All that one process can do to another. The victim's number is the host's.
const REACH: &str = r#"
    my ($pid) = @ARGV;
    report("signal", kill(0, $pid) ? "OK" : why());
    call("pidfd_open", SYS_pidfd_open, $pid + 0, 0);
    call("ptrace attach", SYS_ptrace, 16, $pid + 0, 0, 0); waitpid($pid, 0x40000000); syscall(SYS_ptrace, 17, $pid + 0, 0, 0);
    for my $what ("mnt", "user", "pid", "net", "ipc", "uts", "cgroup") {
        report("namespace $what", sysopen(my $file, "/proc/$pid/ns/$what", O_RDONLY) ? "OK" : why());
    }
    for my $what ("root/etc", "cwd/.", "mem", "maps", "environ", "fd/0", "mountinfo") {
        report("proc $what", sysopen(my $file, "/proc/$pid/$what", O_RDONLY) ? "OK" : why());
    }
"#;

#[test]
fn processes_of_the_host_cannot_be_seen_stopped_or_entered() {
    let mut victim = Victim::start();
    attack_outside(REACH, &[&victim.pid()]).assert_all_ok();
    for mode in MODES {
        attack(mode, &[], REACH, &[&victim.pid()]).assert_all_refused(mode, &["ESRCH", "ENOENT"]);
        // Nor by way of namespaces of one's own, with a proc of one's own.
        let mut command = run(mode, &image(), &[]);
        command.args([
            "unshare",
            "-Urmpf",
            "sh",
            "-c",
            "mount -t proc proc /proc; exec perl -e \"$0\" \"$@\"",
        ]);
        let output = command.args([&program(REACH), &victim.pid()]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.lines().count() == 17 && !text.contains("\tOK"), "{mode:?}: {text}");
    }
    victim.assert_well();
}

/// Process 1 is the launcher's own: what it has open or is in must lead nowhere, because in privileged mode it has the
/// same user and capabilities as root inside, who so may trace it.
#[test]
fn the_first_process_leads_nowhere() {
    for mode in MODES {
        let held = Held::start(mode, &[]);
        let processes = held.processes();
        let first = processes.inside[0];
        let read = |what: &str| std::fs::read_link(format!("/proc/{first}/{what}")).unwrap();
        for fd in std::fs::read_dir(format!("/proc/{first}/fd")).unwrap() {
            let fd = fd.unwrap();
            // What it had for a moment may be closed by now.
            let Ok(target) = std::fs::read_link(fd.path()) else { continue };
            let number = fd.file_name();
            let text = target.to_string_lossy().into_owned();
            let standard = ["0", "1", "2"].contains(&number.to_str().unwrap());
            // The channel to the launcher, who listens to it for its end. For a moment, those devices that everybody has.
            const DEVICES: &[&str] =
                &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
            let harmless =
                ["socket:", "pipe:", "anon_inode:[eventfd]", "anon_inode:[signalfd]", "anon_inode:[pidfd]"];
            let is_harmless = harmless.iter().any(|kind| text.starts_with(kind));
            assert!(standard || is_harmless || DEVICES.contains(&&*text), "{mode:?}: {number:?} is {text}");
        }
        assert_eq!(read("cwd"), std::path::Path::new("/"));
        let table = std::fs::read_to_string(format!("/proc/{first}/mountinfo")).unwrap();
        let root = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let device = |table: &str| {
            let line = table.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
            line.split(' ').nth(2).unwrap().to_owned()
        };
        assert_ne!(device(&table), device(&root), "its root is another device");
        let host = device(&root);
        assert!(table.lines().all(|line| line.split(' ').nth(2) != Some(&*host)), "{mode:?}: {table}");
        held.end();
        // Root inside may signal it, and no more: its memory and descriptors are out of reach.
        attack(mode, &[], TRACE, &[]).assert_all_refused(mode, &["EACCES", "EPERM"]);
    }
}

const TRACE: &str = r#"
    call("ptrace attach", SYS_ptrace, 16, 1, 0, 0);
    call("ptrace seize", SYS_ptrace, 0x4206, 1, 0, 0);
    for my $what ("mem", "fd/3", "environ") {
        report("proc $what", sysopen(my $file, "/proc/1/$what", O_RDONLY) ? "OK" : why());
    }
"#;

#[test]
fn process_numbers_and_signals_stay_inside() {
    let mut victim = Victim::start();
    let host = std::fs::read_dir("/proc").unwrap().flatten();
    let host = host
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .count();
    for mode in MODES {
        let inside: usize = sh(mode, &[], "ls -d /proc/[0-9]* | wc -l").trim_end().parse().unwrap();
        assert!(inside < 8 && inside < host, "{mode:?}: {inside} processes, {host} outside");
        // Everybody one may signal.
        let mut command = run(mode, &image(), &[]);
        let _ = command.args(["perl", "-e", "kill 'KILL', -1; sleep 1"]).output().unwrap();
        victim.assert_well();
    }
}

/// Sockets in the abstract namespace belong to the network, which is the host's unless `--net none` says otherwise.
#[test]
fn a_network_of_its_own_has_no_abstract_sockets_of_the_hosts() {
    let name = format!("memdev-redteam-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    const CONNECT: &str = r#"
        use Socket;
        socket(my $socket, AF_UNIX, SOCK_STREAM, 0) or die;
        report("connect", connect($socket, pack("Sa*", AF_UNIX, "\0$ARGV[0]")) ? "OK" : why());
    "#;
    attack_outside(CONNECT, &[&name]).assert_all_ok();
    for mode in MODES {
        attack(mode, &["--net", "none"], CONNECT, &[&name]).assert_all_refused(mode, &["ECONNREFUSED"]);
        let links = sh(mode, &["--net", "none"], "tail -n +3 /proc/net/dev | cut -d: -f1");
        assert_eq!(links.trim(), "lo", "{mode:?}");
    }
}

/// Whoever shares a terminal could type into it, and the shell outside would read that when the session is over.
#[test]
fn nothing_can_be_typed_into_the_terminal_outside() {
    const TYPE: &str = r#"
        my $tty; open($tty, "+<", "/dev/tty") or open($tty, "<&", 0);
        for my $byte ("x", "\n") { ioctl($tty, 0x5412, my $copy = $byte); }
    "#;
    // Whoever reads from the terminal next, once that has ended.
    let then_read = r#""$@"; read -r -t 2 line; echo "typed=$line""#;
    // `script` gives its command a terminal of its own, as a login has one.
    let on_terminal = |command: &Command| {
        let quote = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().unwrap().replace('\'', r"'\''"));
        let mut words = vec![format!("bash -c {} bash", quote(then_read.as_ref()))];
        words.extend(std::iter::once(command.get_program()).chain(command.get_args()).map(quote));
        let mut script = Command::new("script");
        script.args(["-qec", &words.join(" "), "/dev/null"]);
        // Nobody types, and nobody says that nobody will.
        let (reader, _writer) = std::io::pipe().unwrap();
        let output = script.stdin(reader).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let line = text.lines().find_map(|line| line.strip_prefix("typed="));
        line.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    let mut outside = Command::new("perl");
    outside.args(["-e", &program(TYPE)]);
    assert_eq!(on_terminal(&outside), "x", "outside it can be done");
    for mode in MODES {
        let mut command = Command::new(MEMDEV);
        command.arg("run");
        if mode == Mode::Privileged {
            command.arg("--privileged");
        }
        command.arg(image()).args(["--", "perl", "-e", &program(TYPE)]);
        assert_eq!(on_terminal(&command), "", "{mode:?}");
    }
}

#[test]
fn system_v_memory_and_queues_are_its_own() {
    let make = "ipcmk -M 4096 | grep -o '[0-9]*$'";
    let id = crate::machine::sh_outside(make, &[]);
    let id = id.trim_end();
    let seen = crate::machine::sh_outside("ipcs -m | grep -c -w \"$1\" || :", &[id]);
    for mode in MODES {
        let inside = sh(mode, &[], &format!("tail -n +2 /proc/sysvipc/shm | grep -c -w {id} || :"));
        assert_eq!((seen.trim_end(), inside.trim_end()), ("1", "0"), "{mode:?}");
    }
    crate::machine::sh_outside("ipcrm -m \"$1\"", &[id]);
}
