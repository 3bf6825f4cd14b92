//! What gets to the destination, and back into the next session.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};

use rustix::process::Signal;

use crate::house::House;
use crate::machine::{kill, once_told};
use crate::spool::Small;
use crate::support::wait_until;

#[test]
fn what_is_changed_is_there_afterwards_and_next_time() {
    let house = House::new();
    let said = house.sh(
        &[],
        "echo hello >a; mkdir -p d/e; printf 123 >d/e/f; ln -s ../a d/link; chmod 640 a; : >empty; touch -d @1000000000.5 a",
    );
    assert_eq!(said, "");
    assert_eq!(
        house.tree(),
        ["a 640 6", "d/ 755", "d/e/ 755", "d/e/f 644 3", "d/link -> ../a", "empty 644 0"]
    );
    let metadata = house.dest("a").metadata().unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1_000_000_000, 500_000_000));
    // On another machine: another session, another server process.
    let elsewhere = House::to(house.dest(""));
    elsewhere.sh(
        &[],
        "set -e; test $(cat a) = hello; test $(stat -c %a:%Y a) = 640:1000000000; test $(readlink d/link) = ../a; test $(cat d/e/f) = 123; \
         test ! -s empty; echo more >>a; test ! -e /home/u/other; rm empty",
    );
    assert_eq!(house.read("a"), "hello\nmore\n");
    assert!(house.dest("empty").exists(), "removals are not carried unless asked for");
}

#[test]
fn what_the_image_has_is_not_carried_until_it_is_changed() {
    let place = House::new();
    let output = place.place.attempt(
        &["--carry", &format!("/etc={}", place.dest("").display())],
        "echo kiosk >/etc/hostname; chmod 644 /etc/hostname; mkdir -m 755 /etc/new.d",
    );
    assert!(output.status.success());
    assert_eq!(place.tree(), ["hostname 644 6", "new.d/ 755"]);
}

#[test]
fn it_is_there_while_the_session_runs() {
    let house = House::new();
    let running = house.start(&[], "echo one >x; sleep 1000");
    wait_until("it is delivered", || house.read("x") == "one\n");
    wait_until("it is told", || house.status()["running"][0]["phase"] == "running");
    let status = house.status();
    assert_eq!(status["running"][0]["path"], "/home/u", "{status}");
    wait_until("it is counted", || house.status()["running"][0]["delivered"] == 1);
    assert_eq!(house.status()["running"][0]["waiting"], 0);
    let text = String::from_utf8(house.memdev_carry(&["status"]).stdout).unwrap();
    assert!(text.contains(": /home/u to ") && text.contains("0 waiting"), "{text}");
    drop(running);
    wait_until("the carrier has ended", || house.status()["running"].as_array().unwrap().is_empty());
}

