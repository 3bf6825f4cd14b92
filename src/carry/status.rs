//! How far running carriers are: one file each, locked for as long as the carrier lives.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::entry::escape;
use crate::attach::random_name;
use crate::attach::record::{Directory, Entry};
use crate::error::Result;

/// How often it is written down at the most.
const EVERY: Duration = Duration::from_millis(250);

/// How often a file is read that is written just now.
const WRITTEN_ANEW: u64 = 10;

/// A carrier that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// What it says of itself: `session`, `path`, `destination`, `pid`; `phase` (`running` or `ending`), what waits
    /// (`waiting`, `waiting_bytes`), what was delivered (`delivered`, `delivered_bytes`), `failures` in a row, `retry_in` in
    /// seconds, `last_error`, `failing_since` in seconds since 1970 if nothing has succeeded since then, `events_lost`, and `notes`
    /// for people.
    pub json: Value,
}

/// The carriers that run at this moment.
///
/// # Errors
/// The directory cannot be read; `Denied` for whoever is not root.
pub fn running(directory: &Path) -> Result<Vec<Running>> {
    let directory = Directory::open(directory)?;
    let mut all = Vec::new();
    for entry in directory.entries()? {
        if entry.is_abandoned() {
            directory.remove(entry.id());
            continue;
        }
        // It may be written just now.
        let read = (0..WRITTEN_ANEW).find_map(|attempt| {
            std::thread::sleep(Duration::from_millis(attempt));
            entry.read()
        });
        all.extend(read.map(|json| Running { json }));
    }
    all.sort_by_key(|running| (running.json["session"].to_string(), running.json["path"].to_string()));
    Ok(all)
}

/// This carrier's file, until this is dropped.
pub(crate) struct Status {
    file: Option<(Directory, Entry)>,
    about: Value,
    written: Option<Instant>,
    last: Value,
}

impl Status {
    /// That it cannot be written down does not keep anybody from carrying.
    pub(crate) fn new(directory: &Path, session: &str, place: &Path, destination: &str) -> Self {
        let file = Directory::open(directory).and_then(|directory| {
            let entry = directory.create(&random_name()?)?;
            Ok((directory, entry))
        });
        if let Err(error) = &file {
            tracing::warn!(%error, "Cannot write down how far the files are");
        }
        let about = json!({
            "session": session,
            "path": format!("/{}", escape(place)),
            "destination": destination,
            "pid": std::process::id(),
        });
        Self { file: file.ok(), about, written: None, last: Value::Null }
    }

    /// Writes down how far it is, if that is another state, and not too soon after the last.
    pub(crate) fn set(&mut self, value: Value) {
        if self.last == value || self.written.is_some_and(|written| written.elapsed() < EVERY) {
            return;
        }
        let Some((_, entry)) = &self.file else { return };
        let mut whole = self.about.clone();
        if let (Some(whole), Some(value)) = (whole.as_object_mut(), value.as_object()) {
            whole.extend(value.clone());
        }
        let _ = entry.write_down(&whole);
        self.written = Some(Instant::now());
        self.last = value;
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        if let Some((directory, entry)) = &self.file {
            directory.remove(entry.id());
        }
    }
}
