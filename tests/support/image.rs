//! Base images whose every byte is known without keeping a copy: content follows from a seed and the offset.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{mix, size};

/// An image file: `data` ranges hold pseudo-random bytes (never a whole zero word), the rest are holes.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    seed: u64,
    data: Vec<Range<u64>>,
}

/// What must not change about an image while it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    sha256: String,
    size: u64,
    modified: (i64, i64),
    inode: u64,
}

impl Image {
    /// An image full of data.
    pub fn random(path: impl AsRef<Path>, size: u64, seed: u64) -> Self {
        Self::partly(path, size, 0..size, seed)
    }

    /// An image with one range of data and holes elsewhere.
    pub fn partly(path: impl AsRef<Path>, size: u64, data: Range<u64>, seed: u64) -> Self {
        Self::sparse(path, size, std::slice::from_ref(&data), seed)
    }

    /// An image with data in `data` (sorted, disjoint) and holes elsewhere.
    pub fn sparse(path: impl AsRef<Path>, size: u64, data: &[Range<u64>], seed: u64) -> Self {
        let image = Self { path: path.as_ref().to_owned(), size, seed, data: data.to_vec() };
        image.write_to(&image.path);
        image
    }

    /// An image that is there, whose content is not known here.
    pub fn at(path: impl AsRef<Path>) -> Self {
        let size = fs::metadata(&path).expect("the image is there").len();
        Self { path: path.as_ref().to_owned(), size, seed: 0, data: Vec::new() }
    }

    /// An image without any data.
    pub fn empty(path: impl AsRef<Path>, size: u64) -> Self {
        Self::sparse(path, size, &[], 0)
    }

    /// Writes the same content to another file.
    pub fn write_to(&self, path: &Path) {
        let file = File::create(path).expect("creating an image");
        file.set_len(self.size).expect("sizing an image");
        for range in &self.data {
            let mut offset = range.start;
            while offset < range.end {
                let length = (range.end - offset).min(1 << 20);
                file.write_all_at(&self.bytes(offset, length), offset).expect("writing an image");
                offset += length;
            }
        }
    }

    /// What the base holds there.
    pub fn bytes(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; size(length)];
        for range in &self.data {
            let (start, end) = (range.start.max(offset), range.end.min(offset + length));
            if start < end {
                self.fill(start, &mut bytes[size(start - offset)..size(end - offset)]);
            }
        }
        bytes
    }

    /// The whole content.
    pub fn all(&self) -> Vec<u8> {
        self.bytes(0, self.size)
    }

    /// Checksum, size, modification time and inode of the file as it is now.
    pub fn fingerprint(&self) -> Fingerprint {
        let output = Command::new("sha256sum").arg(&self.path).output().expect("running sha256sum");
        assert!(output.status.success(), "sha256sum reads the image");
        let meta = fs::metadata(&self.path).expect("the image exists");
        Fingerprint {
            sha256: String::from_utf8(output.stdout).expect("a checksum is text")[..64].to_owned(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            inode: meta.ino(),
        }
    }

    /// The pseudo-random bytes from `offset` on.
    fn fill(&self, offset: u64, bytes: &mut [u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            // `| 1`: no word is zero, so data can be told from a hole.
            let word = (mix(self.seed ^ (at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1).to_be_bytes();
            let skip = size(at % 8);
            let count = (8 - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[skip..skip + count]);
            rest = later;
            at += count as u64;
        }
    }
}
