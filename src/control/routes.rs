//! What the control API offers: paths and methods, and what each does.

use super::Subject;
use super::held::Held;
use super::http::{Head, Response, status_of};
use super::images;
use super::metrics;
use super::model::{
    Base, Bytes, Caps, Change, Image, Latencies, Latency, Memory, NewSession, Predecessor, Rates, Requests,
    Server, Session, SessionDetail, Sessions, Used,
};
use super::points;
use super::succession::Succession;
use crate::base::{self, Identity};
use crate::error::{Error, ErrorKind, Result};
use crate::net::tls::TlsParameters;
use crate::net::{Listener, Party, Peer, Uri};
use crate::overlay::Budget;
use crate::session::{Count, Found, Histogram, Kind, SessionId, Totals};
use crate::takeover::State;
use ring::rand::{SecureRandom, SystemRandom};
use serde::de::DeserializeOwned;
use std::fmt::Write as _;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::time::{Duration, UNIX_EPOCH};

/// Sessions in one answer, unless fewer are asked for.
const MOST_SESSIONS: usize = 1000;

/// Who asks.
pub(super) struct Asker<'a> {
    pub(super) peer: &'a Peer,
    /// The sessions that end with its connection.
    pub(super) held: &'a mut Held,
    /// What was sent along with the request.
    pub(super) files: &'a mut Vec<OwnedFd>,
    /// What goes along with the response.
    pub(super) outgoing: &'a mut Vec<OwnedFd>,
}

/// The answer to a request.
pub(super) fn respond(
    subject: &Subject,
    head: &Head,
    body: &[u8],
    asker: &mut Asker<'_>,
    succession: &mut Succession,
    listener: &mut Option<Listener>,
) -> Response {
    route(subject, head, body, asker, succession, listener)
        .unwrap_or_else(|error| Response::failure(status_of(error.kind()), error.kind(), error.to_string()))
}

fn route(
    subject: &Subject,
    head: &Head,
    body: &[u8],
    asker: &mut Asker<'_>,
    succession: &mut Succession,
    listener: &mut Option<Listener>,
) -> Result<Response> {
    let path: Vec<&str> = head.path.iter().map(String::as_str).collect();
    let method = if head.method == "HEAD" { "GET" } else { head.method.as_str() };
    let other = |allowed| {
        let why = format!("There is no {method} here; there is {allowed}");
        Ok(Response::failure(405, ErrorKind::Invalid, why).allowing(allowed))
    };
    match (path.as_slice(), method) {
        (["metrics"], "GET") => Ok(Response::text(metrics::TYPE, metrics::all(subject))),
        (["metrics"], _) => other("GET, HEAD"),
        (["v1", "server"], "GET") => Ok(Response::json(200, &server(subject, succession))),
        (["v1", "server"], _) => other("GET, HEAD"),
        (["v1", "takeover"], "POST") => {
            let super::model::Nothing {} = parse(body)?;
            let (response, sockets) = succession.offer(subject, listener.as_ref())?;
            *asker.outgoing = sockets;
            Ok(response)
        }
        (["v1", "takeover", "commit"], "POST") => succession.commit(subject, body, asker.files, listener),
        (["v1", "takeover"] | ["v1", "takeover", "commit"], _) => other("POST"),
        (["v1", "images"], "GET") => Ok(images::list(subject)),
        (["v1", "images"], _) => other("GET, HEAD"),
        (["v1", "images", name], "GET") => images::show(subject, name),
        (["v1", "images", name], "PUT") => {
            images::set(subject, name, &parse(body)?, std::mem::take(asker.files))
        }
        (["v1", "images", _], _) => other("GET, HEAD, PUT"),
        (["v1", "sessions"], "GET") => list(subject, &head.query),
        (["v1", "sessions"], "POST") => create(subject, &parse(body)?, asker),
        (["v1", "sessions"], _) => other("GET, HEAD, POST"),
        (["v1", "sessions", name], "GET") => {
            Ok(Response::json(200, &detail(subject, &subject.registry.session(name)?)))
        }
        (["v1", "sessions", name], "PATCH") => change(subject, name, &parse(body)?, asker.held),
        (["v1", "sessions", name], "DELETE") => {
            subject.registry.end(name)?;
            Ok(Response::nothing())
        }
        (["v1", "sessions", _], _) => other("GET, HEAD, PATCH, DELETE"),
        (["v1", "sessions", name, rest @ ..], _) => {
            points::route(subject, name, rest, method, body, asker.held).unwrap_or_else(|| Err(nothing(head)))
        }
        _ => Err(nothing(head)),
    }
}

