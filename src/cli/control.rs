//! What the commands have in common that look after live sessions: how they find the server, and how they print.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use memdev::control::Client;
use memdev::control::model::{Base, Latencies, Latency, Memory, Requests, Session};
use memdev::{Error, ErrorKind, Result};
use serde::Serialize;

use super::Failure;
use super::size::human;

/// Where the control socket is, if nobody says so on the command line.
const VARIABLE: &str = "MEMDEV_CONTROL";

#[derive(Args, Debug)]
pub(crate) struct ControlArgs {
    /// The server's control socket, as given to 'memdev serve --control' [default: $MEMDEV_CONTROL]
    #[arg(long, value_name = "PATH", display_order = 800)]
    control: Option<PathBuf>,
}

impl ControlArgs {
    /// Where it is, if anybody has said so.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let from_environment =
            || std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        self.control.clone().or_else(from_environment)
    }

    /// Connects to the server.
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        let Some(path) = self.path() else {
            let why = format!("No control socket given; use --control PATH, or set {VARIABLE}");
            return Err(Failure::Usage(why));
        };
        Ok(Client::connect(&path)?)
    }
}

/// JSON for programs.
pub(crate) fn json(value: &impl Serialize) -> Result<String> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::new(ErrorKind::Io, format!("Cannot write JSON: {error}")))?;
    text.push('\n');
    Ok(text)
}

/// Rows as columns, the first row being the head. Those that `right` says are aligned to the right.
pub(crate) fn table(rows: &[Vec<String>], right: &[bool]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..right.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, &width), &right) in row.iter().zip(&widths).zip(right) {
            let separator = if line.is_empty() { "" } else { "  " };
            // Writing to a String does not fail.
            let _ = if right {
                write!(line, "{separator}{cell:>width$}")
            } else {
                write!(line, "{separator}{cell:<width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The table of sessions that `ps` and `top` show.
pub(crate) fn sessions_table(sessions: &[Session]) -> String {
    const HEAD: [(&str, bool); 10] = [
        ("SESSION", false),
        ("IMAGE", false),
        ("OWNER", false),
        ("AGE", true),
        ("CONNS", true),
        ("WRITTEN", true),
        ("HELD", true),
        ("AWAY", true),
        ("READS/S", true),
        ("WRITES/S", true),
    ];
    let row = |session: &Session| {
        vec![
            shown(&session.name),
            image_of(&session.image, &session.base),
            session.owner.as_deref().map_or_else(|| "nobody yet".to_owned(), owner),
            age(session.age_seconds),
            session.connections.to_string(),
            human(session.bytes.written),
            human(session.memory.data),
            human(session.memory.overflow),
            rate(session.rates.reads_per_second),
            rate(session.rates.writes_per_second),
        ]
    };
    let head = HEAD.iter().map(|(name, _)| (*name).to_owned()).collect();
    let rows: Vec<_> = std::iter::once(head).chain(sessions.iter().map(row)).collect();
    table(&rows, &HEAD.map(|(_, right)| right))
}

/// An image in a column; which of its files it is, if that was replaced.
pub(crate) fn image_of(name: &str, base: &Base) -> String {
    if base.current { shown(name) } else { format!("{}#{}", shown(name), base.generation) }
}

/// An owner in a column: of a certificate's fingerprint as much as tells it from others.
fn owner(owner: &str) -> String {
    shown(owner).chars().take(28).collect()
}

/// Text of a server's, which must not do anything to a terminal.
pub(crate) fn shown(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// A time for people, in its two largest units.
pub(crate) fn age(seconds: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
    let seconds = seconds as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

fn rate(rate: f64) -> String {
    if rate > 0.0 && rate < 9.95 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

/// Lines about what was asked for and what it took, that `stat` shows of a session and of a server.
pub(crate) fn append_traffic(
    out: &mut String,
    requests: &Requests,
    bytes: &memdev::control::model::Bytes,
    latency: &Latencies,
) {
    let Requests { reads, writes, zeroes, trims, flushes, others, errors } = requests;
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "    requests: {reads} reads, {writes} writes, {zeroes} write-zeroes, {trims} trims, \
         {flushes} flushes, {others} others; {errors} errors"
    );
    let _ = writeln!(out, "    bytes: {} read, {} written", human(bytes.read), human(bytes.written));
    let sources = [("image", bytes.from_base), ("overlay", bytes.from_overlay), ("holes", bytes.from_holes)];
    let all: u64 = sources.iter().map(|(_, bytes)| bytes).sum();
    if all > 0 {
        #[allow(clippy::cast_precision_loss, reason = "a percentage")]
        let parts = sources.map(|(name, bytes)| format!("{:.1}% {name}", bytes as f64 * 100.0 / all as f64));
        let _ = writeln!(out, "    read from: {}", parts.join(", "));
    }
    for (name, latency) in [("reads", &latency.read), ("writes", &latency.write), ("others", &latency.other)]
    {
        if let Some(line) = latency_line(latency) {
            let _ = writeln!(out, "    {name} took: {line}");
        }
    }
}

fn latency_line(latency: &Latency) -> Option<String> {
    let mean = latency.mean_us?;
    let parts = [
        ("p50", latency.p50_us),
        ("p90", latency.p90_us),
        ("p99", latency.p99_us),
        ("p99.9", latency.p999_us),
    ];
    let mut line = format!("mean {}", micros(mean));
    for (name, value) in parts {
        let _ = write!(line, ", {name} {}", value.map_or_else(|| "-".to_owned(), micros));
    }
    Some(line)
}

fn micros(micros: f64) -> String {
    if micros < 1000.0 {
        format!("{micros:.0} us")
    } else if micros < 1_000_000.0 {
        format!("{:.1} ms", micros / 1000.0)
    } else {
        format!("{:.1} s", micros / 1_000_000.0)
    }
}

/// The line about memory.
pub(crate) fn append_memory(out: &mut String, memory: &Memory) {
    let Memory { limit, data, map, overflow, pinned } = memory;
    let _ = writeln!(
        out,
        "    memory: {} of {} (and {} of map, {} pinned by replies)",
        human(*data),
        human(*limit),
        human(*map),
        human(*pinned)
    );
    if *overflow > 0 {
        let _ = writeln!(out, "    in --overflow: {}", human(*overflow));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_units() {
        let all = [0.4, 59.9, 60.0, 3599.0, 3600.0, 86399.0, 86400.0 * 12.5];
        assert_eq!(all.map(age), ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "12d12h"]);
        assert_eq!([0.0, 0.26, 9.94, 9.96, 123_456.7].map(rate), ["0", "0.3", "9.9", "10", "123457"]);
        assert_eq!([1.0, 999.4, 1500.0, 2_500_000.0].map(micros), ["1 us", "999 us", "1.5 ms", "2.5 s"]);
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = table(&[row(["NAME", "N"]), row(["a", "100"]), row(["bbbbbb", "1"])], &[false, true]);
        assert_eq!(text, "NAME      N\na       100\nbbbbbb    1\n");
        assert_eq!(shown("a\u{1b}[31m"), "a\u{fffd}[31m");
    }
}
