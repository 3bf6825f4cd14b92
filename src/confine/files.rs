//! Which files and ports the process can still get at (landlock).
//!
//! | allowed | beneath | for |
//! |---|---|---|
//! | reading files | the directory of every image | the file that is renamed over an image |
//! | removing files | the directory of every unix socket | the socket's end |
//! | reading one file | - | images that are devices; what the allocator asks the kernel |
//!
//! All else is denied: other files, writing, making and listing anything, TCP ports, sockets and processes of others.
//! Landlock knows directories with all that is beneath them, not names in them: hence the advice to give images, and
//! sockets, directories of their own. It follows no names either, but what they stand for at start; see [`Readable`].

use super::Needs;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

/// All that is asked of the kernel: the newest version of landlock that this was tested with has it. Newer ones may deny
/// more, of which this knows nothing.
const TESTED: ABI = ABI::V6;

/// What each version of landlock brought that is asked for here.
const BROUGHT: &[(i32, &str)] = &[
    (1, "opening files (which Linux 5.13 can)"),
    (3, "truncating files (Linux 6.2)"),
    (4, "TCP ports (Linux 6.7)"),
    (5, "device controls (Linux 6.10)"),
    (6, "abstract sockets and signals (Linux 6.12)"),
];

/// Files that glibc's allocator reads: how many arenas are worth their memory, and whether to give any of it back.
const SYSTEM_FILES: &[&str] = &["/sys/devices/system/cpu/online", "/proc/sys/vm/overcommit_memory"];

/// As deep as the kernel follows symbolic links.
const MOST_LINKS: usize = 40;

/// A set of rules with its directories open, to be put on.
#[derive(Debug)]
pub(super) struct Rules {
    rules: Result<RulesetCreated, RulesetError>,
    everything: Option<PathBuf>,
}

/// What was reached.
#[derive(Debug)]
pub(super) struct Reached {
    /// The version of the kernel's landlock; 0 without any.
    pub(super) version: i32,
    /// What is not denied, and why.
    pub(super) missing: Vec<String>,
}

impl Rules {
    /// Opens what there are rules for, with the rights that the process has now.
    pub(super) fn new(needs: &Needs) -> Self {
        let mut readable = Readable::default();
        needs.images.iter().for_each(|image| readable.add(image));
        let removable: BTreeSet<&Path> = needs.sockets.iter().filter_map(|socket| socket.parent()).collect();
        let everything = readable.beneath.get(Path::new("/")).cloned();
        readable.files.extend(SYSTEM_FILES.iter().map(PathBuf::from));
        let reading = readable.beneath.keys().chain(&readable.files).map(PathBuf::as_path);
        let reading = reading.map(|path| (path, AccessFs::ReadFile));
        let removing = removable.into_iter().map(|path| (path, AccessFs::RemoveFile));
        let rules = Self::create().and_then(|rules| {
            reading.chain(removing).try_fold(rules, |rules, (path, access)| match PathFd::new(path) {
                Ok(fd) => rules.add_rule(PathBeneath::new(fd, access)),
                // What is not there cannot be opened anyway, and whoever needs it says so better.
                Err(_) => Ok(rules),
            })
        });
        Self { rules, everything }
    }

    fn create() -> Result<RulesetCreated, RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(TESTED))?
            .handle_access(AccessNet::from_all(TESTED))?
            .scope(Scope::from_all(TESTED))?
            .create()
    }

    /// Puts the rules on the calling thread, and on all that it starts from now on.
    pub(super) fn put_on(self) -> Reached {
        let mut reached = match self.rules.and_then(RulesetCreated::restrict_self) {
            Ok(status) => match status.landlock {
                LandlockStatus::Available { effective_abi, kernel_abi } => {
                    let version = kernel_abi.unwrap_or(effective_abi as i32);
                    Reached { version, missing: missing(version).into_iter().collect() }
                }
                LandlockStatus::NotEnabled => {
                    nothing("landlock is switched off (boot with lsm=landlock,...)")
                }
                LandlockStatus::NotImplemented => {
                    nothing("this kernel has no landlock (Linux 5.13 can have)")
                }
            },
            Err(error) => nothing(&format!("landlock: {error}")),
        };
        if let Some(image) = self.everything {
            reached.missing.push(format!(
                "files can be read everywhere ({} lies in the root directory)",
                image.display()
            ));
        }
        reached
    }
}

fn nothing(why: &str) -> Reached {
    Reached { version: 0, missing: vec![format!("{why}, so files and ports are not denied")] }
}

/// What landlock of this version does not deny, in a few words.
fn missing(version: i32) -> Option<String> {
    let unknown: Vec<_> =
        BROUGHT.iter().filter(|(since, _)| version < *since).map(|(_, what)| *what).collect();
    (!unknown.is_empty())
        .then(|| format!("this kernel's landlock (ABI {version}) cannot deny {}", unknown.join(", ")))
}

