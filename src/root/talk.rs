//! What launcher, mounter and process 1 say to each other: whose turn it is, and what came of it.
//!
//! ```text
//!   launcher                       mounter, process 1
//!     ── step n of the plan ──────────>
//!     <── what came of it, with descriptors, or why it failed ──
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde_json::{Value, json};

use super::plan::{Plan, Step};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};

/// What a step gave, beside having been done.
pub(super) type Yield = (Value, Vec<OwnedFd>);

/// Tells the other end to do the `n`th step, with what it has to know for it, and waits until it has.
///
/// # Errors
/// What it says, or that it has died.
pub(super) fn ask(
    channel: BorrowedFd<'_>,
    n: usize,
    with: &Value,
    descriptors: &[BorrowedFd<'_>],
) -> Result<Yield> {
    let failed = |error| Error::io("Cannot talk to a process of the private root", error);
    let died = || Error::new(ErrorKind::Io, "A process that makes the private root has died");
    control::send(channel, &json!({ "step": n, "with": with }), descriptors).map_err(failed)?;
    let (value, descriptors) = control::receive(channel).map_err(failed)?.ok_or_else(died)?;
    match control::error_from_json(&value) {
        Some(error) => Err(error),
        None => Ok((value, descriptors)),
    }
}

/// Waits for one's turn: the step, and what came with it. `None` when the launcher has no more.
///
/// # Errors
/// What the system says.
pub(super) fn next(channel: BorrowedFd<'_>, plan: &Plan) -> Result<Option<(Step, Value, Vec<OwnedFd>)>> {
    let failed = |error| Error::io("Cannot hear the launcher", error);
    let Some((value, descriptors)) = control::receive(channel).map_err(failed)? else { return Ok(None) };
    let step = value["step"].as_u64().and_then(|n| usize::try_from(n).ok());
    let step = step.and_then(|n| plan.steps().get(n).copied());
    let bad = || Error::new(ErrorKind::Invalid, "The launcher asks for a step that is not in the plan");
    Ok(Some((step.ok_or_else(bad)?, value["with"].clone(), descriptors)))
}

/// Tells the launcher what came of it.
///
/// # Errors
/// What the system says.
pub(super) fn answer(channel: BorrowedFd<'_>, result: Result<Yield>) -> Result<()> {
    let (value, descriptors) = match result {
        Ok((value, descriptors)) => (if value.is_null() { json!({}) } else { value }, descriptors),
        Err(error) => (control::error_to_json(&error), Vec::new()),
    };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    control::send(channel, &value, &borrowed).map_err(|error| Error::io("Cannot tell the launcher", error))
}

/// Nothing more to tell.
pub(super) fn done() -> Yield {
    (Value::Null, Vec::new())
}
