//! `memdev ns`: the namespace copy alone.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use clap::Args;
use memdev::Error;
use memdev::root::ns::{Rights, copy_mount_table};

use super::Failure;

/// What an ordinary user should know before it is found out.
const WITHOUT_ROOT: &str = "without root: you can mount tmpfs, binds and overlays here; you cannot mount disks, become \
    another user, or use setuid programs";

/// Run a shell or a command in a private copy of the mount table
#[derive(Args, Debug)]
#[command(
    long_about = "Run a shell or a command in a private copy of this shell's mount table. What is mounted and unmounted \
        there is seen by nobody else, and gone when the last process in it ends. Files are those that they were: for a \
        private copy of these, too, see 'memdev attach'.\n\n\
        Who is not root gets a user namespace with the copy, and is root in it, over what was mounted there.\n\n\
        Exit status: that of COMMAND; 127 if there is no such command, 126 if it cannot be run, 1 if there is no copy.",
    after_help = "Examples:\n  \
        memdev ns                                  a shell; 'exit' undoes every mount\n  \
        memdev ns -- sh -c 'mount -t tmpfs none /opt && make install'\n                                             \
        a trial installation"
)]
pub(crate) struct Ns {
    /// What to run, and its arguments [default: $SHELL, or /bin/sh]
    #[arg(value_name = "COMMAND", last = true)]
    command: Vec<OsString>,

    /// Do not tell what an ordinary user cannot do there
    #[arg(short, long)]
    quiet: bool,
}

pub(super) fn run(args: Ns) -> Result<std::convert::Infallible, Failure> {
    if copy_mount_table()? == Rights::OwnUserNamespace && !args.quiet {
        // With stderr closed there is nobody to tell.
        let _ = writeln!(io::stderr(), "memdev: {WITHOUT_ROOT}");
    }
    let shell = || env::var_os("SHELL").filter(|shell| !shell.is_empty()).unwrap_or_else(|| "/bin/sh".into());
    let mut words = args.command.into_iter();
    let program = words.next().unwrap_or_else(shell);
    let error = Command::new(&program).args(words).exec();
    let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    Err(Failure::NotRun(Error::io("Cannot run", error).on_path(&program), status))
}
