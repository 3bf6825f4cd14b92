//! Saved images: whatever is in a file, reading it ends, and gives no more bytes than the disk that it says it is.

use memdev::load::Qcow2;

/// The largest disk that is read: a file of a few bytes can say that it is one of exbibytes.
const MOST: u64 = 4 << 20;

/// One input: a file from its first byte on.
pub fn body(data: &[u8]) {
    let Ok(mut image) = Qcow2::of(data) else { return };
    if image.size() > MOST {
        return;
    }
    if let Some(backing) = image.backing() {
        assert!(!backing.name.is_empty() && backing.name.len() <= 1023);
    }
    if let Ok(bytes) = image.read_all() {
        assert!(bytes <= image.size());
    }
}