#[test]
fn a_file_is_carried_when_it_is_closed() {
    let house = House::new();
    let script = "exec 3>x; echo begun >&3; echo other >y; read go; echo ended >&3; exec 3>&-; sleep 1000";
    let mut command = house.place.run(
        &["--carry", &format!("/home/u={}", house.dest("").display()), "--workdir", "/home/u"],
        &["sh", "-c", &format!("echo ready; {script}")],
    );
    command.stdin(std::process::Stdio::piped());
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("the other is delivered", || house.read("y") == "other\n");
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(!house.dest("x").exists(), "somebody writes it still");
    child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    wait_until("it is delivered", || house.read("x") == "begun\nended\n");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn removals_are_carried_if_asked_for() {
    let house = House::new();
    house.sh(&[], "mkdir d d/e; echo 1 >d/e/f; echo 2 >d/g; echo 3 >h; ln -s h i");
    house.sh(&["--carry-deletes"], "rm -r d/e i; mv h j; rm d/g; echo 4 >d/k");
    assert_eq!(house.tree(), ["d/ 755", "d/k 644 2", "j 644 2"]);
    // A file in the place of a directory, and the other way round.
    house.sh(&["--carry-deletes"], "rm -r d j; echo 5 >d; mkdir j; echo 6 >j/l");
    assert_eq!(house.tree(), ["d 644 2", "j/ 755", "j/l 644 2"]);
    // All of it is no removal, but an accident.
    let said = house.sh(&["--carry-deletes"], "cd /; rm -r /home/u");
    assert!(said.contains("/home/u is not there any more: nothing of it is removed"), "{said}");
    assert_eq!(house.tree().len(), 3);
}

#[test]
fn rules_decide_what_is_carried() {
    let house = House::new();
    let rules = house.place.path("rules");
    fs::write(&rules, ".cache/\n*.o\n").unwrap();
    fs::create_dir(house.dest(".cache")).unwrap();
    fs::write(house.dest(".cache/old"), "x").unwrap();
    house.sh(
        &["--carry-rules", rules.to_str().unwrap(), "--carry-exclude", "/tmp", "--carry-include", "keep.o"],
        "test ! -e .cache; mkdir -p .cache/a src/tmp tmp; echo >.cache/a/b; echo >src/x.o; echo >src/keep.o; echo >src/tmp/y; echo >tmp/z",
    );
    assert_eq!(
        house.tree(),
        [
            ".cache/ 755",
            ".cache/old 644 1",
            "src/ 755",
            "src/keep.o 644 1",
            "src/tmp/ 755",
            "src/tmp/y 644 1"
        ]
    );
}

#[test]
fn owners_and_modes_come_back_but_give_no_rights_outside() {
    let house = House::new();
    chown(house.dest(""), Some(4711), Some(4712)).unwrap();
    house.sh(
        &[],
        "echo >root; echo >daemon; chown 1:2 daemon; cp /bin/true suid; chmod 4755 suid; mkdir -m 2770 shared; chown 0:50 shared; \
         mkfifo pipe",
    );
    let of = |name: &str| {
        let metadata = house.dest(name).metadata().unwrap();
        (metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777)
    };
    assert_eq!(of("root"), (4711, 4712, 0o644));
    assert_eq!(of("daemon"), (1, 2, 0o644));
    assert_eq!(of("suid"), (4711, 4712, 0o755));
    assert_eq!(of("shared"), (4711, 50, 0o770));
    assert!(!house.dest("pipe").exists());
    house.sh(
        &[],
        "set -e; test $(stat -c %u:%g:%a root daemon suid shared | tr '\\n' ,) = 0:0:644,1:2:644,0:0:4755,0:50:2770,",
    );
}

#[test]
fn attributes_are_carried() {
    let house = House::new();
    fs::write(house.dest("x"), "before").unwrap();
    let path = house.dest("x");
    rustix::fs::setxattr(&path, "user.from-outside", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    let said = house.sh(&[], "echo changed >>x; chmod 600 x");
    assert_eq!(said, "");
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(&path, "user.from-outside", &mut value).unwrap();
    assert_eq!(&value[..length], b"1");
    attributes_of_a_directory(|| House::to(house.dest("")));
}

/// What sets, gets and removes an attribute of the directory `d`, by what every Debian has.
fn attribute() -> [String; 3] {
    // setxattr, getxattr, removexattr.
    ["188, $f, $n, $v, 1, 0", "191, $f, $n, $v, 1", "197, $f, $n"].map(|call| {
        format!("perl -e '($f, $n, $v) = (\"d\", \"user.a\", \"1\"); syscall({call}) >= 0 or die $!'")
    })
}

/// A directory gets an attribute, loses it, and nothing else of it changes.
pub fn attributes_of_a_directory(house: impl Fn() -> House) {
    let [set, get, remove] = attribute();
    house().sh(&[], "mkdir d");
    house().sh(&[], &format!("! {get} && {set}"));
    house().sh(&[], &format!("{get} && {remove}"));
    house().sh(&[], &format!("test -d d && ! {get}"));
}

#[test]
fn a_directory_is_carried_with_its_attributes_but_not_with_what_is_in_it() {
    let house = House::new();
    let [set, _, remove] = attribute();
    let script = format!(
        "mkdir d; read go; {set}; read go; for n in 1 2 3; do echo $n >d/$n; sleep 0.5; done; read go; {remove}; read go"
    );
    let mut command = house.command(&[], &script);
    command.stdin(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut go = || child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    let delivered = || house.status()["running"][0]["delivered"].as_u64().unwrap_or(0);
    let has = || rustix::fs::getxattr(house.dest("d"), "user.a", &mut [0; 8]).is_ok();
    wait_until("it is delivered", || delivered() == 1);
    assert!(!has());
    go();
    wait_until("its attribute is delivered", || has() && delivered() == 2);
    go();
    wait_until("what is in it is delivered", || house.read("d/3") == "3\n" && delivered() >= 5);
    assert_eq!(delivered(), 5, "once the directory, once more its attribute, and the files");
    go();
    wait_until("the attribute is gone", || !has() && delivered() == 6);
    go();
    assert!(child.wait().unwrap().success());
    house.place.assert_empty();
}

#[test]
fn any_name_is_carried() {
    let house = House::new();
    house.sh(&[], "printf x >\"$(printf 'new\\nline')\"; printf x >\"$(printf '\\377 \\033[31m')\"; printf x >-rf; printf x >'50%'; mkdir ' '; printf x >' / '");
    let expected =
        [" /  644 1", " / 755", "-rf 644 1", "50% 644 1", "\\xff \\x1b[31m 644 1", "new\\nline 644 1"];
    assert_eq!(house.tree(), expected);
    house.sh(&[], "test $(ls | wc -l) = 6; test \"$(cat ./-rf)\" = x");
}

#[test]
fn a_large_file_with_holes_keeps_them() {
    let house = House::new();
    house.sh(
        &[],
        "truncate -s 1T big; printf end | dd of=big bs=1 seek=999999999999 conv=notrunc status=none",
    );
    let metadata = house.dest("big").metadata().unwrap();
    assert_eq!(metadata.len(), 1 << 40);
    assert!(metadata.blocks() < 1000, "{}", metadata.blocks());
    let mut end = [0; 3];
    fs::File::open(house.dest("big")).unwrap().read_exact_at(&mut end, 999_999_999_999).unwrap();
    assert_eq!(&end, b"end");
}

#[test]
fn links_in_the_image_lead_to_the_directory() {
    let house = House::new();
    let carry = format!("/var/run-home/u={}", house.dest("").display());
    let output = house.place.attempt(&["--carry", &carry], "echo >/var/run-home/u/x");
    assert!(output.status.success());
    // Debian has /bin as a link to usr/bin.
    let carry = format!("/bin/new={}", house.dest("").display());
    let output = house.place.attempt(&["--carry", &carry], "test -e /usr/bin/new/x; echo >/bin/new/y");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(house.tree(), ["x 644 1", "y 644 1"]);
}

#[test]
fn the_plan_says_what_is_carried() {
    let house = House::new();
    let carry = format!("/home/u={}", house.dest("").display());
    let output = house.place.run(&["--dry-run", "--carry", &carry], &["true"]).output().unwrap();
    let plan = String::from_utf8(output.stdout).unwrap();
    assert!(plan.contains(&format!("fill /home/u from {}, start who", house.dest("").display())), "{plan}");
}

#[test]
fn lost_events_lose_no_files() {
    let house = House::new();
    let _fast = Small::at(house.dest(""), "256m");
    // More than the kernel counts (16,384) while nobody listens.
    let script = "mkdir many; cd many; seq 1 100 | xargs mkdir; for d in *; do (cd $d; seq 1 180 | xargs touch); done; echo made; \
        sleep 1000";
    let mut running = house.start(&[], &once_told(script));
    assert_eq!(running.line(), "set\n");
    wait_until("there is a carrier", || house.status()["running"][0]["pid"].is_u64());
    let carrier = house.status()["running"][0]["pid"].clone();
    kill(&carrier, Signal::STOP);
    running.tell();
    assert_eq!(running.line(), "made\n");
    kill(&carrier, Signal::CONT);
    wait_until("it has noticed", || house.status()["running"][0]["events_lost"].as_u64() > Some(0));
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    assert!(house.spooled().is_empty());
    assert_eq!(house.tree().len(), 1 + 100 + 100 * 180);
}

#[test]
fn a_link_at_the_destination_is_taken_over_as_one() {
    let house = House::new();
    symlink("/etc/passwd", house.dest("l")).unwrap();
    let said = house.sh(&[], "test $(readlink l) = /etc/passwd; rm l; echo mine >l");
    assert_eq!(said, "");
    assert_eq!(house.read("l"), "mine\n");
    assert!(!house.dest("l").symlink_metadata().unwrap().is_symlink());
}
