//! What is left in a directory, and what somebody else has left there.

use super::*;
use crate::carry::stores::tests::Asking;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};

struct Text<'a>(&'a [u8], u64);

impl Read for Text<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Content for Text<'_> {
    fn size(&self) -> u64 {
        self.1
    }
}

fn put(store: &Directory, path: &str, text: &str, aside: Aside<'_>) -> io::Result<Stamp> {
    let meta = Meta { mode: 0o4751, uid: 0, gid: 0 };
    let modified = Time { seconds: 1_000_000_000, nanoseconds: 123_456_789 };
    let attributes = vec![("user.note".into(), b"x".to_vec())];
    let properties = Properties { meta, modified, attributes, session: session() };
    store.put(Path::new(path), &mut Text(text.as_bytes(), text.len() as u64), &properties, aside)
}

fn session() -> Session {
    Session { id: "1".to_owned(), name: "one".to_owned() }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_is_there_with_what_belongs_to_it_and_no_rights() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    let stamp = put(&store, "x", "hello", &mut Asking(|_, _| panic!("nothing is there"))).unwrap();
    let path = dir.path().join("x");
    assert_eq!(fs::read_to_string(&path).unwrap(), "hello");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o751, "no set-id bits");
    let found = store.find(Path::new("x")).unwrap().unwrap();
    assert_eq!(found.stamp, stamp);
    if store.has_attributes {
        assert_eq!(found.meta, Some(Meta { mode: 0o4751, uid: 0, gid: 0 }));
        assert_eq!(found.session, Some(session()));
        fs::write(&path, "edited").unwrap();
        assert_eq!(store.find(Path::new("x")).unwrap().unwrap().session, None);
        let attributes = store.attributes(Path::new("x")).unwrap();
        assert_eq!(attributes, Some(vec![("user.note".into(), b"x".to_vec())]));
    }
    let less = Directory { has_attributes: false, ..store };
    assert_eq!(less.attributes(Path::new("x")).unwrap(), None);
    assert_eq!(names(dir.path()), ["x"]);
}

#[test]
fn what_is_somebody_elses_is_moved_aside_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    fs::write(dir.path().join("x"), "theirs").unwrap();
    put(&store, "x", "ours", &mut Asking(|_, _| Ok(Some("x.conflict".into())))).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("x")).unwrap(), "ours");
    assert_eq!(fs::read_to_string(dir.path().join("x.conflict")).unwrap(), "theirs");
    // Somebody puts one there after it was looked at.
    let mut first = true;
    let mut asking = Asking(|_, at| {
        if std::mem::take(&mut first) {
            fs::write(dir.path().join("late"), "late").unwrap();
            fs::rename(dir.path().join("late"), dir.path().join("x")).unwrap();
            return Ok(None);
        }
        assert_eq!(fs::read_to_string(dir.path().join(at)).unwrap(), "late");
        Ok(Some("x.conflict-2".into()))
    });
    put(&store, "x", "ours again", &mut asking).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("x")).unwrap(), "ours again");
    assert_eq!(fs::read_to_string(dir.path().join("x.conflict-2")).unwrap(), "late");
    assert_eq!(names(dir.path()), ["x", "x.conflict", "x.conflict-2"]);
}

/// It had the temporary name already, and was removed with what had failed.
#[test]
fn what_is_somebody_elses_stays_where_it_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    fs::write(dir.path().join("x"), "known").unwrap();
    let mut first = true;
    let mut asking = Asking(|_, _| {
        if std::mem::take(&mut first) {
            fs::write(dir.path().join("late"), "late").unwrap();
            fs::rename(dir.path().join("late"), dir.path().join("x")).unwrap();
            return Ok(None);
        }
        Err(io::ErrorKind::TimedOut.into())
    });
    put(&store, "x", "ours", &mut asking).unwrap_err();
    assert_eq!(fs::read_to_string(dir.path().join("x")).unwrap(), "late");
    assert_eq!(names(dir.path()), ["x"]);
}

