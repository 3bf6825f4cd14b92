//! `memdev new NAME`: makes a session.

use clap::Args;
use memdev::control::model::{NewSession, SessionDetail};
use memdev::session::SessionId;
use memdev::{Error, ErrorKind, Result};

use super::control::{ControlArgs, json};
use super::{Failure, size};

/// Make a named session of a running server, and print the URI to connect to
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
        memdev new root --control /run/memdev/control.sock\n  \
        memdev new root --id build-17 --memory 1G\n\n\
        The session belongs to whoever connects to it first. It stays until it was used and left again for the server's \
        --linger time, or ended (memdev end). Without --id its name has 128 random bits, which is what protects it over \
        plain TCP.")]
pub(crate) struct New {
    /// The image's export name, as in 'memdev serve NAME=IMAGE'
    #[arg(value_name = "NAME")]
    image: String,

    /// Its id, 1 to 64 letters, digits, dots, underscores or hyphens [default: 128 random bits]
    #[arg(long, value_name = "ID", value_parser = id)]
    id: Option<String>,

    /// Memory for what it writes [default: as for every session]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Keep what it writes encrypted in memory, with a key of its own that ends with it, also if the server does not do so
    /// with every session (serve --seal)
    #[arg(long)]
    seal: bool,

    /// Print all about it as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: New) -> Result<(), Failure> {
    check_image(&args.image)?;
    let mut client = args.control.connect()?;
    let wanted = NewSession {
        image: Some(args.image),
        id: args.id,
        memory: args.memory,
        held: false,
        sealed: args.seal,
    };
    let made = client.create(&wanted)?;
    let text = if args.json { json(&made)? } else { uri(&made) };
    Ok(super::print(&text)?)
}

/// Refuses the name of a session where an image's belongs. The server does too, in the words of its API.
pub(super) fn check_image(name: &str) -> Result<()> {
    if name.contains('@') {
        let error = Error::new(ErrorKind::NotFound, "No such export").on(name);
        return Err(error.advise("give the image's name, and the session's id with --id"));
    }
    Ok(())
}

/// The line that scripts read: where to connect to.
pub(super) fn uri(made: &SessionDetail) -> String {
    // A server that was given a connected socket listens nowhere.
    let uri = made.session.uris.first().unwrap_or(&made.session.name);
    format!("{uri}\n")
}

pub(super) fn id(text: &str) -> Result<String, String> {
    match SessionId::new(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("an id has 1 to 64 letters, digits, dots, underscores or hyphens".to_owned()),
    }
}
