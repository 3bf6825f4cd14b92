//! The `memdev` command: parse, call, map to an exit status.

mod cli;

use memdev::sys::WipingAllocator;
use std::process::ExitCode;

/// What sessions write passes through the heap here and there, and is not to stay there.
#[global_allocator]
static ALLOCATOR: WipingAllocator = WipingAllocator;

fn main() -> ExitCode {
    cli::main()
}
