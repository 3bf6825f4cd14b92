//! `memdev changes` against what the machine's own kernel shows of the same file systems, mounted and walked.
//!
//! They need root, /dev/fuse, loop devices and the image whose path is in MEMDEV_ROOT_IMAGE, so a plain `cargo test` leaves
//! them out; `tools/test` runs them.

#[path = "../interop_support/mod.rs"]
mod interop_support;
#[path = "../support/mod.rs"]
mod support;

mod edits;
mod kernel;
mod layers;
mod roots;
mod scripts;
mod walk;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use interop_support::mounted::Mounted;
use interop_support::{run, uri};
use support::server::{Serve, scratch};
use support::{Image, Server};
use tempfile::TempDir;
use walk::Walk;

/// A server of an image, and what is on it.
pub(crate) struct House {
    pub(crate) server: Server,
    pub(crate) base: Walk,
    image: String,
    control: PathBuf,
    dir: TempDir,
}

impl House {
    /// Of a Debian root.
    pub(crate) fn debian() -> Self {
        let golden = std::env::var("MEMDEV_ROOT_IMAGE")
            .expect("MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image prints it");
        Self::of(&Image::at(golden), scratch())
    }

    /// Of an ext4 with this tree.
    pub(crate) fn of_tree(tree: &Path, size: u64) -> Self {
        let dir = scratch();
        let path = dir.path().join("root.img");
        let image = Image::empty(&path, size);
        run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), "-d".as_ref(), tree.as_os_str(), path.as_os_str()]);
        Self::of(&image, dir)
    }

    fn of(image: &Image, dir: TempDir) -> Self {
        let mut house = Self::unseen(image, dir);
        let mounted = Mounted::new(&house.uri("golden"));
        house.base = Walk::of(&mounted.root());
        mounted.detach();
        house
    }

    /// Of an image whose content is not looked at here.
    pub(crate) fn unseen(image: &Image, dir: TempDir) -> Self {
        let control = dir.path().join("control.sock");
        let server = Serve::image(image).args(["--control".as_ref(), control.as_os_str()]).start();
        let image = image.path.file_stem().unwrap().to_str().unwrap().to_owned();
        Self { server, base: Walk::default(), image, control, dir }
    }

    fn name(&self, session: &str) -> String {
        format!("{}@{session}", self.image)
    }

    pub(crate) fn uri(&self, session: &str) -> String {
        uri(&self.server, &self.name(session))
    }

    /// What `memdev changes` prints of a live session.
    #[track_caller]
    pub(crate) fn changes(&self, session: &str, more: &[&str]) -> Vec<u8> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg("changes").arg(self.name(session)).arg("--control").arg(&self.control).args(more);
        command.arg("--state").arg(self.state());
        let out = command.stdin(Stdio::null()).output().expect("memdev");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    }

    /// The same of a private root; with what went wrong.
    pub(crate) fn attempt_root(&self, name: &str) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.args(["changes", name, "--control"]).arg(&self.control).arg("--state").arg(self.state());
        command.stdin(Stdio::null()).output().expect("memdev")
    }
}

impl House {
    /// Where attachments and private roots are written down.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Attachments that are still written down.
    pub(crate) fn devices_left(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.state().join("attach")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

/// Has the kernel write down what it has in its cache.
pub(crate) fn sync(mounted: &Mounted) {
    run("sync", ["-f".as_ref(), mounted.root().as_os_str()]);
}
