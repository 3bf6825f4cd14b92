//! `memdev ps`: lists the sessions.

use clap::Args;

use super::Failure;
use super::control::{ControlArgs, json, sessions_table};

/// List the live sessions of a running server
#[derive(Args, Debug)]
#[command(
    after_help = "A session is called NAME@ID, as its clients call it; one connection's own is called NAME@:NUMBER \
        here.\nWRITTEN is what its clients have written in all, HELD the memory that it has. Rates are those of the last \
        two\nseconds."
)]
pub(crate) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &Ps) -> Result<(), Failure> {
    let sessions = args.control.connect()?.sessions()?;
    let text = if args.json { json(&sessions)? } else { sessions_table(&sessions) };
    Ok(super::print(&text)?)
}
