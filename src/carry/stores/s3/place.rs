//! Something gets its key, and what somebody else has put there is kept, also what is put there meanwhile.

use std::io::{self, ErrorKind};
use std::path::Path;

use super::S3;
use super::beside::found;
use super::wire::Only;
use crate::carry::entry::Kind;
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

impl S3 {
    /// Puts something there under its key, by what is given as soon as it is sure what is in its place.
    pub(super) fn place<T>(
        &self,
        path: &Path,
        aside: Aside<'_>,
        put: &mut dyn FnMut(&Only) -> io::Result<T>,
    ) -> io::Result<T> {
        let has_conditions = self.has_conditions()?;
        settle(&|| self.find(path), &mut |there| {
            let only = match there {
                None => Only::New,
                Some(found) => {
                    if let Some(target) = aside(found, path)? {
                        self.copy_aside(path, &target, found)?;
                    } else if found.kind == Kind::Directory {
                        self.remove(path, Kind::Directory)?;
                    }
                    match (found.kind, &found.stamp.tag) {
                        (Kind::Directory, _) => Only::New,
                        (_, tag) => tag.clone().map_or(Only::Always, Only::Instead),
                    }
                }
            };
            put(if has_conditions { &only } else { &Only::Always })
        })
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
        settle(&look, &mut |there| {
            if let Some(found) = there {
                if let Some(target) = aside(found, path)? {
                    self.copy_aside(path, &target, found)?;
                }
                self.remove(path, found.kind)?;
            }
            put()
        })
    }

    /// Has what was found at `path` at `target` as well; a directory only there.
    fn copy_aside(&self, path: &Path, target: &Path, found: &Found) -> io::Result<()> {
        if found.kind != Kind::Directory {
            return self.server.copy(&self.key(path)?, &self.key(target)?, found.stamp.tag.as_deref());
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
        copied.into_iter().try_for_each(|key| self.server.remove(key))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::store;
    use super::*;
    use crate::carry::stores::http::tests::{Asked, answering_in_turn};
    use crate::carry::stores::{Properties, Text};

    /// What there is of an object, or of whatever has this name.
    fn object(tag: &str) -> String {
        let body = "<CopyObjectResult><ETag>\"c\"</ETag></CopyObjectResult>";
        let length = body.len();
        format!(
            "HTTP/1.1 200 OK\r\nETag: \"{tag}\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
    }

    fn refusal(status: &str, code: &str) -> String {
        let body = format!("<Error><Code>{code}</Code></Error>");
        let length = body.len();
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
    }

    fn absent() -> String {
        refusal("404 Not Found", "NoSuchKey")
    }

    fn changed() -> String {
        refusal("412 Precondition Failed", "PreconditionFailed")
    }

    /// Neither a file has the name nor a directory.
    fn nothing() -> [String; 3] {
        let body = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
        let length = body.len();
        let listing =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        [absent(), absent(), listing]
    }

    /// A store whose server gives these answers.
    fn answered(answers: &[&[String]]) -> (S3, Asked) {
        let names = &["if-match", "if-none-match", "x-amz-copy-source", "x-amz-copy-source-if-match"];
        let (address, asked) = answering_in_turn(answers.concat(), names);
        (store(address), asked)
    }

    fn changes(asked: &Asked) -> Vec<String> {
        asked.lock().unwrap().iter().filter(|line| line.starts_with(['P', 'D'])).cloned().collect()
    }

    /// Puts a file there, with what is in the way kept under a name that is another one each time.
    fn put(store: &S3, count: &mut u32) -> io::Result<Option<String>> {
        let properties = Properties::default();
        let stamp = store.put(Path::new("x"), &mut Text(b"ours"), &properties, &mut |_, _| {
            *count += 1;
            Ok(Some(format!("c{count}").into()))
        })?;
        Ok(stamp.tag)
    }

    /// What somebody else had changed or removed in the moment before it was copied or replaced was told of as a failure.
    #[test]
    fn who_is_slower_looks_again_at_once() {
        let lost = |code: &str, answers: &[&[String]], expected: &[&str]| {
            let (store, asked) = answered(answers);
            assert_eq!(put(&store, &mut 0).unwrap().as_deref(), Some("new"), "{code}");
            assert_eq!(changes(&asked), expected, "{code}");
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
        );
        lost(
            "It was removed before it was copied",
            &[&[one.clone(), absent()], &nothing(), &[object("new")]],
            &["PUT /bucket/a/c1 /bucket/a/x \"1\"", "PUT /bucket/a/x *"],
        );
        lost(
            "It was removed before it was replaced",
            &[&[one.clone(), object("c"), absent()], &nothing(), &[object("new")]],
            &["PUT /bucket/a/c1 /bucket/a/x \"1\"", "PUT /bucket/a/x \"1\"", "PUT /bucket/a/x *"],
        );
        let (store, asked) = answered(&[&[one, changed(), two, object("c"), object("c"), object("new")]]);
        let aside: Aside<'_> = &mut |_, _| Ok(Some("c".into()));
        store.make_directory(Path::new("x"), &Properties::default(), aside).unwrap();
        assert_eq!(
            changes(&asked),
            [
                "PUT /bucket/a/c /bucket/a/x \"1\"",
                "PUT /bucket/a/c /bucket/a/x \"2\"",
                "DELETE /bucket/a/x",
                "PUT /bucket/a/x/"
            ]
        );
    }

    #[test]
    fn what_is_missing_whoever_is_faster_is_missing() {
        let bucket = refusal("404 Not Found", "NoSuchBucket");
        let (store, _) = answered(&[&nothing(), &[bucket], &nothing()]);
        let error = put(&store, &mut 0).unwrap_err();
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
        let upload = refusal("404 Not Found", "NoSuchUpload");
        let (store, asked) = answered(&[&[object("1"), object("c"), upload, object("1")]]);
        let aside: Aside<'_> = &mut |_, _| Ok(Some("c".into()));
        let placed = store.place(Path::new("x"), aside, &mut |only| {
            store.server.complete("a/x", "id", &["e".to_owned()], only)
        });
        let error = placed.unwrap_err();
        assert!(error.to_string().contains("NoSuchUpload"), "{error}");
        assert_eq!(asked.lock().unwrap().len(), 4);
    }
}
