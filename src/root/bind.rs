//! What is seen of the host in a private root.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A directory or file of the host that is seen in a private root as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is to be seen: a path from the private root's `/`. Made if it is not there.
    pub target: PathBuf,
    /// Whether it can only be read there.
    pub read_only: bool,
}

impl Bind {
    /// One as it is typed: `SRC:DST`, `SRC:DST:ro` or `SRC:DST:rw`. A source that is no absolute path is one from here.
    ///
    /// # Errors
    /// It is none; in words for people.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let wrong = || format!("'{}' does not parse; write SRC:DST or SRC:DST:ro", text.display());
        let fields: Vec<_> = text.as_bytes().split(|&byte| byte == b':').collect();
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let (source, target, read_only) = match fields[..] {
            [source, target] => (source, target, false),
            [source, target, b"ro"] => (source, target, true),
            [source, target, b"rw"] => (source, target, false),
            _ => return Err(wrong()),
        };
        if source.is_empty() || !target.starts_with(b"/") {
            return Err(wrong() + ", DST from the private root's /");
        }
        let source = std::path::absolute(path(source)).map_err(|_| wrong())?;
        Ok(Self { source, target: path(target), read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_those_of_container_tools() {
        let parse = |text: &str| Bind::parse(OsStr::new(text));
        let expected = |read_only| Ok(Bind { source: "/a".into(), target: "/b/c".into(), read_only });
        assert_eq!(parse("/a:/b/c"), expected(false));
        assert_eq!(parse("/a:/b/c:rw"), expected(false));
        assert_eq!(parse("/a:/b/c:ro"), expected(true));
        assert!(parse("x:/b").is_ok_and(|bind| bind.source.is_absolute()));
        for bad in ["", "/a", "/a:", ":/b", "/a:b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
