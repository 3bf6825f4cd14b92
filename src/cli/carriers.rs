//! Who carries files out of private roots, for the commands that show sessions.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memdev::net::Uri;
use memdev::{Error, ErrorKind, Result, carry, root};
use serde::Serialize;
use serde_json::{Value, json};

use super::carry::directories;
use super::control::{age, shown};
use super::size::human;

/// Those that run on this machine.
pub(super) struct Carriers(Vec<Carrier>);

struct Carrier {
    told: Value,
    /// The named session that its private root is on.
    uri: Option<Uri>,
}

impl Carriers {
    /// Whoever may not look sees none. `state` is where things are written down, if not where they usually are.
    pub(super) fn running(state: Option<&Path>) -> Self {
        let roots = state.map_or_else(|| root::directory(root::DIRECTORY), |state| state.join("root"));
        let roots = root::sessions(&roots).unwrap_or_default();
        let all = carry::running(&directories(state).1).unwrap_or_default().into_iter().map(|running| {
            let told = running.json;
            let source = roots.iter().find(|root| told["session"] == root.name).map(|root| &root.source);
            Carrier { uri: source.and_then(|source| source.parse().ok()), told }
        });
        Self(all.collect())
    }

    /// What those of this private root tell.
    pub(super) fn of_root(&self, name: &str) -> Vec<&Value> {
        let all = self.0.iter().map(|carrier| &carrier.told);
        all.filter(|told| told["session"] == name).collect()
    }

    /// What those of the private root tell that is on a server's session, which is had at any of these.
    pub(super) fn of_session(&self, uris: &[String]) -> Vec<&Value> {
        let uris: Vec<Uri> = uris.iter().filter_map(|uri| uri.parse().ok()).collect();
        let is_there =
            |uri: &Uri| uris.iter().any(|own| own.address == uri.address && own.export == uri.export);
        let all = self.0.iter().filter(|carrier| carrier.uri.as_ref().is_some_and(is_there));
        all.map(|carrier| &carrier.told).collect()
    }
}

/// A server's session as JSON, with the carriers of the private root that is on it as `carry`.
///
/// # Errors
/// It cannot be written as JSON.
pub(super) fn with_carriers(session: &impl Serialize, uris: &[String], carriers: &Carriers) -> Result<Value> {
    let failed = |error| Error::new(ErrorKind::Io, format!("Cannot write JSON: {error}"));
    let mut value = serde_json::to_value(session).map_err(failed)?;
    value["carry"] = json!(carriers.of_session(uris));
    Ok(value)
}

/// What one tells, in a line and, if something fails, another.
pub(super) fn append(out: &mut String, told: &Value, begin: &str) {
    let text = |key: &str| shown(told[key].as_str().unwrap_or_default());
    let number = |key: &str| told[key].as_u64().unwrap_or(0);
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "{begin}{} to {}: {} waiting ({}), {} delivered ({})",
        text("path"),
        text("destination"),
        number("waiting"),
        human(number("waiting_bytes")),
        number("delivered"),
        human(number("delivered_bytes")),
    );
    if told["last_error"].is_string() {
        let _ = write!(out, "    failed: {}", text("last_error"));
        if let Some(since) = told["failing_since"].as_u64() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            #[allow(clippy::cast_precision_loss, reason = "seconds for people")]
            let _ = write!(out, "; for {}", age((now - since as f64).max(0.0)));
        }
        if let Some(time) = told["retry_in"].as_u64() {
            let _ = write!(out, "; again in {time} s");
        }
        out.push('\n');
    }
}
