//! How it ended, for those who wait for it.

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind};

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// How many things are in the spool, and how many bytes; `None` if everything was delivered.
    pub(crate) left: Option<(u64, u64)>,
    /// How many of them are neither there nor in the spool.
    pub(crate) lost: u64,
    /// What the rest is called in the spool; without one it is lost.
    pub(crate) spooled: Option<String>,
    /// Why it was not delivered, or not spooled.
    pub(crate) why: Option<String>,
    /// What people are to be told.
    pub(crate) notes: Vec<String>,
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        json!({ "left": self.left, "lost": self.lost, "spooled": self.spooled, "why": self.why, "notes": self.notes })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        Some(Self {
            left: serde_json::from_value(value["left"].clone()).ok()?,
            lost: value["lost"].as_u64()?,
            spooled: text("spooled"),
            why: text("why"),
            notes: serde_json::from_value(value["notes"].clone()).ok()?,
        })
    }
}

/// That the carrier has ended without a report.
pub(crate) fn died() -> Error {
    Error::new(ErrorKind::Io, "The process that carries files has died")
}
