//! What is known of a file: in the private root, and where it is carried to.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use serde_json::{Value, json};

/// How old a change must be before what it has left is read: within one tick of the kernel's clock two changes look alike.
pub(crate) const TICK: f64 = 0.02;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A device, a pipe, a socket: nothing that is carried.
    Other,
}

/// A moment, as file systems have it: seconds since 1970, and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

/// By what a version of a file is told from another of the same name, within one file system. `change` cannot be set by
/// whoever owns the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) kind: Kind,
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) modified: Time,
    pub(crate) changed: Time,
    pub(crate) meta: Meta,
}

/// What belongs to a file beside its content, as it is inside: a mode with its set-id bits, numbers of users there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// By what a version at the destination is told from another, as far as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) size: u64,
    pub(crate) modified: Time,
    /// A name that the store has for this very content, where it has one.
    pub(crate) tag: Option<String>,
}

impl Kind {
    pub(crate) fn of_mode(mode: u32) -> Self {
        match FileType::from_raw_mode(mode) {
            FileType::Directory => Self::Directory,
            FileType::RegularFile => Self::File,
            FileType::Symlink => Self::Link,
            _ => Self::Other,
        }
    }

    fn letter(self) -> &'static str {
        match self {
            Self::Directory => "d",
            Self::File => "f",
            Self::Link => "l",
            Self::Other => "o",
        }
    }

    fn from_letter(letter: &str) -> Option<Self> {
        [Self::Directory, Self::File, Self::Link, Self::Other]
            .into_iter()
            .find(|kind| kind.letter() == letter)
    }
}

impl Time {
    pub(crate) fn new(seconds: i64, nanoseconds: impl TryInto<u32>) -> Self {
        Self { seconds, nanoseconds: nanoseconds.try_into().unwrap_or(0) }
    }

    /// This moment.
    pub(crate) fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Self::new(now.tv_sec, now.tv_nsec)
    }

    /// Seconds from `earlier` on; negative if it is later.
    pub(crate) fn since(self, earlier: Self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a distance that is compared with less than a second")]
        let seconds = self.seconds.saturating_sub(earlier.seconds) as f64;
        seconds + (f64::from(self.nanoseconds) - f64::from(earlier.nanoseconds)) / 1e9
    }

    /// Its second as `20260131T235959`, in UTC.
    pub(crate) fn date(self) -> String {
        let (days, seconds) = (self.seconds.div_euclid(86_400), self.seconds.rem_euclid(86_400));
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}")
    }

    fn to_json(self) -> Value {
        json!([self.seconds, self.nanoseconds])
    }

    fn from_json(value: &Value) -> Option<Self> {
        Some(Self::new(value[0].as_i64()?, value[1].as_u64()?))
    }
}

impl Version {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            kind: Kind::of_mode(stat.st_mode),
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            modified: Time::new(stat.st_mtime, stat.st_mtime_nsec),
            changed: Time::new(stat.st_ctime, stat.st_ctime_nsec),
            meta: Meta { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid },
        }
    }

    /// Whether this may have other attributes than `self` had, although it is the same: of a directory that cannot be
    /// told by its times, which change with what is in it, too.
    pub(crate) fn may_differ(&self, later: &Self) -> bool {
        self.kind == Kind::Directory && self.changed != later.changed
    }

    /// What is remembered of this version before it is read: within one tick of the kernel's clock two changes look alike, so
    /// a directory that has just been changed is not known by its time.
    pub(crate) fn before_reading(mut self) -> Self {
        if self.kind == Kind::Directory && Time::now().since(self.changed) < TICK {
            self.changed = Time::default();
        }
        self
    }

    /// Whether what would be carried is the same, but for a directory's attributes: see [`Self::may_differ`]. A directory
    /// changes with what is in it, which is carried by itself.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        if self.kind == Kind::Directory && other.kind == Kind::Directory {
            return self.inode == other.inode && self.meta == other.meta;
        }
        self == other
    }

    pub(crate) fn to_json(&self) -> Value {
        json!([
            self.kind.letter(),
            self.inode,
            self.size,
            self.modified.to_json(),
            self.changed.to_json(),
            self.meta.to_json()
        ])
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            kind: Kind::from_letter(value[0].as_str()?)?,
            inode: value[1].as_u64()?,
            size: value[2].as_u64()?,
            modified: Time::from_json(&value[3])?,
            changed: Time::from_json(&value[4])?,
            meta: Meta::from_json(&value[5])?,
        })
    }
}

