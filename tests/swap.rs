//! What sessions write stays out of swap: a real swap device is looked through, after the kernel was made to swap out all that
//! it can of the server.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use support::server::{Serve, scratch};
use support::{Image, MIB, Random, Server, assert_bytes};

/// What is looked for.
const MARKER: [u8; 32] = *b"it must never be found in swap!!";

/// How the log says that it could not be done.
const WARNING: &str = "What sessions write may be swapped out: cannot lock ";

const PAGE: usize = 4096;
const PAGES: usize = 4096;
/// Of all those pages.
const BYTES: u64 = 16 * MIB;

/// A swap device in memory, which keeps what is swapped out as it is for whoever reads it.
struct Swap {
    number: String,
}

impl Swap {
    fn new() -> Self {
        let _ = Command::new("modprobe").arg("zram").stderr(Stdio::null()).status();
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")
            .expect("this test needs root, and zram in the kernel");
        let swap = Self { number: number.trim().to_owned() };
        fs::write(swap.setting("disksize"), "256M").expect("its size");
        swap.run("mkswap");
        swap.run("swapon");
        swap
    }

    fn setting(&self, name: &str) -> String {
        format!("/sys/block/zram{}/{name}", self.number)
    }

    fn path(&self) -> String {
        format!("/dev/zram{}", self.number)
    }

