//! How much memory a server may take for overlays when nobody says.

use std::fs;
use std::path::Path;

/// Half of the machine's memory, or of what this process's control groups leave it: the other half is for the page cache
/// and for programs. In bytes.
#[must_use]
pub fn default_budget() -> u64 {
    available() / 2
}

/// The machine's memory, or what this process' control groups leave it, in bytes.
pub(super) fn available() -> u64 {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = limits(&groups, Path::new("/sys/fs/cgroup")).min();
    machine().min(limit.unwrap_or(u64::MAX))
}

fn machine() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "the field's type differs between architectures")]
    let total = u64::from(info.totalram) * u64::from(info.mem_unit.max(1));
    total
}

/// The limits of the groups in `groups` (the text of `/proc/self/cgroup`) and of all groups above them, in both versions
/// of control groups.
fn limits<'a>(groups: &'a str, root: &'a Path) -> impl Iterator<Item = u64> + 'a {
    groups.lines().flat_map(move |line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            _ => (root.join("memory"), "memory.limit_in_bytes"),
        };
        let counts = controllers.is_empty() || controllers.split(',').any(|name| name == "memory");
        let own = root.join(path.trim_start_matches('/'));
        let above: Vec<_> =
            own.ancestors().take_while(|dir| dir.starts_with(&root)).map(|dir| dir.join(file)).collect();
        above
            .into_iter()
            .filter(move |_| counts)
            .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_all_groups_above_count() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let file = dir.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        put("a/memory.max", "1000\n");
        put("a/b/memory.max", "max\n");
        put("memory/c/memory.limit_in_bytes", "2000\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        let of = |groups: &str| limits(groups, dir.path()).collect::<Vec<_>>();
        assert_eq!(of("0::/a/b"), [1000]);
        assert_eq!(of("5:cpu:/c\n4:memory:/c\n"), [2000, 9_223_372_036_854_771_712]);
        assert_eq!(of("nonsense"), [] as [u64; 0]);
        assert!(default_budget() <= machine() / 2);
    }
}
