//! A private root with a carried directory, and its destination.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::interop_support::said;
use crate::machine::{Place, Running};

/// The carried directory, in the private root.
pub const HOME: &str = "/home/u";

pub struct House {
    pub place: Place,
    destination: PathBuf,
    /// What memdev has in its environment beside what the tests have.
    environment: Vec<(&'static str, String)>,
}

impl House {
    pub fn new() -> Self {
        let place = Place::new();
        let destination = place.path("dest");
        fs::create_dir(&destination).unwrap();
        Self { place, destination, environment: Vec::new() }
    }

    /// One that carries somewhere else.
    pub fn to(destination: PathBuf) -> Self {
        Self { place: Place::new(), destination, environment: Vec::new() }
    }

    /// One that carries to a server.
    pub fn at(url: &str, environment: &[(&'static str, String)]) -> Self {
        Self { environment: environment.to_vec(), ..Self::to(url.into()) }
    }

    /// A path at the destination.
    pub fn dest(&self, name: &str) -> PathBuf {
        self.destination.join(name)
    }

    fn carry(&self) -> String {
        format!("{HOME}={}", self.destination.display())
    }

    /// A shell inside with `script`, in the carried directory.
    pub fn command(&self, more: &[&str], script: &str) -> Command {
        let carry = self.carry();
        let options = [&["--carry", &carry, "--workdir", HOME], more].concat();
        let mut command = self.place.run(&options, &["sh", "-c", script]);
        command.envs(self.environment.iter().cloned());
        command
    }

    /// What a shell inside does with `script`, in the carried directory.
    #[track_caller]
    pub fn attempt(&self, more: &[&str], script: &str) -> Output {
        let output = self.attempt_beside(more, script);
        self.place.assert_empty();
        output
    }

    /// The same while another session runs.
    #[track_caller]
    pub fn attempt_beside(&self, more: &[&str], script: &str) -> Output {
        self.command(more, script).output().expect("memdev can be run")
    }

    /// The same, where all must be well; what was said on standard error.
    #[track_caller]
    pub fn sh(&self, more: &[&str], script: &str) -> String {
        let output = self.attempt(more, script);
        assert!(output.status.success(), "{script}: {}\n{}", output.status, said(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts a shell inside with `script`, which says `ready` once.
    #[track_caller]
    pub fn start(&self, more: &[&str], script: &str) -> Running<'_> {
        self.place.begin(self.command(more, &format!("echo ready; {script}")))
    }

    /// `memdev carry ARGUMENTS`.
    pub fn memdev_carry(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memdev"));
        command.arg("carry").args(arguments).arg("--state").arg(self.place.state());
        command.envs(self.environment.iter().cloned()).output().expect("memdev can be run")
    }

    /// What `memdev carry status` knows.
    #[track_caller]
    pub fn status(&self) -> Value {
        let output = self.memdev_carry(&["status", "--json"]);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// What is in the spool.
    #[track_caller]
    pub fn spooled(&self) -> Vec<Value> {
        self.status()["spooled"].as_array().unwrap().clone()
    }

    /// Everything at the destination: path, kind, mode, content or target.
    pub fn tree(&self) -> Vec<String> {
        tree(&self.destination)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dest(name)).unwrap_or_default()
    }
}

/// Everything below `root`.
pub fn tree(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
            let mode = metadata.permissions().mode() & 0o7777;
            all.push(if metadata.is_dir() {
                left.push(path);
                format!("{name}/ {mode:o}")
            } else if metadata.is_symlink() {
                format!("{name} -> {}", fs::read_link(&path).unwrap().display())
            } else {
                format!("{name} {mode:o} {}", metadata.size())
            });
        }
    }
    all.sort();
    all
}
