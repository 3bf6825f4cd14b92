//! `--tar`: what has changed, as an archive.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;

use memdev::changes::{Changes, Node, Pair, layer};
use memdev::save::Target;
use memdev::{Error, ErrorKind, Result};

use super::report::shown_path;

/// Writes the layer. Says what it cannot hold, and how much of that will be missed.
pub(super) fn write<P: Pair>(pair: &mut P, changes: &Changes<Node<P>>, file: &Path) -> Result<usize> {
    let left_out = if file == Path::new("-") {
        if io::stdout().is_terminal() {
            let error = Error::new(ErrorKind::Invalid, "No archive is written to a terminal");
            return Err(error.advise("give a file, or a pipe"));
        }
        layer::write(pair, changes, BufWriter::new(io::stdout().lock()))?
    } else {
        let target = Target::create(file)?;
        let left_out = layer::write(pair, changes, BufWriter::new(target.stream()))?;
        target.finish()?;
        left_out
    };
    for left in &left_out {
        // With stderr closed there is nobody to tell; the status still says it.
        let _ = writeln!(io::stderr(), "memdev: Left out {}: {}", shown_path(&left.path), left.why);
    }
    Ok(left_out.iter().filter(|left| !left.harmless).count())
}
