//! What people type: sizes, durations, and images with their names. The first byte says which of them the rest is.
//!
//! All but durations are the command's own and not the library's, so their files are taken in here.

#[path = "../../src/duration.rs"]
mod duration;
#[allow(dead_code, reason = "only the parser is wanted")]
#[path = "../../src/cli/image.rs"]
mod image;
#[path = "../../src/cli/size.rs"]
mod size;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::str;
use std::time::Duration;

/// The longest duration there is.
const CENTURY: Duration = Duration::from_secs(36_500 * 86_400);

/// One input.
pub fn body(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    match (kind % 3, str::from_utf8(text)) {
        (0, Ok(text)) => size(text),
        (1, Ok(text)) => duration(text),
        (2, _) => image(text),
        _ => {}
    }
}

fn size(text: &str) {
    let Ok(bytes) = size::parse(text) else { return };
    assert_eq!(size::parse(&bytes.to_string()), Ok(bytes), "the same number in bytes");
    // A figure for people is rounded down to a tenth of its unit, so it reads as no more than it is.
    let figure = size::human(bytes).replace(' ', "").replace("bytes", "").replace("byte", "");
    let read = size::parse(&figure).expect("what is shown can be typed");
    assert!(read <= bytes && bytes - read <= bytes / 10, "{bytes} is shown as {figure}");
}

fn duration(text: &str) {
    let Ok(duration) = duration::parse(text) else { return };
    assert!(duration <= CENTURY);
    let exact = format!("{}.{:09}s", duration.as_secs(), duration.subsec_nanos());
    assert_eq!(duration::parse(&exact), Ok(duration), "the same in seconds");
}

fn image(text: &[u8]) {
    let Ok(image) = image::ImageArg::parse(OsString::from_vec(text.to_vec())) else { return };
    assert!(!image.name.is_empty() && !image.name.contains('@') && image.name.len() <= image::NAME_MAX);
    assert!(!image.path.as_os_str().is_empty());
    if image.name.contains('=') {
        // Taken from a path that has one: it cannot be said in front of another.
        return;
    }
    // Said in full it is the same.
    let mut full = OsString::from(format!("{}=", image.name));
    full.push(&image.path);
    assert_eq!(image::ImageArg::parse(full), Ok(image));
}
