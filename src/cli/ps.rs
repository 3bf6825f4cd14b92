//! `memdev ps`: lists the sessions.

use std::path::PathBuf;

use clap::Args;
use memdev::control::model::Session;

use super::Failure;
use super::carriers::{self, Carriers, with_carriers};
use super::control::{ControlArgs, json, sessions_table, shown};

/// List the live sessions of a running server
#[derive(Args, Debug)]
#[command(
    after_help = "A session is called NAME@ID, as its clients call it; one connection's own is called NAME@:NUMBER \
        here.\nIMAGE#N says that it is on the Nth file that the image was, and new sessions are on another.\nWRITTEN is \
        what its clients have written in all, HELD what is kept of that, AWAY as much of it as is in the file of \
        --overflow, and not in memory. Rates are those of the last two seconds."
)]
pub(crate) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,

    /// Where the private roots of this machine are written down
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: &Ps) -> Result<(), Failure> {
    let sessions = args.control.connect()?.sessions()?;
    let carriers = Carriers::running(args.state.as_deref());
    if args.json {
        let with_carriers = |session: &Session| with_carriers(session, &session.uris, &carriers);
        let all = sessions.iter().map(with_carriers).collect::<Result<Vec<_>, _>>()?;
        return Ok(super::print(&json(&all)?)?);
    }
    let mut text = sessions_table(&sessions);
    for session in &sessions {
        for told in carriers.of_session(&session.uris) {
            carriers::append(&mut text, told, &format!("{} carries ", shown(&session.name)));
        }
    }
    Ok(super::print(&text)?)
}
