//! Before anybody is inside there is nothing to be delivered: what is done then is done for whoever waits for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::attach::control;
use crate::error::{Error, ErrorKind};

/// Does `work` as long as somebody hears `channel`, and process 1 lives (`inside`): else this process ends, wherever it is. The work
/// may be waiting for a server that never answers.
///
/// # Errors
/// There is no descriptor left.
pub(super) fn while_awaited<T>(
    channel: BorrowedFd<'_>,
    inside: BorrowedFd<'_>,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    let (over, end) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok(std::thread::scope(move |scope| {
        scope.spawn(move || watch(channel, inside, over.as_fd()));
        let done = work();
        drop(end);
        done
    }))
}

fn watch(channel: BorrowedFd<'_>, inside: BorrowedFd<'_>, over: BorrowedFd<'_>) {
    let of = |fd, flags| PollFd::from_borrowed_fd(fd, flags);
    // That nobody hears it any more is told unasked.
    let mut fds = [of(channel, PollFlags::empty()), of(inside, PollFlags::IN), of(over, PollFlags::empty())];
    while poll(&mut fds, None).is_err() {}
    let [unheard, is_empty, is_over] = fds.map(|fd| !fd.revents().is_empty());
    if is_over {
        return;
    }
    if is_empty && !unheard {
        let error = Error::new(ErrorKind::Io, "The private root has ended while files were filled in");
        let _ = control::send(channel, &control::error_to_json(&error), &[]);
    }
    crate::sys::process::exit_now(1)
}
