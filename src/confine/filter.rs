//! The filter of system calls: a program for the kernel, made of the lists in [`super::calls`].
//!
//! ```text
//!  hot calls ── allow            first, for kernels that run the filter at every call
//!  plain calls ── allow
//!  conditional calls ── allow if the arguments fit, else EPERM
//!  hostile calls ── kill the process
//!  calls newer than this list ── ENOSYS     as an older kernel would say: libraries know another way then
//!  all others ── EPERM
//! ```
//!
//! What is refused is logged by the kernel. Whatever it is that a new C library tries, it gets an error that it can deal
//! with; only what no library does on its own ends the process.
//!
//! `seccompiler` compiles lists with one outcome for a match and one for the rest, the rest being the last instruction.
//! So the program is several of these, one behind the other, each but the last without its end.

use super::calls::{self, Call};
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, sock_filter};

/// The last call that was known when the lists were made (`mseal`, Linux 6.10). The numbers of newer calls are the same
/// on all processors, and higher.
const NEWEST_KNOWN: u32 = 462;

/// What the filter is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose {
    /// The process that may be signalled: this one.
    pub(super) process: u32,
    /// Socket files are to be removed at the end.
    pub(super) unlinks: bool,
    /// There is a file that blocks go to.
    pub(super) overflows: bool,
    /// Kill for all that is not allowed: for tests, to which an error that is dealt with would not show.
    pub(super) strict: bool,
}

/// The program for this machine's processor.
///
/// # Errors
/// When there is none for it.
pub(super) fn program(purpose: Purpose) -> Result<BpfProgram, BackendError> {
    let refuse = if purpose.strict { SeccompAction::KillProcess } else { errno(libc::EPERM) };
    let always = |calls: &[libc::c_long]| calls.iter().map(|&call| (call, Vec::new())).collect();
    let mut program = Vec::new();
    append(&mut program, always(calls::HOT), &SeccompAction::Allow, &refuse)?;
    append(&mut program, always(calls::PLAIN), &SeccompAction::Allow, &refuse)?;
    if purpose.overflows {
        append(&mut program, always(calls::OVERFLOW), &SeccompAction::Allow, &refuse)?;
    }
    let conditional = calls::conditional(purpose.process, purpose.unlinks)?;
    append(&mut program, conditional, &SeccompAction::Allow, &refuse)?;
    append(&mut program, calls::hostile()?, &SeccompAction::KillProcess, &errno(libc::EPERM))?;
    let unknown = if purpose.strict { SeccompAction::KillProcess } else { errno(libc::ENOSYS) };
    program.extend([
        // The number is still loaded.
        sock_filter { code: JUMP_IF_GREATER, jt: 0, jf: 1, k: NEWEST_KNOWN },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: unknown.into() },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: refuse.into() },
    ]);
    Ok(program)
}

const JUMP_IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Adds a list, so that what is not on it goes on behind it. A call that is on it but has no matching condition ends
/// with `unfit`.
fn append(
    program: &mut BpfProgram,
    list: Vec<Call>,
    fit: &SeccompAction,
    unfit: &SeccompAction,
) -> Result<(), BackendError> {
    let target = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(list.into_iter().collect(), unfit.clone(), fit.clone(), target)?;
    let mut part = BpfProgram::try_from(filter)?;
    let end = part.pop();
    debug_assert_eq!(end.map(|end| end.code), Some(RETURN));
    program.append(&mut part);
    Ok(())
}

fn errno(errno: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(errno.cast_unsigned())
}

#[cfg(test)]
mod tests;
