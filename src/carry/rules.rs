//! What is carried and what is not, as gitignore has it: the last pattern that fits decides, `!` before it takes back, and
//! what is below a directory that is left out is left out.

use std::path::{Path, PathBuf};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::stores;
use crate::error::{Error, ErrorKind, Result};

/// The rules of one session.
#[derive(Debug)]
pub(crate) struct Rules(Gitignore);

impl Rules {
    /// Those in `files`, in their order, then those of the command line: what is left out, then what is not after all.
    ///
    /// # Errors
    /// `Invalid` if a pattern cannot be understood; a file that cannot be read.
    pub(crate) fn new(files: &[PathBuf], exclude: &[String], include: &[String]) -> Result<Self> {
        let mut builder = GitignoreBuilder::new("");
        for file in files {
            let text = std::fs::read_to_string(file)
                .map_err(|error| Error::io("Cannot read the rules in", error).on_path(file))?;
            for line in text.lines() {
                builder.add_line(None, line).map_err(|error| wrong(line, &error))?;
            }
        }
        for pattern in exclude {
            builder.add_line(None, pattern).map_err(|error| wrong(pattern, &error))?;
        }
        for pattern in include {
            builder.add_line(None, &format!("!{pattern}")).map_err(|error| wrong(pattern, &error))?;
        }
        builder.build().map(Self).map_err(|error| wrong("the rules", &error))
    }

    /// Whether what is at this path, from the carried directory, is carried.
    pub(crate) fn takes(&self, path: &Path, is_directory: bool) -> bool {
        let temporary = path.file_name().is_some_and(stores::is_temporary);
        !temporary && !self.0.matched_path_or_any_parents(path, is_directory).is_ignore()
    }
}

fn wrong(pattern: &str, error: &ignore::Error) -> Error {
    Error::new(ErrorKind::Invalid, format!("Cannot understand the pattern '{pattern}': {error}"))
        .advise("write it as in a .gitignore")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_fits_decides() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules");
        std::fs::write(&file, "# noise\n.cache/\n*.o\n").unwrap();
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let rules = Rules::new(&[file], &texts(&["/build"]), &texts(&["keep.o"])).unwrap();
        let takes = |path: &str, is_directory| rules.takes(Path::new(path), is_directory);
        assert!(takes("a/b.c", false));
        assert!(!takes("a/b.o", false));
        assert!(takes("a/keep.o", false));
        assert!(!takes(".cache", true));
        assert!(!takes("x/.cache/deep/file", false));
        assert!(takes("x/.cache", false), "only directories are called so there");
        assert!(!takes("build/x", false));
        assert!(takes("src/build/x", false));
        assert!(!takes("a/.memdev-carry-1-2", false));
        assert!(Rules::new(&[], &texts(&["a{b"]), &[]).is_err());
        assert!(Rules::new(&["/no/such".into()], &[], &[]).is_err());
    }
}
