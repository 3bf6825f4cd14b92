//! Encryption to a recipient, by the program `age` (<https://age-encryption.org/v1>): as `ssh`, it is left to know keys.
//!
//! What is plain goes through pipes, and is on no disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::MemfdFlags;

use crate::error::{Error, ErrorKind, Result, plain};

/// The most that is told of what the program has said, in bytes.
const SAID_MAX: u64 = 1000;

/// Looks whether this can be a recipient. No program is asked.
///
/// # Errors
/// `Invalid` if not.
pub(crate) fn check(recipient: &str) -> Result<()> {
    let is_key = recipient.starts_with("age1") && recipient.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_key {
        return Ok(());
    }
    let why = format!("'{recipient}' is no recipient of age");
    Err(Error::new(ErrorKind::Invalid, why).advise("give what 'age-keygen' calls the public key: age1..."))
}

/// Looks whether something can be encrypted to this recipient, before anybody relies on it.
///
/// # Errors
/// What stands in the way.
pub(crate) fn try_out(recipient: &str) -> Result<()> {
    check(recipient)?;
    let failed = |error| {
        let error = Error::io("Cannot encrypt to", error).on(recipient);
        error.advise("install age, and see that the recipient is whole: 'age-keygen -y FILE' prints it")
    };
    let nowhere = File::options().write(true).open("/dev/null").map_err(failed)?;
    Encryption::begin(recipient, nowhere).and_then(Encryption::end).map_err(failed)
}

/// The program, and what it has to say.
struct Age {
    child: Child,
    said: File,
}

impl Age {
    fn start(arguments: &[&std::ffi::OsStr], input: Stdio, output: Stdio) -> io::Result<Self> {
        let said = File::from(rustix::fs::memfd_create("age", MemfdFlags::CLOEXEC)?);
        let mut command = Command::new("age");
        command.args(arguments).stdin(input).stdout(output).stderr(said.try_clone()?);
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("age: {}", plain(&error))))?;
        Ok(Self { child, said })
    }

    /// Waits for it.
    fn end(mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let mut text = Vec::new();
        self.said.seek(SeekFrom::Start(0))?;
        (&self.said).take(SAID_MAX).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it failed");
        let first =
            first.trim_start_matches("age: ").trim_start_matches("error: ").replace(char::is_control, "?");
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("age says: {first}")))
    }
}

impl Drop for Age {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is written into this comes out encrypted.
pub(super) struct Encryption {
    age: Age,
    pub(super) input: ChildStdin,
}

impl Encryption {
    pub(super) fn begin(recipient: &str, output: File) -> io::Result<Self> {
        let arguments = ["--encrypt", "--recipient", recipient].map(AsRef::as_ref);
        let mut age = Age::start(&arguments, Stdio::piped(), output.into())?;
        let input = age.child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { age, input })
    }

    /// That was all of it.
    ///
    /// # Errors
    /// What the program says.
    pub(super) fn end(self) -> io::Result<()> {
        drop(self.input);
        self.age.end()
    }
}

/// What was encrypted, as it was before.
pub(super) struct Decryption {
    age: Age,
    pub(super) output: ChildStdout,
}

impl Decryption {
    pub(super) fn begin(identity: &Path, input: File) -> io::Result<Self> {
        let arguments = ["--decrypt".as_ref(), "--identity".as_ref(), identity.as_os_str()];
        let mut age = Age::start(&arguments, input.into(), Stdio::piped())?;
        let output = age.child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { age, output })
    }

    /// Reads what is left, and whether all of it was what had been encrypted.
    ///
    /// # Errors
    /// What the program says.
    pub(super) fn end(mut self) -> io::Result<()> {
        io::copy(&mut self.output, &mut io::sink())?;
        drop(self.output);
        self.age.end()
    }
}