fn nothing(head: &Head) -> Error {
    let error = Error::new(ErrorKind::NotFound, "There is nothing at").on(shown(&head.path));
    error.advise("docs/control-api.md tells what there is")
}

/// A path in an error: what was asked for may hold anything.
fn shown(path: &[String]) -> String {
    format!("/{}", path.join("/").replace(char::is_control, "?"))
}

/// The body of a request; an empty one says nothing of anything.
pub(super) fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T> {
    if body.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| {
        Error::new(ErrorKind::Invalid, format!("The body is not what belongs here: {error}"))
    })
}

fn list(subject: &Subject, query: &[(String, String)]) -> Result<Response> {
    let (mut after, mut limit) = (0, MOST_SESSIONS as u64);
    for (key, value) in query {
        let number = value.parse::<u64>();
        match (key.as_str(), number) {
            ("after", Ok(serial)) => after = serial,
            ("limit", Ok(count @ 1..)) => limit = count,
            _ => {
                let error = Error::new(ErrorKind::Invalid, "Not a number of sessions or serial number:");
                return Err(
                    error.on(format_args!("{key}={value}").to_string().replace(char::is_control, "?"))
                );
            }
        }
    }
    let most = usize::try_from(limit).unwrap_or(usize::MAX).min(MOST_SESSIONS);
    let all = subject.registry.sessions();
    let mut rest = all.iter().filter(|found| found.session.serial() > after).peekable();
    let mut sessions = Vec::new();
    while sessions.len() < most
        && let Some(found) = rest.next()
    {
        sessions.push(session(subject, found, &found.session.totals()));
    }
    let next = rest.peek().and(sessions.last()).map(|last| last.serial);
    let before = if next.is_none() { subject.registry.names_before() } else { Vec::new() };
    Ok(Response::json(200, &Sessions { sessions, next, before }))
}

fn create(subject: &Subject, wanted: &NewSession, asker: &mut Asker<'_>) -> Result<Response> {
    let registry = &subject.registry;
    let id = new_id(wanted.id.clone())?;
    let image = wanted.image.clone().unwrap_or_default();
    if image.contains('@') {
        let error = Error::new(ErrorKind::NotFound, "No such export").on(image);
        return Err(error.advise("give the image's name, and the id as 'id'"));
    }
    asker.held.check(wanted.held)?;
    let found =
        registry.create(&format!("{image}@{id}"), Party::of(asker.peer), wanted.memory, wanted.sealed)?;
    let made = detail(subject, &found);
    if wanted.held {
        asker.held.hold(found);
    }
    Ok(Response::json(201, &made))
}

/// An id for a new session: what was asked for, or a random one.
pub(super) fn new_id(wanted: Option<String>) -> Result<String> {
    match wanted {
        Some(id) if SessionId::new(&id).is_none() => {
            let error = Error::new(ErrorKind::Invalid, "Not a session id:").on(format_args!("{id:?}"));
            Err(error.advise("use 1 to 64 letters, digits, dots, underscores or hyphens"))
        }
        Some(id) => Ok(id),
        None => random_id(),
    }
}

