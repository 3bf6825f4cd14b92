//! Sessions that stay open, for looking at a server's memory: idle ones, and ones that are worked on step by step.

use std::io::{BufRead, Write};
use std::time::Duration;

use memdev::{Error, ErrorKind, Result};

use crate::drive::{Limits, connect, drive};
use crate::pattern::{Pattern, Plan};
use crate::target::Target;
use crate::{report, units};

/// Opens `count` connections; each reads one block of its own; prints `ready`; then obeys standard input until it ends.
///
/// A line `PATTERN BLOCK SPAN [REQUESTS] [ALIGN]` loads all open connections, every place at most once, and is
/// answered by the outcome as one line of JSON.
pub(crate) fn hold(target: &Target, count: u64, plan: &Plan, patience: Duration) -> Result<()> {
    let mut lanes = connect(target, count, plan)?;
    let threads = 1;
    let shared = target.share.is_some();
    let first = Limits { depth: 1, time: patience, requests: Some(count) };
    let outcome = drive(&mut lanes, plan, first, shared, threads)?;
    if outcome.tally.requests != count {
        return Err(Error::new(ErrorKind::Io, "Not every connection could read its first block"));
    }
    say("ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("Cannot read", e).on("standard input"))?;
        let (step, requests) = parse(&line, plan).map_err(|e| Error::new(ErrorKind::Invalid, e).on(&line))?;
        let limits = Limits { depth: 16, time: patience, requests };
        let outcome = drive(&mut lanes, &step, limits, shared, threads)?;
        say(&report::object(&line, &outcome).to_string())?;
    }
    lanes.iter_mut().for_each(crate::lane::Lane::disconnect);
    Ok(())
}

fn parse(line: &str, plan: &Plan) -> Result<(Plan, Option<u64>), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [pattern, block, span, rest @ ..] = &words[..] else {
        return Err("A step is PATTERN BLOCK SPAN [REQUESTS] [ALIGN], not".into());
    };
    let block = units::block(block)?;
    let requests = rest.first().map(|text| units::size(text)).transpose()?;
    let align = rest.get(1).map(|text| units::size(text)).transpose()?.unwrap_or(block.into());
    let pattern: Pattern = pattern.parse()?;
    Ok((Plan { pattern, block, span: units::size(span)?, align, distinct: true, ..*plan }, requests))
}

/// One line that the reader sees at once.
fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|e| Error::io("Cannot write the outcome", e))
}
