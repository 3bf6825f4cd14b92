//! The kernel's own interfaces: raw I/O, modules, kexec, sysctls, sysfs, control groups, capabilities.

use std::fs;

use crate::machine::{MODES, Mode, attack, attack_outside, image, program, run, sh, sh_outside, succeed};
use crate::support::server::scratch;

/// Calls with arguments that make no sense, so that they do nothing wherever they are allowed: who may not call them
/// is told so before anything is looked at.
const CALLS: &str = r#"
    call("init_module", SYS_init_module, 0, 0, "");
    call("finit_module", SYS_finit_module, -1, "", 0);
    call("delete_module", SYS_delete_module, "no_such_module", 2048);
    call("kexec_load", SYS_kexec_load, 0, 17, 0, 0);
    call("kexec_file_load", SYS_kexec_file_load, -1, -1, 0, 0, 1 << 20);
    call("iopl", SYS_iopl, 3);
    call("ioperm", SYS_ioperm, 0x80, 1, 1);
    call("swapon", SYS_swapon, "/no/such", 0);
    call("swapoff", SYS_swapoff, "/no/such");
    call("acct", SYS_acct, "/no/such");
    call("bpf", SYS_bpf, 0, pack("LLLLL", 2, 4, 4, 1, 0) . "\0" x 100, 120);
"#;

/// What the calls come to for who may make them, by their names; what they come to inside.
#[test]
fn modules_kexec_raw_io_and_the_like_are_refused() {
    let outside = attack_outside(CALLS, &[]);
    // Of some kernels none can be tried: what they do not have, nobody may call.
    let absent: Vec<_> =
        outside.iter().filter(|(_, outcome)| *outcome == "ENOSYS").map(|(name, _)| name).collect();
    eprintln!("this kernel does not have {absent:?}");
    for (name, outcome) in outside.iter() {
        assert_ne!(outcome, "EPERM", "outside, {name} is not forbidden");
    }
    assert!(!absent.contains(&"swapon") && !absent.contains(&"acct"), "some can be tried");
    for mode in MODES {
        let inside = attack(mode, &[], CALLS, &[]);
        inside.assert_same_attempts(&outside);
        inside.assert_all_refused(mode, &["EPERM", "ENOSYS"]);
        for (name, outcome) in inside.iter() {
            assert!(
                outcome == "EPERM" || absent.contains(&name) || name == "iopl" || name == "ioperm",
                "{name}: {inside:?}"
            );
        }
        let mut command = run(mode, &image(), &[]);
        let text = succeed(command.args(["unshare", "-Urmpf", "perl", "-e", &program(CALLS)]));
        assert!(
            text.lines().all(|line| line.ends_with("\tEPERM") || line.ends_with("\tENOSYS")),
            "{mode:?}: {text}"
        );
    }
}

/// Capabilities by number that reach the host where there is no user namespace in between.
const FORBIDDEN: &[(u32, &str)] = &[
    (2, "DAC_READ_SEARCH"),
    (9, "LINUX_IMMUTABLE"),
    (14, "IPC_LOCK"),
    (16, "SYS_MODULE"),
    (17, "SYS_RAWIO"),
    (19, "SYS_PTRACE"),
    (20, "SYS_PACCT"),
    (21, "SYS_ADMIN"),
    (22, "SYS_BOOT"),
    (23, "SYS_NICE"),
    (24, "SYS_RESOURCE"),
    (25, "SYS_TIME"),
    (26, "SYS_TTY_CONFIG"),
    (27, "MKNOD"),
    (30, "AUDIT_CONTROL"),
    (32, "MAC_OVERRIDE"),
    (33, "MAC_ADMIN"),
    (34, "SYSLOG"),
    (35, "WAKE_ALARM"),
    (36, "BLOCK_SUSPEND"),
    (37, "AUDIT_READ"),
    (38, "PERFMON"),
    (39, "BPF"),
    (40, "CHECKPOINT_RESTORE"),
];

fn capabilities(status: &str) -> Vec<(String, u64)> {
    let sets = status.lines().filter_map(|line| line.strip_prefix("Cap")).map(|line| {
        let (name, value) = line.split_once(":\t").unwrap();
        (name.to_owned(), u64::from_str_radix(value, 16).unwrap())
    });
    let sets: Vec<_> = sets.collect();
    assert_eq!(sets.len(), 5);
    sets
}

