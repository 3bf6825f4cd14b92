//! `memdev checkpoint SESSION [NAME]`: takes, lists and gives up checkpoints.

use clap::Args;
use memdev::control::model::Checkpoint;

use super::Failure;
use super::control::{ControlArgs, json, shown, table};
use super::size::human;

/// Take a checkpoint of a live session, to go back to later
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
        memdev checkpoint root@build-17 clean        take it\n  \
        memdev checkpoint root@build-17              list them\n  \
        memdev checkpoint root@build-17 clean --drop give it up\n\n\
        Requests of its clients go on meanwhile; each is before the checkpoint or behind it. What a kernel or a program \
        has not written yet is not in it: sync or freeze (fsfreeze) a mounted file system before.")]
pub(crate) struct CheckpointArgs {
    /// The session, as 'memdev ps' calls it
    #[arg(value_name = "SESSION")]
    session: String,

    /// The checkpoint, 1 to 64 letters, digits, dots, underscores or hyphens; without, all are listed
    #[arg(value_name = "NAME")]
    name: Option<String>,

    /// Give it up
    #[arg(long, requires = "name")]
    drop: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: &CheckpointArgs) -> Result<(), Failure> {
    let mut client = args.control.connect()?;
    let text = match &args.name {
        None => {
            let all = client.checkpoints(&args.session)?;
            if args.json { json(&all)? } else { list(&all) }
        }
        Some(name) if args.drop => {
            client.drop_checkpoint(&args.session, name)?;
            if args.json { json(&serde_json::json!({ "dropped": name }))? } else { String::new() }
        }
        Some(name) => {
            let taken = client.checkpoint(&args.session, name)?;
            if args.json { json(&taken)? } else { String::new() }
        }
    };
    Ok(super::print(&text)?)
}

fn list(all: &[Checkpoint]) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0.0, |time| time.as_secs_f64());
    let row = |point: &Checkpoint| {
        vec![shown(&point.name), super::control::age((now - point.taken).max(0.0)), human(point.data)]
    };
    let head = ["CHECKPOINT", "AGE", "DATA"].map(str::to_owned).to_vec();
    table(&std::iter::once(head).chain(all.iter().map(row)).collect::<Vec<_>>(), &[false, true, true])
}
