//! The log: to stderr, warnings and worse unless `-v` or `MEMDEV_LOG` say otherwise.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// The environment variable with the filter, written as `tracing`'s `EnvFilter` takes it: `debug`, `memdev::net=trace`.
pub(crate) const VARIABLE: &str = "MEMDEV_LOG";

/// Starts the log. What was typed (`-v`, `-vv`, `-vvv`) beats what is in the environment.
///
/// # Errors
/// The filter in the environment cannot be read; one line for people.
pub(crate) fn start(verbose: u8) -> Result<(), String> {
    let typed = match verbose {
        0 => None,
        1 => Some("info"),
        2 => Some("debug"),
        _ => Some("trace"),
    };
    let filter = match (typed, std::env::var(VARIABLE)) {
        (Some(level), _) => EnvFilter::new(level),
        (None, Ok(text)) if !text.trim().is_empty() => EnvFilter::try_new(&text).map_err(|error| {
            format!(
                "Cannot read {VARIABLE}='{text}': {error}; write a level (info, debug) or memdev::net=debug"
            )
        })?,
        _ => EnvFilter::new("warn"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    Ok(())
}
