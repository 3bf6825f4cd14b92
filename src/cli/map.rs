//! `memdev map IMAGE|URI`: where there is data, and whose it is.

mod image;
mod server;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

use clap::Args;
use memdev::Result;
use memdev::net::Uri;

/// Show where an image or a session has data, and which of it the session wrote
#[derive(Args, Debug)]
#[command(
    long_about = "Show where an image or a session has data, and which of it the session wrote.\n\n\
        Of an image file, what the server would tell of it: data, and the holes that the file system knows. Of an \
        export, what its server tells; with memdev as server also whose the data is: depth 0 is what the session \
        wrote itself, depth 1 the image under it. Any other server has one layer, depth 0. A session is seen under \
        its own name, NAME@ID, and is not made by that if it is not there; a plain NAME is a new session each time, in which \
        nothing is written yet.",
    after_help = "Examples:\n  \
        memdev map root.img                      where an image has data\n  \
        memdev map nbd://localhost/root@alice    what session 'alice' wrote and sees\n  \
        memdev map --json nbd://localhost/root@alice |\n      \
            jq 'map(select(.depth == 0).length) | add'\n                                           \
        how many bytes it wrote\n\n\
        The JSON is that of 'qemu-img map --output=json': start, length, depth, present, zero, data."
)]
pub(crate) struct Map {
    /// The image file, or the NBD URI of an export or session
    #[arg(value_name = "IMAGE|URI")]
    what: OsString,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Map) -> Result<()> {
    let extents = match args.what.to_str().filter(|text| Uri::looks_like(text)) {
        Some(uri) => server::extents(&uri.parse()?)?,
        None => {
            let what = Path::new(&args.what);
            image::extents(what).map_err(|error| super::info::explain(&args.what, error))?
        }
    };
    super::print(&if args.json { extents.to_json() } else { extents.to_text() })
}

/// What holds for a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holds {
    /// 0 for the topmost layer, 1 for the one under it.
    depth: u8,
    /// There is data, which may well be zeroes.
    data: bool,
    /// It is known to read as zeroes.
    zero: bool,
}

/// Everything from byte 0 on, without a gap; neighbours differ.
#[derive(Debug, Default, PartialEq, Eq)]
struct Extents(Vec<(u64, Holds)>);

impl Extents {
    /// Adds `length` bytes behind what is there.
    fn push(&mut self, length: u64, holds: Holds) {
        match self.0.last_mut() {
            Some((last, same)) if *same == holds => *last += length,
            _ => self.0.push((length, holds)),
        }
    }

    /// With where each begins.
    fn iter(&self) -> impl Iterator<Item = (u64, u64, Holds)> {
        self.0.iter().scan(0, |at, &(length, holds)| {
            let start = *at;
            *at += length;
            Some((start, length, holds))
        })
    }

    /// One line an extent, under the head that `qemu-img map` has, as far as it fits.
    fn to_text(&self) -> String {
        let mut out = format!("{:<16}{:<16}{:<8}{}\n", "Offset", "Length", "Depth", "Holds");
        for (start, length, Holds { depth, data, zero }) in self.iter() {
            let what = match (data, zero) {
                (true, false) => "data",
                (true, true) => "data, zeroes",
                (false, true) => "zeroes",
                (false, false) => "nothing known",
            };
            let _ = writeln!(out, "{start:<#16x}{length:<#16x}{depth:<8}{what}");
        }
        out
    }

    /// As `qemu-img map --output=json` prints it: a list, one extent a line.
    fn to_json(&self) -> String {
        let lines: Vec<String> = self
            .iter()
            .map(|(start, length, Holds { depth, data, zero })| {
                format!(
                    "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": true, \
                     \"zero\": {zero}, \"data\": {data}}}"
                )
            })
            .collect();
        format!("[{}]\n", lines.join(",\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents() -> Extents {
        let mut extents = Extents::default();
        extents.push(0x1000, Holds { depth: 1, data: true, zero: false });
        extents.push(0x1000, Holds { depth: 1, data: true, zero: false });
        extents.push(0x10_0000_0000, Holds { depth: 0, data: false, zero: true });
        extents
    }

    #[test]
    fn text_has_columns() {
        assert_eq!(
            extents().to_text(),
            "Offset          Length          Depth   Holds\n\
             0x0             0x2000          1       data\n\
             0x2000          0x1000000000    0       zeroes\n"
        );
    }

    #[test]
    fn json_is_a_list_of_what_qemu_img_has_too() {
        let json: serde_json::Value = serde_json::from_str(&extents().to_json()).unwrap();
        assert_eq!(
            json,
            serde_json::json!([
                { "start": 0, "length": 8192, "depth": 1, "present": true, "zero": false, "data": true },
                {
                    "start": 8192, "length": 0x10_0000_0000_u64, "depth": 0, "present": true, "zero": true,
                    "data": false
                },
            ])
        );
    }
}
