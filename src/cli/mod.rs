//! The command line: what was typed becomes what to do. One file a subcommand, one for each kind of value.
//!
//! The definitions here are the only source of help, manual and completions (see [`generate`]). Exit status: 0; 1 when
//! something failed; 2 when the command line itself is wrong; that of the command that it runs, where it runs one. Either
//! failure is one line on stderr that begins with `memdev: ` and says what to do.

mod attach;
mod carriers;
mod carry;
mod changes;
mod checkpoint;
mod command;
mod control;
mod detach;
mod end;
mod enter;
mod fork;
mod generate;
mod held;
mod image;
mod images;
mod info;
mod interruption;
mod limits;
mod load;
mod log;
mod login;
mod logind;
mod map;
mod new;
mod ns;
mod progress;
mod ps;
mod rollback;
mod run;
mod save;
mod serve;
mod set;
mod size;
mod stat;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use memdev::Error;
use memdev::duration;

/// Private, in-memory, copy-on-write block devices over one shared image, served by NBD
#[derive(Debug, Parser)]
#[command(
    name = "memdev",
    version,
    arg_required_else_help = true,
    max_term_width = 100,
    long_about = "Private, in-memory, copy-on-write block devices over one shared image, served by NBD.\n\n\
        Every client gets a writable block device of its own that starts as a copy of the image. What it writes is kept \
        in memory, seen by nobody else, and gone when its session ends. The image itself never changes.",
    after_help = "Try it:\n  \
        memdev serve root.img                    serve an image on 127.0.0.1:10809\n  \
        nbdinfo nbd://localhost/root             look at it from another shell\n  \
        memdev serve --help                      all about serving\n\n\
        MEMDEV_LOG sets what is logged to stderr: error, warn (the default), info, debug, trace."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Log more: -v what happens, -vv in detail, -vvv everything
    #[arg(short, long, global = true, display_order = 900, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    // Boxed: it has many options, the others few.
    Serve(Box<serve::Serve>),
    Info(info::Info),
    Map(map::Map),
    Attach(attach::Attach),
    Detach(detach::Detach),
    New(new::New),
    Ps(ps::Ps),
    Stat(stat::Stat),
    Top(top::Top),
    Set(set::Set),
    End(end::End),
    Ns(ns::Ns),
    // Boxed as well.
    Run(Box<run::Run>),
    Enter(enter::Enter),
    Login(login::Login),
    Logind(logind::Logind),
    Save(save::Save),
    Load(load::Load),
    Image(images::ImageCommand),
    Changes(changes::ChangesArgs),
    Carry(carry::CarryCommand),
    Checkpoint(checkpoint::CheckpointArgs),
    Rollback(rollback::RollbackArgs),
    Reset(rollback::ResetArgs),
    Fork(Box<fork::ForkArgs>),
    #[command(hide = true, name = memdev::attach::daemon::SUBCOMMAND)]
    AttachDaemon(AttachDaemon),
    #[command(hide = true)]
    Generate(generate::Generate),
}

/// Serve one block device; started by 'memdev attach' only
#[derive(Debug, clap::Args)]
struct AttachDaemon {
    /// What it serves, for people who list processes
    #[arg(hide = true)]
    what: Vec<std::ffi::OsString>,
}

/// Why a command did not succeed.
enum Failure {
    /// The command line is wrong: exit status 2.
    Usage(String),
    /// It was tried and failed: exit status 1.
    Failed(Error),
    /// It failed, and has a status of its own for that: as shells have for a command that is not there, or not to be run.
    NotRun(Error, u8),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let (line, status) = match parse_and_run() {
        Ok(status) => return status,
        Err(Failure::Failed(error)) => (error.to_string(), 1),
        Err(Failure::NotRun(error, status)) => (error.to_string(), status),
        Err(Failure::Usage(why)) => (why, 2),
    };
    // What was typed is part of the line, and may hold anything.
    let line = line.replace(char::is_control, " ");
    // With stderr closed there is nobody to tell; the status still says it.
    let _ = writeln!(io::stderr(), "memdev: {line}");
    ExitCode::from(status)
}

