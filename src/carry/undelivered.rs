//! What of a directory could not be delivered by the end of its session, and what people are told of it.

use std::fmt;

use serde_json::{Value, json};

use super::report::{Report, died};
use crate::size;

/// What of one carried directory was not delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undelivered {
    /// The directory, as it is called inside.
    pub path: String,
    /// Where it was to be delivered.
    pub destination: String,
    /// How many changes, and how many bytes; `None` if nobody knows.
    pub rest: Option<(u64, u64)>,
    /// How many of them are neither there nor in the spool.
    pub lost: u64,
    /// What they are called in the spool; without it all of them are lost.
    pub spooled: Option<String>,
    /// Why they were not delivered.
    pub why: Option<String>,
}

impl Undelivered {
    /// What a report says, if it is not that all is well; `trouble` is why there is none.
    pub(crate) fn of(
        report: Option<Report>,
        path: String,
        destination: String,
        trouble: Option<String>,
    ) -> Option<Self> {
        let (rest, lost, spooled, why) = match report {
            Some(Report { left, lost, spooled, why, .. }) => (Some(left?), lost, spooled, why),
            None => (None, 0, None, Some(trouble.unwrap_or_else(|| died().to_string()))),
        };
        Some(Self { path, destination, rest, lost, spooled, why })
    }

    /// One line for whoever's files they are: nothing of the host in it but what to ask for.
    #[must_use]
    pub fn for_user(&self) -> String {
        let path = &self.path;
        match (self.rest, &self.spooled) {
            (None, _) => format!("What you changed in {path} may be LOST: tell the administrator"),
            (Some((count, _)), None) => {
                format!("{count} changes in {path} were not delivered and are LOST: tell the administrator")
            }
            (Some((count, bytes)), Some(id)) => {
                let lost = match self.lost {
                    0 => String::new(),
                    lost => format!(" but {lost}, which are LOST"),
                };
                let size = size::human(bytes);
                format!(
                    "{count} changes in {path} ({size}) were not delivered, and are not there at your next login; they are \
                     kept{lost}: tell the administrator '{id}'"
                )
            }
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "path": self.path,
            "destination": self.destination,
            "rest": self.rest,
            "lost": self.lost,
            "spooled": self.spooled,
            "why": self.why,
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        Some(Self {
            path: text("path")?,
            destination: text("destination")?,
            rest: serde_json::from_value(value["rest"].clone()).ok()?,
            lost: value["lost"].as_u64()?,
            spooled: text("spooled"),
            why: text("why"),
        })
    }
}

impl fmt::Display for Undelivered {
    /// One line for whoever can do something about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = format_args!("{} to {}", self.path, self.destination);
        let why = self.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        match (self.rest, &self.spooled) {
            (None, _) => {
                let why = self.why.as_deref().unwrap_or_default();
                write!(f, "Changed files may be LOST, carrying {what}: {why}")
            }
            (Some((count, _)), None) => write!(f, "{count} changes of {what} are LOST{why}"),
            (Some((count, bytes)), Some(id)) => {
                write!(f, "{count} changes, {bytes} bytes, were not delivered from {what}{why}; ")?;
                if self.lost > 0 {
                    write!(f, "{} of them cannot be read and are LOST; ", self.lost)?;
                }
                write!(f, "they are in the spool: memdev carry resume {id}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(report: Option<Report>) -> Option<Undelivered> {
        Undelivered::of(report, "/home/joe".to_owned(), "/srv/secret/joe".to_owned(), None)
    }

    #[test]
    fn what_is_delivered_is_not_spoken_of() {
        assert_eq!(of(Some(Report::default())), None);
    }

    #[test]
    fn the_user_is_told_what_is_kept_and_nothing_of_the_host() {
        let why = Some("cannot write to /srv/secret/joe".to_owned());
        let spooled = Some("0123456789ab".to_owned());
        let reports = [
            (
                Some(Report { left: Some((3, 2048)), spooled, why: why.clone(), ..Report::default() }),
                "0123456789ab",
            ),
            (Some(Report { left: Some((3, 2048)), lost: 3, why, ..Report::default() }), "LOST"),
            (None, "may be LOST"),
        ];
        for (report, word) in reports {
            let rest = of(report).unwrap();
            let (user, administrator) = (rest.for_user(), rest.to_string());
            assert!(user.contains(word) && user.contains("/home/joe"), "{user}");
            assert!(!user.contains("secret") && !user.contains('\n'), "{user}");
            assert!(
                administrator.contains(word) && administrator.contains("/srv/secret/joe"),
                "{administrator}"
            );
            assert_eq!(Undelivered::from_json(&rest.to_json()), Some(rest));
        }
    }
}
