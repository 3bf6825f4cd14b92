//! Whatever is wrong refuses the login: a status, a line that tells nothing, the reason in the log, and no shell.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::process::{Output, Stdio};

use rustix::process::Signal;

use super::machine::{DIR, Machine, has_ended, parent, send};
use crate::interop_support::said;
use crate::support::wait_until;

fn attempt(machine: &Machine) -> Output {
    machine.login(&["-c", "echo in"]).output().unwrap()
}

#[test]
fn users_that_have_no_entry_or_are_none() {
    let machine = Machine::new();
    let of = |uid: u32| {
        machine.command_of(uid, &format!("{DIR}/memdev")).args(["login", "-c", "echo in"]).output().unwrap()
    };
    machine.assert_refused(&of(4713), "No entry of the settings is for the user stranger");
    machine.assert_refused(&of(54321), "The host has no user of the number 54321");
}

#[test]
fn settings_that_are_not_to_be_believed() {
    let machine = Machine::new();
    let file = machine.file("login.toml");
    let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    assert_eq!(said(&attempt(&machine)), "in\n");
    mode(0o646);
    machine.assert_refused(&attempt(&machine), "login.toml: others can write to it");
    mode(0o644);
    chown(&file, Some(4711), None).unwrap();
    machine.assert_refused(&attempt(&machine), "login.toml: it is not root's");
    fs::remove_file(&file).unwrap();
    machine.assert_refused(&attempt(&machine), "Cannot read /run/t/login.toml: no such file");
    machine.settings("[default]\nimage = ");
    machine.assert_refused(&attempt(&machine), "Mistake in /run/t/login.toml: line 2: ");
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\ncolour = 'red'\n"));
    machine.assert_refused(&attempt(&machine), "unknown field `colour`");
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\n"));
    assert_eq!(said(&attempt(&machine)), "in\n");
}

#[test]
fn images_that_are_none() {
    let machine = Machine::new();
    machine.settings(&format!("[default]\nimage = '{DIR}/none'\n"));
    machine.assert_refused(&attempt(&machine), "Cannot look at /run/t/none: no such file");
    fs::write(machine.file("none"), [7; 1 << 20]).unwrap();
    fs::set_permissions(machine.file("none"), fs::Permissions::from_mode(0o666)).unwrap();
    machine.assert_refused(&attempt(&machine), "Cannot trust /run/t/none: others can write to it");
    fs::set_permissions(machine.file("none"), fs::Permissions::from_mode(0o644)).unwrap();
    machine.assert_refused(&attempt(&machine), "file system");
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nbinds = ['{DIR}/nowhere:/mnt']\n"));
    machine.assert_refused(&attempt(&machine), "Cannot bind /run/t/nowhere");
    machine.settings("[default]\nsession = 'nbd+unix:///x@{user}?socket=/run/t/nobody'\n");
    machine.assert_refused(&attempt(&machine), "/run/t/nobody");
    machine.settings(&format!("[default]\nimage = '{DIR}/image'\nuser = 'nobody-there'\n"));
    machine.assert_refused(&attempt(&machine), "The image has no user 'nobody-there'");
}

#[test]
fn no_daemon() {
    let mut machine = Machine::without_daemon();
    let output = attempt(&machine);
    assert_eq!(output.status.code(), Some(125));
    let line = String::from_utf8_lossy(&output.stderr);
    assert!(line.starts_with("memdev: Cannot reach 'memdev logind' at /run/memdev-login/socket: "), "{line}");
    assert_eq!(output.stdout, b"");
    // One of a user's is none, and gets nothing.
    machine.start_daemon();
    machine.kill_daemon();
    let socket = machine.file("../memdev-login/socket");
    fs::remove_file(&socket).unwrap();
    let script = "import os,socket,sys; s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.bind(sys.argv[1]); \
        os.chmod(sys.argv[1],0o666); os.setuid(4713); s.listen(); print('ready',flush=True); s.accept()[0].recv(9); print('talked to')";
    let mut command = machine.command("/usr/bin/python3");
    command.args(["-c", script, "/run/memdev-login/socket"]);
    let fake = machine.begin(command);
    let output = attempt(&machine);
    assert!(said(&output).contains("It is not root who listens at"), "{}", said(&output));
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(fake.finish(), (Some(0), "talked to\n".to_owned()));
}

/// Neither a client nor a worker that is killed while the private root is made leaves anything behind; here it waits for the
/// server of the session that is to be the root.
#[test]
fn killed_in_the_middle() {
    let machine = Machine::new();
    machine.settings(&format!("[default]\nsession = 'nbd+unix:///x@{{user}}?socket={DIR}/server'\n"));
    let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); \
        print('ready',flush=True); kept=[]
