//! `memdev rollback SESSION NAME` and `memdev reset SESSION`: the way back.

use clap::Args;

use super::Failure;
use super::control::{ControlArgs, json};

/// Make a live session what it was at a checkpoint
#[derive(Args, Debug)]
#[command(
    after_help = "All of its connections see the old state at once. What the kernel or a virtual machine has cached of \
        the device is theirs to forget: unmount before, or stop the machine."
)]
pub(crate) struct RollbackArgs {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// The checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,

    /// Print the session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

/// Make a live session what its image is, as if nothing had been written
#[derive(Args, Debug)]
#[command(
    after_help = "Its checkpoints stay. As after 'memdev rollback', what others have cached of the device is theirs to \
        forget."
)]
pub(crate) struct ResetArgs {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// Print the session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &RollbackArgs) -> Result<(), Failure> {
    let session = args.control.connect()?.rollback(&args.session, &args.checkpoint)?;
    if args.json { Ok(super::print(&json(&session)?)?) } else { Ok(()) }
}

pub(crate) fn reset(args: &ResetArgs) -> Result<(), Failure> {
    let session = args.control.connect()?.reset(&args.session)?;
    if args.json { Ok(super::print(&json(&session)?)?) } else { Ok(()) }
}
