//! The FUSE backend: a detached FUSE file system with one file, and a loop device on it.

pub(super) mod disk;
pub(crate) mod mount;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use super::Begun;
use super::claim::in_use;
use super::control::Told;
use super::device::{Device, mark};
use super::family;
use super::fork::AtThatMoment;
use super::loop_device::{self, Wanted};
use super::plan::{Plan, block_size};
use super::process::Daemon;
use super::record::Record;
use crate::error::{Error, ErrorKind, Result};
use mount::Detached;

/// Makes the device; see [`super::attach`].
///
/// # Errors
/// As there. What was begun is undone.
pub(super) fn make(plan: &Plan<'_>, sockets: Vec<OwnedFd>) -> Result<Begun> {
    if let Some(device) =
        plan.wanted.as_ref().filter(|device| device.attribute("loop/backing_file").is_some())
    {
        return Err(in_use("Cannot attach to", device, &["it has a file already".to_owned()]));
    }
    let name = file_name(plan.entry.id(), &plan.export);
    let (requests, mount) = Detached::new()?.split();
    let daemon = Daemon::start(plan)?;
    daemon.instruct(plan, Some((&name, requests.as_fd())), None, &sockets)?;
    // Nobody but the daemon has these from now on: when it dies, the file and the session are to know.
    drop((requests, sockets));
    match daemon.answer().and_then(|(told, _)| finish(plan, &daemon, &mount, &name, told)) {
        Ok((device, open, record)) => Ok(Begun { device, open, daemon, record }),
        Err(error) => {
            drop(mount);
            daemon.end();
            Err(error)
        }
    }
}

/// Makes the device as a fork of the one whose attachment is `of` and whose daemon is `pid`; see [`super::fork()`].
///
/// # Errors
/// As there. What was begun is undone.
pub(super) fn make_fork(plan: &Plan<'_>, of: &str, pid: u32, during: AtThatMoment<'_>) -> Result<Begun> {
    let name = file_name(plan.entry.id(), &plan.export);
    let (requests, mount) = Detached::new()?.split();
    let mut made = None;
    // All that can be done before has been, since somebody waits. The daemon has one guest at a time, who must not have to
    // wait for the moment.
    during(&mut || {
        let daemon = Daemon::of_other(pid, family::knock(pid)?);
        let told = daemon.ask_fork(plan, of, &name, requests.as_fd())?;
        made = Some((daemon, told));
        Ok(())
    })?;
    drop(requests);
    let missed = || Error::new(ErrorKind::Invalid, "The moment for a fork did not come");
    let (daemon, told) = made.ok_or_else(missed)?;
    let (device, open, record) = finish(plan, &daemon, &mount, &name, told)?;
    Ok(Begun { device, open, daemon, record })
}

fn finish(
    plan: &Plan<'_>,
    daemon: &Daemon,
    mount: &OwnedFd,
    name: &str,
    told: Told,
) -> Result<(Device, Option<File>, Record)> {
    let mut record = plan.record("fuse", told, daemon.number())?;
    let file = Detached::open(mount, name, record.read_only)
        .map_err(|error| Error::io("Cannot open the file that the daemon serves", error))?;
    let wanted = Wanted {
        id: plan.entry.id(),
        file: file.as_fd(),
        block_size: block_size(told),
        read_only: record.read_only,
        while_used: plan.options.while_used,
    };
    let (device, open) = loop_device::make(&wanted, plan.wanted.as_ref(), |device| {
        device.name().clone_into(&mut record.device);
        plan.entry.write(&record)
    })?;
    Ok((device, plan.options.while_used.then_some(open), record))
}

/// What the file is called, and so what `losetup` shows.
fn file_name(id: &str, export: &str) -> String {
    let mut name = format!("{}:", mark(id));
    // 255 bytes at most, and no character that a path or a line of text cannot hold.
    for c in export.chars().map(|c| if c == '/' || c.is_control() { '_' } else { c }) {
        if name.len() + c.len_utf8() > 255 {
            break;
        }
        name.push(c);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::random_name;

    #[test]
    fn files_are_named_so_that_they_are_found_and_shown() {
        let id = random_name().unwrap();
        let name = file_name(&id, "a/b\n@c");
        assert_eq!(name, format!("memdev:{id}:a_b_@c"));
        let long = file_name(&id, &"ä".repeat(300));
        assert!(long.len() <= 255 && long.ends_with('ä'));
    }
}
