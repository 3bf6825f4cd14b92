//! What an export name asks for: `NAME`, `NAME@ID`, or `NAME@ID?`.

use std::fmt;

/// The name of a session among those of one image: 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Box<str>);

impl SessionId {
    /// Most characters.
    pub const MAX: usize = 64;

    /// An id, if `text` can be one.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        ((1..=Self::MAX).contains(&text.len()) && text.chars().all(allowed)).then(|| Self(text.into()))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a client asks for by an export name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// A session of its own on the image of this name; the empty name means the first image.
    Fresh(&'a str),
    /// The session of this name, shared with whoever else may name it.
    Named(&'a str, SessionId),
    /// The same, if it is there already: for who only wants to look, and must not make what nobody else has made.
    Existing(&'a str, SessionId),
    /// Behind the `@` is something that no session can be called.
    BadId(&'a str),
}

impl<'a> Request<'a> {
    /// Takes an export name apart. Image names have no `@`.
    #[must_use]
    pub fn parse(export_name: &'a str) -> Self {
        match export_name.split_once('@') {
            None => Self::Fresh(export_name),
            Some((image, id)) => match (SessionId::new(id), id.strip_suffix('?').and_then(SessionId::new)) {
                (Some(id), _) => Self::Named(image, id),
                (None, Some(id)) => Self::Existing(image, id),
                (None, None) => Self::BadId(id),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_at_the_first_at_sign() {
        assert_eq!(Request::parse(""), Request::Fresh(""));
        assert_eq!(Request::parse("root"), Request::Fresh("root"));
        assert_eq!(Request::parse("root@a.B_3-"), Request::Named("root", SessionId::new("a.B_3-").unwrap()));
        assert_eq!(Request::parse("@x"), Request::Named("", SessionId::new("x").unwrap()));
        assert_eq!(Request::parse("root@x?"), Request::Existing("root", SessionId::new("x").unwrap()));
        let long = "x".repeat(65);
        for bad in ["", "?", "a??", "?a", "a@b", "a/b", "a b", "ä", &long] {
            assert_eq!(Request::parse(&format!("root@{bad}")), Request::BadId(bad));
        }
        assert!(SessionId::new(&long[1..]).is_some());
    }
}
