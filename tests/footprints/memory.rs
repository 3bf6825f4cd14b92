//! Where the marker is in a process' memory, and in what is made of it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that are looked at in one go.
const PIECE: usize = 1 << 20;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How often `needle` is in a stream of pieces of bytes, also across their borders.
struct Finder<'a> {
    needle: &'a [u8],
    end: Vec<u8>,
    found: usize,
}

impl<'a> Finder<'a> {
    fn new(needle: &'a [u8]) -> Self {
        Self { needle, end: Vec::new(), found: 0 }
    }

    fn look(&mut self, piece: &[u8]) {
        // Most of it is pages of zeroes.
        for page in piece.chunks(ZEROES.len()) {
            if page != &ZEROES[..page.len()] || self.end.iter().any(|&byte| byte != 0) {
                self.look_closely(page);
            }
        }
    }

    fn look_closely(&mut self, piece: &[u8]) {
        let mut bytes = std::mem::take(&mut self.end);
        bytes.extend_from_slice(piece);
        let mut rest = &bytes[..];
        // Most bytes are none of it: its first one is looked for, quickly.
        while let Some(at) = rest.iter().position(|&byte| byte == self.needle[0]) {
            rest = &rest[at..];
            if rest.len() < self.needle.len() {
                break;
            }
            self.found += usize::from(rest.starts_with(self.needle));
            rest = &rest[1..];
        }
        let keep = (self.needle.len() - 1).min(bytes.len());
        self.end = bytes[bytes.len() - keep..].to_vec();
    }
}

/// How often a process has `needle` in its memory.
pub(crate) fn in_memory(pid: u32, needle: &[u8]) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives, and this is root");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("this is root");
    let mut found = 0;
    let mut piece = vec![0; PIECE];
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').expect("a range and what it is");
        let (start, end) = range.split_once('-').expect("two addresses");
        let address = |text| u64::from_str_radix(text, 16).expect("an address");
        let (mut at, end) = (address(start), address(end));
        // What nobody writes to is a file's.
        if !rest.starts_with("rw") {
            continue;
        }
        let mut finder = Finder::new(needle);
        while at < end {
            let most = usize::try_from((end - at).min(PIECE as u64)).expect("it is small");
            // What cannot be read is memory that the kernel has none of, or shows to nobody.
            let Ok(count @ 1..) = memory.read_at(&mut piece[..most], at) else {
                at += most as u64;
                continue;
            };
            finder.look(&piece[..count]);
            at += count as u64;
        }
        found += finder.found;
    }
    found
}

/// How often a file has `needle` in it. One that is gone meanwhile, as others' files may be, has nothing.
pub(crate) fn in_file(path: &Path, needle: &[u8]) -> usize {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return 0,
        file => file.unwrap_or_else(|error| panic!("{}: {error}", path.display())),
    };
    let mut finder = Finder::new(needle);
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while let Ok(count @ 1..) = file.read_at(&mut piece, at) {
        finder.look(&piece[..count]);
        at += count as u64;
    }
    finder.found
}

/// How often the files of a directory and those below it have `needle` in them.
pub(crate) fn in_files(dir: &Path, needle: &[u8]) -> usize {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return 0,
        entries => entries.unwrap_or_else(|error| panic!("{}: {error}", dir.display())),
    };
    let entries = entries.map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| match entry.file_type().expect("its type") {
            kind if kind.is_dir() => in_files(&entry.path(), needle),
            kind if kind.is_file() => in_file(&entry.path(), needle),
            _ => 0,
        })
        .sum()
}