#[test]
fn what_reaches_the_host_is_in_no_set_of_capabilities() {
    let here = capabilities(&fs::read_to_string("/proc/self/status").unwrap());
    assert!(here.iter().any(|(_, set)| set & (1 << 27) != 0), "outside, root may make device nodes");
    // Of every process there is inside, and of one that a setuid program would be.
    for options in [&[][..], &["--net", "none"]] {
        let text = sh(Mode::Privileged, options, "cat /proc/[0-9]*/status | grep ^Cap");
        for status in text.lines().collect::<Vec<_>>().chunks(5) {
            for (name, set) in capabilities(&status.join("\n")) {
                for (number, capability) in FORBIDDEN {
                    assert_eq!(set & (1 << number), 0, "{capability} in {name}");
                }
                if options.is_empty() {
                    assert_eq!(
                        set & (1 << 12 | 1 << 13),
                        0,
                        "NET_ADMIN and NET_RAW over the host's network in {name}"
                    );
                }
            }
        }
        let text = sh(Mode::Privileged, options, "grep ^CapEff /proc/self/status");
        assert_ne!(text.trim_end(), "CapEff:\t0000000000000000", "it has some");
    }
    // With a user namespace what counts is that root inside is nobody outside.
    let map = sh(Mode::User, &[], "cat /proc/self/uid_map /proc/self/gid_map");
    for line in map.lines() {
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        assert!(numbers[1] > 0, "the host's root is not mapped: {map}");
    }
}

/// Opens what is known to be dangerous, for writing; nothing is written.
const DANGEROUS: &str = r#"
    opens($_, O_WRONLY) for @ARGV;
"#;

const SYSCTLS: &[&str] = &[
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/core_pipe_limit",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/fs/file-max",
    "/proc/sys/fs/suid_dumpable",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/vm/overcommit_memory",
];

#[test]
fn core_pattern_and_other_sysctls_cannot_be_written() {
    attack_outside(DANGEROUS, SYSCTLS).assert_all_ok();
    for mode in MODES {
        attack(mode, &[], DANGEROUS, SYSCTLS).assert_all_refused(mode, &["EACCES", "EROFS", "EPERM"]);
    }
}

/// A fresh proc, mounted in namespaces of one's own, without what the session's has on top.
#[test]
fn nor_by_way_of_another_proc() {
    let script = r#"mount -t proc proc /mnt 2>/dev/null; umount -l /proc/sys 2>/dev/null; umount -l /proc 2>/dev/null
        exec perl -e "$0" /proc/sys/kernel/core_pattern /mnt/sys/kernel/core_pattern"#;
    let dir = scratch();
    let fresh = r#"mount -t proc proc "$1"; exec perl -e "$2" "$1/sys/kernel/core_pattern""#;
    let outside = sh_outside(fresh, &[dir.path().to_str().unwrap(), &program(DANGEROUS)]);
    assert!(outside.ends_with("\tOK\n"), "{outside}");
    for mode in MODES {
        for unshare in [&["unshare", "-Urm"][..], &["unshare", "-Urmpf"], &["sh", "-c", "exec \"$@\"", "sh"]]
        {
            let mut command = run(mode, &image(), &[]);
            let text = succeed(command.args(unshare).args(["sh", "-uc", script, &program(DANGEROUS)]));
            assert_eq!(text.lines().count(), 2);
            assert!(!text.contains("\tOK"), "{mode:?} {unshare:?}: {text}");
        }
    }
}

/// Every file of `/proc/sys` and `/sys`, opened for writing. What opens belongs to namespaces of the session's own.
const WALK: &str = r#"
    my @left = @ARGV;
    my $seen = 0;
    while (defined(my $path = shift @left)) {
        next if -l $path;
        if (-d _) {
            next if !opendir(my $dir, $path);
            push @left, map { "$path/$_" } grep { $_ ne "." && $_ ne ".." } readdir $dir;
        } elsif (-f _) {
            $seen += 1;
            report($path, "OK") if sysopen(my $file, $path, O_WRONLY | O_NONBLOCK);
        }
    }
    report("seen", $seen);
"#;

#[test]
fn nothing_in_proc_sys_and_sys_is_the_sessions_but_what_is_its_own() {
    /// Limits of the user namespace itself; System V memory, semaphores and messages, and POSIX queues, of the ipc
    /// namespace: the kernel keeps a set of these for each.
    const OWN: &[&str] = &[
        "/proc/sys/user/",
        "/proc/sys/kernel/shm",
        "/proc/sys/kernel/msg",
        "/proc/sys/kernel/sem",
        "/proc/sys/kernel/auto_msgmni",
        "/proc/sys/fs/mqueue/",
        // Of the namespace of processes.
        "/proc/sys/kernel/ns_last_pid",
        "/proc/sys/kernel/pid_max",
        // The names of the host and the domain, of the uts namespace.
        "/proc/sys/kernel/hostname",
        "/proc/sys/kernel/domainname",
    ];
    for mode in MODES {
        let found = attack(mode, &[], WALK, &["/proc/sys", "/sys"]);
        let seen: usize = found.of("seen").parse().unwrap();
        assert!(seen > 500, "{seen} files");
        for (path, outcome) in found.iter() {
            let own = OWN.iter().any(|own| path.starts_with(own));
            assert!(outcome != "OK" || (own && mode == Mode::User), "{mode:?}: {path}");
        }
        // A network of its own has settings of its own.
        let found = attack(mode, &["--net", "none"], WALK, &["/proc/sys", "/sys"]);
        for (path, outcome) in found.iter() {
            let own = OWN.iter().any(|own| path.starts_with(own)) || path.starts_with("/proc/sys/net/");
            assert!(
                outcome != "OK" || (own && mode == Mode::User),
                "{mode:?} with a network of its own: {path}"
            );
        }
    }
}

