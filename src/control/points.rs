//! Points in a session's life, as the control API has them: checkpoints, the way back to them, and forks.

use super::Subject;
use super::held::Held;
use super::http::Response;
use super::model::{Checkpoint, Checkpoints, Fork, NewCheckpoint, Rollback};
use super::routes::{detail, new_id, parse};
use crate::error::{Error, ErrorKind, Result};
use crate::session::{self, Heir};
use std::time::UNIX_EPOCH;

/// Behind a session's path: what is done with it. `None` where there is nothing.
pub(super) fn route(
    subject: &Subject,
    session: &str,
    rest: &[&str],
    method: &str,
    body: &[u8],
    held: &mut Held,
) -> Option<Result<Response>> {
    let other = |allowed: &'static str| {
        let why = format!("There is no {method} here; there is {allowed}");
        Ok(Response::failure(405, ErrorKind::Invalid, why).allowing(allowed))
    };
    Some(match (rest, method) {
        (["checkpoints"], "GET") => list(subject, session),
        (["checkpoints"], "POST") => take(subject, session, body),
        (["checkpoints"], _) => other("GET, HEAD, POST"),
        (["checkpoints", name], "DELETE") => shared(session)
            .and_then(|()| subject.registry.drop_checkpoint(session, name))
            .map(|()| Response::nothing()),
        (["checkpoints", _], _) => other("DELETE"),
        (["rollback"], "POST") => rollback(subject, session, body),
        (["reset"], "POST") => reset(subject, session, body),
        (["fork"], "POST") => fork(subject, session, body, held),
        (["rollback" | "reset" | "fork"], _) => other("POST"),
        _ => return None,
    })
}

/// A session of one connection has no points: nobody but its client knows when it would be worth having one.
fn shared(session: &str) -> Result<()> {
    if session.contains("@:") {
        let error = Error::new(ErrorKind::Unsupported, "A session of one connection alone has no points:");
        return Err(error.on(session).advise("connect to a named one, NAME@ID"));
    }
    Ok(())
}

fn list(subject: &Subject, session: &str) -> Result<Response> {
    shared(session)?;
    let checkpoints = subject.registry.checkpoints(session)?.iter().map(told).collect();
    Ok(Response::json(200, &Checkpoints { checkpoints }))
}

fn told(point: &session::Checkpoint) -> Checkpoint {
    let taken = point.taken.duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    Checkpoint { name: point.name.clone(), taken, data: point.data }
}

fn take(subject: &Subject, session: &str, body: &[u8]) -> Result<Response> {
    shared(session)?;
    let NewCheckpoint { name } = parse(body)?;
    let name = name.ok_or_else(|| missing("name"))?;
    Ok(Response::json(201, &told(&subject.registry.checkpoint(session, &name)?)))
}

fn rollback(subject: &Subject, session: &str, body: &[u8]) -> Result<Response> {
    shared(session)?;
    let Rollback { checkpoint } = parse(body)?;
    let checkpoint = checkpoint.ok_or_else(|| missing("checkpoint"))?;
    subject.registry.rollback(session, &checkpoint)?;
    Ok(Response::json(200, &detail(subject, &subject.registry.session(session)?)))
}

fn reset(subject: &Subject, session: &str, body: &[u8]) -> Result<Response> {
    shared(session)?;
    // Nothing can be said about it, and what is said all the same is not passed over.
    let super::model::Nothing {} = parse(body)?;
    subject.registry.reset(session)?;
    Ok(Response::json(200, &detail(subject, &subject.registry.session(session)?)))
}

fn fork(subject: &Subject, session: &str, body: &[u8], held: &mut Held) -> Result<Response> {
    shared(session)?;
    let Fork { id, unclaimed, held: is_held } = parse(body)?;
    held.check(is_held)?;
    let id = new_id(id)?;
    let image = session.split('@').next().unwrap_or_default();
    let new = format!("{image}@{id}");
    let heir = if unclaimed { Heir::FirstComer } else { Heir::Owner };
    subject.registry.fork(session, &new, heir)?;
    let found = subject.registry.session(&new)?;
    let made = detail(subject, &found);
    if is_held {
        held.hold(found);
    }
    Ok(Response::json(201, &made))
}

fn missing(field: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("The body must say which '{field}'"))
}
