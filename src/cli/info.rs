//! `memdev info IMAGE|URI`: what an image holds, or what a server offers.

mod image;

use std::ffi::OsString;
use std::path::Path;

use clap::Args;
use memdev::Result;
use memdev::net::Uri;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
        memdev info root.img                                  an image\n  \
        memdev info nbd://localhost                           all exports of a server\n  \
        memdev info 'nbd+unix:///root?socket=/run/memdev.sock'  one export\n  \
        memdev info --json root.img | jq .size                for programs")]
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
        Some(_uri) => return Ok(()),
        None => image::show(Path::new(&args.what), args.json)?,
    };
    super::print(&text)
}
