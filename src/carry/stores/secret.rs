//! Where people keep what servers are to know them by: variables of the environment, and files.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::plain;

/// The longest file that is read, in bytes.
const LENGTH_MAX: u64 = 1 << 20;

/// A variable that is set to something.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The file that a variable names, or else the one in the home directory.
pub(super) fn place(name: &str, at_home: &str) -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of(name).or_else(|| of("HOME").map(|home| home.join(at_home)))
}

/// The text of a file; `None` if it is not there.
///
/// # Errors
/// What the system says; `InvalidData` if others may use it and `is_private`.
pub(super) fn read(path: &Path, is_private: bool) -> io::Result<Option<Zeroizing<String>>> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {}", path.display(), plain(&error)));
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(named)?,
    };
    if is_private && file.metadata().map_err(named)?.mode() & 0o077 != 0 {
        let why = format!("{} is open to others: chmod 600", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(LENGTH_MAX).read_to_string(&mut text).map_err(named)?;
    Ok(Some(text))
}
