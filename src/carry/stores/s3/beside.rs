//! What is kept beside an object for which S3 has no room: `mode`, `uid`, `gid` and `mtime`, as rclone has them, and ours.

use super::wire::Object;
use crate::carry::entry::{Kind, Meta, Stamp, Time};
use crate::carry::stores::beside::{LINK, NOT_KEPT, read_attributes, unword, word, write_attributes};
use crate::carry::stores::{Attributes, Found, Properties, Session};

/// The longest attributes that are kept, as text and in bytes: servers take 2 KiB for all that is beside an object.
const ATTRIBUTES_MAX: usize = 1_400;

/// What is kept beside an object that no other program has a name for: whose version it is, and its attributes.
const SESSION: &str = "memdev-session";
const ATTRIBUTES: &str = "memdev-attributes";

/// What is kept beside what is put there; of attributes that are too long for that, only that they are not.
pub(super) fn meta(kind: u32, properties: &Properties) -> Vec<(&'static str, String)> {
    let Properties { meta, modified, session, attributes } = properties;
    let mut all = vec![
        ("mode", format!("{:o}", kind | meta.mode)),
        ("uid", meta.uid.to_string()),
        ("gid", meta.gid.to_string()),
        ("mtime", write_time(*modified)),
        (SESSION, format!("{} {}", word(session.id.as_bytes()), word(session.name.as_bytes()))),
    ];
    let attributes = write_attributes(attributes);
    match attributes.len() {
        0 => {}
        1..=ATTRIBUTES_MAX => all.push((ATTRIBUTES, attributes)),
        _ => all.push((ATTRIBUTES, NOT_KEPT.to_owned())),
    }
    all
}

/// An object's attributes; nothing is known of those that were not kept, nor of those of what was not carried there.
pub(super) fn attributes(object: &Object) -> Option<Attributes> {
    match object.value(ATTRIBUTES) {
        Some(text) => read_attributes(text),
        None => object.value(SESSION).map(|_| Attributes::new()),
    }
}

/// As rclone has it: seconds since 1970, with a fraction.
fn write_time(time: Time) -> String {
    format!("{}.{:09}", time.seconds, time.nanoseconds)
}

fn read_time(text: &str) -> Option<Time> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: u32 = format!("{fraction:0<9}")[..9].parse().ok()?;
    Some(Time::new(seconds.parse().ok()?, nanoseconds))
}

/// What an object is.
pub(super) fn found(object: &Object, is_directory: bool) -> Found {
    let value = |name| object.value(name);
    let mode = value("mode").and_then(|text| u32::from_str_radix(text, 8).ok());
    let number = |name| value(name).and_then(|text| text.parse().ok());
    let meta = match (mode, number("uid"), number("gid")) {
        (Some(mode), Some(uid), Some(gid)) => Some(Meta { mode: mode & 0o7777, uid, gid }),
        _ => None,
    };
    let session = value(SESSION).and_then(|text| {
        let (id, name) = text.split_once(' ')?;
        let text = |word| unword(word).and_then(|bytes| String::from_utf8(bytes).ok());
        Some(Session { id: text(id)?, name: text(name)? })
    });
    let kind = match mode.map(|mode| mode & 0o170_000) {
        _ if is_directory => Kind::Directory,
        Some(LINK) => Kind::Link,
        _ => Kind::File,
    };
    let mode = mode.map(|mode| mode & 0o1777);
    if is_directory {
        let stamp = Stamp { size: 0, modified: Time::default(), tag: None };
        return Found { kind, stamp, meta, mode, session: None };
    }
    let modified = value("mtime").and_then(read_time).unwrap_or_else(|| Time::new(object.modified, 0_u32));
    let stamp = Stamp { size: object.size, modified, tag: object.tag.clone() };
    Found { kind, stamp, meta, mode, session }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_were_written() {
        for time in [Time::new(1_000_000_000, 5_u32), Time::new(-1, 999_999_999_u32), Time::default()] {
            assert_eq!(read_time(&write_time(time)), Some(time));
        }
        assert_eq!(read_time("1354040105.123456789"), Some(Time::new(1_354_040_105, 123_456_789_u32)));
        assert_eq!(read_time("7.5"), Some(Time::new(7, 500_000_000_u32)));
        assert_eq!(read_time("7"), Some(Time::new(7, 0_u32)));
        for bad in ["", "x", "1.-5", "1.2.3", "1e9"] {
            assert_eq!(read_time(bad), None, "{bad}");
        }
    }

    /// The image's directory lost its own attributes to those that had not been kept.
    #[test]
    fn attributes_that_are_not_kept_are_not_none() {
        let read = |attributes: Attributes| {
            let properties = Properties { attributes, ..Properties::default() };
            let meta = meta(LINK, &properties).into_iter().map(|(name, text)| (name.to_owned(), text));
            let object = Object { meta: meta.collect(), ..Object::default() };
            super::attributes(&object)
        };
        let of = |length: usize| vec![("user.a".into(), vec![b'x'; length])];
        let most = ATTRIBUTES_MAX - "user.a=".len();
        assert_eq!(read(of(most)), Some(of(most)));
        assert_eq!(read(of(most + 1)), None);
        assert_eq!(read(Vec::new()), Some(Vec::new()));
    }

    #[test]
    fn what_others_have_put_there_is_a_file() {
        let object = Object { size: 7, modified: 9, tag: Some("e".to_owned()), meta: Vec::new() };
        let plain = found(&object, false);
        assert_eq!((plain.kind, plain.meta, plain.mode, plain.session), (Kind::File, None, None, None));
        assert_eq!(attributes(&object), None, "who put it there knows of none");
        assert_eq!(plain.stamp, Stamp { size: 7, modified: Time::new(9, 0_u32), tag: Some("e".to_owned()) });
        let meta = [
            ("mode", "120777"),
            ("uid", "1"),
            ("gid", "2"),
            ("mtime", "3.5"),
            ("memdev-session", "id a%20b"),
        ];
        let meta = meta.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let object = Object { meta, ..object };
        let ours = found(&object, false);
        assert_eq!(attributes(&object), Some(Vec::new()), "it had none");
        assert_eq!((ours.kind, ours.meta), (Kind::Link, Some(Meta { mode: 0o777, uid: 1, gid: 2 })));
        assert_eq!(ours.session, Some(Session { id: "id".to_owned(), name: "a b".to_owned() }));
    }
}
