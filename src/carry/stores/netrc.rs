//! Passwords from `~/.netrc`, as curl and ftp take them from there.

use std::io;

use zeroize::Zeroizing;

use super::secret;

/// Whom a server is to know.
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: Zeroizing<String>,
}

/// What the file says of a host, and of the user there if one is wanted: that of the variable `NETRC`, or else `~/.netrc`.
/// `None` if there is no such file, or nothing of the host in it.
///
/// # Errors
/// What the system says; `InvalidData` if others may read it.
pub(super) fn login(host: &str, user: Option<&str>) -> io::Result<Option<Login>> {
    let Some(path) = secret::place("NETRC", ".netrc") else { return Ok(None) };
    let text = secret::read(&path, true)?;
    Ok(text.and_then(|text| find(&text, host, user)))
}

/// The first entry for this host, and this user if one is wanted; one that is for every host if there is none.
fn find(text: &str, host: &str, user: Option<&str>) -> Option<Login> {
    let mut words = Words(text);
    let mut fits = false;
    let (mut name, mut password) = (None, None);
    loop {
        let word = words.next();
        let word = word.as_deref().map(String::as_str);
        if matches!(word, None | Some("machine" | "default")) {
            if let (true, Some(password)) = (fits, password.take()) {
                let name: Option<Zeroizing<String>> = name.take();
                let is_wanted = user.is_none_or(|user| name.as_ref().is_none_or(|name| **name == user));
                let user = user.map(str::to_owned).or_else(|| name.map(|name| name.to_string()));
                if let (true, Some(user)) = (is_wanted, user) {
                    return Some(Login { user, password });
                }
            }
            (name, password) = (None, None);
        }
        match word? {
            "machine" => fits = words.next()?.eq_ignore_ascii_case(host),
            "default" => fits = true,
            "login" => name = words.next(),
            "password" => password = words.next(),
            "account" => drop(words.next()),
            // Up to an empty line.
            "macdef" => words.0 = words.0.split_once("\n\n").map_or("", |(_, rest)| rest),
            // A word that this does not know, or a comment.
            other if other.starts_with('#') => {
                words.0 = words.0.split_once('\n').map_or("", |(_, rest)| rest)
            }
            _ => {}
        }
    }
}

/// Words between spaces; one in quotes may have some, and has `\` before what is meant as it is.
struct Words<'a>(&'a str);

impl Iterator for Words<'_> {
    type Item = Zeroizing<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0 = self.0.trim_start();
        let Some(rest) = self.0.strip_prefix('"') else {
            let end = self.0.find(char::is_whitespace).unwrap_or(self.0.len());
            let (word, rest) = self.0.split_at(end);
            self.0 = rest;
            return (!word.is_empty()).then(|| Zeroizing::new(word.to_owned()));
        };
        let mut word = Zeroizing::new(String::with_capacity(rest.len()));
        let mut all = rest.char_indices();
        while let Some((at, c)) = all.next() {
            match c {
                '"' => {
                    self.0 = &rest[at + 1..];
                    return Some(word);
                }
                '\\' => word.extend(all.next().map(|(_, c)| c)),
                c => word.push(c),
            }
        }
        // It has no end.
        self.0 = "";
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found() {
        let text = "# who\nmachine files.example login joe password secret\nmachine files.example\n\tlogin ann\n\tpassword \"a \\\"b\\\\\"\n\
                    machine other.example password nobodys\nmacdef init\nmachine x login y password z\n\n\
                    machine UPPER.example login u account a password #hash\ndefault login anonymous password guest";
        let of = |host: &str, user: Option<&str>| {
            find(text, host, user).map(|login| format!("{} {}", login.user, *login.password))
        };
        let known = |host: &str, user: Option<&str>| of(host, user).unwrap_or_default();
        assert_eq!(known("files.example", None), "joe secret");
        assert_eq!(known("files.example", Some("ann")), "ann a \"b\\");
        assert_eq!(known("files.example", Some("anonymous")), "anonymous guest");
        assert_eq!(of("files.example", Some("eve")), None);
        assert_eq!(known("other.example", Some("eve")), "eve nobodys");
        assert_eq!(known("upper.example", None), "u #hash");
        assert_eq!(known("x", None), "anonymous guest", "a macro is no entry");
        assert_eq!(known("other.example", None), "anonymous guest", "a password without a user is nobody's");
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        for text in [
            "",
            "machine",
            "machine h login",
            "machine h login u password",
            "machine h login u password \"x",
            "\"",
            "macdef",
        ] {
            assert!(find(text, "h", None).is_none(), "{text}");
        }
    }
}
