//! The program is run here, instruction by instruction, for calls of all kinds: so nothing has to be executed, mounted or
//! attached to in order to see that it could not be.

use super::*;
use libc::{c_int, c_long};

const PROCESS: u32 = 4711;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | 38;

/// As linux/audit.h has it.
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xC000_00B7;
/// 32-bit programs of the other family.
const FOREIGN: u32 = 0x4000_0003;

/// `struct seccomp_data` as words: number, processor, address (2), six arguments (2 each, the low half first).
fn data(call: c_long, processor: u32, arguments: &[u64]) -> [u32; 16] {
    let mut words = [0; 16];
    words[0] = u32::try_from(call).unwrap();
    words[1] = processor;
    for (pair, argument) in words[4..].chunks_mut(2).zip(arguments) {
        pair[0] = u32::try_from(argument & 0xffff_ffff).unwrap();
        pair[1] = u32::try_from(argument >> 32).unwrap();
    }
    words
}

/// Runs the program; what it returns, after how many instructions.
fn run(program: &[sock_filter], data: &[u32; 16]) -> (u32, usize) {
    let (mut at, mut accumulator, mut steps) = (0, 0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        steps += 1;
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { jt } else { jf });
        match code {
            0x20 => {
                assert_eq!(k % 4, 0);
                accumulator = data[k as usize / 4];
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x06 => return (k, steps),
            _ => panic!("instruction {code:#x} is not known here"),
        }
    }
}

fn purpose() -> Purpose {
    Purpose { process: PROCESS, unlinks: true, overflows: false, strict: false }
}

fn outcome(purpose: Purpose, call: c_long, arguments: &[u64]) -> u32 {
    run(&program(purpose).unwrap(), &data(call, NATIVE, arguments)).0
}

fn of(call: c_long, arguments: &[u64]) -> u32 {
    outcome(purpose(), call, arguments)
}

fn int(value: c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

#[test]
fn what_a_server_does_is_allowed() {
    for &call in calls::HOT.iter().chain(calls::PLAIN) {
        assert_eq!(of(call, &[u64::MAX; 6]), ALLOW, "{call}");
        assert_eq!(of(call, &[0; 6]), ALLOW, "{call}");
    }
}

#[test]
fn what_only_an_intruder_does_kills() {
    let hostile = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_mount,
        libc::SYS_pivot_root,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_setresuid,
        libc::SYS_reboot,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_fork,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork,
    ];
    for call in hostile {
        assert_eq!(of(call, &[0; 6]), KILL, "{call}");
        assert_eq!(of(call, &[u64::MAX; 6]), KILL, "{call}");
    }
    // A fork by its general name; a thread is refused only.
    assert_eq!(of(libc::SYS_clone, &[int(libc::SIGCHLD)]), KILL);
    assert_eq!(of(libc::SYS_clone, &[int(libc::CLONE_VM | libc::CLONE_VFORK)]), KILL);
    assert_eq!(of(libc::SYS_clone, &[int(libc::CLONE_THREAD)]), EPERM);
}

#[test]
fn the_rest_is_refused() {
    for call in [
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_clone3,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_pidfd_open,
        libc::SYS_memfd_create,
        libc::SYS_getdents64,
        libc::SYS_renameat2,
        libc::SYS_mkdirat,
        libc::SYS_linkat,
        libc::SYS_symlinkat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_truncate,
        libc::SYS_pwrite64,
        libc::SYS_openat2,
        libc::SYS_pkey_mprotect,
        libc::SYS_seccomp,
        libc::SYS_prlimit64,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat,
    ] {
        assert_eq!(of(call, &[0; 6]), EPERM, "{call}");
    }
}

#[test]
fn calls_that_did_not_exist_do_not_exist() {
    let newest = c_long::from(NEWEST_KNOWN);
    assert_eq!(of(newest, &[0; 6]), EPERM);
    assert_eq!(of(newest + 1, &[0; 6]), ENOSYS);
    // The x32 calls of x86-64.
    assert_eq!(of(0x4000_0000 + 520, &[0; 6]), ENOSYS);
}

#[test]
fn calls_of_another_processor_kill() {
    let program = program(purpose()).unwrap();
    for call in [libc::SYS_read, libc::SYS_execve, 11] {
        assert_eq!(run(&program, &data(call, FOREIGN, &[0; 6])).0, KILL);
    }
}

