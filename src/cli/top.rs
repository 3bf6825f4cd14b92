//! `memdev top`: the sessions, live.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use memdev::Error;
use memdev::control::model::{Server, Session};
use rustix::termios::tcgetwinsize;

use super::control::{ControlArgs, age, sessions_table};
use super::size::human;
use super::{Failure, duration};

/// Show the sessions of a running server, the busiest first, again and again
#[derive(Args, Debug)]
#[command(
    after_help = "Ends with Ctrl-C. In a terminal it shows as many sessions as there is room for; elsewhere all of \
        them, one table after the other, or with --json one line of JSON each time."
)]
pub(crate) struct Top {
    /// How long to wait in between
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration::parse)]
    interval: Duration,

    /// How many times to show them [default: until Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Print a line of JSON each time
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

/// Shorter intervals would only be work for the server: its rates are those of two seconds.
const SHORTEST: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &Top) -> Result<(), Failure> {
    let mut client = args.control.connect()?;
    let screen = io::stdout().is_terminal() && !args.json;
    let mut first = true;
    for turn in 0..args.count.unwrap_or(u64::MAX) {
        if turn > 0 {
            std::thread::sleep(args.interval.max(SHORTEST));
        }
        let server = client.server()?;
        let mut sessions = client.sessions()?;
        let busy = |session: &Session| session.rates.reads_per_second + session.rates.writes_per_second;
        sessions.sort_by(|a, b| busy(b).total_cmp(&busy(a)));
        let text = if args.json {
            format!("{}\n", serde_json::json!({ "server": server, "sessions": sessions }))
        } else {
            let (summary, table) = (summary(&server), sessions_table(&sessions));
            if screen {
                frame(&format!("{summary}; Ctrl-C ends this\n\n{table}"), std::mem::take(&mut first))
            } else {
                format!("{summary}\n\n{table}\n")
            }
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            // Its reader has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Error::io("Cannot write to standard output", error).into()),
        }
    }
    Ok(())
}

fn summary(server: &Server) -> String {
    let memory = &server.memory;
    format!(
        "memdev {}, up {}; {} sessions, {} connections; {} of {} held, {} of map",
        server.version,
        age(server.age_seconds),
        server.sessions.now,
        server.connections.now,
        human(memory.data),
        human(memory.limit),
        human(memory.map)
    )
}

/// What to send a terminal so that it shows `text`, as far as there is room, in the place of what was there.
fn frame(text: &str, clear: bool) -> String {
    let size = tcgetwinsize(io::stdout()).ok();
    let (rows, columns) = size.map_or((24, 80), |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
    place(text, rows.max(2), columns.max(20), clear)
}

fn place(text: &str, rows: usize, columns: usize, clear: bool) -> String {
    let mut out = String::from(if clear { "\x1b[H\x1b[2J" } else { "\x1b[H" });
    // One row less than there is: a line feed in the last one would move all of them up.
    for line in text.lines().take(rows - 1) {
        // In the last column a terminal waits with the next line, and would clear what was put there.
        out.extend(line.chars().take(columns - 1));
        // Nothing of a longer line is left.
        out.push_str("\x1b[K\n");
    }
    out.push_str("\x1b[J");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_never_overfull() {
        let text = "head\na very long line that has no room\nthree\nfour\n";
        let placed = place(text, 4, 20, true);
        assert_eq!(placed, "\x1b[H\x1b[2Jhead\x1b[K\na very long line th\x1b[K\nthree\x1b[K\n\x1b[J");
        assert!(place(text, 24, 80, false).starts_with("\x1b[Hhead"));
    }
}
