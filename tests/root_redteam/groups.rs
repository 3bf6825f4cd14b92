//! Control groups: limits cannot be taken off, nor left behind.

use crate::machine::{MODES, Mode, image, run, sh};

/// Every control group file system that can be mounted is, and every limit in it taken off; then another group is made there, and
/// gone to. Prints what could be written, and `all` if 60 processes can be started.
const ATTACK: &str = r#"
    for kind in "cgroup2 -onone" "cgroup -opids" "cgroup -omemory" "cgroup -ofreezer"; do
        mount -t ${kind% *} $([ ${kind% *} = cgroup2 ] || echo ${kind#* }) none /mnt 2>/dev/null || continue
        echo "mounted ${kind}" >&2
        for limit in pids.max:max memory.max:max memory.swap.max:max memory.high:max memory.limit_in_bytes:-1 \
            memory.memsw.limit_in_bytes:-1 cgroup.procs:0 tasks:0 cgroup.subtree_control:+pids; do
            [ -e /mnt/${limit%:*} ] || continue
            echo ${limit#*:} 2>/dev/null >/mnt/${limit%:*} && echo "${limit%:*}" >&2
        done
        mkdir /mnt/new 2>/dev/null && echo "made" >&2 && echo 0 2>/dev/null >/mnt/new/cgroup.procs
        ls /mnt/../mnt/.. | grep -q memdev- && echo "above" >&2
        umount -l /mnt
    done
    i=0; while [ $i -lt 60 ]; do sleep 100 & i=$((i + 1)); done; echo all"#;

#[test]
fn limits_cannot_be_taken_off_from_inside() {
    for mode in MODES {
        // As root inside, and as root in namespaces of one's own.
        for prefix in [&["sh", "-c"][..], &["unshare", "-UrmC", "sh", "-c"]] {
            let attack = |options: &[&str]| {
                let mut command = run(mode, &image(), options);
                let output = command.args(prefix).arg(ATTACK).output().expect("it can be run");
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                (text(&output.stdout), text(&output.stderr))
            };
            let (free, told) = attack(&[]);
            assert_eq!(free, "all\n", "{mode:?}: without a limit they can be started: {told}");
            let (limited, told) = attack(&["--pids-limit", "20", "--memory-limit", "256M"]);
            assert_eq!(limited, "", "{mode:?} {prefix:?}: {told}");
            if prefix.len() > 2 {
                assert!(told.contains("mounted"), "{mode:?}: nothing can be attacked: {told}");
            }
            let written = told.lines().filter(|line| !line.starts_with("mounted") && !line.contains("ork"));
            let written: Vec<_> = written.collect();
            if mode == Mode::User {
                assert_eq!(written, [""; 0], "{prefix:?}");
            }
            assert!(!told.contains("above"), "{mode:?}: {told}");
        }
    }
}

/// Where the session is on the host is not to be seen.
#[test]
fn the_place_of_its_group_is_not_to_be_seen() {
    for mode in MODES {
        let text = sh(
            mode,
            &[],
            "cut -d: -f3 /proc/self/cgroup /proc/1/cgroup | sort -u; ls -A /sys/fs/cgroup | wc -l",
        );
        assert_eq!(text, "/\n0\n", "{mode:?}");
    }
}