/// What must stay readable, so that images can be opened again by their paths when others have taken their places.
///
/// That is the directory in which the image lies. A symbolic link as an image's path may be replaced, or be pointed at
/// another file: so the directories of the link and of the file both count. A link on the way, as `current` in
/// `/srv/current/root.img`, may be pointed at another directory: where that lies beneath the link's own directory
/// (`/srv/releases/41`), its siblings count, too. A link that leads elsewhere (`/srv -> /mnt/disk/srv`) is taken for part
/// of the machine, and what it would have to open (`/mnt/disk`) for too much.
///
/// A device is that device only: nobody renames another over it, and its directory has all the machine's.
#[derive(Debug, Default, PartialEq, Eq)]
struct Readable {
    /// Directories, with the image that asked for each.
    beneath: BTreeMap<PathBuf, PathBuf>,
    files: BTreeSet<PathBuf>,
}

impl Readable {
    fn add(&mut self, image: &Path) {
        let mut found = Vec::new();
        let is_device = fs::metadata(image).is_ok_and(|metadata| metadata.file_type().is_block_device());
        if is_device {
            self.files.insert(image.to_owned());
        }
        let mut links = 0;
        let mut here = PathBuf::from("/");
        let mut way: VecDeque<PathBuf> = pieces(image).collect();
        while let Some(piece) = way.pop_front() {
            let Some(Component::Normal(name)) = piece.components().next() else {
                if piece == Path::new("..") {
                    here.pop();
                } else {
                    here = PathBuf::from("/");
                }
                continue;
            };
            let path = here.join(name);
            let Ok(target) = fs::read_link(&path) else {
                if way.is_empty() {
                    found.push(here.clone());
                }
                here = path;
                continue;
            };
            links += 1;
            if links > MOST_LINKS {
                break;
            }
            if way.is_empty() {
                found.push(here.clone());
            } else if let Ok(directory) = fs::canonicalize(&path)
                && let Some(siblings) = directory.parent()
                && here != Path::new("/")
                && siblings.starts_with(&here)
            {
                found.push(siblings.to_owned());
            }
            pieces(&target).rev().for_each(|piece| way.push_front(piece));
        }
        // Devices' directories are the system's; the links to them may be anybody's.
        for directory in found.into_iter().filter(|directory| !is_device || !directory.starts_with("/dev")) {
            self.beneath.entry(directory).or_insert_with(|| image.to_owned());
        }
    }
}

fn pieces(path: &Path) -> impl DoubleEndedIterator<Item = PathBuf> {
    path.components()
        .filter(|piece| *piece != Component::CurDir)
        .map(|piece| PathBuf::from(piece.as_os_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory, by its real name.
    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    fn beneath(image: &Path) -> Vec<PathBuf> {
        let mut readable = Readable::default();
        readable.add(image);
        assert!(readable.files.is_empty());
        readable.beneath.into_keys().collect()
    }

    #[test]
    fn a_files_directory() {
        let (_dir, top) = scratch();
        fs::create_dir(top.join("a")).unwrap();
        fs::write(top.join("a/root.img"), "x").unwrap();
        assert_eq!(beneath(&top.join("a/root.img")), [top.join("a")]);
        assert_eq!(beneath(&top.join("a/../a/./root.img")), [top.join("a")]);
        assert_eq!(beneath(&top.join("a/none.img")), [top.join("a")]);
        assert_eq!(beneath(Path::new("/none.img")), [Path::new("/")]);
    }

    #[test]
    fn the_directories_of_a_link_and_of_what_it_points_at() {
        let (_dir, top) = scratch();
        for name in ["links", "more", "files"] {
            fs::create_dir(top.join(name)).unwrap();
        }
        fs::write(top.join("files/v1.img"), "x").unwrap();
        symlink("../more/root.img", top.join("links/root.img")).unwrap();
        symlink(top.join("files/v1.img"), top.join("more/root.img")).unwrap();
        let all = ["files", "links", "more"].map(|name| top.join(name));
        assert_eq!(beneath(&top.join("links/root.img")), all);
        symlink("loop", top.join("links/loop")).unwrap();
        assert_eq!(beneath(&top.join("links/loop")), [top.join("links")]);
    }

    #[test]
    fn a_directory_that_is_a_link_brings_its_siblings_where_they_are_close() {
        let (_dir, top) = scratch();
        fs::create_dir_all(top.join("srv/releases/41")).unwrap();
        fs::create_dir_all(top.join("disk/images")).unwrap();
        symlink("releases/41", top.join("srv/current")).unwrap();
        symlink("../disk/images", top.join("srv/images")).unwrap();
        for directory in ["srv/releases/41", "disk/images"] {
            fs::write(top.join(directory).join("root.img"), "x").unwrap();
        }
        let releases = ["srv/releases", "srv/releases/41"].map(|name| top.join(name));
        assert_eq!(beneath(&top.join("srv/current/root.img")), releases);
        assert_eq!(beneath(&top.join("srv/images/root.img")), [top.join("disk/images")]);
    }

    #[test]
    fn what_a_kernel_cannot_deny_is_said() {
        assert_eq!(missing(6), None);
        assert_eq!(missing(7), None);
        let two = missing(2).unwrap();
        assert!(
            two.starts_with("this kernel's landlock (ABI 2) cannot deny truncating files (Linux 6.2), TCP")
        );
        assert!(!two.contains("opening files") && missing(5).unwrap().ends_with("signals (Linux 6.12)"));
    }

    #[test]
    fn an_image_in_the_root_directory_leaves_everything_readable_and_says_so() {
        let needs = Needs { images: vec!["/none.img".into()], sockets: Vec::new() };
        assert_eq!(Rules::new(&needs).everything, Some("/none.img".into()));
    }
}
