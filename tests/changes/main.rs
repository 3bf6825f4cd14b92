//! `memdev changes`: what a session has made, changed and removed, as files, read from the disks alone. Nothing here
//! takes rights: file systems are made by `mkfs.ext4 -d` and changed by `debugfs -w`. What the kernel makes of them is
//! tried in `tests/changes_mounted`.

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../support/mod.rs"]
mod support;

mod diffs;
mod layers;
mod lines;
mod sources;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use interop_support::{run, uri};
use support::server::{Serve, scratch};
use support::{Client, Image, MIB, Server, Stream};
use tempfile::TempDir;

/// An image with a small tree, and what became of it.
pub(crate) struct Edited {
    pub(crate) dir: TempDir,
    pub(crate) base: PathBuf,
    pub(crate) now: PathBuf,
}

impl Edited {
    /// Makes the image with these options of `mkfs.ext4`, and changes a copy of it by a script for `debugfs`.
    pub(crate) fn new(options: &[&str], script: &str) -> Self {
        let dir = scratch();
        let tree = dir.path().join("tree");
        for (path, text) in
            [("etc/hostname", "base\n"), ("etc/motd", "hello\n"), ("usr/bin/tool", "#!/bin/sh\n")]
        {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::write(tree.join("usr/large"), support::Random::new(5).bytes(300_000)).unwrap();
        fs::hard_link(tree.join("usr/bin/tool"), tree.join("usr/bin/other")).unwrap();
        std::os::unix::fs::symlink("bin/tool", tree.join("usr/link")).unwrap();
        let base = dir.path().join("base.img");
        let image = Image::empty(&base, 16 * MIB);
        let mut all = vec!["-q", "-F", "-E", "root_owner=0:0", "-d", tree.to_str().unwrap()];
        all.extend(options);
        all.push(base.to_str().unwrap());
        run("mkfs.ext4", all);
        drop(image);
        let edited = Self { now: dir.path().join("now.img"), dir, base };
        fs::copy(&edited.base, &edited.now).unwrap();
        edited.edit(script);
        edited
    }

    /// Changes the copy; a line of the script that fails, fails the test.
    pub(crate) fn edit(&self, script: &str) {
        let file = self.dir.path().join("script");
        fs::write(&file, script).unwrap();
        let out = interop_support::attempt(
            "debugfs",
            ["-w".as_ref(), "-f".as_ref(), file.as_os_str(), self.now.as_os_str()],
        );
        let said = String::from_utf8_lossy(&out.stderr);
        let said: Vec<_> = said.lines().filter(|line| !line.starts_with("debugfs ")).collect();
        assert!(out.status.success() && said.is_empty(), "{said:?}");
    }

    /// A file for scripts to write into the image.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A server of the base, in whose session `x` is what became of it: only what differs was written.
    pub(crate) fn serve(&self) -> (Server, Client) {
        let control = self.dir.path().join("control.sock");
        // An image's directory is one that the server may read all of.
        let image = Image::at(&self.base);
        let server = Serve::image(&image).args(["--control".as_ref(), control.as_os_str()]).start();
        let mut client = Client::attach(Stream::unix(server.socket()).unwrap(), "base@x").unwrap();
        self.write_to(&mut client);
        (server, client)
    }

    /// Writes what differs.
    pub(crate) fn write_to(&self, client: &mut Client) {
        let (base, now) = (fs::read(&self.base).unwrap(), fs::read(&self.now).unwrap());
        for (at, (old, new)) in (0_u64..).zip(base.chunks(4096).zip(now.chunks(4096))) {
            if old != new {
                client.write(at * 4096, new);
            }
        }
        client.flush();
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }
}

pub(crate) fn changes<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
    command.arg("changes").args(args).env_remove("MEMDEV_CONTROL").stdin(Stdio::null());
    command.output().expect("memdev")
}

/// What it says when it succeeds.
#[track_caller]
pub(crate) fn told<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let out = changes(args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.is_empty(), "{said}");
    String::from_utf8(out.stdout).unwrap()
}

/// What it says of two files.
#[track_caller]
pub(crate) fn told_of(now: &Path, base: &Path, more: &[&str]) -> String {
    let mut args = vec![now.to_str().unwrap(), "--base", base.to_str().unwrap()];
    args.extend(more);
    told(&args)
}

/// One line of what went wrong, and the status.
#[track_caller]
pub(crate) fn trouble(args: &[&str]) -> (String, Option<i32>) {
    let out = changes(args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    (said, out.status.code())
}

/// Overwrites bytes of a file.
pub(crate) fn patch(path: &Path, at: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

pub(crate) use uri as session_uri;