/// 128 bits that nobody can guess, in hexadecimal.
fn random_id() -> Result<String> {
    let mut bits = [0; 16];
    SystemRandom::new()
        .fill(&mut bits)
        .map_err(|_| Error::new(ErrorKind::Io, "The system has no random bits"))?;
    Ok(bits.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

fn change(subject: &Subject, name: &str, change: &Change, held: &mut Held) -> Result<Response> {
    let mut found = subject.registry.session(name)?;
    if change.held == Some(true) {
        let error = Error::new(ErrorKind::Invalid, "A session is held from when it is made, or not at all:");
        return Err(error.on(name));
    }
    if let Some(memory) = change.memory {
        found.session.device().overlay().budget().set_limit(memory);
    }
    if change.iops.is_some() || change.bandwidth.is_some() {
        let mut caps = found.session.pace().caps();
        caps.iops = change.iops.map_or(caps.iops, NonZeroU64::new);
        caps.bandwidth = change.bandwidth.map_or(caps.bandwidth, NonZeroU64::new);
        subject.registry.set_caps(&found.session, caps);
    }
    if let Some(id) = &change.id {
        found = subject.registry.rename(name, id)?;
        held.renamed(&found);
    }
    if change.held.is_some() {
        held.let_go(&found);
    }
    Ok(Response::json(200, &detail(subject, &found)))
}

fn server(subject: &Subject, succession: &Succession) -> Server {
    let registry = &subject.registry;
    let totals = totals(subject);
    let count = |count: usize| count as u64;
    let used = |tally: &crate::net::Tally| Used { now: count(tally.all()), most: count(tally.most().all) };
    let sources = registry.sources().iter();
    Server {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        age_seconds: subject.started.elapsed().as_secs_f64(),
        workers: count(subject.workers),
        addresses: subject.addresses.iter().map(|address| address.uri(subject.encrypted)).collect(),
        images: sources
            .map(|source| Image { name: source.name().to_owned(), size: source.latest().size() })
            .collect(),
        before: succession.before().map(|State { pid, connections, sessions, memory }| Predecessor {
            pid,
            connections,
            sessions,
            memory,
        }),
        connections: used(&subject.connections),
        sessions: used(registry.tally()),
        memory: memory(registry.total()),
        requests: requests(&totals),
        bytes: bytes(&totals),
        latency: latencies(&totals),
    }
}

/// The sums of all that ever was, which never go down.
pub(super) fn totals(subject: &Subject) -> Totals {
    let mut told = subject.told.lock().unwrap_or_else(PoisonError::into_inner);
    *told = subject.registry.totals().at_least(&told);
    told.clone()
}

fn session(subject: &Subject, found: &Found, totals: &Totals) -> Session {
    let Found { name, image, id, is_current, session } = found;
    let rates = session.rates(totals);
    let uri = |address: &crate::net::Address| {
        let tls = subject.encrypted.then(TlsParameters::default);
        Uri { address: address.clone(), export: name.clone(), tls }.to_string()
    };
    Session {
        name: name.clone(),
        serial: session.serial(),
        image: image.clone(),
        id: id.clone(),
        owner: session.owner(),
        age_seconds: session.age().as_secs_f64(),
        connections: session.connections() as u64,
        size: session.device().size(),
        base: base(session.device().image(), *is_current),
        sealed: session.device().is_sealed(),
        memory: memory(session.device().overlay().budget()),
        caps: Caps {
            iops: session.pace().caps().iops.map(NonZeroU64::get),
            bandwidth: session.pace().caps().bandwidth.map(NonZeroU64::get),
        },
        requests: requests(totals),
        bytes: bytes(totals),
        rates: Rates {
            reads_per_second: rates.reads,
            writes_per_second: rates.writes,
            bytes_read_per_second: rates.bytes_read,
            bytes_written_per_second: rates.bytes_written,
        },
        uris: if id.is_some() { subject.addresses.iter().map(uri).collect() } else { Vec::new() },
    }
}

pub(super) fn detail(subject: &Subject, found: &Found) -> SessionDetail {
    let totals = found.session.totals();
    SessionDetail {
        session: session(subject, found, &totals),
        peers: found.session.peers(),
        latency: latencies(&totals),
    }
}

/// The file that a session or an image is on.
pub(super) fn base(image: &base::Image, current: bool) -> Base {
    let Identity { device, inode } = image.identity();
    Base {
        path: image.path().to_string_lossy().into_owned(),
        size: image.size(),
        device,
        inode,
        opened: image.opened().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()),
        generation: image.generation(),
        current,
    }
}

fn memory(budget: &Budget) -> Memory {
    Memory {
        limit: budget.limit(),
        data: budget.data(),
        map: budget.map(),
        overflow: budget.away(),
        pinned: budget.pinned(),
    }
}

fn requests(totals: &Totals) -> Requests {
    Requests {
        reads: totals.get(Count::Reads),
        writes: totals.get(Count::Writes),
        zeroes: totals.get(Count::Zeroes),
        trims: totals.get(Count::Trims),
        flushes: totals.get(Count::Flushes),
        others: totals.get(Count::Others),
        errors: totals.get(Count::Errors),
    }
}

fn bytes(totals: &Totals) -> Bytes {
    Bytes {
        read: totals.get(Count::BytesRead),
        written: totals.get(Count::BytesWritten),
        from_base: totals.get(Count::BytesFromBase),
        from_overlay: totals.get(Count::BytesFromOverlay),
        from_holes: totals.get(Count::BytesFromHoles),
    }
}

fn latencies(totals: &Totals) -> Latencies {
    let of = |kind| latency(totals.times(kind));
    Latencies { read: of(Kind::Read), write: of(Kind::Write), other: of(Kind::Other) }
}

fn latency(times: &Histogram) -> Latency {
    let micros = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e6);
    Latency {
        requests: times.count(),
        mean_us: micros(times.mean()),
        p50_us: micros(times.quantile(0.5)),
        p90_us: micros(times.quantile(0.9)),
        p99_us: micros(times.quantile(0.99)),
        p999_us: micros(times.quantile(0.999)),
    }
}
