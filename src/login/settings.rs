//! `/etc/memdev/login.toml`: who gets which private root.
//!
//! Everything in the file is looked at whoever logs in: a mistake anywhere refuses everybody, at once, rather than the one
//! whom it concerns, some day. What is not known is refused, too.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::daemon::MOST_OF_ONE;
use super::person::Person;
use super::{carried, trust};
use crate::attach::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::net::percent_encode;
use crate::root::{Bind, Limits, Network, Run, Swap};
use crate::size;

/// Where the settings are.
pub const FILE: &str = "/etc/memdev/login.toml";

/// What a second login of a user gets while the first is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Second {
    /// A private root of its own.
    #[default]
    Own,
    /// The first one's, which ends with the last that is in it.
    Join,
    /// Nothing: it is refused.
    Refuse,
}

impl fmt::Display for Second {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "own",
            Self::Join => "join",
            Self::Refuse => "refuse",
        })
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Net {
    #[default]
    Host,
    None,
}

/// As [`Swap`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Swapping {
    #[default]
    Avoid,
    Never,
    Allow,
}

/// What one user, the members of one group, or everybody gets. An entry stands for itself: what it does not say is not
/// taken from another.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    name: Option<String>,
    image: Option<PathBuf>,
    session: Option<String>,
    partition: Option<u32>,
    #[serde(default)]
    binds: Vec<String>,
    user: Option<String>,
    #[serde(default)]
    privileged: bool,
    #[serde(default)]
    net: Net,
    hostname: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    memory: Option<String>,
    pids_limit: Option<u64>,
    memory_limit: Option<String>,
    #[serde(default)]
    swap: Swapping,
    #[serde(default)]
    pub(super) second: Second,
    logins: Option<usize>,
    #[serde(default)]
    pub(super) carry: Vec<String>,
    #[serde(default)]
    pub(super) carry_deletes: bool,
    #[serde(default)]
    pub(super) carry_rules: Vec<PathBuf>,
    #[serde(default)]
    pub(super) carry_exclude: Vec<String>,
    #[serde(default)]
    pub(super) carry_include: Vec<String>,
    pub(super) carry_wait: Option<String>,
    pub(super) carry_recipient: Option<String>,
}

/// The settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    default: Option<Entry>,
    #[serde(default)]
    user: Vec<Entry>,
    #[serde(default)]
    group: Vec<Entry>,
}

/// What somebody gets who logs in.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Which entry says so, for people.
    pub because: String,
    /// The private root, without a command.
    pub run: Run,
    /// What a second login gets.
    pub second: Second,
    /// How many logins the user may have at once.
    pub logins: usize,
    /// Whether the entry says who the user is inside.
    pub named_user: bool,
}

impl Settings {
    /// Reads and looks through the settings.
    ///
    /// # Errors
    /// `Denied` if others than root could have written them, `Invalid` with the line if there is a mistake in them, and
    /// what the system says.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |why: String| {
            Error::new(ErrorKind::Invalid, format!("Mistake in {}: {why}", path.display()))
                .advise("see docs/login.md, and try it with 'memdev login --check'")
        };
        Self::parse(&trust::read(path)?).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let line = at.map_or_else(String::new, |line| format!("line {line}: "));
            line + &error.message().replace('\n', " ")
        })?;
        settings.look_through()?;
        Ok(settings)
    }

    fn look_through(&self) -> Result<(), String> {
        let somebody = Person {
            name: "name".into(),
            uid: 1,
            gid: 1,
            home: "/home/name".into(),
            groups: vec!["name".into()],
        };
        let fine = |title: &str, entry: &Entry| {
            entry.grant(&somebody, String::new()).map(drop).map_err(|why| format!("{title}: {why}"))
        };
        if let Some(entry) = &self.default {
            if entry.name.is_some() {
                return Err("[default]: it has no name".to_owned());
            }
            fine("[default]", entry)?;
        }
        for (kind, entries) in [("user", &self.user), ("group", &self.group)] {
            let mut names = Vec::new();
            for entry in entries {
                let Some(name) = entry.name.as_deref().filter(|name| !name.is_empty()) else {
                    return Err(format!("[[{kind}]]: name is missing"));
                };
                if names.contains(&name) {
                    return Err(format!("[[{kind}]]: '{name}' is there twice"));
                }
                names.push(name);
                fine(&format!("[[{kind}]] '{name}'"), entry)?;
            }
        }
        Ok(())
    }

    /// What `person` gets: by the entry of the user, else by the first entry of a group that the user is in, else by the
    /// default.
    ///
    /// # Errors
    /// `Denied` if no entry is for this user.
    pub fn grant(&self, person: &Person) -> Result<Grant> {
        let by_user = self.user.iter().find(|entry| entry.name.as_ref() == Some(&person.name));
        let by_group = || {
            let is_in = |entry: &&Entry| entry.name.as_ref().is_some_and(|name| person.groups.contains(name));
            self.group.iter().find(is_in)
        };
        let found = match (by_user, by_group(), &self.default) {
            (Some(entry), ..) => Some((entry, format!("[[user]] '{}'", person.name))),
            (None, Some(entry), _) => {
                Some((entry, format!("[[group]] '{}'", entry.name.as_deref().unwrap_or_default())))
            }
            (None, None, Some(entry)) => Some((entry, "[default]".to_owned())),
            (None, None, None) => None,
        };
        let (entry, because) = found.ok_or_else(|| {
            Error::new(ErrorKind::Denied, format!("No entry of the settings is for the user {}", person.name))
        })?;
        entry.grant(person, because).map_err(|why| Error::new(ErrorKind::Invalid, why))
    }

    /// Who has an entry, in words for people.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (kind, entries) in [("user", &self.user), ("group", &self.group)] {
            for entry in entries {
                let name = entry.name.as_deref().unwrap_or_default();
                let _ = writeln!(text, "[[{kind}]] '{name}': {}", entry.what());
            }
        }
        let everybody = self.default.as_ref().map_or("refused".to_owned(), Entry::what);
        let _ = writeln!(text, "everybody else: {everybody}");
        text
    }
}

