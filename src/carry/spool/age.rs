//! Encryption to a recipient, by the program `age` (<https://age-encryption.org/v1>): as `ssh`, it is left to know keys.
//!
//! What is plain goes through pipes, and is on no disk.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::MemfdFlags;

use crate::error::{Error, ErrorKind, Result, plain};

/// The most that is told of what the program has said at last, in bytes.
const SAID_MAX: usize = 1000;

/// What it says after each error.
const AFTERWARDS: &str = "age: report unexpected or unhelpful errors";

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
    fn start(program: &str, arguments: &[&OsStr], input: Stdio, output: Stdio) -> io::Result<Self> {
        let said = File::from(rustix::fs::memfd_create("age", MemfdFlags::CLOEXEC)?);
        let mut command = Command::new(program);
        command.args(arguments).stdin(input).stdout(output).stderr(said.try_clone()?);
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("age: {}", plain(&error))))?;
        Ok(Self { child, said })
    }

    /// Waits for it. Whoever asks again is told the same.
    ///
    /// # Errors
    /// What it says.
    fn end(&mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let mut text = [0; SAID_MAX];
        let length = self.said.metadata()?.len();
        let got = self.said.read_at(&mut text, length.saturating_sub(SAID_MAX as u64))?;
        let words = last_words(&String::from_utf8_lossy(&text[..got]));
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("age says: {words}")))
    }
}

/// Of what the program has said the last line, which is why it failed.
fn last_words(text: &str) -> String {
    let is_word = |line: &&str| !line.is_empty() && !line.starts_with(AFTERWARDS);
    let last = text.lines().map(str::trim).rfind(is_word).unwrap_or("it failed");
    last.trim_start_matches("age: ").trim_start_matches("error: ").replace(char::is_control, "?")
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
        let mut age = Age::start("age", &arguments, Stdio::piped(), output.into())?;
        let input = age.child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { age, input })
    }

    /// That was all of it.
    ///
    /// # Errors
    /// What the program says.
    pub(super) fn end(mut self) -> io::Result<()> {
        drop(self.input);
        self.age.end()
    }
}

/// What was encrypted, as it was before. It ends where that does: if the program fails before, it is not short, but cannot be read.
pub(super) struct Decryption {
    age: Age,
    output: ChildStdout,
}

impl Decryption {
    pub(super) fn begin(identity: &Path, input: File) -> io::Result<Self> {
        let arguments = ["--decrypt".as_ref(), "--identity".as_ref(), identity.as_os_str()];
        Self::by("age", &arguments, input.into())
    }

    fn by(program: &str, arguments: &[&OsStr], input: Stdio) -> io::Result<Self> {
        let mut age = Age::start(program, arguments, input, Stdio::piped())?;
        let output = age.child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { age, output })
    }

    /// Reads what is left, and whether all of it was what had been encrypted.
    ///
    /// # Errors
    /// What the program says.
    pub(super) fn end(mut self) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink()).map(|_| ())
    }
}

impl Read for Decryption {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.output.read(buffer)?;
        if got == 0 && !buffer.is_empty() {
            self.age.end()?;
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was damaged ended early, and nobody was told why.
    #[test]
    fn who_reads_is_told_what_the_program_says() {
        let start = |script: &str| Decryption::by("sh", &["-c".as_ref(), script.as_ref()], Stdio::null());
        let fails =
            "echo half; echo 'age: warning: an old key' >&2; printf 'age: error: it is \\t damaged\n' >&2;
                     echo 'age: report unexpected or unhelpful errors at https://age.example' >&2; exit 1";
        let mut age = start(fails).unwrap();
        let mut text = String::new();
        assert_eq!(age.read_to_string(&mut text).unwrap_err().to_string(), "age says: it is ? damaged");
        assert_eq!(age.read(&mut [0]).unwrap_err().to_string(), "age says: it is ? damaged");
        assert_eq!(age.end().unwrap_err().to_string(), "age says: it is ? damaged");
        let long = start(&format!("echo {} >&2; echo last >&2; exit 1", "x".repeat(5000))).unwrap();
        assert_eq!(long.end().unwrap_err().to_string(), "age says: last");
        assert_eq!(start("exit 1").unwrap().end().unwrap_err().to_string(), "age says: it failed");
        let mut age = start("echo whole; echo 'age: warning: an old key' >&2").unwrap();
        let mut text = String::new();
        age.read_to_string(&mut text).unwrap();
        assert_eq!(text, "whole\n");
        age.end().unwrap();
    }
}
