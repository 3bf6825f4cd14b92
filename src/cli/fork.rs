//! `memdev fork SESSION`: a new session of the state of another, a server's or a private root.

use std::process::ExitCode;

use clap::Args;
use memdev::control::model::Fork;
use memdev::root;

use super::Failure;
use super::command::{CommandArgs, finish, notice};
use super::control::{ControlArgs, json};

/// Go on twice from here: fork a private root, or a session of a server
#[derive(Args, Debug)]
#[command(
    long_about = "Fork a private root that 'memdev run' has made: run a command, by default a shell, in a new one of its \
        present state. Its file system stands still for an instant; what is mounted in it is mounted anew, with copies of what \
        is in memory there; its processes are not copied. What it was given of the host, its network and its rights are the \
        same. Neither sees the other from then on, and either may end first. The exit status is the command's, as that of \
        'memdev run'. Needs root.\n\n\
        Or fork a session of a server, NAME@ID as 'memdev ps' calls it: print the URI to connect to. It has the owner of the \
        other and shares its memory until one of the two writes. It stays until it was used and left again for the server's \
        --linger time, or ended.",
    after_help = "Examples:\n  \
        memdev enter --list                        what there is to be forked\n  \
        memdev fork debian-3f2a9c                  a shell in a copy of it\n  \
        memdev fork kiosk --name try -- make test  a command there\n  \
        memdev fork root@build-17 --id build-18    a session of a server"
)]
pub(crate) struct ForkArgs {
    /// The private root's name, or the beginning of its id; or NAME@ID of a server's session
    #[arg(value_name = "SESSION")]
    session: String,

    #[command(flatten)]
    command: CommandArgs,

    /// What the new private root is called [default: the image's name and some digits]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// The host name [default: the session's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// Print what would be done, step by step, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// The new session's id, of a server [default: 128 random bits]
    #[arg(long, value_name = "ID", value_parser = super::new::id)]
    id: Option<String>,

    /// Print all about the new session, of a server, as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: ForkArgs) -> Result<ExitCode, Failure> {
    // No private root is called so.
    if args.session.contains('@') { fork_of_server(args) } else { fork_root(args) }
}

fn fork_of_server(args: ForkArgs) -> Result<ExitCode, Failure> {
    let given = [
        ("--name", args.name.is_some()),
        ("--hostname", args.hostname.is_some()),
        ("--dry-run", args.dry_run),
    ];
    let given = given.into_iter().find(|(_, given)| *given).map(|(option, _)| option);
    if let Some(option) = given.or_else(|| args.command.given()) {
        let why = format!("{option} is for private roots, and {} is a session of a server", args.session);
        return Err(Failure::Usage(why));
    }
    let wanted = Fork { id: args.id, unclaimed: false, held: false };
    let made = args.control.connect()?.fork(&args.session, &wanted)?;
    let text = if args.json { json(&made)? } else { super::new::uri(&made) };
    super::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn fork_root(args: ForkArgs) -> Result<ExitCode, Failure> {
    let given = [("--id", args.id.is_some()), ("--json", args.json)];
    if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
        let why =
            format!("{option} is for sessions of a server, and {} is called as a private root", args.session);
        return Err(Failure::Usage(why + "; write NAME@ID"));
    }
    let (attachments, sessions) = args.command.directories();
    let mut run = root::Run::fork(&args.session, sessions)?;
    run.attachments = attachments;
    run.env = args.command.env();
    run.command = args.command.command;
    run.login = args.command.login;
    run.workdir = args.command.workdir;
    run.user = args.command.user;
    run.name = args.name;
    run.hostname = args.hostname;
    run.control = args.control.path();
    run.notice = notice;
    run.warn = notice;
    if args.dry_run {
        super::print(&run.plan().to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    finish(&run.run()?)
}