impl Entry {
    fn what(&self) -> String {
        let image = self.image.as_ref().map(|image| format!("a copy of {}", image.display()));
        image.or_else(|| self.session.clone()).unwrap_or_default()
    }

    fn grant(&self, person: &Person, because: String) -> Result<Grant, String> {
        let mut run = Run::new(self.source(person)?);
        run.ordinary = false;
        run.login = true;
        // A user may have made some of what is on the way, in a home directory above all.
        run.binds_by_roots_links = true;
        run.partition = self.partition;
        if self.partition == Some(0) {
            return Err("partition: they are counted from 1".to_owned());
        }
        for text in &self.binds {
            let text = expand("binds", text, person)?;
            if !text.starts_with('/') {
                return Err(format!("binds: '{text}' is no absolute path"));
            }
            run.binds.push(Bind::parse(OsStr::new(&text)).map_err(|why| format!("binds: {why}"))?);
        }
        run.carrying = self.carrying(person)?;
        run.privileged = self.privileged;
        run.network = match self.net {
            Net::Host => Network::Host,
            Net::None => Network::None,
        };
        run.hostname = self.hostname.as_ref().map(|text| expand("hostname", text, person)).transpose()?;
        for (key, value) in &self.env {
            if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
                return Err(format!("env: '{key}' can be no variable"));
            }
            run.env.push((key.into(), value.into()));
        }
        run.memory = self.memory.as_deref().map(|text| bytes("memory", text)).transpose()?;
        run.limits = Limits {
            pids: self.pids_limit,
            memory: self.memory_limit.as_deref().map(|text| bytes("memory_limit", text)).transpose()?,
            swap: match self.swap {
                Swapping::Avoid => Swap::Avoid,
                Swapping::Never => Swap::Never,
                Swapping::Allow => Swap::Allow,
            },
        };
        run.limits.check().map_err(|error| error.to_string())?;
        run.user = Some(match &self.user {
            Some(user) if user.is_empty() => return Err("user: it is empty".to_owned()),
            Some(user) => user.clone(),
            // There a number inside is the same one outside: nobody may become another by an image that names users otherwise.
            None if self.privileged => format!("{}:{}", person.uid, person.gid),
            None => person.name.clone(),
        });
        if self.user.is_none() {
            run.stranger = Some(person.as_stranger());
        }
        let logins = self.logins.unwrap_or(MOST_OF_ONE);
        if !(1..=MOST_OF_ONE).contains(&logins) {
            return Err(format!("logins: {logins} is not from 1 to {MOST_OF_ONE}"));
        }
        Ok(Grant { because, run, second: self.second, logins, named_user: self.user.is_some() })
    }

    fn source(&self, person: &Person) -> Result<Source, String> {
        match (&self.image, &self.session) {
            (Some(path), None) if path.is_absolute() => {
                let name =
                    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
                Ok(Source::Image { name, path: path.clone() })
            }
            (Some(path), None) => Err(format!("image: '{}' is no absolute path", path.display())),
            (None, Some(text)) => {
                let encoded = Person { name: percent_encode(OsStr::new(&person.name)), ..person.clone() };
                let text = expand("session", text, &encoded)?;
                if !Uri::looks_like(&text) {
                    return Err(format!(
                        "session: '{text}' is no URI; write nbd+unix:///NAME@{{user}}?socket=PATH"
                    ));
                }
                Ok(Source::Export(text.parse::<Uri>().map_err(|error| format!("session: {error}"))?))
            }
            (None, None) => Err("image or session is missing".to_owned()),
            (Some(_), Some(_)) => Err("image and session exclude each other".to_owned()),
        }
    }
}

fn bytes(key: &str, text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|why| format!("{key}: {why}"))
}

