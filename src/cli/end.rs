//! `memdev end SESSION...`: ends sessions.

use clap::Args;
use memdev::Error;
use serde_json::json;

use super::Failure;
use super::control::{self, ControlArgs};

/// End sessions of a running server: hang up on their clients, and forget what they wrote
#[derive(Args, Debug)]
pub(crate) struct End {
    /// Sessions, as 'memdev ps' calls them
    #[arg(value_name = "SESSION", required = true)]
    sessions: Vec<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &End) -> Result<(), Failure> {
    let mut client = args.control.connect()?;
    let mut ended = Vec::new();
    let mut failed: Option<Error> = None;
    // One that cannot be ended keeps nobody from ending the others.
    for session in &args.sessions {
        match client.end(session) {
            Ok(()) => ended.push(session),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    if args.json {
        super::print(&control::json(&json!({ "ended": ended }))?)?;
    }
    Ok(())
}