#[test]
fn arguments_count_where_they_matter() {
    let (openat, mmap, mprotect) = (libc::SYS_openat, libc::SYS_mmap, libc::SYS_mprotect);
    assert_eq!(of(openat, &[0, 0, int(libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW)]), ALLOW);
    for flag in [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC, libc::O_TMPFILE | libc::O_RDWR] {
        assert_eq!(of(openat, &[0, 0, int(flag)]), EPERM, "{flag:#x}");
        #[cfg(target_arch = "x86_64")]
        assert_eq!(of(libc::SYS_open, &[0, int(flag)]), EPERM, "{flag:#x}");
    }
    for call in [mmap, mprotect] {
        assert_eq!(of(call, &[0, 4096, int(libc::PROT_READ | libc::PROT_WRITE)]), ALLOW);
        assert_eq!(of(call, &[0, 4096, int(libc::PROT_READ | libc::PROT_EXEC)]), EPERM);
    }
    assert_eq!(of(libc::SYS_ioctl, &[3, 0x541B]), ALLOW);
    assert_eq!(of(libc::SYS_ioctl, &[3, 0x5411]), ALLOW);
    assert_eq!(of(libc::SYS_ioctl, &[3, 0x5412]), EPERM, "typing on a terminal (TIOCSTI)");
    assert_eq!(of(libc::SYS_fcntl, &[3, int(libc::F_GETFD)]), ALLOW);
    assert_eq!(of(libc::SYS_fcntl, &[3, int(libc::F_SETOWN)]), EPERM);
    assert_eq!(of(libc::SYS_prctl, &[int(libc::PR_SET_NAME)]), ALLOW);
    assert_eq!(of(libc::SYS_prctl, &[int(libc::PR_SET_DUMPABLE), 1]), EPERM);
    assert_eq!(of(libc::SYS_tgkill, &[u64::from(PROCESS), 1, 6]), ALLOW);
    assert_eq!(of(libc::SYS_tgkill, &[1, 1, 9]), EPERM);
}

#[test]
fn socket_options_are_those_that_the_server_sets() {
    let set =
        |level: c_int, name: c_int| of(libc::SYS_setsockopt, &[3, int(level), int(name), u64::MAX, u64::MAX]);
    assert_eq!(set(libc::SOL_SOCKET, libc::SO_SNDBUF), ALLOW);
    assert_eq!(set(libc::IPPROTO_TCP, libc::TCP_KEEPCNT), ALLOW);
    assert_eq!(set(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT), ALLOW);
    assert_eq!(set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER), EPERM);
    assert_eq!(set(libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_EBPF), EPERM);
    // The number of one level is not that of another.
    assert_eq!((libc::SO_SNDBUF, libc::TCP_USER_TIMEOUT), (7, 18));
    assert_eq!(set(libc::IPPROTO_TCP, 7), EPERM);
    assert_eq!(set(libc::SOL_SOCKET, 18), EPERM);
}

#[test]
fn files_are_written_to_by_place_only_where_there_is_an_overflow() {
    let with = Purpose { overflows: true, ..purpose() };
    for call in [libc::SYS_pwrite64, libc::SYS_fallocate] {
        assert_eq!((of(call, &[0; 6]), outcome(with, call, &[0; 6])), (EPERM, ALLOW));
    }
}

#[test]
fn files_are_removed_only_where_there_are_sockets_to_remove() {
    let without = Purpose { unlinks: false, ..purpose() };
    assert_eq!(of(libc::SYS_unlinkat, &[0, 0, 0]), ALLOW);
    assert_eq!(of(libc::SYS_unlinkat, &[0, 0, int(libc::AT_REMOVEDIR)]), EPERM);
    assert_eq!(outcome(without, libc::SYS_unlinkat, &[0, 0, 0]), EPERM);
    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(of(libc::SYS_unlink, &[0]), ALLOW);
        assert_eq!(outcome(without, libc::SYS_unlink, &[0]), EPERM);
    }
}

#[test]
fn strictly_all_that_is_refused_kills() {
    let strict = Purpose { strict: true, ..purpose() };
    for (call, arguments) in [
        (libc::SYS_socket, [0; 3]),
        (libc::SYS_openat, [0, 0, int(libc::O_RDWR)]),
        (libc::SYS_execve, [0; 3]),
        (c_long::from(NEWEST_KNOWN) + 1, [0; 3]),
    ] {
        assert_eq!(outcome(strict, call, &arguments), KILL, "{call}");
    }
    assert_eq!(outcome(strict, libc::SYS_sendmsg, &[0; 3]), ALLOW);
}

#[test]
fn no_call_is_on_two_lists_and_hot_ones_are_found_soon() {
    let conditional = calls::conditional(PROCESS, true).unwrap();
    let hostile = calls::hostile().unwrap();
    let of_lists = conditional.iter().chain(&hostile).map(|(call, _)| *call);
    let mut all: Vec<c_long> = calls::HOT.iter().chain(calls::PLAIN).copied().chain(of_lists).collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);

    let program = program(purpose()).unwrap();
    for call in [libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_epoll_pwait] {
        let (outcome, steps) = run(&program, &data(call, NATIVE, &[]));
        assert!(outcome == ALLOW && steps <= 40, "{call} takes {steps} instructions");
    }
}
