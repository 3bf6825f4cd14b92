//! Images, as the control API has them: which files they are, and have been; and another file for one.

use super::Subject;
use super::http::Response;
use super::model::{ImageDetail, ImageFile, Images, NewImage};
use super::routes::base;
use crate::base::{Image, Source};
use crate::error::{Error, ErrorKind, Result};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(super) fn list(subject: &Subject) -> Response {
    let images = details(subject, subject.registry.sources().iter());
    Response::json(200, &Images { images })
}

pub(super) fn show(subject: &Subject, name: &str) -> Result<Response> {
    let mut details = details(subject, std::iter::once(subject.registry.image(name)?));
    Ok(Response::json(200, &details.remove(0)))
}

/// Offers another file from now on: what was opened by whoever asks, or what this server can open by itself.
pub(super) fn set(
    subject: &Subject,
    name: &str,
    wanted: &NewImage,
    mut files: Vec<OwnedFd>,
) -> Result<Response> {
    let invalid = |why| Error::new(ErrorKind::Invalid, why);
    let path = wanted.path.as_ref().filter(|path| path.is_absolute());
    let path = path.ok_or_else(|| invalid("The body must say the absolute 'path' of the file"))?;
    if files.len() > 1 {
        return Err(invalid("One descriptor comes with a file, and not several"));
    }
    let file = files.pop().map(File::from);
    let advise = file.is_none();
    subject.registry.replace_image(name, path, file).map_err(|error| match error.kind() {
        ErrorKind::Denied if advise => error.advise(
            "a confined server opens what lies beneath the directories that images were in at start; \
             'memdev image set' opens any file for it",
        ),
        _ => error,
    })?;
    show(subject, name)
}

fn details<'a>(subject: &Subject, sources: impl Iterator<Item = &'a Source>) -> Vec<ImageDetail> {
    let mut sessions: HashMap<*const Image, u64> = HashMap::new();
    for found in subject.registry.sessions() {
        *sessions.entry(Arc::as_ptr(found.session.device().image())).or_default() += 1;
    }
    let detail = |source: &Source| {
        let file = |(index, image): (usize, Arc<Image>)| ImageFile {
            base: base(&image, index == 0),
            sessions: sessions.get(&Arc::as_ptr(&image)).copied().unwrap_or(0),
        };
        let files = source.all().into_iter().enumerate().map(file);
        // One that nobody is on any more is about to go.
        let files = files.filter(|file| file.base.current || file.sessions > 0).collect();
        ImageDetail { name: source.name().to_owned(), files }
    };
    sources.map(detail).collect()
}
