//! What a run prints: one line for people or one JSON object for programs.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::drive::Outcome;
use crate::lane::Tally;

/// Microseconds, as latencies are told.
#[allow(clippy::cast_precision_loss, reason = "a latency of 2^53 ns is 104 days")]
fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1000.0
}

fn latency(histogram: &Histogram<u64>) -> Value {
    let at = |quantile| microseconds(histogram.value_at_quantile(quantile));
    json!({
        "mean": histogram.mean() / 1000.0,
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "max": microseconds(histogram.max()),
    })
}

#[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// The outcome with `what` was done as JSON: rates a second, latencies in microseconds.
pub(crate) fn object(what: &str, outcome: &Outcome) -> Value {
    let Tally { latency: histogram, requests, bytes, errors, .. } = &outcome.tally;
    let seconds = outcome.elapsed.as_secs_f64();
    json!({
        "pattern": what,
        "seconds": seconds,
        "requests": requests,
        "errors": errors,
        "iops": rate(*requests, seconds),
        "bytes_per_second": rate(*bytes, seconds),
        "latency_us": latency(histogram),
        "client_cpu_seconds": outcome.client_cpu,
    })
}

/// The same for people.
pub(crate) fn line(what: &str, outcome: &Outcome) -> String {
    let value = object(what, outcome);
    let number = |name: &str| value[name].as_f64().unwrap_or_default();
    let at = |name: &str| value["latency_us"][name].as_f64().unwrap_or_default();
    format!(
        "{what}: {:.0} requests/s, {:.1} MiB/s, {} errors in {:.2} s; latency in us: mean {:.1}, p50 {:.1}, \
         p90 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
        number("iops"),
        number("bytes_per_second") / f64::from(1 << 20),
        value["errors"],
        number("seconds"),
        at("mean"),
        at("p50"),
        at("p90"),
        at("p99"),
        at("p99.9"),
        at("max"),
    )
}
