//! `memdev run --carry` and `memdev carry`: files that leave a private root, and what became of them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use memdev::carry::{self, Carry, Options};
use memdev::root;
use serde_json::{Value, json};

use super::carriers;
use super::command::notice;
use super::progress::Bar;
use super::size::human;
use super::{Failure, duration};

/// What is carried out of a private root.
#[derive(Args, Debug)]
pub(crate) struct CarryArgs {
    /// Fill the directory PATH of the private root from DEST, and deliver to DEST what is changed there: while the session
    /// runs, and the rest when it ends. DEST is a directory of the host, such as a mounted network file system,
    /// sftp://[USER@]HOST[:PORT]/PATH, webdavs://[USER@]HOST[:PORT]/PATH, or s3://BUCKET[/PREFIX]
    #[arg(long, value_name = "PATH=DEST")]
    carry: Vec<String>,

    /// Remove at DEST what is removed in the session
    #[arg(long, requires = "carry")]
    carry_deletes: bool,

    /// Rules of what is not carried, in a file like a .gitignore
    #[arg(long, value_name = "FILE", requires = "carry")]
    carry_rules: Vec<PathBuf>,

    /// Do not carry what fits this pattern, as in a .gitignore
    #[arg(long, value_name = "PATTERN", requires = "carry")]
    carry_exclude: Vec<String>,

    /// Carry what fits this pattern after all
    #[arg(long, value_name = "PATTERN", requires = "carry")]
    carry_include: Vec<String>,

    /// At the end, how long to try without one success before the rest goes to the spool [default: 30s]
    #[arg(long, value_name = "TIME", requires = "carry", value_parser = duration::parse)]
    carry_wait: Option<Duration>,

    /// Encrypt what goes to the spool to this recipient, with the program age (age1...)
    #[arg(long, value_name = "RECIPIENT", requires = "carry")]
    carry_recipient: Option<String>,
}

impl CarryArgs {
    /// What that means; `state` is where things are written down, if not where they usually are.
    pub(crate) fn options(&self, state: Option<&Path>) -> Result<Options, Failure> {
        let parse = |text: &String| {
            let wrong = || Failure::Usage(format!("'{text}' does not parse; write PATH=DEST"));
            let (path, destination) = text.split_once('=').ok_or_else(wrong)?;
            let destination = if destination.contains("://") || destination.is_empty() {
                destination.to_owned()
            } else {
                let whole = std::path::absolute(destination).map_err(|_| wrong())?;
                whole.to_str().ok_or_else(wrong)?.to_owned()
            };
            Ok::<_, Failure>(Carry::new(path.into(), destination)?)
        };
        let (spool, state) = directories(state);
        let options = Options {
            carries: self.carry.iter().map(parse).collect::<Result<_, _>>()?,
            deletes: self.carry_deletes,
            rules: self.carry_rules.clone(),
            exclude: self.carry_exclude.clone(),
            include: self.carry_include.clone(),
            patience: self.carry_wait.unwrap_or(carry::PATIENCE),
            of_user: false,
            recipient: self.carry_recipient.clone(),
            spool,
            state,
            notice,
            progress,
        };
        options.check()?;
        Ok(options)
    }
}

/// Spool, and where running carriers are written down.
pub(super) fn directories(state: Option<&Path>) -> (PathBuf, PathBuf) {
    match state {
        Some(state) => (state.join("spool"), state.join("carry")),
        None => (carry::SPOOL.into(), root::directory(carry::STATE)),
    }
}

fn progress(far: Option<(u64, u64)>) {
    static BAR: std::sync::Mutex<Option<Bar>> = std::sync::Mutex::new(None);
    let Ok(mut bar) = BAR.lock() else { return };
    match far {
        Some((done, all)) => bar.get_or_insert_with(Bar::new).show(done, all),
        None => drop(bar.take().inspect(Bar::clear)),
    }
}

/// See what becomes of the files that leave private roots, and deliver what could not be delivered
#[derive(Args, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:\n  \
        memdev run --carry /home/joe=/srv/homes/joe --user joe --login debian.img\n                                        \
        a home directory that is there next time\n  \
        memdev carry status                   what is on its way, and in the spool\n  \
        memdev carry resume                   deliver what is in the spool\n  \
        memdev carry resume --identity KEY    the same of what is encrypted"
)]
pub(crate) struct CarryCommand {
    #[command(subcommand)]
    what: What,

    /// Where carriers are written down, and the spool is
    #[arg(long, value_name = "DIR", hide = true, global = true)]
    state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show what is on its way, and in the spool
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Deliver what is in the spool
    Resume {
        /// What it is called there, or how that begins [default: everything, the oldest first]
        id: Option<String>,

        /// The file of the key that it is encrypted to, as 'age --identity' takes it
        #[arg(long, value_name = "FILE")]
        identity: Option<PathBuf>,
    },
    /// Remove from the spool what is not to be delivered
    Forget {
        /// What it is called there, or how that begins
        id: String,
    },
}

pub(crate) fn run(args: CarryCommand) -> Result<(), Failure> {
    let (spool, state) = directories(args.state.as_deref());
    match args.what {
        What::Status { json } => Ok(super::print(&status(&spool, &state, json)?)?),
        What::Resume { id, identity } => resume(&spool, id, identity.as_deref()),
        What::Forget { id } => {
            let one = carry::forget(&spool, &id)?;
            notice(&format!("forgot {} changes of {} in {}", one.entries, one.path, one.session));
            Ok(())
        }
    }
}

fn status(spool: &Path, state: &Path, as_json: bool) -> Result<String, Failure> {
    let (running, spooled) = (carry::running(state)?, carry::spooled(spool)?);
    if as_json {
        let running: Vec<_> = running.into_iter().map(|running| running.json).collect();
        let spooled: Vec<_> = spooled.iter().map(carry::Spooled::to_json).collect();
        return Ok(format!("{:#}\n", json!({ "running": running, "spooled": spooled })));
    }
    let mut out = String::new();
    let shown = |value: &Value| value.as_str().unwrap_or_default().replace(char::is_control, "?");
    for running in &running {
        let json = &running.json;
        carriers::append(&mut out, json, &format!("{}: ", shown(&json["session"])));
        for note in json["notes"].as_array().into_iter().flatten() {
            let _ = writeln!(out, "    {}", shown(note));
        }
    }
    for one in &spooled {
        let _ = writeln!(
            out,
            "spool {}: {} changes ({}) of {} in {}, for {}{}",
            one.id,
            one.entries,
            human(one.bytes),
            one.path,
            one.session,
            one.destination,
            one.recipient.as_ref().map(|recipient| format!(", encrypted to {recipient}")).unwrap_or_default(),
        );
    }
    Ok(out)
}

fn resume(spool: &Path, id: Option<String>, identity: Option<&Path>) -> Result<(), Failure> {
    let ids = match id {
        Some(id) => vec![id],
        None => carry::spooled(spool)?.into_iter().map(|one| one.id).collect(),
    };
    // One that cannot be delivered does not keep the others.
    let mut first = None;
    for id in ids {
        let mut bar = Bar::new();
        let result = carry::resume(spool, &id, identity, &mut |done, all| bar.show_count(done, all));
        bar.clear();
        match result {
            Ok(notes) => notes.iter().for_each(|note| notice(note)),
            Err(error) => drop(first.get_or_insert(error)),
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}
