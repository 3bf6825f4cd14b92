//! What is in the spool is delivered after all.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::{encrypted, find, lock};
use crate::carry::delivery::{Delivery, Notes};
use crate::carry::entry::{Kind, Stamp, Version, escape, is_inner, unescape};
use crate::carry::known::Known;
use crate::carry::stores::{self, Content, Properties, Session, Stored};
use crate::carry::together::together;
use crate::error::{Error, ErrorKind, Result};

/// Delivers what is called so, or the one thing whose name begins so, and forgets it. `progress` is told how many of how many things
/// are done. What is encrypted takes the file of an identity of age. What people are to be told is returned: conflicts, and what
/// the destination cannot hold.
///
/// # Errors
/// `NotFound` if there is none; `Denied` if it is encrypted, and there is no identity; whatever stands in the way of the next thing: those before it are delivered, and are not
/// delivered again the next time.
pub fn resume(
    spool: &Path,
    id: &str,
    identity: Option<&Path>,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Vec<String>> {
    let one = find(spool, id)?;
    let identity = match (&one.recipient, identity) {
        (None, _) => None,
        (Some(_), Some(identity)) => Some(identity),
        (Some(recipient), None) => {
            let why = format!("Cannot read {}: it is encrypted to {recipient}", one.id);
            return Err(
                Error::new(ErrorKind::Denied, why).advise("give the file of its key: --identity FILE")
            );
        }
    };
    let directory = spool.join(&one.id);
    let _lock = lock(&directory)?;
    let failed = |error: io::Error| Error::io("Cannot read from the spool", error).on(&one.id);
    let read = |name: &str| -> Result<Value> {
        let text = fs::read(directory.join(name)).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|error| failed(error.into()))
    };
    let about = read("about.json")?;
    let session = Session {
        id: about["session_id"].as_str().unwrap_or_default().to_owned(),
        name: one.session.clone(),
    };
    // Nothing is taken inside any more, so it does not matter who that would be.
    let person = (about["of_user"] == true).then_some((0, 0));
    let store = stores::open(&one.destination, &session.id[..session.id.len().min(12)], true, person)?;
    let notes = Notes::default();
    let delivery = Delivery { store: &*store, session: &session, notes: &notes };
    let done_path = directory.join("done");
    let done = fs::read_to_string(&done_path).unwrap_or_default();
    // A line that was begun and not ended is none.
    let done: BTreeSet<usize> =
        done.lines().filter_map(|line| line.strip_suffix(';')?.parse().ok()).collect();
    let done_file = File::options().append(true).create(true).mode(0o600).open(&done_path).map_err(failed)?;
    let making = Mutex::new(());
    let progress = Mutex::new(Progress { done: 0, tell: progress });
    let one_more = |number: usize, entry: &Value, content: Option<&mut dyn Content>| {
        if !done.contains(&number) {
            let path = entry["path"].as_str().and_then(unescape).filter(|path| is_inner(path));
            let path = path.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
            deliver(&delivery, &path, entry, content, &making).map_err(|error| {
                let error =
                    Error::io(format!("Cannot deliver {} to", escape(&path)), error).on(&one.destination);
                error.advise("what is not delivered stays in the spool: try again later")
            })?;
            // Whatever was begun before it, this is a line of its own.
            let line = format!("\n{number};");
            (&done_file).write_all(line.as_bytes()).and_then(|()| done_file.sync_data()).map_err(failed)?;
        }
        progress.lock().unwrap_or_else(PoisonError::into_inner).one_more(one.entries);
        Ok(())
    };
    if let Some(identity) = identity {
        encrypted::read(&directory, identity, one.entries, &mut { one_more })?;
    } else {
        let from_data = |(number, entry): (usize, &Value)| {
            let data = directory.join("data").join(number.to_string());
            let mut content = match is_file(entry) && !done.contains(&number) {
                true => Some(File::open(&data).and_then(Stored::new).map_err(failed)?),
                false => None,
            };
            one_more(number, entry, content.as_mut().map(|content| content as &mut dyn Content))?;
            let _ = fs::remove_file(&data);
            Ok::<_, Error>(Vec::new())
        };
        let entries = read("entries.json")?;
        let entries: Vec<_> = entries.as_array().into_iter().flatten().enumerate().collect();
        // Files need not wait for each other; all else is done in its order.
        for some in entries.chunk_by(|one, next| is_file(one.1) && is_file(next.1)) {
            let first_is_last = some.iter().rev().copied().collect();
            together(store.at_once(), first_is_last, from_data)?;
        }
    }
    fs::remove_dir_all(&directory).map_err(failed)?;
    for lack in store.lacks() {
        notes.add(format!("{} holds no {lack}", one.destination));
    }
    Ok(notes.all())
}

/// How far it is.
struct Progress<'a> {
    done: u64,
    tell: &'a mut (dyn FnMut(u64, u64) + Send),
}

impl Progress<'_> {
    fn one_more(&mut self, all: u64) {
        self.done += 1;
        (self.tell)(self.done, all);
    }
}

/// Whether the entry has a content.
pub(super) fn is_file(entry: &Value) -> bool {
    Version::from_json(&entry["version"]).is_some_and(|version| version.kind == Kind::File)
}

fn deliver(
    delivery: &Delivery<'_>,
    path: &Path,
    entry: &Value,
    content: Option<&mut dyn Content>,
    making: &Mutex<()>,
) -> io::Result<()> {
    let known = Known::from_json(&entry["known"]);
    let Some(version) = Version::from_json(&entry["version"]) else {
        return known.map_or(Ok(()), |known| delivery.remove(path, &known));
    };
    let attribute = |value: &Value| {
        let bytes = |value: &Value| serde_json::from_value::<Vec<u8>>(value.clone()).ok();
        Some((OsString::from_vec(bytes(&value[0])?), bytes(&value[1])?))
    };
    let attributes = entry["attributes"].as_array().into_iter().flatten().filter_map(attribute).collect();
    let properties = Properties {
        meta: version.meta.clone(),
        modified: version.modified,
        attributes,
        session: delivery.session.clone(),
    };
    let is_missing = |path: &Path| -> io::Result<bool> {
        Ok(delivery.store.find(path)?.is_none_or(|found| found.kind != Kind::Directory))
    };
    // What a directory was like that it is in came before it, if it was new; else it is there.
    for above in path
        .ancestors()
        .skip(1)
        .filter(|above| !above.as_os_str().is_empty())
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        if !is_missing(above)? {
            continue;
        }
        // Of several that are missing it, one makes it.
        let _making = making.lock().unwrap_or_else(PoisonError::into_inner);
        if is_missing(above)? {
            let mut made = properties.clone();
            made.meta.mode = 0o755;
            made.attributes.clear();
            delivery.directory(above, &made, None)?;
        }
    }
    let _: Stamp = match version.kind {
        Kind::Directory => delivery.directory(path, &properties, known.as_ref())?,
        Kind::Link => {
            let target = entry["target"].as_str().and_then(unescape).ok_or(io::ErrorKind::InvalidData)?;
            delivery.link(path, target.as_os_str(), &properties, known.as_ref())?
        }
        _ => {
            let content = content.ok_or(io::ErrorKind::InvalidData)?;
            delivery.file(path, content, &properties, known.as_ref())?.0
        }
    };
    Ok(())
}
