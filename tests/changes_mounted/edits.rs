//! Scripts of edits, at random, as people and programs make them.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, RenameFlags, XattrFlags};

use crate::support::Random;

/// Makes `count` edits in the tree at `root`; says what it did.
pub(crate) fn script(root: &Path, random: &mut Random, count: usize) -> Vec<String> {
    let mut editor = Editor { root: root.to_owned(), random, all: Vec::new(), log: Vec::new() };
    editor.list();
    for number in 0..count {
        if number % 16 == 15 {
            editor.list();
        }
        // Much of it cannot be done where it falls: then that was no edit.
        let _ = editor.edit();
    }
    editor.log
}

struct Editor<'a> {
    root: PathBuf,
    random: &'a mut Random,
    all: Vec<PathBuf>,
    log: Vec<String>,
}

impl Editor<'_> {
    fn list(&mut self) {
        self.all.clear();
        let mut left = vec![self.root.clone()];
        while let Some(path) = left.pop() {
            if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
                left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            if path != self.root {
                self.all.push(path);
            }
        }
        // So that a seed means the same script each time.
        self.all.sort();
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).unwrap()
    }

    fn any(&mut self) -> PathBuf {
        let at = self.below(self.all.len());
        self.all[at].clone()
    }

    fn pick(&mut self, is_it: impl Fn(&fs::Metadata) -> bool) -> PathBuf {
        for _ in 0..500 {
            let path = self.any();
            if path.symlink_metadata().is_ok_and(|metadata| is_it(&metadata)) {
                return path;
            }
        }
        panic!("there is nothing of that kind")
    }

    fn file(&mut self) -> PathBuf {
        self.pick(fs::Metadata::is_file)
    }

    fn directory(&mut self) -> PathBuf {
        self.pick(fs::Metadata::is_dir)
    }

    /// A name that is new, in a directory that is there.
    fn new_path(&mut self) -> PathBuf {
        let directory = self.directory();
        let number = self.random.below(1 << 40);
        let name = match self.random.below(12) {
            0 => b"odd\nname \xff\"\\".to_vec(),
            1 => vec![b'x'; 200],
            2 => "Größe".as_bytes().to_vec(),
            3 => b" (was x) ".to_vec(),
            _ => Vec::new(),
        };
        directory.join(OsString::from_vec([name, format!("{number:x}").into_bytes()].concat()))
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = match self.random.below(6) {
            0 => 0,
            1 => self.random.below(60),
            2 => 4096,
            3 => self.random.below(300_000),
            _ => self.random.below(9000),
        };
        self.random.bytes(length)
    }

    fn edit(&mut self) -> std::io::Result<()> {
        let kind = self.random.below(30);
        let path = match kind {
            0..=3 => self.new_path(),
            4..=12 => self.file(),
            13..=14 => self.directory(),
            _ => self.any(),
        };
        let entry = format!("{kind} {path:?}");
        match kind {
            0 | 1 => fs::write(&path, self.bytes())?,
            2 => {
                // A file with holes.
                let file = File::create(&path)?;
                for _ in 0..3 {
                    file.write_all_at(&self.bytes(), self.random.below(1 << 24))?;
                }
                file.set_len(self.random.below(1 << 25))?;
            }
            3 => {
                fs::create_dir(&path)?;
                for number in 0..self.below(40) {
                    fs::write(path.join(format!("{number}")), self.bytes())?;
                }
            }
            4 => OpenOptions::new().append(true).open(&path)?.write_all(&self.bytes())?,
            5 => {
                let file = OpenOptions::new().write(true).open(&path)?;
                let length = file.metadata()?.len();
                file.write_all_at(b"changed", self.random.below(length.max(1)))?;
            }
            6 => {
                let file = OpenOptions::new().write(true).open(&path)?;
                let length = file.metadata()?.len();
                file.set_len(self.random.below(length * 2 + 1))?;
            }
            7 => {
                // The same again, in other blocks.
                let content = fs::read(&path)?;
                fs::write(&path, content)?;
            }
            8 => {
                // As editors save: a new file under the name.
                let metadata = path.symlink_metadata()?;
                let (content, new) = (fs::read(&path)?, path.with_extension("new"));
                fs::write(&new, if self.random.below(2) == 0 { content } else { self.bytes() })?;
                fs::set_permissions(&new, fs::Permissions::from_mode(metadata.mode()))?;
                std::os::unix::fs::chown(&new, Some(metadata.uid()), Some(metadata.gid()))?;
                fs::rename(&new, &path)?;
            }
            9 => {
                let file = OpenOptions::new().write(true).open(&path)?;
                let flags = match self.random.below(3) {
                    0 => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    1 => FallocateFlags::ZERO_RANGE,
                    _ => FallocateFlags::empty(),
                };
                rustix::fs::fallocate(
                    &file,
                    flags,
                    self.random.below(20_000),
                    1 + self.random.below(200_000),
                )?;
            }
            10 => {
                // Blocks are taken out of it, and what is behind them comes forward.
                let file = OpenOptions::new().write(true).open(&path)?;
                rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 4096, 4096)?;
            }
            11 => fs::hard_link(&path, self.new_path())?,
            12 => {
                let (mut one, mut other) = (File::open(&path)?, File::create(self.new_path())?);
                std::io::copy(&mut one, &mut other)?;
                other.seek(SeekFrom::Start(0))?;
            }
            13 => {
                let file = self.file();
                fs::remove_dir_all(&path)?;
                fs::rename(file, &path)?;
            }
            14 if path.components().count() > 6 => fs::remove_dir_all(&path)?,
            14 => {
                for entry in fs::read_dir(&path)?.take(3) {
                    fs::remove_file(entry?.path())?;
                }
            }
            15 | 16 => fs::rename(&path, self.new_path())?,
            17 => {
                // Onto something that is there.
                let other = self.any();
                fs::rename(&path, other)?;
            }
            18 => {
                let other = self.any();
                rustix::fs::renameat_with(CWD, &path, CWD, other, RenameFlags::EXCHANGE)?;
            }
            19 if path.symlink_metadata()?.is_dir() => fs::remove_dir(&path)?,
            19 => fs::remove_file(&path)?,
            20 if !path.symlink_metadata()?.is_symlink() => {
                let mode = u32::try_from(self.random.below(0o10000)).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
            21 => {
                let mut id = || Some(u32::try_from(self.random.below(100_000)).unwrap());
                std::os::unix::fs::lchown(&path, id(), id())?;
            }
            22 | 23 => {
                let name = ["user.a", "user.some-longer-name", "trusted.b", "security.c"][self.below(4)];
                let length = [0, 20, 300, 3000][self.below(4)];
                let value = self.random.bytes(length);
                rustix::fs::lsetxattr(&path, name, &value, XattrFlags::empty())?;
            }
            24 => {
                // Owner, user 7, group, mask, others.
                let entry = |tag: u8, id: [u8; 4]| [&[tag, 0, 5, 0][..], &id].concat();
                let none = [0xff; 4];
                let list = [
                    vec![2, 0, 0, 0],
                    entry(1, none),
                    entry(2, [7, 0, 0, 0]),
                    entry(4, none),
                    entry(0x10, none),
                    entry(0x20, none),
                ];
                let name = if self.random.below(2) == 0 { "access" } else { "default" };
                let name = format!("system.posix_acl_{name}");
                rustix::fs::setxattr(&path, name, &list.concat(), XattrFlags::empty())?;
            }
            25 => {
                fs::remove_file(&path)?;
                // Up to 59 bytes fit into an inode.
                symlink("t".repeat([1, 59, 60, 1500][self.below(4)]), &path)?;
            }
            26 => {
                fs::remove_file(&path)?;
                let kind = [FileType::Fifo, FileType::CharacterDevice, FileType::BlockDevice][self.below(3)];
                let device =
                    rustix::fs::makedev([1, 300, 4000][self.below(3)], [3, 700, 1_000_000][self.below(3)]);
                rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR, device)?;
            }
            27 => {
                fs::remove_file(&path)?;
                fs::create_dir(&path)?;
                // A socket's path may not be longer.
                if path.as_os_str().len() < 90 {
                    drop(UnixListener::bind(path.join("socket"))?);
                }
                // An index of names, and blocks of it.
                for number in 0..self.below(900) {
                    File::create(path.join(format!("entry-{number}")))?;
                }
            }
            28 => {
                // What was only looked at has not changed.
                let _ = fs::read(&path);
                let _ = fs::read_dir(&path);
            }
            _ => {
                let file = File::open(&path)?;
                let moment = SystemTime::UNIX_EPOCH + Duration::new(self.random.below(1 << 34), 123_456_789);
                file.set_modified(moment)?;
            }
        }
        self.log.push(entry);
        Ok(())
    }
}
