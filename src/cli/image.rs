//! `[NAME=]IMAGE`: an image and the export name under which it is offered.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The longest export name, in bytes: with `@` and a session's ID of 64 bytes it is still no longer than the 256 bytes
/// that a string on the wire should be (specification, "Conventions").
pub(crate) const NAME_MAX: usize = 191;

/// One image to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageArg {
    /// The export's name.
    pub(crate) name: String,
    /// The image file.
    pub(crate) path: PathBuf,
}

impl ImageArg {
    /// Reads `NAME=IMAGE`, or `IMAGE`, which is named by its file stem.
    ///
    /// A name has no `/`, so a path that holds a `=` is a bare one if a `/` comes before it (`./a=b.img`).
    pub(crate) fn parse(arg: OsString) -> Result<Self, String> {
        let bytes = arg.as_bytes();
        let name_length = bytes.iter().position(|&b| b == b'=' || b == b'/').filter(|&at| bytes[at] == b'=');
        if let Some(length) = name_length {
            let name = check_name(OsStr::from_bytes(&bytes[..length]))
                .map_err(|why| format!("{why} (for a path with a '=' in it write NAME=PATH or ./PATH)"))?;
            let path = PathBuf::from(OsString::from_vec(bytes[length + 1..].to_vec()));
            if path.as_os_str().is_empty() {
                return Err(format!("no image after '{name}='"));
            }
            return Ok(Self { name, path });
        }
        let path = PathBuf::from(arg);
        if path.as_os_str().is_empty() {
            return Err("the path of the image is empty".to_owned());
        }
        let advice = || format!("give it a name: NAME={}", path.display());
        let stem =
            path.file_stem().ok_or_else(|| format!("no file name to call the export by; {}", advice()))?;
        let name = check_name(stem).map_err(|why| format!("{why}; {}", advice()))?;
        Ok(Self { name, path })
    }
}

/// Refuses two images of one name.
pub(crate) fn check_distinct(images: &[ImageArg]) -> Result<(), String> {
    for (index, image) in images.iter().enumerate() {
        if let Some(first) = images[..index].iter().find(|first| first.name == image.name) {
            return Err(format!(
                "{} and {} would both be named '{}'; name one of them, as {}={}",
                first.path.display(),
                image.path.display(),
                image.name,
                second_name(images, &image.name),
                image.path.display()
            ));
        }
    }
    Ok(())
}

/// A name for advice that is free: `root2` for a second `root`.
fn second_name(images: &[ImageArg], name: &str) -> String {
    let free = |candidate: &String| images.iter().all(|image| image.name != *candidate);
    (2_u32..).map(|n| format!("{name}{n}")).find(free).unwrap_or_default()
}

/// What an export may be called.
fn check_name(name: &OsStr) -> Result<String, String> {
    let Some(name) = name.to_str() else {
        return Err(format!("the export name '{}' is not UTF-8", Path::new(name).display()));
    };
    if name.is_empty() {
        return Err("the export name is empty".to_owned());
    }
    if name.contains('@') {
        return Err(format!("the export name '{name}' holds an '@', which separates the ID of a session"));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("the export name {name:?} holds a control character"));
    }
    if name.len() > NAME_MAX {
        return Err(format!("the export name '{name}' has {} bytes and may have {NAME_MAX}", name.len()));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ImageArg, String> {
        ImageArg::parse(text.into())
    }

    #[test]
    fn names_and_paths() {
        for (text, name, path) in [
            ("root.img", "root", "root.img"),
            ("/srv/images/debian-12.raw", "debian-12", "/srv/images/debian-12.raw"),
            ("disk", "disk", "disk"),
            ("a.tar.img", "a.tar", "a.tar.img"),
            (".hidden", ".hidden", ".hidden"),
            ("golden=/srv/root.img", "golden", "/srv/root.img"),
            ("my root=root.img", "my root", "root.img"),
            ("Größe=x", "Größe", "x"),
            ("a=b=c.img", "a", "b=c.img"),
            ("./a=b.img", "a=b", "./a=b.img"),
            ("/srv/a=b.img", "a=b", "/srv/a=b.img"),
            ("x=/srv/a@b.img", "x", "/srv/a@b.img"),
            ("root=nbd+unix:///?socket=/s", "root", "nbd+unix:///?socket=/s"),
        ] {
            assert_eq!(parse(text), Ok(ImageArg { name: name.into(), path: path.into() }), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_named_says_why_and_how() {
        for (text, why) in [
            ("", "empty"),
            ("=root.img", "the export name is empty"),
            ("root=", "no image after 'root='"),
            ("a@b=root.img", "holds an '@'"),
            ("a@b=root.img", "write NAME=PATH or ./PATH"),
            ("/srv/a@b.img", "give it a name: NAME=/srv/a@b.img"),
            ("..", "give it a name: NAME=.."),
            ("a\nb=root.img", "control character"),
            ("a\nb.img", "control character"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(parse(&format!("{}=x", "n".repeat(NAME_MAX))).is_ok());
        assert!(parse(&format!("{}=x", "n".repeat(NAME_MAX + 1))).unwrap_err().contains("has 192 bytes"));
        let error = ImageArg::parse(OsString::from_vec(b"\xff.img".to_vec())).unwrap_err();
        assert!(error.contains("not UTF-8") && error.contains("NAME="), "{error}");
        assert!(ImageArg::parse(OsString::from_vec(b"x=/srv/\xff.img".to_vec())).is_ok());
    }

    #[test]
    fn two_of_one_name_are_refused_with_a_name_that_is_free() {
        let images = |texts: &[&str]| texts.iter().map(|text| parse(text).unwrap()).collect::<Vec<_>>();
        assert_eq!(check_distinct(&images(&["a/root.img", "other=b/root.img"])), Ok(()));
        assert_eq!(
            check_distinct(&images(&["a/root.img", "root2=c", "b/root.img"])),
            Err(
                "a/root.img and b/root.img would both be named 'root'; name one of them, as root3=b/root.img"
                    .into()
            )
        );
    }
}
