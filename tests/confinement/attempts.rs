//! What a process that has taken all these steps can still do, tried by one that has: first without, as a control, then
//! with landlock and what root gives up, then with everything.
//!
//! [`attempt`] is that process: this very program, started by the tests. What fails there is told by its error, what
//! kills by the signal.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};

use memdev::confine::{Confinement, Needs};
use rustix::process::Signal;

use super::support::server::scratch;

/// What happened: `Ok`, or the error's number.
type Outcome = Result<(), i32>;
const ALLOWED: Outcome = Ok(());
const EPERM: Outcome = Err(libc::EPERM);
const EACCES: Outcome = Err(libc::EACCES);

/// Does what `name` says, for the `round`th time.
fn act(name: &str, top: &Path, round: usize) -> io::Result<()> {
    let images = top.join("images");
    match name {
        "read image" => File::open(images.join("root.img")).map(drop),
        "read next image" => File::open(images.join("next.img")).map(drop),
        "read elsewhere" => File::open(top.join("secret")).map(drop),
        "read passwords" => File::open("/etc/passwd").map(drop),
        "read own memory" => File::open("/proc/self/mem").map(drop),
        "list images" => fs::read_dir(&images).map(drop),
        "write image" => OpenOptions::new().write(true).open(images.join("root.img")).map(drop),
        "make file" => File::create(images.join(format!("new{round}"))).map(drop),
        "make directory" => fs::create_dir(images.join(format!("directory{round}"))),
        "rename" => fs::rename(top.join(format!("victim{round}")), top.join(format!("renamed{round}"))),
        "remove elsewhere" => fs::remove_file(top.join(format!("victim{round}"))),
        "remove socket" => fs::remove_file(top.join(format!("sockets/socket{round}"))),
        "run" => Command::new("/bin/true").status().map(drop),
        "become" if round == 0 => Ok(()),
        "become" => Err(Command::new("/bin/true").exec()),
        "thread" => std::thread::Builder::new().spawn(|| {}).map(drop),
        "socket" => UnixDatagram::unbound().map(drop),
        "listen tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
        "connect tcp" => TcpStream::connect(std::env::var("MEMDEV_TEST_TCP").unwrap()).map(drop),
        "connect abstract" => {
            let name = top.as_os_str().as_encoded_bytes();
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?).map(drop)
        }
        "signal others" => {
            let parent = rustix::process::getppid().expect("the test is visible");
            Ok(rustix::process::kill_process(parent, Signal::CONT)?)
        }
        "executable memory" => memmap2::MmapMut::map_anon(4096)?.make_exec().map(drop),
        "memory file" => Ok(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).map(drop)?),
        "dumps" => Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?),
        // With what these are given they do nothing, but get as far as that.
        "same user" => Ok(rustix::thread::set_thread_uid(rustix::process::getuid())?),
        "same capabilities" => {
            let sets = rustix::thread::capabilities(None)?;
            Ok(rustix::thread::set_capabilities(None, sets)?)
        }
        "mount" => not_there(rustix::mount::mount(
            "none",
            top.join("none"),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )),
        "change root" => not_there(rustix::process::chroot(top.join("none"))),
        _ => panic!("no attempt is called {name:?}"),
    }
}

/// That the directory is not there, or that one may not, is no refusal of the call as such.
fn not_there(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::PERM) => Ok(()),
        other => Ok(other?),
    }
}

fn tell(result: &io::Result<()>) {
    match result {
        Ok(()) => println!("\noutcome 0"),
        Err(error) => println!("\noutcome {}", error.raw_os_error().expect("the system said it")),
    }
}

#[test]
#[ignore = "run by the tests here, in a process of its own"]
fn attempt() {
    let name = std::env::var("MEMDEV_TEST_ATTEMPT").expect("told what to attempt");
    let top = std::env::var_os("MEMDEV_TEST_TOP").expect("told where");
    let top = Path::new(&top);
    tell(&act(&name, top, 0));
    let sockets = (0..3).map(|round| top.join(format!("sockets/socket{round}"))).collect();
    let needs = Needs { images: vec![top.join("images/root.img")], sockets };
    let entered = Confinement::default().enter(&needs).unwrap();
    tell(&act(&name, top, 1));
    let report = entered.seal().unwrap();
    println!("\nmissing {}", report.missing().unwrap_or_default());
    tell(&act(&name, top, 2));
    // The test harness of this process would go on with what it may no longer do.
    std::process::exit(0);
}

/// How an attempt went: the outcomes of the three rounds, as far as it came, and its end.
struct Attempt {
    outcomes: Vec<Outcome>,
    missing: String,
    status: ExitStatus,
}

