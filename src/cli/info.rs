//! `memdev info IMAGE|URI`: what an image holds, or what a server offers.

mod image;
mod server;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Args;
use memdev::net::Uri;
use memdev::proto::BlockSizes;
use memdev::{Error, ErrorKind, Result};
use serde_json::{Value, json};

/// Show what an image holds, or what a server offers
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
        memdev info root.img                       what an image holds\n  \
        memdev info nbd://localhost                all exports of a server\n  \
        memdev info nbd://localhost/root           one export\n  \
        memdev info 'nbd+unix:///root?socket=/run/memdev.sock'\n  \
        memdev info --json root.img | jq .size     for programs")]
pub(crate) struct Info {
    /// The image file, or the NBD URI of a server (all its exports) or of one export
    #[arg(value_name = "IMAGE|URI")]
    what: OsString,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Info) -> Result<()> {
    let text = match args.what.to_str().filter(|text| Uri::looks_like(text)) {
        Some(uri) => server::show(&uri.parse()?, args.json)?,
        None => image::show(Path::new(&args.what), args.json).map_err(|error| explain(&args.what, error))?,
    };
    super::print(&text)
}

/// What to say of `what`, at which there is no file: it may have been meant as something else.
pub(super) fn explain(what: &OsStr, error: Error) -> Error {
    let Some(text) = what.to_str().filter(|_| error.kind() == ErrorKind::NotFound) else { return error };
    if text.contains("://") {
        // It says which scheme is not known.
        return text.parse::<Uri>().err().unwrap_or(error);
    }
    if text.contains('@') && !text.contains('/') {
        return error.advise(
            "name a session by its URI, as nbd+unix:///NAME@ID?socket=PATH; 'memdev stat NAME@ID' tells what it does",
        );
    }
    error
}

/// Size constraints as a line of text has them.
fn block_sizes_text(sizes: BlockSizes) -> String {
    format!("minimum {}, preferred {}, maximum {}", sizes.minimum, sizes.preferred, sizes.maximum)
}

/// Size constraints as JSON has them.
fn block_sizes_json(sizes: BlockSizes) -> Value {
    json!({ "minimum": sizes.minimum, "preferred": sizes.preferred, "maximum": sizes.maximum })
}
