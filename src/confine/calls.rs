//! Which system calls a running server makes, and which only an intruder would.
//!
//! The lists were made from what the whole test suite does (`strace -f`), from the code, and from what the standard
//! library and glibc do on its behalf. What is on neither of them fails with an error, and the server goes on (see
//! [`super::filter`]).
//!
//! Calls in the loop of every request have no conditions on their arguments: since Linux 5.11 the kernel finds out once
//! that such a call is always allowed, and then does not run the filter for it at all. The others are made a few times a
//! connection.

use libc::{c_int, c_long};
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, SeccompCondition, SeccompRule};

/// A call, and the conditions of which one must hold; none means always.
pub(super) type Call = (c_long, Vec<SeccompRule>);
type Result<T> = std::result::Result<T, BackendError>;

/// Made for every request or every sleep.
pub(super) const HOT: &[c_long] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_epoll_ctl,
    libc::SYS_sched_yield,
    libc::SYS_mincore,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_madvise,
];

/// Made where there is an `--overflow`: blocks go to its file, which is open already, and what of it is not needed is given back.
pub(super) const OVERFLOW: &[c_long] = &[libc::SYS_pwrite64, libc::SYS_fallocate];

/// Made now and then, whatever the arguments.
pub(super) const PLAIN: &[c_long] = &[
    // Connections come, are looked at, and go. No socket is made: those that listen are there already.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // What does the image's path name by now? Where are its holes, and does the kernel tell us what of it is in memory?
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_lseek,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_capget,
    // The same by older names, which some libraries still use.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    // Who am I, and where? `rustix` takes it for granted that these cannot fail.
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    // Memory; what makes it executable is in `conditional`.
    libc::SYS_munmap,
    libc::SYS_munlock,
    libc::SYS_mremap,
    libc::SYS_brk,
    // The threads that are there: their first steps, and their end. None is started any more.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Signals.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    // Time, on machines whose clock cannot be read without a call; keys for hash maps.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
];

/// Options of sockets that the server sets; some others hand programs to the kernel.
const SOCKET_OPTIONS: &[(c_int, c_int)] = &[
    (libc::SOL_SOCKET, libc::SO_SNDBUF),
    (libc::SOL_SOCKET, libc::SO_RCVBUF),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
];

/// Made now and then, where the arguments say that it is what the server does. `process` is this process's id;
/// `unlinks` says that socket files are to be removed at the end.
pub(super) fn conditional(process: u32, unlinks: bool) -> Result<Vec<Call>> {
    let option = |&(level, name): &(c_int, c_int)| all(vec![equal(1, level)?, equal(2, name)?]);
    let mut calls = vec![
        // Files are opened to be read, and never made.
        (libc::SYS_openat, vec![none_of(2, libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC)?]),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, vec![none_of(1, libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC)?]),
        // No memory that could hold code: neither new nor by changing what is there.
        (libc::SYS_mmap, vec![none_of(2, libc::PROT_EXEC)?]),
        (libc::SYS_mprotect, vec![none_of(2, libc::PROT_EXEC)?]),
        (libc::SYS_setsockopt, SOCKET_OPTIONS.iter().map(option).collect::<Result<_>>()?),
        // Is there anything unread on a socket, or unacknowledged? (Others of these calls drive devices.)
        (
            libc::SYS_ioctl,
            [FIONREAD, TIOCOUTQ]
                .map(|request| one(Dword, 1, Eq, u64::from(request)))
                .into_iter()
                .collect::<Result<_>>()?,
        ),
        // The standard library checks descriptors that it closes, when it is built for debugging.
        (
            libc::SYS_fcntl,
            [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC]
                .map(|command| rule(1, command))
                .into_iter()
                .collect::<Result<_>>()?,
        ),
        // Threads give themselves a name, the allocator its memory.
        (libc::SYS_prctl, vec![rule(0, libc::PR_SET_NAME)?, rule(0, libc::PR_SET_VMA)?]),
        // A second signal ends the process as if the first had never been caught; so does `abort`.
        (libc::SYS_tgkill, vec![one(Dword, 0, Eq, u64::from(process))?]),
    ];
    if unlinks {
        calls.push((libc::SYS_unlinkat, vec![rule(2, 0)?]));
        #[cfg(target_arch = "x86_64")]
        calls.push((libc::SYS_unlink, Vec::new()));
    }
    Ok(calls)
}

/// As the kernel has them, for every processor that this list is for.
const FIONREAD: u32 = 0x541B;
const TIOCOUTQ: u32 = 0x5411;

/// What nothing in the server, nor below it, would ever do: whoever does it has taken the process over.
pub(super) fn hostile() -> Result<Vec<Call>> {
    let mut calls: Vec<Call> = HOSTILE.iter().map(|&call| (call, Vec::new())).collect();
    // A process, not a thread. (`clone3` has its flags in memory, where no filter can see them.)
    calls.push((libc::SYS_clone, vec![none_of(0, libc::CLONE_THREAD)?]));
    Ok(calls)
}

const HOSTILE: &[c_long] = &[
    // Another program, another process.
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    // Into other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Another view of the system.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
    // Into the kernel, or by its less trodden ways.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    // Other rights.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_personality,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_syslog,
];

/// Argument `index` is `value`.
fn rule(index: u8, value: c_int) -> Result<SeccompRule> {
    all(vec![equal(index, value)?])
}

/// Argument `index` has none of the bits in `mask`.
fn none_of(index: u8, mask: c_int) -> Result<SeccompRule> {
    one(Dword, index, MaskedEq(word(mask)), 0)
}

fn equal(index: u8, value: c_int) -> Result<SeccompCondition> {
    SeccompCondition::new(index, Dword, Eq, word(value))
}

fn one(
    length: seccompiler::SeccompCmpArgLen,
    index: u8,
    operator: seccompiler::SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule> {
    all(vec![SeccompCondition::new(index, length, operator, value)?])
}

fn all(conditions: Vec<SeccompCondition>) -> Result<SeccompRule> {
    SeccompRule::new(conditions)
}

/// The low half of an argument, which is all of it that the kernel looks at for an `int`.
fn word(value: c_int) -> u64 {
    u64::from(value.cast_unsigned())
}
