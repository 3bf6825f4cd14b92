//! Something gets its key, and what somebody else has put there is kept, also what is put there meanwhile.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::S3;
use super::beside::found;
use super::wire::Only;
use crate::carry::entry::{Kind, Stamp};
use crate::carry::stores::{ATTEMPTS, Aside, Found, Store, contended, if_there};

/// Tells what has the name.
type Look<'a> = &'a dyn Fn() -> io::Result<Option<Found>>;

/// Does what is to be done, given what has the name.
type Act<'a, T> = &'a mut dyn FnMut(Option<&Found>) -> io::Result<T>;

/// Has something done with what has a name, again and again while others are faster.
fn settle<T>(look: Look<'_>, act: Act<'_, T>) -> io::Result<T> {
    let mut there = look()?;
    for _ in 0..ATTEMPTS {
        let error = match act(there.as_ref()) {
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => error,
            result => return result,
        };
        let now = look()?;
        let is_same = match (&there, &now) {
            (Some(one), Some(other)) => (one.kind, &one.stamp) == (other.kind, &other.stamp),
            (one, other) => one.is_none() && other.is_none(),
        };
        // Nobody was faster: something else is not there, such as the bucket, or what has been sent in parts.
        if is_same && error.kind() == ErrorKind::NotFound {
            return Err(error);
        }
        there = now;
    }
    Err(contended())
}

/// What is kept beside of versions in the way until they are replaced: what fails after that is tried again, and is not to keep them
/// once more under another name each time.
#[derive(Default)]
pub(super) struct Kept(Mutex<HashMap<PathBuf, (Kind, Stamp, PathBuf)>>);

impl Kept {
    /// Where to what was found is moved, if an attempt before this one has begun with that.
    fn target(&self, path: &Path, found: &Found) -> Option<PathBuf> {
        let is_known = found.kind == Kind::Directory || found.stamp.tag.is_some();
        let kept = self.lock();
        let (kind, stamp, target) = kept.get(path).filter(|_| is_known)?;
        ((*kind, stamp) == (found.kind, &found.stamp)).then(|| target.clone())
    }

    fn note(&self, path: &Path, found: &Found, target: &Path) {
        self.lock().insert(path.to_owned(), (found.kind, found.stamp.clone(), target.to_owned()));
    }

