//! The same numbers as Prometheus has them (text format 0.0.4): of the server, and of every session.

use super::Subject;
use super::routes::totals;
use crate::session::{Count, Found, Kind, Totals};
use std::fmt::{Display, Write as _};

/// The format's content type.
pub(super) const TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Sessions that are told of: a monitoring system has to keep every one of them for weeks.
const MOST_SESSIONS: usize = 1000;

const COMMANDS: [(&str, Count); 6] = [
    ("read", Count::Reads),
    ("write", Count::Writes),
    ("write-zeroes", Count::Zeroes),
    ("trim", Count::Trims),
    ("flush", Count::Flushes),
    ("other", Count::Others),
];
const SOURCES: [(&str, Count); 3] =
    [("base", Count::BytesFromBase), ("overlay", Count::BytesFromOverlay), ("hole", Count::BytesFromHoles)];
const KINDS: [(&str, Kind); 3] = [("read", Kind::Read), ("write", Kind::Write), ("other", Kind::Other)];

/// Lines in the making.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP memdev_{name} {help}"));
        self.line(format_args!("# TYPE memdev_{name} {kind}"));
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut text = String::new();
        for (key, value) in labels {
            let separator = if text.is_empty() { '{' } else { ',' };
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(text, "{separator}{key}=\"{escaped}\"");
        }
        if !text.is_empty() {
            text.push('}');
        }
        self.line(format_args!("memdev_{name}{text} {value}"));
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.value(name, &[], value);
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "{line}");
    }
}

/// All of it.
pub(super) fn all(subject: &Subject) -> String {
    let mut text = Text::default();
    server(&mut text, subject);
    sessions(&mut text, subject);
    text.0
}

fn server(text: &mut Text, subject: &Subject) {
    let (registry, budget) = (&subject.registry, subject.registry.total());
    text.family("build_info", "gauge", "The version that runs.");
    text.value("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    let uptime = subject.started.elapsed().as_secs_f64();
    text.single("uptime_seconds", "gauge", "How long the server has been running.", uptime);
    text.single("connections", "gauge", "Connections of NBD clients.", subject.connections.all());
    text.single("connections_limit", "gauge", "How many there may be.", subject.connections.most().all);
    text.single("sessions", "gauge", "Sessions.", registry.tally().all());
    text.single("sessions_limit", "gauge", "How many there may be.", registry.tally().most().all);
    text.single("memory_limit_bytes", "gauge", "What all sessions may hold.", budget.limit());
    text.single("memory_data_bytes", "gauge", "Blocks that sessions hold.", budget.data());
    text.single("memory_map_bytes", "gauge", "What it takes to find them.", budget.map());
    text.single("memory_pinned_bytes", "gauge", "Blocks held by replies alone.", budget.pinned());
    text.single("memory_overflow_bytes", "gauge", "Blocks in the file of --overflow.", budget.away());
    let totals = totals(subject);
    text.family("requests_total", "counter", "Requests of NBD clients.");
    counts(text, "requests_total", "command", &COMMANDS, &totals, &[]);
    let errors = totals.get(Count::Errors);
    text.single("request_errors_total", "counter", "Requests that were answered by an error.", errors);
    let (read, written) = (totals.get(Count::BytesRead), totals.get(Count::BytesWritten));
    text.single("read_bytes_total", "counter", "Bytes that clients read.", read);
    text.single("written_bytes_total", "counter", "Bytes that clients wrote.", written);
    text.family("read_source_bytes_total", "counter", "Bytes that were read, by where they came from.");
    counts(text, "read_source_bytes_total", "source", &SOURCES, &totals, &[]);
    text.family(
        "request_duration_seconds",
        "histogram",
        "From when a request had arrived to when the kernel was given its reply.",
    );
    for (name, kind) in KINDS {
        let times = totals.times(kind);
        for (bound, below) in times.up_to() {
            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| bound.as_secs_f64().to_string());
            text.value("request_duration_seconds_bucket", &[("command", name), ("le", &bound)], below);
        }
        text.value("request_duration_seconds_sum", &[("command", name)], times.sum().as_secs_f64());
        text.value("request_duration_seconds_count", &[("command", name)], times.count());
    }
}

fn counts(
    text: &mut Text,
    name: &str,
    key: &str,
    all: &[(&str, Count)],
    totals: &Totals,
    labels: &[(&str, &str)],
) {
    for (value, count) in all {
        let labels: Vec<_> = labels.iter().copied().chain([(key, *value)]).collect();
        text.value(name, &labels, totals.get(*count));
    }
}

fn sessions(text: &mut Text, subject: &Subject) {
    let mut all = subject.registry.sessions();
    let omitted = all.len().saturating_sub(MOST_SESSIONS);
    all.truncate(MOST_SESSIONS);
    text.single("sessions_omitted", "gauge", "Sessions that are not told of below: the youngest.", omitted);
    let all: Vec<(Found, Totals)> = all
        .into_iter()
        .map(|found| {
            let totals = found.session.totals();
            (found, totals)
        })
        .collect();
    let mut family = |name: &str, kind, help, add: &dyn Fn(&mut Text, &str, &Found, &Totals)| {
        text.family(name, kind, help);
        all.iter().for_each(|(found, totals)| add(text, name, found, totals));
    };
    family("session_age_seconds", "gauge", "How long it has been there.", &|text, name, found, _| {
        text.value(name, &labels(found), found.session.age().as_secs_f64());
    });
    family("session_connections", "gauge", "Connections that are in it.", &|text, name, found, _| {
        text.value(name, &labels(found), found.session.connections());
    });
    let budget = |found: &Found| {
        let budget = found.session.device().overlay().budget();
        [budget.limit(), budget.data(), budget.map(), budget.pinned(), budget.away()]
    };
    for (index, (name, help)) in [
        ("session_memory_limit_bytes", "Data that it may hold."),
        ("session_memory_data_bytes", "Blocks that it holds."),
        ("session_memory_map_bytes", "What it takes to find them."),
        ("session_memory_pinned_bytes", "Blocks held by its replies alone."),
        ("session_memory_overflow_bytes", "Blocks of it in the file of --overflow."),
    ]
    .into_iter()
    .enumerate()
    {
        family(name, "gauge", help, &|text, name, found, _| {
            text.value(name, &labels(found), budget(found)[index])
        });
    }
    family("session_requests_total", "counter", "Requests of its clients.", &|text, name, found, totals| {
        counts(text, name, "command", &COMMANDS, totals, &labels(found));
    });
    for (name, help, count) in [
        ("session_request_errors_total", "Requests that were answered by an error.", Count::Errors),
        ("session_read_bytes_total", "Bytes that its clients read.", Count::BytesRead),
        ("session_written_bytes_total", "Bytes that its clients wrote.", Count::BytesWritten),
    ] {
        family(name, "counter", help, &|text, name, found, totals| {
            text.value(name, &labels(found), totals.get(count));
        });
    }
    family(
        "session_read_source_bytes_total",
        "counter",
        "Bytes that were read, by where they came from.",
        &|text, name, found, totals| counts(text, name, "source", &SOURCES, totals, &labels(found)),
    );
}

fn labels(found: &Found) -> [(&'static str, &str); 2] {
    [("session", &found.name), ("image", &found.image)]
}
