//! Who uses a block device: what stands in the way of detaching it, in words.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::device::Device;
use crate::swap;

/// Everybody who uses the device or one of its partitions, in words: mounts in all namespaces that can be seen, other
/// devices on top of it, swap, and processes that have it open.
pub(super) fn users(device: &Device) -> Vec<String> {
    let parts = Parts::of(device);
    let mut users = Vec::new();
    mounts(&parts, &mut users);
    holders(device, &parts, &mut users);
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    users.extend(swap_areas(&swaps, &parts).map(|area| format!("{area} is swapped to")));
    openers(&parts, &mut users);
    users
}

/// A device and its partitions, by number and by path.
struct Parts {
    numbers: HashSet<String>,
    paths: HashSet<String>,
}

impl Parts {
    fn of(device: &Device) -> Self {
        let mut parts = Self { numbers: HashSet::new(), paths: HashSet::new() };
        let mut add = |directory: &Path, name: &str| {
            if let Ok(number) = fs::read_to_string(directory.join("dev")) {
                parts.numbers.insert(number.trim().to_owned());
                parts.paths.insert(format!("/dev/{name}"));
            }
        };
        add(&device.sysfs(), device.name());
        for path in children(&device.sysfs()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if name.starts_with(device.name()) {
                add(&path, &name);
            }
        }
        parts
    }
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The number of the block device behind a descriptor's link, as `7:3`. What is behind it is not asked, so that a network
/// or FUSE file whose server hangs is not waited for.
fn device_number(fd: &Path) -> Option<String> {
    let stat = statx(CWD, fd, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_block = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice;
    is_block.then(|| format!("{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor))
}

/// The process numbers there are.
fn processes() -> impl Iterator<Item = u32> {
    children(Path::new("/proc")).filter_map(|path| path.file_name()?.to_str()?.parse().ok())
}

fn mounts(parts: &Parts, users: &mut Vec<String>) {
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let mut seen = HashSet::new();
    for pid in processes() {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        let here = own.as_ref() == Some(&namespace);
        if !seen.insert(namespace) {
            continue;
        }
        let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        for point in mount_points(&text, parts) {
            let place = if here { String::new() } else { format!(" for process {pid}") };
            users.push(format!("it is mounted on {point}{place}"));
        }
    }
}

/// The mount points in `text`, in the form of `/proc/PID/mountinfo`, of file systems on the device.
fn mount_points<'a>(text: &'a str, parts: &'a Parts) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (number, point) = (fields.nth(2)?, fields.nth(1)?);
        // File systems that span devices (btrfs) have a number of their own, but say what they were mounted from.
        let source = fields.skip_while(|field| *field != "-").nth(2)?;
        (parts.numbers.contains(number) || parts.paths.contains(source)).then_some(point)
    })
}

fn holders(device: &Device, parts: &Parts, users: &mut Vec<String>) {
    let disk = device.sysfs();
    let partitions = children(&disk).map(|path| path.join("holders"));
    for directory in std::iter::once(disk.join("holders")).chain(partitions) {
        for holder in children(&directory) {
            let name = holder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            users.push(format!("/dev/{name} is made of it"));
        }
    }
    for other in children(Path::new("/sys/block")) {
        let file = fs::read_to_string(other.join("loop/backing_file")).unwrap_or_default();
        if parts.paths.contains(file.trim_end()) {
            let name = other.file_name().unwrap_or_default().to_string_lossy().into_owned();
            users.push(format!("/dev/{name} is made of it"));
        }
    }
}

/// The areas in `text`, in the form of `/proc/swaps`, that are on the device.
fn swap_areas<'a>(text: &'a str, parts: &'a Parts) -> impl Iterator<Item = &'a str> {
    swap::areas(text).filter(|area| parts.paths.contains(*area))
}

fn openers(parts: &Parts, users: &mut Vec<String>) {
    for pid in processes() {
        let has = children(Path::new(&format!("/proc/{pid}/fd"))).any(|fd| {
            // By number: in a root of its own, or by another node, the device has another path.
            device_number(&fd).is_some_and(|number| parts.numbers.contains(&number))
        });
        if has {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            users.push(format!("process {pid} ({}) has it open", name.trim_end()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts {
        Parts {
            numbers: ["7:3", "259:1"].map(str::to_owned).into(),
            paths: ["/dev/loop3", "/dev/loop3p1"].map(str::to_owned).into(),
        }
    }

    #[test]
    fn mounts_are_known_by_number_or_by_source() {
        let text = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            30 22 7:3 / /mnt/a rw,relatime shared:5 - ext4 /dev/loop3 rw\n\
            31 22 7:30 / /mnt/b rw - ext4 /dev/loop30 rw\n\
            32 22 259:1 /sub /mnt/c\\040d rw - xfs /dev/root rw\n\
            33 22 0:51 / /mnt/e rw shared:1 master:2 - btrfs /dev/loop3 rw,subvolid=5\n\
            broken\n";
        let parts = parts();
        assert_eq!(mount_points(text, &parts).collect::<Vec<_>>(), ["/mnt/a", "/mnt/c\\040d", "/mnt/e"]);
    }

    #[test]
    fn swap_areas_are_known_by_path() {
        let text = "Filename\t\tType\t\tSize\tUsed\tPriority\n/dev/loop3p1  partition\t100\t0\t-2\n/dev/loop4 partition 1 0 1\n";
        assert_eq!(swap_areas(text, &parts()).collect::<Vec<_>>(), ["/dev/loop3p1"]);
    }

    #[test]
    fn a_device_that_nobody_has_has_no_users() {
        let device = Device::named("nosuchdevice").unwrap();
        assert_eq!(users(&device), [""; 0]);
    }
}