    fn forget(&self, path: &Path) {
        self.lock().remove(path);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, (Kind, Stamp, PathBuf)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl S3 {
    /// Puts something there under its key, by what is given as soon as it is sure what is in its place.
    pub(super) fn place<T>(
        &self,
        path: &Path,
        aside: Aside<'_>,
        put: &mut dyn FnMut(&Only) -> io::Result<T>,
    ) -> io::Result<T> {
        let has_conditions = self.has_conditions()?;
        let placed = settle(&|| self.find(path), &mut |there| {
            let only = match there {
                None => Only::New,
                Some(found) => {
                    if !self.keep(path, found, aside)? && found.kind == Kind::Directory {
                        self.remove(path, Kind::Directory)?;
                    }
                    match (found.kind, &found.stamp.tag) {
                        (Kind::Directory, _) => Only::New,
                        (_, tag) => tag.clone().map_or(Only::Always, Only::Instead),
                    }
                }
            };
            put(if has_conditions { &only } else { &Only::Always })
        })?;
        self.kept.forget(path);
        Ok(placed)
    }

    /// Puts a directory's own object there, by what is given, as soon as no file has its name.
    pub(super) fn place_directory<T>(
        &self,
        path: &Path,
        aside: Aside<'_>,
        put: &mut dyn FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let key = self.key(path)?;
        let look = || Ok(if_there(self.server.head(&key))?.map(|object| found(&object, false)));
        let placed = settle(&look, &mut |there| {
            if let Some(found) = there {
                self.keep(path, found, aside)?;
                self.remove(path, found.kind)?;
            }
            put()
        })?;
        self.kept.forget(path);
        Ok(placed)
    }

    /// Has what was found kept beside, if it is not to be lost. Whether it is.
    fn keep(&self, path: &Path, found: &Found, aside: Aside<'_>) -> io::Result<bool> {
        if let Some(target) = self.kept.target(path, found) {
            // Somebody may have removed it since, while they had this one.
            let is_there =
                found.kind != Kind::Directory && if_there(self.server.head(&self.key(&target)?))?.is_some();
            if is_there {
                aside.kept(&target);
            } else {
                self.copy_aside(path, &target, found, aside)?;
            }
            return Ok(true);
        }
        let Some(target) = aside.aside(found, path)? else { return Ok(false) };
        // Before, as the server may have it although nobody hears of that.
        self.kept.note(path, found, &target);
        self.copy_aside(path, &target, found, aside)?;
        Ok(true)
    }

    /// Has what was found at `path` at `target` as well; a directory only there.
    fn copy_aside(&self, path: &Path, target: &Path, found: &Found, aside: Aside<'_>) -> io::Result<()> {
        if found.kind != Kind::Directory {
            self.server.copy(&self.key(path)?, &self.key(target)?, found.stamp.tag.as_deref())?;
            aside.kept(target);
            return Ok(());
        }
        let (from, to) = (self.within(path)?, self.within(target)?);
        let mut keys = Vec::new();
        self.pages(&from, false, &mut |page| {
            keys.extend(page.keys);
            Ok(())
        })?;
        let mut copied = Vec::new();
        for key in &keys {
            // What somebody has removed meanwhile needs no other place.
            if if_there(self.server.copy(key, &format!("{to}{}", &key[from.len()..]), None))?.is_some() {
                copied.push(key);
            }
        }
        if !copied.is_empty() {
            aside.kept(target);
            // Before, as the server may have removed it although nobody hears of that: what gets this name from now on is something
            // new, and not to be copied over this.
            self.kept.forget(path);
        }
        copied.into_iter().try_for_each(|key| self.server.remove(key))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::store;
    use super::*;
    use crate::carry::stores::http::tests::{Asked, answering_in_turn, header, success};
    use crate::carry::stores::{InTheWay, Properties, Text};

    /// What there is of an object, or of whatever has this name.
    fn object(tag: &str) -> String {
        let body = "<CopyObjectResult><ETag>\"c\"</ETag></CopyObjectResult>";
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nETag: \"{tag}\"\r\nContent-Length: {length}\r\n\r\n{body}")
    }

    fn refusal(status: &str, code: &str) -> String {
        let body = format!("<Error><Code>{code}</Code></Error>");
        success(&body).replacen("200 OK", status, 1)
    }

    fn absent() -> String {
        refusal("404 Not Found", "NoSuchKey")
    }

    fn changed() -> String {
        refusal("412 Precondition Failed", "PreconditionFailed")
    }

    fn listing(keys: &[&str]) -> String {
        let keys: String = keys.iter().map(|key| format!("<Contents><Key>{key}</Key></Contents>")).collect();
        success(&format!("<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"))
    }

    /// Neither a file has the name nor a directory.
    fn nothing() -> [String; 3] {
        [absent(), absent(), listing(&[])]
    }

    /// A store whose server gives these answers.
    fn answered(answers: &[&[String]]) -> (S3, Asked) {
        let (address, asked) = answering_in_turn(answers.concat(), |head, _| {
            let names = ["if-match", "if-none-match", "x-amz-copy-source", "x-amz-copy-source-if-match"];
            names.iter().filter_map(|name| header(head, name)).map(|value| format!(" {value}")).collect()
        });
        (store(address), asked)
    }

    fn changes(asked: &Asked) -> Vec<String> {
        asked.lock().unwrap().iter().filter(|line| line.starts_with(['P', 'D'])).cloned().collect()
    }

    /// Has what is in the way kept under a name that is another one each time.
    #[derive(Default)]
    struct Another {
        count: u32,
        kept: Vec<String>,
    }

    impl InTheWay for Another {
        fn aside(&mut self, _found: &Found, _at: &Path) -> io::Result<Option<PathBuf>> {
            self.count += 1;
            Ok(Some(format!("c{}", self.count).into()))
        }

        fn kept(&mut self, target: &Path) {
            self.kept.push(target.to_str().unwrap().to_owned());
        }
    }

    /// Puts a file there.
    fn put(store: &S3, aside: &mut Another) -> io::Result<Option<String>> {
        let stamp = store.put(Path::new("x"), &mut Text(b"ours"), &Properties::default(), aside)?;
        Ok(stamp.tag)
    }

    /// What somebody else had changed or removed in the moment before it was copied or replaced was told of as a failure; and copies
    /// were told of that had not been made.
    #[test]
    fn who_is_slower_looks_again_at_once() {
        let lost = |code: &str, answers: &[&[String]], expected: &[&str], kept: &[&str]| {
            let (store, asked) = answered(answers);
            let mut aside = Another::default();
            assert_eq!(put(&store, &mut aside).unwrap().as_deref(), Some("new"), "{code}");
            assert_eq!(changes(&asked), expected, "{code}");
            assert_eq!(aside.kept, kept, "{code}");
        };
        let (one, two) = (object("1"), object("2"));
        lost(
            "It was changed before it was copied",
            &[&[one.clone(), changed(), two.clone(), object("c"), object("new")]],
            &[
                "PUT /bucket/a/c1 /bucket/a/x \"1\"",
                "PUT /bucket/a/c2 /bucket/a/x \"2\"",
                "PUT /bucket/a/x \"2\"",
            ],
            &["c2"],
        );
        lost(
            "It was removed before it was copied",
            &[&[one.clone(), absent()], &nothing(), &[object("new")]],
            &["PUT /bucket/a/c1 /bucket/a/x \"1\"", "PUT /bucket/a/x *"],
            &[],
        );
        lost(
            "It was removed before it was replaced",
            &[&[one.clone(), object("c"), absent()], &nothing(), &[object("new")]],
            &["PUT /bucket/a/c1 /bucket/a/x \"1\"", "PUT /bucket/a/x \"1\"", "PUT /bucket/a/x *"],
            &["c1"],
        );
        let (store, asked) = answered(&[&[one, changed(), two, object("c"), object("c"), object("new")]]);
        let mut aside = Another::default();
        store.make_directory(Path::new("x"), &Properties::default(), &mut aside).unwrap();
        assert_eq!(
            changes(&asked),
            [
                "PUT /bucket/a/c1 /bucket/a/x \"1\"",
                "PUT /bucket/a/c2 /bucket/a/x \"2\"",
                "DELETE /bucket/a/x",
                "PUT /bucket/a/x/"
            ]
        );
        assert_eq!(aside.kept, ["c2"]);
    }

    /// What failed after a version had been copied aside copied it once more at every attempt.
    #[test]
    fn what_is_in_the_way_is_kept_once() {
        let (one, new, full) = (object("1"), object("new"), refusal("507 Full", "QuotaExceeded"));
        let (store, asked) = answered(&[
            &[one.clone(), full.clone()],
            &[one.clone(), absent(), object("c"), full.clone()],
            &[one.clone(), object("c"), full.clone()],
            &[object("2"), object("c"), full.clone()],
            &[object("2"), object("c"), new.clone()],
            &[object("2"), object("c"), new],
        ]);
        let mut aside = Another::default();
        for (n, kept, expected) in [
            (1, &[][..], &["PUT /bucket/a/c1 /bucket/a/x \"1\""][..]),
            // The server had failed to copy it.
            (1, &["c1"], &["PUT /bucket/a/c1 /bucket/a/x \"1\"", "PUT /bucket/a/x \"1\""]),
            // Who has not heard of it, since the answer was lost, is told now.
            (1, &["c1"], &["PUT /bucket/a/x \"1\""]),
            // Another version.
            (2, &["c2"], &["PUT /bucket/a/c2 /bucket/a/x \"2\"", "PUT /bucket/a/x \"2\""]),
            (2, &["c2"], &["PUT /bucket/a/x \"2\""]),
            // The same once more, after it was replaced.
            (3, &["c3"], &["PUT /bucket/a/c3 /bucket/a/x \"2\"", "PUT /bucket/a/x \"2\""]),
        ] {
            let _ = put(&store, &mut aside);
            assert_eq!(
                (aside.count, changes(&asked)),
                (n, expected.iter().map(|line| (*line).to_owned()).collect())
            );
            assert_eq!(std::mem::take(&mut aside.kept), kept);
            asked.lock().unwrap().clear();
        }
        // A directory takes the place of a file that cannot be removed.
        let (store, asked) = answered(&[
            &[one.clone(), object("c"), full.clone()],
            &[one, object("c")],
            &[object("d"), object("d")],
        ]);
        let mut make = || store.make_directory(Path::new("x"), &Properties::default(), &mut aside);
        assert!(make().is_err());
        make().unwrap();
        assert_eq!(aside.kept, ["c4", "c4"]);
        let expected = [
            "PUT /bucket/a/c4 /bucket/a/x \"1\"",
            "DELETE /bucket/a/x",
            "DELETE /bucket/a/x",
            "PUT /bucket/a/x/",
        ];
        assert_eq!(changes(&asked), expected);
    }

    /// The same of a directory, of which a part may be kept already.
    #[test]
    fn a_directory_in_the_way_is_kept_in_one_place() {
        let full = refusal("507 Full", "QuotaExceeded");
        let (ok, all) = (object("c"), listing(&["a/x/1", "a/x/2"]));
        let (store, asked) = answered(&[
            &[absent(), ok.clone(), all.clone(), ok.clone(), full.clone()],
            // Somebody removes one.
            &[absent(), ok.clone(), all, ok.clone(), absent(), ok.clone(), full.clone()],
            &nothing(),
            &[object("new")],
        ]);
        let mut aside = Another::default();
        for (kept, expected) in [
            (&[][..], &["PUT /bucket/a/c1/1 /bucket/a/x/1", "PUT /bucket/a/c1/2 /bucket/a/x/2"][..]),
            (
                &["c1"],
                &[
                    "PUT /bucket/a/c1/1 /bucket/a/x/1",
                    "PUT /bucket/a/c1/2 /bucket/a/x/2",
                    "DELETE /bucket/a/x/1",
                    "PUT /bucket/a/x *",
                ],
            ),
            (&[], &["PUT /bucket/a/x *"]),
        ] {
            let _ = put(&store, &mut aside);
            assert_eq!(
                (aside.count, &*changes(&asked)),
                (1, &*expected.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>())
            );
            assert_eq!(std::mem::take(&mut aside.kept), kept);
            asked.lock().unwrap().clear();
        }
    }

    /// Where nobody had heard that it was removed, the next directory of that name was copied over the one that was kept.
    #[test]
    fn a_directory_is_not_kept_over_another_one() {
        let (ok, one) = (object("c"), listing(&["a/x/1"]));
        let (store, asked) = answered(&[
            &[absent(), ok.clone(), one.clone(), ok.clone(), refusal("500 Lost", "InternalError")],
            &[absent(), ok.clone(), one, ok.clone(), ok],
            &[object("new")],
        ]);
        let mut aside = Another::default();
        put(&store, &mut aside).unwrap_err();
        put(&store, &mut aside).unwrap();
        let expected = [
            "PUT /bucket/a/c1/1 /bucket/a/x/1",
            "DELETE /bucket/a/x/1",
            "PUT /bucket/a/c2/1 /bucket/a/x/1",
            "DELETE /bucket/a/x/1",
            "PUT /bucket/a/x *",
        ];
        assert_eq!(changes(&asked), expected);
        assert_eq!(aside.kept, ["c1", "c2"]);
    }

    #[test]
    fn what_is_missing_whoever_is_faster_is_missing() {
        let bucket = refusal("404 Not Found", "NoSuchBucket");
        let (store, _) = answered(&[&nothing(), &[bucket], &nothing()]);
        let error = put(&store, &mut Another::default()).unwrap_err();
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
        let upload = refusal("404 Not Found", "NoSuchUpload");
        let (store, asked) = answered(&[&[object("1"), object("c"), upload, object("1")]]);
        let placed = store.place(Path::new("x"), &mut Another::default(), &mut |only| {
            store.server.complete("a/x", "id", &["e".to_owned()], only)
        });
        let error = placed.unwrap_err();
        assert!(error.to_string().contains("NoSuchUpload"), "{error}");
        assert_eq!(asked.lock().unwrap().len(), 4);
    }
}