impl Meta {
    fn to_json(&self) -> Value {
        json!([self.mode, self.uid, self.gid])
    }

    fn from_json(value: &Value) -> Option<Self> {
        let number = |at: usize| value[at].as_u64().and_then(|number| u32::try_from(number).ok());
        Some(Self { mode: number(0)? & 0o7777, uid: number(1)?, gid: number(2)? })
    }
}

impl Stamp {
    pub(crate) fn to_json(&self) -> Value {
        json!([self.size, self.modified.to_json(), self.tag])
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            size: value[0].as_u64()?,
            modified: Time::from_json(&value[1])?,
            tag: value[2].as_str().map(str::to_owned),
        })
    }
}

/// Year, month and day of the day that is so many after 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    // In years that begin in March, whose lengths repeat every 400 years.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

/// Bytes as two digits each.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A path as text that says it whole: what is no printable text, and `%`, as `%XX`.
pub(crate) fn escape(path: &Path) -> String {
    let mut text = String::new();
    for part in path.as_os_str().as_bytes().utf8_chunks() {
        for c in part.valid().chars() {
            if c.is_control() || c == '%' {
                let mut bytes = [0; 4];
                c.encode_utf8(&mut bytes).bytes().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
            } else {
                text.push(c);
            }
        }
        part.invalid().iter().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
    }
    text
}

/// The path that [`escape`] made the text of.
pub(crate) fn unescape(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        if first == b'%' {
            let digits = others.get(..2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = &others[2..];
        } else {
            bytes.push(first);
            rest = others;
        }
    }
    Some(OsString::from_vec(bytes).into())
}

/// Whether this is a path that may be below another: relative, without `..` or `.`, and not empty.
pub(crate) fn is_inner(path: &Path) -> bool {
    let plain = |component| matches!(component, std::path::Component::Normal(_));
    !path.as_os_str().is_empty() && path.components().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn any_path_survives_as_text_in_one_line() {
        for bytes in [&b"a/b c"[..], b"50%", b"new\nline", b"\xff\xfe/\xc3\xa4", b"\x1b[31m", b""] {
            let path = Path::new(OsStr::from_bytes(bytes));
            let text = escape(path);
            assert!(!text.chars().any(char::is_control), "{text:?}");
            assert_eq!(unescape(&text).as_deref(), Some(path), "{text}");
        }
        assert_eq!(escape(Path::new("50%/ä")), "50%25/ä");
        for bad in ["%", "%1", "%zz"] {
            assert_eq!(unescape(bad), None);
        }
    }

    #[test]
    fn days_are_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(-1), (1969, 12, 31));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_786), (2026, 11, 29));
        assert_eq!(Time::new(1_709_251_199, 5_u32).date(), "20240229T235959");
    }

    #[test]
    fn inner_paths_stay_below() {
        assert!(is_inner(Path::new("a/b")));
        for bad in ["", "/a", "../a", "a/../b", "./a", "a/.."] {
            assert!(!is_inner(Path::new(bad)), "{bad}");
        }
    }

    #[test]
    fn versions_are_read_as_they_were_written() {
        let version = Version::of(&rustix::fs::stat("/").unwrap());
        assert_eq!(version.kind, Kind::Directory);
        assert_eq!(Version::from_json(&version.to_json()), Some(version.clone()));
        let later = Version { modified: Time::now(), ..version.clone() };
        assert!(later.is_same(&version), "what is in it has changed");
        let old = Version { changed: Time::default(), ..version.clone() };
        let touch = || Version { changed: Time::now(), ..version.clone() };
        assert!(version.may_differ(&touch()) && !version.may_differ(&later));
        // Whoever is kept from running in between looks a tick later: not every time.
        let is_unsure = |touched: Version| touched.clone().before_reading().may_differ(&touched);
        assert!((0..100).any(|_| is_unsure(touch())), "within a tick nothing is sure");
        assert!(!is_unsure(Version { changed: Time::new(1, 0_u32), ..old }));
        let other = Version { meta: Meta { mode: 0o1, ..version.meta.clone() }, ..version.clone() };
        assert!(!other.is_same(&version));
    }
}