fn parse_and_run() -> Result<ExitCode, Failure> {
    // Before anything that was typed is looked at: it may have been typed by somebody who may only log in.
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| login::is_shell(&name)) {
        log::start(0).map_err(Failure::Usage)?;
        return login::as_shell(args);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are asked for; help instead of an error is what bare `memdev` gets.
        Err(error) if error.exit_code() == 0 || shows_help(&error) => error.exit(),
        Err(error) => return Err(Failure::Usage(usage_line(&error))),
    };
    log::start(cli.verbose).map_err(Failure::Usage)?;
    match cli.command {
        Command::Serve(args) => serve::run(*args)?,
        Command::Info(args) => info::run(&args)?,
        Command::Map(args) => map::run(&args)?,
        Command::Attach(args) => attach::run(args)?,
        Command::Detach(args) => detach::run(&args)?,
        Command::New(args) => new::run(args)?,
        Command::Ps(args) => ps::run(&args)?,
        Command::Stat(args) => stat::run(&args)?,
        Command::Top(args) => top::run(&args)?,
        Command::Set(args) => set::run(&args)?,
        Command::End(args) => end::run(&args)?,
        Command::Ns(args) => match ns::run(args)? {},
        Command::Run(args) => return run::run(*args),
        Command::Enter(args) => return enter::run(args),
        Command::Save(args) => save::run(args)?,
        Command::Load(args) => load::run(args)?,
        Command::Image(args) => images::run(args)?,
        Command::Changes(args) => return changes::run(&args),
        Command::Carry(args) => carry::run(args)?,
        Command::Checkpoint(args) => checkpoint::run(&args)?,
        Command::Rollback(args) => rollback::run(&args)?,
        Command::Reset(args) => rollback::reset(&args)?,
        Command::Fork(args) => return fork::run(*args),
        Command::Login(args) => return login::run(args),
        Command::Logind(args) => return logind::run(args),
        Command::AttachDaemon(_) => return Ok(memdev::attach::daemon::run()),
        Command::Generate(args) => generate::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn shows_help(error: &clap::Error) -> bool {
    error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
}

/// clap's error in one line: its message, its tips, and where to read on.
fn usage_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let mut line = String::new();
    for paragraph in text.split("\n\n") {
        let paragraph =
            paragraph.split('\n').map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
        if paragraph.is_empty()
            || paragraph.starts_with("Usage:")
            || paragraph.starts_with("For more information")
        {
            continue;
        }
        if line.is_empty() {
            let mut chars = paragraph.chars();
            line.extend(chars.next().map(|first| first.to_ascii_uppercase()));
            line.push_str(chars.as_str());
        } else {
            line.push_str("; ");
            line.push_str(match paragraph.strip_prefix("tip: ") {
                // clap's is how to give it as an operand.
                Some(_) if is_below_zero(error) => {
                    "if it is a size, number or duration: none can be negative"
                }
                Some(tip) => tip,
                None => &paragraph,
            });
        }
    }
    let typed = std::env::args_os().nth(1);
    let cli = Cli::command();
    let subcommand =
        cli.get_subcommands().find(|command| typed.as_ref().is_some_and(|typed| typed == command.get_name()));
    // What is one too many there most likely is a command's first word.
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && subcommand.is_some_and(|command| command.get_arguments().any(clap::Arg::is_last_set))
        && line.starts_with("Unexpected argument '")
        && !line.starts_with("Unexpected argument '-")
    {
        line.push_str("; put -- before the command");
    }
    let see = subcommand.map_or_else(String::new, |command| format!(" {}", command.get_name()));
    format!("{line}; see 'memdev{see} --help'")
}

/// Whether the argument that was not expected is a number, as for an option that takes none like that.
fn is_below_zero(error: &clap::Error) -> bool {
    use clap::error::{ContextKind, ContextValue};
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) => {
            arg.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        }
        _ => false,
    }
}

/// Writes a command's output to stdout. A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("Cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// On a terminal of 80 columns clap breaks what is longer, and what is broken already once more.
    #[test]
    fn help_is_broken_into_lines_once() {
        fn look(command: &clap::Command) {
            let texts = [command.get_long_about(), command.get_after_help(), command.get_after_long_help()];
            for text in texts.into_iter().flatten().map(ToString::to_string) {
                let mut lines = text.lines().peekable();
                while let Some(line) = lines.next() {
                    let name = command.get_name();
                    if line.is_empty() {
                        continue;
                    }
                    if line.starts_with(' ') {
                        assert!(line.chars().count() <= 80, "{name}: an example is too long: {line}");
                    } else if lines.peek().is_some_and(|next| !next.is_empty() && !next.starts_with(' ')) {
                        assert!(line.ends_with('.'), "{name}: a line that ends within a sentence: {line}");
                    }
                }
            }
            command.get_subcommands().for_each(look);
        }
        look(&Cli::command());
    }
}
