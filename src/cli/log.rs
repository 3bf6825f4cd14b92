//! The log: to stderr, warnings and worse unless `-v` or `MEMDEV_LOG` say otherwise.

use std::io::{self, IsTerminal, Write};

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
        (None, Ok(text)) if !text.trim().is_empty() => {
            let filter = EnvFilter::try_new(&text).map_err(|error| {
                format!(
                    "Cannot read {VARIABLE}='{text}': {error}; write a level (info, debug) or memdev::net=debug"
                )
            })?;
            if let Some(part) = no_level(&text) {
                // Not by the log, which may show nothing at all now. With stderr closed nobody wants to know.
                let _ = writeln!(
                    io::stderr(),
                    "memdev: {VARIABLE} has {part:?}, which is no level; write error, warn, info, debug, trace or off, or \
                     a part of the program and its level, as memdev::net=debug"
                );
            }
            filter
        }
        _ => EnvFilter::new("warn"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    Ok(())
}

/// What in a filter is neither a level, nor a part of a program with its level: it may be a slip, and is taken for the name of
/// a part, so that nothing else is logged.
fn no_level(filter: &str) -> Option<&str> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_fine = |part: &str| {
        // Numbers are levels, too; spans and their fields are for those who know what they write.
        part.is_empty()
            || part.contains(['=', '[', ']', '{', '}'])
            || part.starts_with("memdev")
            || part.parse::<u8>().is_ok_and(|level| usize::from(level) < LEVELS.len())
            || LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part))
    };
    filter.split(',').map(str::trim).find(|part| !is_fine(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_told_from_levels_and_parts() {
        for fine in
            ["info", "INFO", "3", "off", "memdev", "memdev::net=debug,warn", "rustls=info", "a[b{c=1}]=info"]
        {
            assert_eq!(no_level(fine), None, "{fine}");
        }
        for (filter, part) in
            [("bogus", "bogus"), ("warn, bogus", "bogus"), ("inof,warn", "inof"), ("7", "7")]
        {
            assert_eq!(no_level(filter), Some(part));
        }
    }
}
