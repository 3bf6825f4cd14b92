//! `memdev set SESSION`: changes a live session.

use clap::Args;
use memdev::control::model::Change;

use super::control::{ControlArgs, json};
use super::{Failure, size};

/// Change a session of a running server
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
        memdev set root@build-17 --memory 2G\n  \
        memdev set root@build-17 --iops 500 --bandwidth 20M\n  \
        memdev set root@build-17 --iops none\n\n\
        A limit below what the session has already takes nothing from it: it can still overwrite and trim, and write \
        elsewhere once it has less than the limit. What is asked for beyond a cap waits, and does not fail.")]
#[group(id = "changes", required = true, multiple = true, args = ["memory", "iops", "bandwidth"])]
pub(crate) struct Set {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// Memory for what it writes, from now on
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Requests a second, of all of its connections together; 'none' or 0: as many as come
    #[arg(long, value_name = "N", value_parser = iops)]
    iops: Option<u64>,

    /// Bytes a second that are read and written, by all of its connections together; 'none' or 0: as many as come
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    bandwidth: Option<u64>,

    /// Print the session as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &Set) -> Result<(), Failure> {
    let change =
        Change { memory: args.memory, iops: args.iops, bandwidth: args.bandwidth, ..Change::default() };
    let changed = args.control.connect()?.change(&args.session, &change)?;
    if args.json {
        super::print(&json(&changed)?)?;
    }
    Ok(())
}

/// Requests a second; 0 for no cap.
pub(super) fn iops(text: &str) -> Result<u64, String> {
    let no_number = |_| "not a number of requests; write one as 500, or none".to_owned();
    if text == "none" { Ok(0) } else { text.parse().map_err(no_number) }
}

/// Bytes a second; 0 for no cap.
pub(super) fn bandwidth(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { size::parse(text).map_err(|why| format!("{why}, or none")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_can_be_none() {
        assert_eq!((iops("none"), iops("0"), iops("500")), (Ok(0), Ok(0), Ok(500)));
        assert_eq!((bandwidth("none"), bandwidth("20M")), (Ok(0), Ok(20 << 20)));
        for text in ["", "-1", "1.5", "off", "5k"] {
            assert!(iops(text).unwrap_err().contains("or none"), "{text}");
        }
        assert!(bandwidth("fast").unwrap_err().contains("or none"));
    }
}