while True: kept.append(s.accept()); print('asked',flush=True)";
    let mut command = machine.command("/usr/bin/python3");
    command.args(["-c", script, &format!("{DIR}/server")]);
    let mut server = machine.begin(command);
    for killed in ["client", "worker"] {
        let mut login = machine.login(&["-c", "echo in"]);
        let client = login.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(server.line(), "asked\n");
        let launcher =
            machine.sessions().iter().map(|session| session["launcher"].clone()).find(|pid| !has_ended(pid));
        let launcher = launcher.expect("it has begun");
        send(if killed == "client" { client.id() } else { parent(&launcher) }, Signal::KILL);
        let output = client.wait_with_output().unwrap();
        if killed == "worker" {
            assert_eq!(said(&output), "memdev: The login has been broken off: its worker has died\n");
            assert_eq!(output.status.code(), Some(125));
        }
        wait_until("the launcher has ended", || has_ended(&launcher));
    }
}

/// A login shell's arguments are the user's: nothing else of memdev is to be had by them.
#[test]
fn arguments_of_a_login_shell() {
    let machine = Machine::new();
    let shell =
        |args: &[&str]| machine.command_of(4711, &format!("{DIR}/memdev-login")).args(args).output().unwrap();
    assert_eq!(said(&shell(&["-c", "echo $((1 + 1))"])), "2\n");
    for args in [&["ns", "--", "id"][..], &["-c", "id", "x"], &["--version"], &["run"]] {
        let output = shell(args);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(said(&output), "memdev: A login shell takes nothing but -c COMMAND\n");
    }
}

/// What the client says is not believed.
#[test]
fn requests_that_are_none() {
    let machine = Machine::new();
    let script = "import array,json,os,socket,sys
def ask(message, fds):
    s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.connect('/run/memdev-login/socket')
    s.sendmsg([message], [(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array('i',fds))] if fds else [])
    print(s.recv(1000).decode())
null=os.open('/dev/null',os.O_RDWR); etc=os.open('/etc',os.O_RDONLY); path=os.open('/etc/shadow',os.O_PATH)
login=json.dumps({'line':list(b'echo in'),'env':[]}).encode()
ask(b'nonsense',[]); ask(b'{}',[null]*3); ask(login,[null]*2); ask(login,[null,etc,null]); ask(login,[path,null,null])
ask(json.dumps({'open':'root','service':'x'}).encode(),[])";
    let output = machine.command_of(4711, "/usr/bin/python3").args(["-c", script]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert_eq!(told.matches("refused").count(), 6, "{}", said(&output));
    for why in
        ["no request", "Descriptor 1 is none", "Descriptor 0 is none", "Who is not root asks for a login"]
    {
        assert!(machine.log().contains(why), "{why} is not in {}", machine.log());
    }
    assert_eq!(machine.sh("echo in"), "in\n");
}

/// What is bound is mounted by root, who followed a symbolic link of the user's wherever it led to: to all of the host's files,
/// and those of root's were root's inside.
#[test]
fn what_is_bound_is_no_link_of_the_users() {
    let machine = Machine::new();
    let home = machine.file("home");
    fs::create_dir(home.join("real")).unwrap();
    fs::write(home.join("real/file"), "mine\n").unwrap();
    chown(&home, Some(4711), Some(4711)).unwrap();
    machine.settings(&format!(
        "[default]\nimage = '{DIR}/image'\nuser = 'root'\nbinds = ['{DIR}/home/work:/mnt']\n"
    ));
    symlink("real", home.join("work")).unwrap();
    assert_eq!(machine.sh("cat /mnt/file"), "mine\n", "a link of root's is one");
    fs::remove_file(home.join("work")).unwrap();
    symlink("/etc", home.join("work")).unwrap();
    lchown(home.join("work"), Some(4711), Some(4711)).unwrap();
    machine.assert_refused(&attempt(&machine), "work: a symbolic link that is not root's");
}

/// Whoever comes when there are too many is told so; but that one who has gone meanwhile could not be told was a failure, after
/// which the daemon took nobody in for a while.
#[test]
fn who_comes_and_goes_does_not_hold_up_others() {
    const FLOOD: &str = "import os, socket, sys, time\nos.setuid(4711)\n\
        def come():\n  s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.setblocking(False); s.connect(sys.argv[1]); return s\n\
        held = [come() for n in range(64)]; print('ready', flush=True)\n\
        while True:\n  try: come().close()\n  except BlockingIOError: time.sleep(0.001)\n";
    let machine = Machine::new();
    let mut command = machine.command("python3");
    command.args(["-c", FLOOD, "/run/memdev-login/socket"]).stdout(Stdio::piped());
    let mut flood = command.spawn().unwrap();
    let mut ready = [0; 6];
    flood.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    wait_until("there are too many", || machine.log().contains("too many at once"));
    let output = machine.command_of(4712, &format!("{DIR}/memdev")).args(["login", "-c", "echo in"]).output();
    flood.kill().unwrap();
    flood.wait().unwrap();
    assert_eq!(said(&output.unwrap()), "in\n");
}