/// The rest of `/proc` that is the machine's.
#[test]
fn sysrq_memory_and_interrupts_are_out_of_reach() {
    const WRITE: &[&str] =
        &["/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr", "/proc/scsi/scsi"];
    const READ: &str = r#"
        for my $path (@ARGV) {
            my $there = sysopen(my $file, $path, O_RDONLY | O_NONBLOCK);
            report($path, !$there ? why() : sysread($file, my $bytes, 16) ? "OK" : "empty");
        }
    "#;
    let there: Vec<_> = WRITE.iter().copied().filter(|path| fs::metadata(path).is_ok()).collect();
    eprintln!("this kernel has {there:?}");
    attack_outside(DANGEROUS, &["/proc/irq/default_smp_affinity"]).assert_all_ok();
    for mode in MODES {
        attack(mode, &[], DANGEROUS, WRITE).assert_all_refused(mode, &["EACCES", "EPERM", "EROFS", "ENOENT"]);
        let mut files = vec!["/proc/kcore", "/proc/kmsg", "/proc/kpagecount"];
        if mode == Mode::Privileged {
            // With ids of its own it sees its own keys there.
            files.push("/proc/keys");
        }
        attack(mode, &[], READ, &files).assert_all_refused(mode, &["EACCES", "EPERM", "ENOENT", "empty"]);
    }
}

/// A control group of the first version runs a program on the host when it becomes empty, if it may be told which.
#[test]
fn release_agent_cannot_be_set() {
    const AGENTS: &str = r#"
        my ($point) = @ARGV;
        my @kinds = map { (split)[0] } grep { !/^#/ } do { open(my $file, "<", "/proc/cgroups") or die; <$file> };
        for my $kind (@kinds, "none,name=redteam", "none,name=systemd") {
            if (try(SYS_mount, "none", $point, "cgroup", 0, $kind) == -1) { report("mount $kind", why()); next }
            # What is written is what is there, so that it changes nothing.
            for my $what ("release_agent", "devices.allow") {
                next if !-e "$point/$what";
                my $old = "\n";
                if (open(my $file, "<", "$point/$what")) { $old = <$file> || "\n" }
                $old = "a *:* rwm" if $what eq "devices.allow";
                my $open = sysopen(my $file, "$point/$what", O_WRONLY);
                report("$kind $what", $open && syswrite($file, $old) ? "OK" : why());
            }
            try(SYS_umount2, $point, 2);
        }
    "#;
    let dir = scratch();
    let first = fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.contains(" cgroup rw"));
    if first {
        let outside =
            attack_outside(&AGENTS.replace("\"none,name=redteam\", ", ""), &[dir.path().to_str().unwrap()]);
        assert!(outside.iter().any(|(_, outcome)| outcome == "OK"), "outside it can be set: {outside:?}");
    } else {
        eprintln!("this machine has no control groups of the first version");
    }
    for mode in MODES {
        let refused = ["EPERM", "EACCES", "ENOENT", "EINVAL", "EBUSY", "EROFS"];
        attack(mode, &[], AGENTS, &["/mnt"]).assert_all_refused(mode, &refused);
        let mut command = run(mode, &image(), &[]);
        let text = succeed(command.args(["unshare", "-UrmC", "perl", "-e", &program(AGENTS), "/mnt"]));
        assert!(!text.contains("\tOK"), "{mode:?}: {text}");
    }
}

/// What the clock and the machine's name are is not the session's to say.
#[test]
fn clock_log_and_power_are_out_of_reach() {
    let script = r#"
        ! date -s '2030-01-01' >/dev/null 2>&1; ! dmesg >/dev/null 2>&1
        ! sysctl -w vm.drop_caches=1 >/dev/null 2>&1; ! chattr +i /etc/hostname 2>/dev/null
        ! fsfreeze -f / 2>/dev/null; echo ok"#;
    for mode in MODES {
        let before = std::time::SystemTime::now();
        assert_eq!(sh(mode, &[], script), "ok\n", "{mode:?}");
        assert!(before.elapsed().is_ok_and(|passed| passed.as_secs() < 3600), "the time is what it was");
    }
}

/// A machine's name is a private root's own.
#[test]
fn the_hosts_name_stays() {
    let before = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let own = sh(
        Mode::User,
        &[],
        "hostname redteam 2>/dev/null || echo redteam >/proc/sys/kernel/hostname; hostname",
    );
    assert_eq!(own, "redteam\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}