#[test]
fn a_torn_content_leaves_nothing() {
    struct Torn;
    impl Read for Torn {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ResourceBusy.into())
        }
    }
    impl Content for Torn {
        fn size(&self) -> u64 {
            10
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    let properties = Properties::default();
    let asking = &mut Asking(|_, _| Ok(None));
    assert!(store.put(Path::new("x"), &mut Torn, &properties, asking).is_err());
    assert!(store.put(Path::new("x"), &mut Text(b"short", 10), &properties, asking).is_err());
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn links_at_the_destination_lead_nowhere() {
    let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Directory::open(dir.path(), "t", None).unwrap();
    fs::write(outside.path().join("x"), "untouched").unwrap();
    symlink(outside.path(), dir.path().join("d")).unwrap();
    let asking = &mut Asking(|_, _| Ok(None));
    assert!(put(&store, "d/x", "bad", asking).is_err());
    symlink(outside.path().join("x"), dir.path().join("l")).unwrap();
    put(&store, "l", "fine", asking).unwrap();
    assert_eq!(fs::read_to_string(outside.path().join("x")).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(dir.path().join("l")).unwrap(), "fine");
    // A directory takes the place of the link.
    store.make_directory(Path::new("d"), &Properties::default(), asking).unwrap();
    put(&store, "d/x", "in", asking).unwrap();
    assert_eq!(names(outside.path()), ["x"]);
    assert!(store.remove(Path::new("../x"), Kind::File).is_err());
}

/// A directory that has a temporary name has been exchanged for a file by a carrier that was killed before it could be kept beside.
/// Nothing could be removed of it, and so nobody could log in any more from a day later on.
#[test]
fn a_directory_that_was_abandoned_is_kept_where_it_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(".memdev-carry-t-0-1")).unwrap();
    fs::write(dir.path().join(".memdev-carry-t-0-1/theirs"), "x").unwrap();
    fs::create_dir(dir.path().join(".memdev-carry-t-0-2")).unwrap();
    fs::write(dir.path().join(".memdev-carry-t-0-3"), "torn").unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    store.sweep(Path::new("")).unwrap();
    let names = names(dir.path());
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(names[0].starts_with("found.conflict-other-20"), "{names:?}");
    assert_eq!(fs::read_to_string(dir.path().join(&names[0]).join("theirs")).unwrap(), "x");
}

/// The attributes that a directory had once, and has no more, came back with the next fill.
#[test]
fn a_directory_may_lose_its_attributes() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = Directory::open(dir.path(), "t", None).unwrap();
    assert!(store.has_attributes, "this test takes a file system with attributes on /var/tmp");
    let make = |names: &[&str]| {
        let attributes = names.iter().map(|name| (name.into(), b"x".to_vec())).collect();
        let properties = Properties { attributes, session: session(), ..Properties::default() };
        store.make_directory(Path::new("d"), &properties, &mut Asking(|_, _| Ok(None))).unwrap();
        let attributes = store.attributes(Path::new("d")).unwrap().unwrap_or_default();
        let mut names: Vec<_> = attributes.into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert!(store.inside(Path::new("d"), Kind::Directory).is_some());
        names
    };
    assert_eq!(make(&["user.a", "user.b"]), ["user.a", "user.b"]);
    assert_eq!(make(&["user.b", "user.c"]), ["user.b", "user.c"]);
    assert_eq!(make(&[]), [""; 0]);
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let file = fs::File::create(&from).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"middle", 1 << 30).unwrap();
    let tree = crate::carry::tree::Tree::new(fs::File::open(dir.path()).unwrap().into(), "".into());
    let mut source = tree.read(Path::new("from"), true).unwrap();
    copy(&mut source, &fs::File::create(&to).unwrap()).unwrap();
    let mut middle = [0; 6];
    fs::File::open(&to).unwrap().read_exact_at(&mut middle, 1 << 30).unwrap();
    assert_eq!((&middle, to.metadata().unwrap().len()), (b"middle", 1 << 40));
    use std::os::unix::fs::MetadataExt;
    assert!(to.metadata().unwrap().blocks() < 1000);
}
