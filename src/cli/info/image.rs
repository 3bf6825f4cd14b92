//! What an image file is and holds.

use std::fmt::Write as _;
use std::path::Path;

use memdev::base::Image;
use memdev::base::contents::Content;
use memdev::proto::BlockSizes;
use memdev::{Error, Result};
use serde_json::json;

use super::{block_sizes_json, block_sizes_text};
use crate::cli::size::human;

/// What was found out about an image.
struct Report {
    size: u64,
    /// Bytes that the file system has data for; the rest are holes.
    data: u64,
    /// Runs of data.
    runs: u64,
    contents: Vec<Content>,
}

/// A description of the image at `path`, as text or JSON.
///
/// # Errors
/// It is missing, cannot be read, is empty or is nothing that could be served.
pub(super) fn show(path: &Path, json: bool) -> Result<String> {
    let report = examine(path)?;
    Ok(if json { report.to_json(path) } else { report.to_text(path) })
}

fn examine(path: &Path) -> Result<Report> {
    // Opened as the server would open it, so that what is refused here is refused there, in the same words.
    let image = Image::open(path)?;
    let size = image.size();
    let contents = image.contents().map_err(|error| Error::io("Cannot read image", error).on_path(path))?;
    let (data, runs) = image
        .extents()
        .runs(0..size)
        .filter(|run| run.data)
        .fold((0, 0), |(data, runs), run| (data + run.len, runs + 1));
    Ok(Report { size, data, runs, contents })
}

/// What to do about what is no raw disk.
fn advice(content: &Content) -> Option<String> {
    content.advice.map(|advice| format!("it would be served as raw bytes; {advice}"))
}

impl Report {
    fn to_text(&self, path: &Path) -> String {
        let mut out = String::new();
        let holes = self.size - self.data;
        let runs = if self.runs == 1 { "run" } else { "runs" };
        let _ = writeln!(out, "image: {}", path.display());
        let _ = writeln!(out, "    format: raw");
        let _ = writeln!(out, "    size: {} ({})", self.size, human(self.size));
        let _ = writeln!(out, "    data: {} ({}) in {} {runs}", self.data, human(self.data), self.runs);
        let _ = writeln!(out, "    holes: {holes} ({})", human(holes));
        let _ = writeln!(out, "    block sizes: {}", block_sizes_text(BlockSizes::default()));
        if self.contents.is_empty() {
            let _ = writeln!(out, "    holds: nothing known");
        }
        for content in &self.contents {
            let _ = write!(out, "    holds: {}", content.what);
            if let Some(label) = &content.label {
                let _ = write!(out, ", label '{label}'");
            }
            if let Some(uuid) = &content.uuid {
                let _ = write!(out, ", UUID {uuid}");
            }
            out.push('\n');
        }
        for content in &self.contents {
            if let Some(advice) = advice(content) {
                let _ = writeln!(out, "    note: this looks like a {}; {advice}", content.what);
            }
        }
        out
    }

    fn to_json(&self, path: &Path) -> String {
        let contents: Vec<_> = self
            .contents
            .iter()
            .map(|content| {
                json!({
                    "type": content.kind,
                    "description": content.what,
                    "label": content.label,
                    "uuid": content.uuid,
                    "advice": advice(content),
                })
            })
            .collect();
        let report = json!({
            "image": path.to_string_lossy(),
            "format": "raw",
            "size": self.size,
            "data": self.data,
            "holes": self.size - self.data,
            "data-runs": self.runs,
            "block-sizes": block_sizes_json(BlockSizes::default()),
            "contents": contents,
        });
        format!("{report:#}\n")
    }
}
