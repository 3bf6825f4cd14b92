//! How a file was inside, and whose it is: what the protocol has no room for is kept beside, in a property.

use super::multistatus::Resource;
use crate::carry::entry::{Kind, Meta, Stamp, Time};
use crate::carry::stores::beside::{LINK, unword, word};
use crate::carry::stores::{Found, Properties, Session};

/// The version of what has none: a directory is the same one whatever is in it.
pub(super) const NO_VERSION: &str = "-";

/// By what a version is known on the server: its own name for it, or else when it was made.
pub(super) fn version(resource: &Resource) -> Option<String> {
    resource.tag.clone().or_else(|| resource.modified.map(|seconds| format!("at {seconds}")))
}

pub(super) fn stamp(resource: &Resource, inside: Option<&Inside>) -> Stamp {
    if resource.is_directory {
        return Stamp { size: 0, modified: Time::default(), tag: None };
    }
    let theirs = Time::new(resource.modified.unwrap_or(0), 0_u32);
    let modified = inside.map_or(theirs, |inside| inside.modified);
    Stamp { size: resource.size.unwrap_or(0), modified, tag: resource.tag.clone() }
}

pub(super) fn found(resource: &Resource) -> Found {
    let inside = resource.inside.as_deref().and_then(Inside::parse);
    // What somebody else has made of it since has neither this time nor this session.
    let valid = inside.as_ref().filter(|inside| Some(&inside.version) == version(resource).as_ref());
    let kind = match valid {
        _ if resource.is_directory => Kind::Directory,
        Some(inside) if inside.mode & 0o170_000 == LINK => Kind::Link,
        _ => Kind::File,
    };
    let meta =
        inside.as_ref().map(|inside| Meta { mode: inside.mode & 0o7777, uid: inside.uid, gid: inside.gid });
    let session = valid.map(|inside| inside.session.clone());
    Found { kind, stamp: stamp(resource, valid), meta, mode: None, session }
}

/// How a file was inside, and whose it is: `MODE UID GID SECONDS NANOSECONDS ID NAME VERSION`, the mode with its kind and in
/// octal, then the time of its content, the session's id and name, and the server's name for the version of which all of this is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inside {
    mode: u32,
    uid: u32,
    gid: u32,
    modified: Time,
    session: Session,
    version: String,
}

impl Inside {
    pub(super) fn new(properties: &Properties, kind: u32, version: String) -> Self {
        let Properties { meta, modified, session, .. } = properties;
        let session = session.clone();
        Self { mode: kind | meta.mode, uid: meta.uid, gid: meta.gid, modified: *modified, session, version }
    }

    pub(super) fn write(&self) -> String {
        let Self { mode, uid, gid, modified: Time { seconds, nanoseconds }, session, version } = self;
        let Session { id, name } = session;
        let name = word(name.as_bytes());
        format!("{mode:o} {uid} {gid} {seconds} {nanoseconds} {id} {name} {version}")
    }

    fn parse(text: &str) -> Option<Self> {
        let [mode, uid, gid, seconds, nanoseconds, id, name, version] =
            text.splitn(8, ' ').collect::<Vec<_>>()[..]
        else {
            return None;
        };
        let nanoseconds: u32 = nanoseconds.parse().ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000)?;
        let name = String::from_utf8(unword(name)?).ok()?;
        Some(Self {
            mode: u32::from_str_radix(mode, 8).ok()?,
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            modified: Time::new(seconds.parse().ok()?, nanoseconds),
            session: Session { id: id.to_owned(), name },
            version: version.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carry::stores::beside::FILE;

    fn inside() -> Inside {
        Inside {
            mode: FILE | 0o4755,
            uid: 1,
            gid: 2,
            modified: Time::new(-3, 4_u32),
            session: Session { id: "id".to_owned(), name: "a name".to_owned() },
            version: "7-6 5".to_owned(),
        }
    }

    #[test]
    fn what_is_kept_beside_is_read_as_it_was_written() {
        let text = inside().write();
        assert_eq!(text, "104755 1 2 -3 4 id a%20name 7-6 5");
        assert_eq!(Inside::parse(&text), Some(inside()));
        for bad in
            ["", "x & y", "9 0 0 0 0 id name v", "644 0 0 0 1000000000 id name v", "644 0 0 0 0 id name"]
        {
            assert_eq!(Inside::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_others_edit_is_not_ours() {
        let text = inside().write();
        let resource = Resource {
            size: Some(7),
            modified: Some(9),
            tag: Some("7-6 5".to_owned()),
            ..Resource::default()
        };
        let ours = found(&Resource { inside: Some(text.clone()), ..resource.clone() });
        assert_eq!((ours.kind, ours.stamp.modified), (Kind::File, Time::new(-3, 4_u32)));
        assert_eq!(ours.session, Some(inside().session));
        let theirs = found(&Resource { inside: Some(text), tag: Some("7-7".to_owned()), ..resource.clone() });
        assert_eq!((theirs.kind, theirs.stamp.modified), (Kind::File, Time::new(9, 0_u32)));
        assert_eq!(theirs.session, None);
        assert_eq!(theirs.meta.unwrap().mode, 0o4755);
        let link = Inside { mode: LINK | 0o777, ..inside() }.write();
        assert_eq!(found(&Resource { inside: Some(link.clone()), ..resource.clone() }).kind, Kind::Link);
        let edited = Resource { inside: Some(link), tag: None, ..resource };
        assert_eq!(found(&edited).kind, Kind::File, "it has text now");
    }
}