/// Puts in who it is: `{user}`, `{uid}`, `{gid}`, `{home}`.
pub(super) fn expand(key: &str, text: &str, person: &Person) -> Result<String, String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        result.push_str(before);
        let unknown =
            || format!("{key}: '{text}' has a '{{' that is none of {{user}}, {{uid}}, {{gid}}, {{home}}");
        let (word, after) = after.split_once('}').ok_or_else(unknown)?;
        match word {
            "user" => result.push_str(&person.name),
            "uid" => result.push_str(&person.uid.to_string()),
            "gid" => result.push_str(&person.gid.to_string()),
            "home" => result.push_str(
                person.home.to_str().ok_or_else(|| format!("{key}: the home directory is no text"))?,
            ),
            _ => return Err(unknown()),
        }
        rest = after;
    }
    result.push_str(rest);
    Ok(result)
}

impl Grant {
    /// Looks at what can be seen without doing it: that the image is there and nobody's but root's, and what is to be
    /// bound is there.
    ///
    /// # Errors
    /// The first thing that stands in the way.
    pub fn verify(&self) -> Result<()> {
        if let Source::Image { path, .. } = &self.run.source {
            // The kernel reads it as a file system.
            trust::check(path)?;
        }
        for bind in &self.run.binds {
            std::fs::metadata(&bind.source)
                .map_err(|error| Error::io("Cannot bind", error).on_path(&bind.source))?;
        }
        carried::verify(&self.run.carrying)
    }

    /// Whether a login program can be put into this private root.
    ///
    /// # Errors
    /// `Unsupported` if not, with the reason, and what to do.
    pub fn by_pam(&self) -> Result<()> {
        let limits = self.run.limits;
        let (why, advice) = if self.run.privileged {
            (
                "A login program cannot be put into a private root that is privileged",
                "take 'privileged' out of the entry, or use the login shell",
            )
        } else if limits.pids.or(limits.memory).is_some() || limits.swap == Swap::Never {
            // A program that is killed with its session could not tell how that ended.
            (
                "A login program is not in the control group of a private root, and the entry has limits",
                "take them out of the entry, or use the login shell",
            )
        } else if self.named_user {
            (
                "By PAM a user stays who it is, and the entry says 'user'",
                "take 'user' out of the entry, or use the login shell",
            )
        } else if !self.run.carrying.carries.is_empty() {
            (
                "A login program ends before files are delivered, and could not tell what was not: the entry says 'carry'",
                "take 'carry' out of the entry, or use the login shell",
            )
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Unsupported, why).advise(advice))
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = &self.run;
        let mut line = |key: &str, value: &dyn fmt::Display| writeln!(f, "{key:10} {value}");
        line("entry", &self.because)?;
        match &run.source {
            Source::Image { path, .. } => line("image", &path.display())?,
            Source::Export(uri) => line("session", uri)?,
        }
        if let Some(partition) = run.partition {
            line("partition", &partition)?;
        }
        let user = run.user.as_deref().unwrap_or("root");
        match &run.stranger {
            Some(stranger) if !run.privileged => {
                let (user, group) = (stranger.user, stranger.group);
                line("user", &format_args!("{} of the image, or else {user}:{group}", stranger.name))?;
            }
            _ => line("user", &user)?,
        }
        line("root", &if run.privileged { "the host's user 0 (privileged)" } else { "nobody outside" })?;
        for bind in &run.binds {
            let how = if bind.read_only { " (read-only)" } else { "" };
            line("bind", &format_args!("{} on {}{how}", bind.source.display(), bind.target.display()))?;
        }
        line("net", &if run.network == Network::None { "none" } else { "host" })?;
        if let Some(name) = &run.hostname {
            line("hostname", name)?;
        }
        for (key, value) in &run.env {
            line("env", &format_args!("{}={}", key.display(), value.display()))?;
        }
        if let Some(memory) = run.memory {
            line("memory", &size::human(memory))?;
        }
        line(
            "limits",
            &Some(run.limits.describe()).filter(|text| !text.is_empty()).unwrap_or("none".into()),
        )?;
        let carrying = &run.carrying;
        for carry in &carrying.carries {
            line("carry", &format_args!("{} to {}", carry.path.display(), carry.destination))?;
        }
        if !carrying.carries.is_empty() {
            let removed = if carrying.deletes {
                "what is removed is removed there, too"
            } else {
                "nothing is removed there"
            };
            line("", &format_args!("{removed}; given up after {:?} without a success", carrying.patience))?;
            if let Some(recipient) = &carrying.recipient {
                line("", &format_args!("the spool encrypted to {recipient}"))?;
            }
            for file in &carrying.rules {
                line("", &format_args!("rules of {}", file.display()))?;
            }
            for (what, patterns) in [("without", &carrying.exclude), ("but with", &carrying.include)] {
                if !patterns.is_empty() {
                    line("", &format_args!("{what} {}", patterns.join(" ")))?;
                }
            }
        }
        match self.by_pam() {
            Ok(()) => line("by PAM", &"possible")?,
            Err(error) => line("by PAM", &format_args!("refused: {error}"))?,
        }
        line("logins", &format_args!("{} at once", self.logins))?;
        line("second", &self.second)
    }
}

#[cfg(test)]
mod tests;
