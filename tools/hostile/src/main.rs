//! A crowd of NBD clients that misbehave, for the server whose address is given.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Args, Parser};
use memdev_hostile::{Crowd, Kind, Place, Progress, raise_descriptor_limit, run};
use serde_json::json;

/// Send a crowd of misbehaving clients to an NBD server
///
/// Only ever to a server of your own: on a unix socket or the loopback address.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    place: Where,
    /// The export to ask for; every other client asks for a named session of it, EXPORT@rude-N
    #[arg(long, default_value = "", value_name = "NAME")]
    export: String,
    /// A way to misbehave, or several [default: all]
    #[arg(long, value_delimiter = ',', value_name = "KIND")]
    kind: Vec<Kind>,
    /// Clients in all
    #[arg(long, default_value_t = 10_000)]
    clients: usize,
    /// Clients at a time
    #[arg(long, default_value_t = 1000)]
    at_once: usize,
    /// Seconds for which those who stay do so
    #[arg(long, default_value_t = 1.0)]
    hold: f64,
    /// Seconds between two bytes of a slow client
    #[arg(long, default_value_t = 0.1)]
    gap: f64,
    /// Go on until standard input ends, and print "ready" when as many as may be at a time have come to misbehave
    #[arg(long)]
    until_eof: bool,
    /// The same seed, the same crowd
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Where {
    /// The server's unix socket
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// The server's TCP address
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
}

fn seconds(number: f64) -> io::Result<Duration> {
    Duration::try_from_secs_f64(number).map_err(io::Error::other)
}

fn crowd(cli: Cli) -> io::Result<Crowd> {
    let place = match (cli.place.unix, cli.place.tcp) {
        (Some(path), _) => Place::Unix(path),
        (None, Some(address)) if address.ip().is_loopback() => Place::Tcp(address),
        (None, _) => return Err(io::Error::other("a crowd is only ever sent to a loopback address")),
    };
    let most = usize::try_from(raise_descriptor_limit()).unwrap_or(usize::MAX);
    if cli.at_once == 0 || cli.at_once + 20 > most {
        return Err(io::Error::other(format!(
            "--at-once must be at least 1 and well below ulimit -n, which is {most}"
        )));
    }
    Ok(Crowd {
        kinds: if cli.kind.is_empty() { Kind::ALL.to_vec() } else { cli.kind },
        clients: cli.clients,
        at_once: cli.at_once,
        goes_on: cli.until_eof,
        hold: if cli.until_eof { Duration::from_secs(3600) } else { seconds(cli.hold)? },
        gap: seconds(cli.gap)?,
        seed: cli.seed,
        ..Crowd::new(place, &cli.export)
    })
}

/// Says `ready` when the crowd is there, and tells it to go when standard input ends.
fn watch(crowd: &Crowd, progress: &Progress) {
    let enough = crowd.at_once.min(crowd.clients);
    while progress.settled.load(Ordering::Relaxed) < enough && !progress.stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut out = io::stdout();
    // Whoever does not want to know has closed it.
    let _ = writeln!(out, "ready").and_then(|()| out.flush());
    let _ = io::stdin().read_to_end(&mut Vec::new());
    progress.stop.store(true, Ordering::Relaxed);
}

fn go(cli: Cli) -> io::Result<()> {
    let until_eof = cli.until_eof;
    let crowd = crowd(cli)?;
    let progress = Progress::default();
    let report = std::thread::scope(|scope| {
        if until_eof {
            scope.spawn(|| watch(&crowd, &progress));
        }
        // The watcher waits for standard input and cannot be told that there is no crowd to be ended.
        run(&crowd, &progress).unwrap_or_else(|error| {
            eprintln!("memdev-hostile: {error}");
            std::process::exit(1)
        })
    });
    println!(
        "{}",
        json!({
            "clients": report.clients(),
            "ended": report.ended,
            "hung_up": report.hung_up,
            "refused": report.refused,
            "most_at_once": report.most_at_once,
        })
    );
    Ok(())
}

fn main() -> ExitCode {
    match go(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memdev-hostile: {error}");
            ExitCode::FAILURE
        }
    }
}
