//! `memdev fork SESSION`: a new session of the state of another.

use clap::Args;
use memdev::control::model::Fork;

use super::Failure;
use super::control::{ControlArgs, json};

/// Make a new session of the present state of a live one, and print the URI to connect to
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
        memdev fork root@build-17 --id build-18\n\n\
        It has the owner of the other and shares its memory until one of the two writes. It stays until it was used and\n\
        left again for the server's --linger time, or ended.")]
pub(crate) struct ForkArgs {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// The new session's id [default: 128 random bits]
    #[arg(long, value_name = "ID", value_parser = super::new::id)]
    id: Option<String>,

    /// Print all about the new session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: ForkArgs) -> Result<(), Failure> {
    let made = args.control.connect()?.fork(&args.session, &Fork { id: args.id, unclaimed: false })?;
    let text = if args.json { json(&made)? } else { super::new::uri(&made) };
    Ok(super::print(&text)?)
}