fn attempt_to(name: &str) -> Attempt {
    let dir = scratch();
    let top = dir.path();
    for directory in ["images", "sockets"] {
        fs::create_dir(top.join(directory)).unwrap();
    }
    for file in ["images/root.img", "images/next.img", "secret"] {
        fs::write(top.join(file), "x").unwrap();
    }
    for round in 0..3 {
        fs::write(top.join(format!("victim{round}")), "x").unwrap();
        drop(UnixListener::bind(top.join(format!("sockets/socket{round}"))).unwrap());
    }
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let name_of_socket = top.as_os_str().as_encoded_bytes();
    let _abstract =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name_of_socket).unwrap()).unwrap();

    let output = Command::new(std::env::current_exe().unwrap())
        .args(["attempts::attempt", "--exact", "--ignored", "--nocapture"])
        .env("MEMDEV_TEST_ATTEMPT", name)
        .env("MEMDEV_TEST_TOP", top)
        .env("MEMDEV_TEST_TCP", tcp.local_addr().unwrap().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let outcome = |text: &str| match text.parse().unwrap() {
        0 => Ok(()),
        errno => Err(errno),
    };
    let outcomes: Vec<_> =
        said.lines().filter_map(|line| line.strip_prefix("outcome ")).map(outcome).collect();
    assert!(!outcomes.is_empty(), "{name}: {said}{}", String::from_utf8_lossy(&output.stderr));
    let missing = said.lines().find_map(|line| line.strip_prefix("missing ")).unwrap_or_default().to_owned();
    Attempt { outcomes, missing, status: output.status }
}

/// The outcomes without, with landlock, and with everything.
fn outcomes(name: &str) -> [Outcome; 3] {
    let attempt = attempt_to(name);
    assert!(attempt.status.success(), "{name}: {:?}, {}", attempt.outcomes, attempt.status);
    attempt.outcomes.try_into().expect("three rounds")
}

#[test]
fn what_the_server_needs_goes_on() {
    for name in ["read image", "read next image", "remove socket"] {
        assert_eq!(outcomes(name), [ALLOWED; 3], "{name}");
    }
}

#[test]
fn other_files_are_out_of_reach() {
    for name in ["read elsewhere", "read passwords", "read own memory"] {
        // By landlock alone: the call is one that a server makes.
        assert_eq!(outcomes(name), [ALLOWED, EACCES, EACCES], "{name}");
    }
    assert_eq!(outcomes("list images"), [ALLOWED, EACCES, EACCES]);
    assert_eq!(outcomes("remove elsewhere"), [ALLOWED, EACCES, EACCES]);
}

#[test]
fn nothing_is_written_or_made_by_either_defence() {
    for name in ["write image", "make file", "make directory", "rename"] {
        assert_eq!(outcomes(name), [ALLOWED, EACCES, EPERM], "{name}");
    }
}

#[test]
fn nobody_is_connected_to_and_nobody_else_signalled() {
    for (name, what, alone) in [
        ("listen tcp", "TCP ports", EACCES),
        ("connect tcp", "TCP ports", EACCES),
        ("connect abstract", "abstract sockets", EPERM),
        ("signal others", "signals", EPERM),
    ] {
        let Attempt { outcomes, missing, .. } = attempt_to(name);
        // Where landlock does not know of it, system calls do.
        let alone = if missing.contains(what) { ALLOWED } else { alone };
        assert_eq!(outcomes, [ALLOWED, alone, EPERM], "{name}");
    }
    assert_eq!(outcomes("socket"), [ALLOWED, ALLOWED, EPERM]);
}

#[test]
fn no_code_is_brought_in_and_no_thread_or_process_started() {
    for name in ["executable memory", "memory file", "thread", "dumps"] {
        assert_eq!(outcomes(name), [ALLOWED, ALLOWED, EPERM], "{name}");
    }
    let run = attempt_to("run");
    assert_eq!(run.outcomes[..2], [ALLOWED, EACCES], "/bin/true is a file elsewhere");
    // By which call a library starts a process is its own business: one kills, another is refused.
    assert!(run.status.signal() == Some(libc::SIGSYS) || run.outcomes[2..] == [EPERM], "{}", run.status);
}

#[test]
fn what_only_an_intruder_does_ends_the_process() {
    for (name, alone) in [
        ("become", EACCES),
        ("same user", ALLOWED),
        ("same capabilities", ALLOWED),
        ("mount", ALLOWED),
        ("change root", ALLOWED),
    ] {
        let attempt = attempt_to(name);
        assert_eq!(attempt.outcomes, [ALLOWED, alone], "{name}");
        assert_eq!(attempt.status.signal(), Some(libc::SIGSYS), "{name}: {}", attempt.status);
        assert!(!attempt.status.core_dumped(), "{name}");
    }
}
