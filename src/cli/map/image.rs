//! The map of an image file: its holes are those that the server sees.

use std::path::Path;

use memdev::Result;
use memdev::base::Image;

use super::{Extents, Holds};

/// What the image at `path` holds: one layer.
///
/// # Errors
/// It is missing, cannot be read, is empty or is nothing that could be served.
pub(super) fn extents(path: &Path) -> Result<Extents> {
    let image = Image::open(path)?;
    let mut extents = Extents::default();
    for run in image.extents().runs(0..image.size()) {
        extents.push(run.len, Holds { depth: 0, data: run.data, zero: !run.data });
    }
    Ok(extents)
}
