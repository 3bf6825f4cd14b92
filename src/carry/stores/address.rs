//! Where a server is, as URLs say it.

use std::os::unix::ffi::OsStringExt;

use crate::carry::entry::unescape;

/// Where a server is, and what on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::carry::stores) struct Address {
    pub(in crate::carry::stores) user: Option<String>,
    pub(in crate::carry::stores) host: String,
    pub(in crate::carry::stores) port: Option<u16>,
    /// From the server's root, with a slash before it.
    pub(in crate::carry::stores) path: Vec<u8>,
}

impl Address {
    /// Reads what follows a scheme: `[USER@]HOST[:PORT]/PATH`, with `%XX` for what is no part of a plain name.
    pub(in crate::carry::stores) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.contains(['?', '#']) {
            return Err("it has a '?' or '#'; write %3F or %23 for such in a name");
        }
        let (place, path) = text.split_once('/').ok_or("it has no path")?;
        let (user, place) = match place.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, place),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err("a password in it would be seen by everybody");
        }
        let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, rest)) => {
                (host, if rest.is_empty() { None } else { rest.strip_prefix(':').or(Some("")) })
            }
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let port = port.map(|port| port.parse().ok().filter(|port| *port != 0).ok_or("its port is no port"));
        let text = |text: &str| {
            let whole = unescape(text).and_then(|text| text.into_os_string().into_string().ok());
            // What begins so would be an option of a program's.
            whole
                .filter(|text| !text.is_empty() && !text.starts_with('-') && !text.contains(char::is_control))
        };
        let host = text(host).ok_or("it has no host")?;
        let user = user.map(|user| text(user).ok_or("its user is no user")).transpose()?;
        let path = unescape(path).ok_or("it has a bad % escape")?.into_os_string().into_vec();
        if path.contains(&0) {
            return Err("its path has a NUL");
        }
        let path = [b"/", &path[..]].concat();
        Ok(Self { user, host, port: port.transpose()?, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parse = |text: &str| Address::parse(text);
        let plain = parse("joe@host:2222/srv/a%20b").unwrap();
        assert_eq!((plain.user.as_deref(), &*plain.host, plain.port), (Some("joe"), "host", Some(2222)));
        assert_eq!(plain.path, b"/srv/a b");
        assert_eq!(parse("host/").unwrap().path, b"/");
        assert_eq!(parse("[::1]:22/x").unwrap().host, "::1");
        assert_eq!(parse("[fe80::1]/x").unwrap().port, None);
        for bad in [
            "host",
            "/x",
            "joe:secret@host/x",
            "-oProxyCommand=x/x",
            "%2DoProxyCommand=x/x",
            "-l@host/x",
            "host:0/x",
            "host:ssh/x",
            "[::1]x/x",
            "host/%0",
            "host/a%00b",
            "host/x?y",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
