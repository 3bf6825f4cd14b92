//! `memdev set SESSION`: changes a live session.

use clap::Args;
use memdev::control::model::Change;

use super::control::{ControlArgs, json};
use super::{Failure, size};

/// Change a session of a running server
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
        memdev set root@build-17 --memory 2G\n\n\
        A limit below what the session has already takes nothing from it: it can still overwrite and trim, and write\n\
        elsewhere once it has less than the limit.")]
pub(crate) struct Set {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// Memory for what it writes, from now on
    #[arg(long, value_name = "SIZE", required = true, value_parser = size::parse)]
    memory: Option<u64>,

    /// Print the session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &Set) -> Result<(), Failure> {
    let changed = args.control.connect()?.change(&args.session, &Change { memory: args.memory })?;
    if args.json {
        super::print(&json(&changed)?)?;
    }
    Ok(())
}
