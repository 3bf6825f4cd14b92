//! A device of the present state of another, by the same daemon.

use super::record::Directory;
use super::{Attached, Options, clean_up, finish, fuse, plan::Plan, random_name};
use crate::error::{Error, ErrorKind, Result};

/// Does something at the moment that is to be kept.
pub(crate) type AtThatMoment<'a> = &'a mut dyn FnMut(&mut dyn FnMut() -> Result<()>) -> Result<()>;

/// Attaches a fork of the device whose attachment is `of`: of its state at a moment that `during` chooses, which is given what
/// is to be done then. It shares its memory with the other until one of the two writes, and has its limit.
///
/// # Errors
/// `NotFound` if there is no such device, or it is one of another server's session; what `during` or the kernel says.
pub(crate) fn fork(options: &Options, of: &str, during: AtThatMoment<'_>) -> Result<Attached> {
    let directory = Directory::open(&options.state)?;
    clean_up(&directory)?;
    let gone = || Error::new(ErrorKind::NotFound, "The disk that is to be forked has just gone");
    let entries = directory.entries()?;
    let original = entries.iter().find(|entry| entry.id() == of && !entry.is_abandoned());
    let original = original.and_then(|entry| entry.record()).ok_or_else(gone)?;
    drop(entries);
    let image = original.export.split('@').next().unwrap_or_default();
    let export = format!("{image}@{}", random_name()?);
    let entry = directory.create(&random_name()?)?;
    let source = original.source;
    let plan = Plan {
        options,
        directory: &directory,
        entry: &entry,
        wanted: None,
        source,
        export,
        told: None,
        image: None,
    };
    let made = fuse::make_fork(&plan, of, original.pid, during);
    finish(made, &directory, entry)
}