    fn run(&self, program: &str) {
        let output = Command::new(program).arg(self.path()).output().expect("it can be run");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How many of its pages hold the marker.
    fn marked(&self) -> usize {
        // What was read before is not to be read again from the cache.
        let mut file = fs::File::open(self.path()).expect("opening the swap device");
        let flushed = Command::new("blockdev").args(["--flushbufs", &self.path()]).status();
        assert!(flushed.expect("blockdev can be run").success());
        let mut page = vec![0; PAGE];
        let mut marked = 0;
        while file.read_exact(&mut page).is_ok() {
            marked += usize::from(page.windows(MARKER.len()).any(|window| window == MARKER));
        }
        marked
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(self.path()).status();
        let _ = fs::write(self.setting("reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

/// A memory control group, of either version.
struct Group {
    path: PathBuf,
    is_first_version: bool,
}

impl Group {
    fn new() -> Self {
        let first = PathBuf::from("/sys/fs/cgroup/memory");
        let is_first_version = first.is_dir();
        let parent = if is_first_version { first } else { PathBuf::from("/sys/fs/cgroup") };
        if !is_first_version {
            // It may be on already.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
        }
        let path = parent.join(format!("memdev-test-{}", std::process::id()));
        fs::create_dir(&path).expect("this test needs root, and memory control groups");
        Self { path, is_first_version }
    }

    fn set(&self, name: &str, value: &str) -> std::io::Result<()> {
        fs::write(self.path.join(name), value)
    }

    fn take_in(&self, server: &Server) {
        self.set("cgroup.procs", &server.pid().to_string()).expect("moving the server");
    }

    /// Has the kernel take from the group what it can.
    fn squeeze(&self) {
        for _ in 0..5 {
            // They fail when not all could be taken.
            let _ = match self.is_first_version {
                true => self.set("memory.force_empty", "0"),
                false => self.set("memory.reclaim", "1G"),
            };
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Random bytes with the marker in every page.
fn marked_pages() -> Vec<u8> {
    let mut bytes = Random::new(5).bytes(BYTES);
    for page in bytes.chunks_mut(PAGE) {
        page[1000..1000 + MARKER.len()].copy_from_slice(&MARKER);
    }
    bytes
}

/// Pages of the swap device with the marker, and pages of a server's that are there, after one that was started with `args` had the
/// marker in each of [`PAGES`] pages.
fn pages_in_swap(args: &[&str]) -> (usize, usize) {
    let dir = scratch();
    let image = Image::partly(dir.path().join("base.img"), 64 * MIB, 0..MIB, 1);
    let group = Group::new();
    // For a server that becomes somebody else.
    let home = scratch();
    for (dir, mode) in [(&dir, 0o755), (&home, 0o777)] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).expect("it is ours");
    }
    let server = Serve::image(&image).dir(home).args(["--memory", "64M"]).args(args).start();
    group.take_in(&server);
    let mut client = server.client("base");
    let data = marked_pages();
    for (page, at) in data.chunks(PAGE).zip((0..).step_by(PAGE)) {
        client.write(at, page);
    }
    // A part of a block, which the server itself copies from where it is received.
    client.write(32 * MIB + 7, &MARKER);
    // Its worker has nothing to do for a moment, and wipes what passed through.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let swap = Swap::new();
    group.squeeze();
    let swapped = pages_of(&server);
    let marked = swap.marked();
    assert_bytes(&client.read(0, BYTES), &data, 0);
    // Locked or not, it comes back.
    client.disconnect();
    server.stop();
    (marked, swapped)
}

/// How many pages of the server's are in swap.
fn pages_of(server: &Server) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmSwap:")).expect("the kernel tells");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024 / PAGE
}

#[test]
fn what_sessions_write_stays_out_of_swap() {
    // Without a lock much of it is there: so it would be found.
    let (unlocked, _) = pages_in_swap(&["--lock-memory", "off"]);
    assert!(unlocked > PAGES / 2, "the kernel swaps: {unlocked} pages");
    assert_eq!(pages_in_swap(&["--lock-memory", "require"]).0, 0);
    assert_eq!(pages_in_swap(&[]).0, 0, "it is the default");
    assert_eq!(pages_in_swap(&["--user", "54321:54321"]).0, 0, "it is locked before root is left");
}

/// Not locked, what is sealed is swapped out as everything else is, and is noise there.
#[test]
fn what_sealed_sessions_write_is_noise_in_swap() {
    let (marked, swapped) = pages_in_swap(&["--lock-memory", "off", "--seal"]);
    assert!(swapped > PAGES / 2, "it is swapped out: {swapped} pages");
    assert_eq!(marked, 0);
}

#[test]
fn a_limit_that_is_too_low_is_an_error_or_a_warning() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let socket = dir.path().join("socket");
    const HEAD: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
    let swaps = dir.path().join("swaps");
    fs::write(&swaps, format!("{HEAD}/dev/zram9 partition 262140 0 -2\n")).expect("writing a file");
    let serve = |lock: &str| {
        let mut command = Command::new("unshare");
        // Whatever swap there is where this runs.
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /proc/swaps && exec \"$@\""]).arg(&swaps);
        // Root without its powers is limited as everybody.
        command.args(["setpriv", "--bounding-set=-all", "--inh-caps=-all", "prlimit", "--memlock=8388608"]);
        command.args([env!("CARGO_BIN_EXE_memdev"), "serve"]).arg(&image.path).arg("--unix").arg(&socket);
        command.args(["--memory", "1G", "--lock-memory", lock]);
        command
    };
    let output = serve("require").output().expect("setpriv can be run");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = said.strip_suffix('\n').expect("a line");
    assert!(
        line.starts_with("memdev: What sessions write would not stay out of swap: cannot lock "),
        "{said}"
    );
    assert!(
        line.ends_with("raise ulimit -l (LimitMEMLOCK=), or start it as root") && !line.contains('\n'),
        "{said}"
    );

    for (lock, has_swap, warnings) in [("auto", true, 1), ("off", true, 0), ("auto", false, 0)] {
        if !has_swap {
            fs::write(&swaps, HEAD).expect("writing a file");
        }
        let mut child = serve(lock).stderr(Stdio::piped()).spawn().expect("setpriv can be run");
        let log = BufReader::new(child.stderr.take().expect("it is a pipe"));
        // What it has to say at start-up comes before this.
        let said: Vec<_> =
            log.lines().map_while(Result::ok).take_while(|line| !line.starts_with("listening")).collect();
        child.kill().expect("killing it");
        child.wait().expect("its end");
        assert!(said.iter().all(|line| !line.contains(" KiB")), "sizes for people: {said:?}");
        let warned = said.iter().filter(|line| line.contains(WARNING)).count();
        assert_eq!(warned, warnings, "{said:?}");
    }
}
