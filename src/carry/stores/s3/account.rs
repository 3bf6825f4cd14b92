//! Where the server is and who asks, by the variables and the file that every program for S3 knows.

use std::io;

use zeroize::Zeroizing;

use crate::carry::entry::{is_inner, unescape};
use crate::carry::stores::secret::{self, variable};

/// A server, and an account there.
pub(super) struct Account {
    /// `https://HOST[:PORT]` or `http://HOST[:PORT]`; `None` if it is Amazon's own server.
    pub(super) endpoint: Option<String>,
    pub(super) region: String,
    pub(super) keys: Keys,
}

/// The account's keys.
pub(super) struct Keys {
    pub(super) key_id: String,
    pub(super) secret: Zeroizing<String>,
    pub(super) token: Option<Zeroizing<String>>,
}

impl Account {
    /// What the environment says.
    ///
    /// # Errors
    /// It names no keys, or a region that is none.
    pub(super) fn of_environment() -> io::Result<Self> {
        let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
        let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
        let is_word = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let region = region.unwrap_or_else(|| "us-east-1".to_owned());
        if !is_word(&region) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "AWS_REGION is no region"));
        }
        let keys = match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            (Some(key_id), Some(secret)) => {
                let token = variable("AWS_SESSION_TOKEN").map(Zeroizing::new);
                Keys { key_id, secret: Zeroizing::new(secret), token }
            }
            _ => of_file()?,
        };
        Ok(Self { endpoint: endpoint.map(|text| text.trim_end_matches('/').to_owned()), region, keys })
    }
}

/// `BUCKET[/PREFIX]`: the prefix with a slash at its end, if it is one.
pub(super) fn parse(rest: &str) -> Result<(String, String), &'static str> {
    if rest.contains(['?', '#', '@']) {
        return Err("it has a '?', '#' or '@'; write %3F, %23 or %40 for such in a prefix");
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let is_bucket = bucket.len() >= 3
        && bucket.len() <= 63
        && bucket
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte))
        && !bucket.contains("..")
        && !bucket.starts_with(['.', '-']);
    if !is_bucket {
        return Err("its bucket is none");
    }
    let prefix = unescape(prefix.trim_end_matches('/')).ok_or("it has a bad % escape")?;
    if prefix.as_os_str().is_empty() {
        return Ok((bucket.to_owned(), String::new()));
    }
    let text =
        prefix.to_str().filter(|text| !text.contains(char::is_control)).ok_or("its prefix is no text")?;
    if !is_inner(&prefix) || text.contains("//") {
        return Err("its prefix has '.', '..' or an empty name");
    }
    Ok((bucket.to_owned(), format!("{text}/")))
}

/// What the shared file of credentials says of the profile.
fn of_file() -> io::Result<Keys> {
    let path = secret::place("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
    let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
    let none = || {
        let why = "there are no keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or have them in ~/.aws/credentials";
        io::Error::new(io::ErrorKind::NotFound, why)
    };
    let path = path.ok_or_else(none)?;
    let text = secret::read(&path, false)?.ok_or_else(none)?;
    find(&text, &profile).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("{} has no keys of '{profile}'", path.display()))
    })
}

/// The keys of a profile: what is below `[PROFILE]`.
fn find(text: &str, profile: &str) -> Option<Keys> {
    let (mut key_id, mut secret, mut token) = (None, None, None);
    let mut is_wanted = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            is_wanted = name.trim() == profile;
        } else if let (true, Some((name, value))) = (is_wanted, line.split_once('=')) {
            let value = value.trim().to_owned();
            match name.trim() {
                "aws_access_key_id" => key_id = Some(value),
                "aws_secret_access_key" => secret = Some(Zeroizing::new(value)),
                "aws_session_token" => token = Some(Zeroizing::new(value)),
                _ => {}
            }
        }
    }
    Some(Keys { key_id: key_id?, secret: secret?, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let of = |text: &str| parse(text).ok();
        let pair = |bucket: &str, prefix: &str| Some((bucket.to_owned(), prefix.to_owned()));
        assert_eq!(of("bucket"), pair("bucket", ""));
        assert_eq!(of("my.bucket-1/"), pair("my.bucket-1", ""));
        assert_eq!(of("bucket/a/b%20c/"), pair("bucket", "a/b c/"));
        for bad in [
            "",
            "/x",
            "Bucket",
            "..a",
            "-ab",
            "b",
            "a@b/c",
            "bucket/../x",
            "bucket/a//b",
            "bucket/%00",
            "bucket//a",
            "bucket/%z",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_found_by_profile() {
        let text = "# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=s/=\n\n[other]\naws_session_token = t\n\
                    aws_secret_access_key = o\naws_access_key_id = B\nregion = x\n[half]\naws_access_key_id = C\n";
        let of = |profile: &str| {
            let keys = find(text, profile)?;
            Some((keys.key_id, keys.secret.to_string(), keys.token.map(|token| token.to_string())))
        };
        assert_eq!(of("default"), Some(("A".to_owned(), "s/=".to_owned(), None)));
        assert_eq!(of("other"), Some(("B".to_owned(), "o".to_owned(), Some("t".to_owned()))));
        assert_eq!(of("half"), None);
        assert_eq!(of("none"), None);
    }
}
