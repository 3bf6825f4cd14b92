//! A session as a mounted file system, on the machine's own kernel:
//!
//! ```text
//! server ── unix socket ── nbdfuse ── DIR/disk (FUSE) ── /dev/loopN ── mount
//! ```
//!
//! Whatever is set up is taken down again when the value is dropped, innermost first, also when a test fails: nothing
//! may stay mounted or attached on the machine that runs the tests.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{attempt, run};
use crate::support::{PATIENCE, wait_until};

/// Waits until a device that was unmounted is mounted nowhere else. A namespace of mounts that another test makes has a
/// copy of every mount of that moment, for as long as it is there: until then the file system is not at rest, and the
/// device in use.
#[track_caller]
pub fn wait_until_free(device: &Path) {
    wait_until("the device is mounted in no other namespace", || {
        let claimed = fs::File::options().read(true).custom_flags(libc::O_EXCL).open(device);
        !claimed.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    });
}

/// An export as a loop device, and the file system on it mounted or not.
pub struct Mounted {
    // In the order of taking down; see `drop`.
    mounted: bool,
    device: Option<String>,
    nbdfuse: Child,
    dir: TempDir,
}

impl Mounted {
    /// Attaches the export behind `uri` and mounts the file system on it, read-write.
    #[track_caller]
    pub fn new(uri: &str) -> Self {
        let mut this = Self::attach(uri);
        this.mount();
        this
    }

    /// Attaches the export behind `uri` as a loop device.
    #[track_caller]
    pub fn attach(uri: &str) -> Self {
        assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse (modprobe fuse)");
        let dir = tempfile::Builder::new().prefix("memdev-mount-").tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("fuse")).expect("creating a mount point");
        fs::create_dir(dir.path().join("root")).expect("creating a mount point");
        let disk = dir.path().join("fuse/disk");
        let pid_file = dir.path().join("pid");
        let nbdfuse = Command::new("nbdfuse")
            .arg("--pidfile")
            .args([&pid_file, &disk])
            .arg(uri)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start nbdfuse ({error}); run tools/setup"));
        let mut this = Self { mounted: false, device: None, nbdfuse, dir };
        // It writes its pid when the file is there.
        wait_until("nbdfuse serves the disk", || {
            let ended = this.nbdfuse.try_wait().expect("asking for nbdfuse's status");
            assert!(ended.is_none(), "nbdfuse ended with {ended:?}");
            fs::metadata(&pid_file).is_ok_and(|meta| meta.len() > 0)
        });
        let device = run("losetup", ["--find".as_ref(), "--show".as_ref(), disk.as_os_str()]);
        this.device = Some(device.trim().to_owned());
        this
    }

    /// The loop device.
    pub fn device(&self) -> &str {
        self.device.as_deref().expect("the loop device is attached")
    }

    /// Where it is mounted.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A path below the mount point.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root().join(path.trim_start_matches('/'))
    }

    /// Mounts the file system, read-write.
    #[track_caller]
    pub fn mount(&mut self) {
        self.mount_as("ext4", "rw");
    }

    /// Mounts a file system of this kind, with these options.
    #[track_caller]
    pub fn mount_as(&mut self, kind: &str, options: &str) {
        let root = self.root();
        run("mount", ["-t", kind, "-o", options, self.device(), root.to_str().expect("a plain path")]);
        self.mounted = true;
    }

    /// Unmounts it; it stays attached.
    #[track_caller]
    pub fn unmount(&mut self) {
        run("umount", [self.root()]);
        self.mounted = false;
        wait_until_free(Path::new(self.device()));
    }

    /// Panics unless the unmounted file system is in perfect order.
    #[track_caller]
    pub fn assert_clean(&self) {
        // So that the session answers, not what the loop device has in its cache.
        run("blockdev", ["--flushbufs", self.device()]);
        run("e2fsck", ["-fn", self.device()]);
    }

    /// Detaches; panics if something is in the way.
    #[track_caller]
    pub fn detach(mut self) {
        if self.mounted {
            self.unmount();
        }
        let device = self.device.take().expect("the loop device is attached");
        run("losetup", ["--detach", &device]);
        // The kernel lets go of the file a moment after losetup has returned.
        wait_until("the FUSE file system is unmounted", || {
            attempt("umount", [self.dir.path().join("fuse")]).status.success()
        });
        let status = self.ended(PATIENCE).expect("nbdfuse ends when its file system is unmounted");
        assert!(status.success(), "nbdfuse ended with {status}");
    }

    fn ended(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let start = Instant::now();
        loop {
            match self.nbdfuse.try_wait() {
                Ok(Some(status)) => return Some(status),
                _ if start.elapsed() > patience => return None,
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Only what a failed test left; results are of no use here, and a panic would hide the first one.
        let quiet = |program: &str, args: &[&std::ffi::OsStr]| {
            super::command(program, args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        };
        if self.mounted && !quiet("umount", &[self.root().as_os_str()]) {
            quiet("umount", &["-l".as_ref(), self.root().as_os_str()]);
        }
        if let Some(device) = &self.device {
            quiet("losetup", &["--detach".as_ref(), device.as_ref()]);
        }
        if matches!(self.nbdfuse.try_wait(), Ok(Some(_))) {
            return;
        }
        let fuse = self.dir.path().join("fuse");
        let start = Instant::now();
        while !quiet("umount", &[fuse.as_os_str()]) {
            if start.elapsed() > Duration::from_secs(5) {
                quiet("umount", &["-l".as_ref(), fuse.as_os_str()]);
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if self.ended(PATIENCE / 6).is_none() {
            let _ = self.nbdfuse.kill();
            let _ = self.nbdfuse.wait();
        }
    }
}
