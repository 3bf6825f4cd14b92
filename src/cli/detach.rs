//! `memdev detach`: takes a block device away again.

use std::path::PathBuf;

use clap::Args;
use memdev::Result;
use memdev::attach::{self, DIRECTORY};

/// Take a block device away that 'memdev attach' has made
#[derive(Args, Debug)]
#[command(
    long_about = "Take a block device away that 'memdev attach' has made, and return when the kernel has let go of it and \
        its daemon has ended. A device that is mounted or otherwise in use is left as it is. Needs root.",
    after_help = "Example:\n  memdev detach /dev/loop3"
)]
pub(crate) struct Detach {
    /// The device
    #[arg(value_name = "DEVICE")]
    device: PathBuf,

    /// Where attachments are written down
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, hide = true)]
    state: PathBuf,
}

pub(crate) fn run(args: &Detach) -> Result<()> {
    attach::detach(&args.state, &args.device)
}
