//! `memdev image`: the images of a running server, and other files for them.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Subcommand};
use memdev::base::cannot_open;
use memdev::control::model::{ImageDetail, ImageFile};
use memdev::{Error, ErrorKind};

use super::Failure;
use super::control::{ControlArgs, age, json, shown, table};
use super::image::ImageArg;
use super::size::human;

/// Show the images of a running server, or offer another file as one of them
#[derive(Args, Debug)]
pub(crate) struct ImageCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    Set(Set),
    List(List),
}

/// Offer another file as an image from now on; sessions that are there stay on what they are on
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
        memdev image set root=/srv/images/debian-13.raw\n\n\
        The file is opened here and handed to the server, so it may lie where the server can open nothing. One that is \
        renamed over it later is taken up as well, where the server can open that. The old file stays mapped until its \
        last session ends: 'memdev image list' shows which are still used, 'memdev ps' marks the sessions that are on \
        them.")]
struct Set {
    /// The image's export name, and the file
    #[arg(value_name = "NAME=FILE", value_parser = OsStringValueParser::new().try_map(named))]
    image: ImageArg,

    /// Print the image as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

/// List the images, with the files that they are and have been
#[derive(Args, Debug)]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn run(args: ImageCommand) -> Result<(), Failure> {
    match args.what {
        What::Set(args) => set(&args),
        What::List(args) => list(&args),
    }
}

fn named(arg: OsString) -> Result<ImageArg, String> {
    let has_name = |image: &ImageArg| arg.as_bytes().starts_with(format!("{}=", image.name).as_bytes());
    let image = ImageArg::parse(arg.clone())?;
    if has_name(&image) { Ok(image) } else { Err("no name; write NAME=FILE".to_owned()) }
}

fn set(args: &Set) -> Result<(), Failure> {
    let mut client = args.control.connect()?;
    let ImageArg { name, path } = &args.image;
    let failed = |error| cannot_open(path, error);
    // Looked at before it is opened: opening a FIFO would wait for a writer. The server says what is wrong with others.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_dir() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
        let error = Error::new(ErrorKind::Invalid, "Neither a regular file nor a block device:");
        return Err(error.on_path(path).advise("give the path of a raw disk image").into());
    }
    let file = File::open(path).map_err(failed)?;
    let absolute = std::path::absolute(path).map_err(failed)?;
    let image = client.set_image(name, &absolute, &file)?;
    if args.json {
        super::print(&json(&image)?)?;
    }
    Ok(())
}

fn list(args: &List) -> Result<(), Failure> {
    let images = args.control.connect()?.images()?;
    let text = if args.json { json(&images)? } else { images_table(&images) };
    Ok(super::print(&text)?)
}

fn images_table(images: &[ImageDetail]) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0.0, |time| time.as_secs_f64());
    let row = |image: &ImageDetail, file: &ImageFile| {
        vec![
            super::control::image_of(&image.name, &file.base),
            human(file.base.size),
            age((now - file.base.opened).max(0.0)),
            file.sessions.to_string(),
            shown(&file.base.path),
        ]
    };
    let head = ["IMAGE", "SIZE", "OPENED", "SESSIONS", "FILE"].map(str::to_owned).to_vec();
    let rows = images.iter().flat_map(|image| image.files.iter().map(move |file| row(image, file)));
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>(), &[false, true, true, true, false])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_given_with_a_name() {
        let parse = |text: &str| named(text.into());
        assert_eq!(parse("root=x.img"), Ok(ImageArg { name: "root".into(), path: "x.img".into() }));
        for text in ["x.img", "./a=b", "/srv/root.img"] {
            assert!(parse(text).unwrap_err().contains("NAME=FILE"), "{text}");
        }
        assert!(parse("root=").is_err());
    }
}
