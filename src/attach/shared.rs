//! One disk behind several devices of this machine. That is allowed, for file systems that are made for it and for who only
//! looks; any other file system breaks when it is mounted twice, and nobody hears of it before it has.

use super::record::{Directory, Record};
use crate::net::{Address, Uri};

/// A warning, in a line for people, if others than the attachment `id` are of the same session as `record`, and they and it
/// can be written to.
///
/// To be called when `record` is written down: so of two that attach at the same time one at least sees the other.
pub(super) fn warning(directory: &Directory, id: &str, record: &Record) -> Option<String> {
    if record.read_only {
        return None;
    }
    let own: Uri = record.source.parse().ok()?;
    let is_other =
        |other: &Record| !other.read_only && other.source.parse::<Uri>().is_ok_and(|uri| is_same(&own, &uri));
    let mut others: Vec<_> = directory
        .entries()
        .ok()?
        .iter()
        .filter(|entry| entry.id() != id && !entry.is_abandoned())
        .filter_map(|entry| entry.record().filter(&is_other))
        .map(|other| match other.root {
            Some(root) => format!("the private root {root}"),
            None => format!("/dev/{}", other.device),
        })
        .collect();
    if others.is_empty() {
        return None;
    }
    others.sort();
    // Only memdev's sessions have forks.
    let fork = match name(&own) {
        name if name.contains('@') => format!(", or a fork of the session ('memdev fork {name}')"),
        _ => String::new(),
    };
    Some(format!(
        "{own} has {} already, and a file system that more than one of them writes to breaks; attach the others with \
         --read-only{fork}",
        others.join(", ")
    ))
}

/// What the session is called: `NAME@ID?` is the session NAME@ID, if it is there.
fn name(uri: &Uri) -> &str {
    uri.export.strip_suffix('?').unwrap_or(&uri.export)
}

/// Whether two URIs lead to the same session.
fn is_same(a: &Uri, b: &Uri) -> bool {
    name(a) == name(b) && is_same_place(&a.address, &b.address)
}

fn is_same_place(a: &Address, b: &Address) -> bool {
    let real = |path: &std::path::Path| path.canonicalize().ok();
    match (a, b) {
        (Address::Unix(a), Address::Unix(b)) => a == b || real(a).is_some_and(|path| Some(path) == real(b)),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::super::random_name;
    use super::super::record::Entry;
    use super::*;

    const SESSION: &str = "nbd+unix:///root@m?socket=/no/such/sock";

    fn record(source: &str, device: &str, read_only: bool, root: Option<&str>) -> Record {
        Record {
            device: device.into(),
            backend: "fuse".into(),
            source: source.into(),
            export: String::new(),
            size: 512,
            read_only,
            connections: 1,
            pid: 0,
            root: root.map(str::to_owned),
        }
    }

    #[test]
    fn others_of_the_same_session_are_named_if_both_can_be_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let write = |record: &Record| -> Entry {
            let entry = directory.create(&random_name().unwrap()).unwrap();
            entry.write(record).unwrap();
            entry
        };
        let own = record(SESSION, "loop9", false, None);
        let entry = write(&own);
        let warning = |own: &Record| warning(&directory, entry.id(), own);
        assert_eq!(warning(&own), None, "its own is none");
        let strangers =
            ["/srv/root.img", "nbd+unix:///root@n?socket=/no/such/sock", "nbd://localhost/root@m"];
        let mut kept: Vec<_> = strangers.map(|source| write(&record(source, "loop1", false, None))).into();
        kept.push(write(&record(SESSION, "loop2", true, None)));
        // Whose daemon has died serves nobody any more.
        drop(write(&record(SESSION, "loop3", false, None)));
        assert_eq!(warning(&own), None);
        kept.push(write(&record("nbd+unix:///root@m%3F?socket=/no/such/sock", "loop4", false, None)));
        kept.push(write(&record(SESSION, "loop5", false, Some("kiosk"))));
        assert_eq!(
            warning(&own).unwrap(),
            "nbd+unix:///root@m?socket=/no/such/sock has /dev/loop4, the private root kiosk already, and a file system that \
             more than one of them writes to breaks; attach the others with --read-only, or a fork of the session \
             ('memdev fork root@m')"
        );
        assert_eq!(warning(&Record { read_only: true, ..own }), None, "it only looks");
    }
}
