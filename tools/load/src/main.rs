//! A lean NBD load generator, and the ceiling: a server that does nothing but move bytes.
//!
//! The generator exists so that the client is never what limits a measurement: one thread, all replies that have
//! arrived parsed in place, all refills in one send, payloads never touched.

mod ceiling;
mod drive;
mod hold;
mod lane;
mod open;
mod pattern;
mod replies;
mod report;
mod target;
mod tls;
mod units;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use memdev::sys::Arena;
use memdev::{Error, ErrorKind, Result};

use crate::drive::Limits;
use crate::pattern::{Pattern, Plan};
use crate::target::{Place, Target};

/// A lean load generator for NBD servers, and the ceiling they can be measured against
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive a server with a pattern of requests and print rates and latencies
    Run(Run),
    /// Open connections that each read one block, print "ready", and hold them until standard input ends
    #[command(alias = "hold")]
    Idle(Idle),
    /// Touch and free memory, so that later first touches do not pay for the host's
    Touch {
        /// How much, such as 4G
        #[arg(value_parser = units::size)]
        size: u64,
    },
    /// Serve an image as fast as the socket allows: no sessions, no checks, writes dropped
    Ceiling(Ceiling),
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    target: Target,
    /// Connections, each with a session of its own unless --share is given
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    connections: u64,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    depth: u32,
    /// Bytes a request
    #[arg(long, default_value = "4K", value_parser = units::block)]
    block: u32,
    /// Offsets are multiples of this [default: the block]
    #[arg(long, value_parser = units::size)]
    align: Option<u64>,
    /// randread, randwrite, read, write, trim, mixed:READS:WRITES or open
    #[arg(long, default_value = "randread")]
    pattern: Pattern,
    /// Use this much of the export, from its start
    #[arg(long, default_value = "1G", value_parser = units::size)]
    span: u64,
    /// Visit every block of the span at most once, and stop when all have been
    #[arg(long)]
    distinct: bool,
    /// Stop after this time
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Stop after this many requests
    #[arg(long)]
    requests: Option<u64>,
    /// Client threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// The same seed, the same requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Idle {
    #[command(flatten)]
    target: Target,
    /// How many connections
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    connections: u64,
    /// Read from this much of the export
    #[arg(long, default_value = "1G", value_parser = units::size)]
    span: u64,
    /// No step may take longer
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
}

#[derive(Args)]
pub(crate) struct Ceiling {
    #[command(flatten)]
    pub(crate) place: Place,
    /// The image to serve
    pub(crate) image: PathBuf,
    /// Event loops
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: u16,
}

/// A time limit that was typed.
fn limit(seconds: f64) -> Result<Duration> {
    // Every load is bounded: an hour is more than any measurement needs.
    Duration::try_from_secs_f64(seconds).ok().filter(|time| *time <= Duration::from_secs(3600)).ok_or_else(
        || Error::new(ErrorKind::Invalid, "The time limit must be between 0 and 3600 s, not").on(seconds),
    )
}

fn run(args: &Run) -> Result<()> {
    let plan = Plan {
        pattern: args.pattern,
        block: args.block,
        span: args.span,
        align: args.align.unwrap_or(args.block.into()),
        distinct: args.distinct,
        seed: args.seed,
    };
    let time = limit(args.seconds)?;
    let threads = usize::from(args.threads);
    let outcome = if args.pattern == Pattern::Open {
        open::open(&args.target, &plan, time, args.requests, threads)?
    } else {
        let mut lanes = drive::connect(&args.target, args.connections, &plan)?;
        let limits = Limits { depth: args.depth, time, requests: args.requests };
        let outcome = drive::drive(&mut lanes, &plan, limits, args.target.share.is_some(), threads)?;
        lanes.iter_mut().for_each(lane::Lane::disconnect);
        outcome
    };
    if args.json {
        println!("{}", report::object(&args.pattern.to_string(), &outcome));
    } else {
        println!("{}", report::line(&args.pattern.to_string(), &outcome));
    }
    Ok(())
}

fn idle(args: &Idle) -> Result<()> {
    let plan = Plan {
        pattern: Pattern::RandRead,
        block: 4096,
        span: args.span,
        align: 4096,
        distinct: false,
        seed: 1,
    };
    hold::hold(&args.target, args.connections, &plan, limit(args.seconds)?)
}

/// Touches the memory, in huge pages where the system gives them (many times faster); all of it goes back to the
/// system at the end, now backed by its host.
fn touch(size: u64) -> Result<()> {
    const PIECE: u64 = 2 << 20;
    let cannot = |e: io::Error| Error::io("Cannot touch so much memory:", e).on(size);
    let pieces =
        u32::try_from(size.div_ceil(PIECE)).map_err(|_| cannot(io::ErrorKind::OutOfMemory.into()))?;
    let memory = Arena::reserve(pieces, 2 << 20).map_err(cannot)?;
    memory.populate(0, pieces).map_err(cannot)
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Idle(args) => idle(&args),
        Command::Touch { size } => touch(size),
        Command::Ceiling(args) => ceiling::serve(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memdev-load: {error}");
            ExitCode::FAILURE
        }
    }
}
