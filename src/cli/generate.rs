//! `memdev generate man|completions DIR`: manual pages and shell completions from the command line's own definition.
//!
//! Hidden: for those who package memdev. The flags are written down once, in these modules, and help, manual and
//! completions all come from there.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;
use memdev::{Error, Result};

use super::Cli;

/// Write manual pages or shell completions into a directory
#[derive(Args, Debug)]
pub(crate) struct Generate {
    /// What to write
    what: What,
    /// Where to; made if it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Manual pages: memdev.1, memdev-serve.1 and so on
    Man,
    /// Completions for bash, zsh, fish, elvish and PowerShell
    Completions,
}

pub(crate) fn run(args: &Generate) -> Result<()> {
    let directory = args.directory.as_path();
    fs::create_dir_all(directory)
        .map_err(|error| Error::io("Cannot make directory", error).on_path(directory))?;
    match args.what {
        What::Man => man(directory),
        What::Completions => completions(directory),
    }
    .map_err(|error| Error::io("Cannot write to", error).on_path(directory))
}

fn man(directory: &Path) -> std::io::Result<()> {
    // A page would say that there is one about 'help'.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let pages = std::iter::once(&command).chain(command.get_subcommands().filter(|sub| !sub.is_hide_set()));
    for command in pages {
        // `build` gives a subcommand the display name `memdev-serve`.
        let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
        let mut page = Vec::new();
        clap_mangen::Man::new(command.clone()).title(name.to_uppercase()).render(&mut page)?;
        fs::write(directory.join(format!("{name}.1")), page)?;
    }
    Ok(())
}

fn completions(directory: &Path) -> std::io::Result<()> {
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut Cli::command(), "memdev", directory)?;
    }
    Ok(())
}
