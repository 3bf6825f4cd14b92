//! What the processes of a private root may use, as people type it.

use clap::{Args, ValueEnum};
use memdev::root::{Limits, PIDS_MIN, Swap};

use super::size;

/// The options of those who start a private root.
#[derive(Args, Debug)]
pub(crate) struct LimitArgs {
    /// The most processes and threads inside [default: no limit of its own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(PIDS_MIN..))]
    pids_limit: Option<u64>,

    /// Memory for the processes inside and their files in memory; over it one of them is killed [default: no limit of its own]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory_limit: Option<u64>,

    /// Whether what they have in memory may be swapped out
    #[arg(long, value_enum, default_value_t = SwapArg::Avoid)]
    swap: SwapArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SwapArg {
    /// Not if it can be helped
    Avoid,
    /// No, or do not start
    Never,
    /// As everybody's
    Allow,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Self {
        let swap = match args.swap {
            SwapArg::Avoid => Swap::Avoid,
            SwapArg::Never => Swap::Never,
            SwapArg::Allow => Swap::Allow,
        };
        Self { pids: args.pids_limit, memory: args.memory_limit, swap }
    }
}
