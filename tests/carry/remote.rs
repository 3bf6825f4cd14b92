//! What is asked of every kind of server alike.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::Signal;

use crate::ends::{WRITER, kill_carrier, numbers_of};
use crate::house::{House, tree};
use crate::interop_support::said;
use crate::machine::{kill, once_told};
use crate::support::wait_until;

/// Runs everything here against one kind of server.
macro_rules! scenarios {
    ($server:expr) => {
        $crate::remote::scenarios!($server; there_and_back conflicts new_on_both_sides no_removal cut_off_and_back away_at_the_end killed
            killed_while_it_sends);
    };
    ($server:expr; $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $crate::remote::$name(&mut $server);
            }
        )*
    };
}
pub(crate) use scenarios;

/// A server whose files can be looked at.
pub trait Server {
    /// Where to is carried.
    fn url(&self) -> String;

    /// What memdev needs in its environment.
    fn environment(&self) -> Vec<(&'static str, String)>;

    /// Where the server has its files.
    fn files(&self) -> PathBuf;

    /// Where the server has what is not whole yet.
    fn unfinished(&self) -> PathBuf {
        self.files()
    }

    /// Ends it, and all of its connections.
    fn stop(&mut self);

    /// Starts it again.
    fn start(&mut self);
}

pub fn house(server: &dyn Server) -> House {
    House::at(&server.url(), &server.environment())
}

fn read(server: &dyn Server, name: &str) -> String {
    fs::read_to_string(server.files().join(name)).unwrap_or_default()
}

/// What is there, without modes where the server keeps none, and without what it keeps beside (`.DAV`, `%`).
pub fn names(server: &dyn Server) -> Vec<String> {
    let all = tree(&server.files());
    let all = all.iter().map(|line| line.split(' ').next().unwrap());
    all.filter(|name| !name.split('/').any(|part| matches!(part, ".DAV" | "%"))).map(str::to_owned).collect()
}

/// What belongs to files gets there and comes back in another session, of which this gives the place; `holes` MiB are a file that is
/// almost none. `made` makes one file more, and `found` looks for that.
pub fn what_belongs_to_files(server: &dyn Server, holes: u64, made: &str, found: &str) -> House {
    let script = format!(
        "echo >root; echo >daemon; chown 1:2 daemon; cp /bin/true suid; chmod 4751 suid; mkdir -m 1770 shared; \
         ln -s ../x link; ln -s a b; chown -h 1:2 b; touch -d @1000000000.5 root; truncate -s {holes}M holes; echo x >>holes; {made}"
    );
    assert_eq!(house(server).sh(&[], &script), "");
    assert!(
        names(server).contains(&"link".to_owned())
            && server.files().join("link").metadata().unwrap().is_file()
    );
    let back = format!(
        "set -e; test $(stat -c %u:%g:%a root daemon suid shared | tr '\\n' ,) = 0:0:644,1:2:644,0:0:4751,0:0:1770,; \
         test $(readlink link) = ../x; test $(stat -c %.Y root) = 1000000000.500000000; test $(stat -c %u:%g b) = 1:2; \
         test $(stat -c %s holes) = {}; {found}",
        (holes << 20) + 2
    );
    let back_in = house(server);
    back_in.sh(&[], &back);
    back_in
}

/// Files get there, come back in another session, are changed again and removed.
pub fn there_and_back(server: &mut dyn Server) {
    let first = house(server);
    let script = "mkdir -p d/e; echo one >d/e/f; : >empty; head -c 3000000 /dev/urandom >big; sha256sum big >sum; echo 50 >'50% ä#?&+;'";
    first.sh(&[], script);
    assert_eq!(names(server), ["50%", "big", "d/", "d/e/", "d/e/f", "empty", "sum"]);
    assert_eq!(server.files().join("big").metadata().unwrap().len(), 3_000_000);
    let script = "set -e; sha256sum -c --quiet sum; test $(cat d/e/f) = one; test -e empty; test ! -s empty; test $(cat '50% ä#?&+;') = 50; \
                  echo two >d/e/f; rm big sum empty 50*; mv d/e d/g";
    house(server).sh(&["--carry-deletes"], script);
    assert_eq!(names(server), ["d/", "d/g/", "d/g/f"]);
    assert_eq!(read(server, "d/g/f"), "two\n");
    // A file in the place of a directory, and the other way round.
    house(server).sh(&["--carry-deletes"], "rm -r d; echo 5 >d; mkdir j; echo 6 >j/l");
    assert_eq!(names(server), ["d", "j/", "j/l"]);
    house(server).sh(&["--carry-deletes"], "test $(cat d) = 5; rm -r d j; mkdir d; echo 7 >j");
    assert_eq!(names(server), ["d/", "j"]);
    house(server).sh(&[], "test $(cat j) = 7; rm j");
    assert_eq!(read(server, "j"), "7\n", "removals are not carried unless asked for");
}

/// What another session, or somebody else, has changed is kept.
pub fn conflicts(server: &mut dyn Server) {
    fs::write(server.files().join("x"), "before").unwrap();
    let house = house(server);
    // Some servers tell versions of one second by nothing but their size.
    let script = once_told("sleep 2; echo inside >x; rm y; sleep 1000");
    let mut running = house.start(&["--carry-deletes"], &script);
    assert_eq!(running.line(), "set\n");
    fs::write(server.files().join("x"), "outside").unwrap();
    running.tell();
    wait_until("it is delivered", || read(server, "x") == "inside\n");
    kept_beside(server, &house);
}

/// Two make a file of the same name.
pub fn new_on_both_sides(server: &mut dyn Server) {
    let house = house(server);
    let mut running = house.start(&[], &once_told("echo inside >x; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(server.files().join("x"), "outside").unwrap();
    running.tell();
    wait_until("it is delivered", || read(server, "x") == "inside\n");
    kept_beside(server, &house);
}

/// What was written to `x` outside is there still, and that is told.
#[track_caller]
fn kept_beside(server: &dyn Server, house: &House) {
    let kept =
        || names(server).into_iter().filter(|name| name.starts_with("x.conflict-")).collect::<Vec<_>>();
    wait_until("the other is beside", || !kept().is_empty());
    let kept = kept();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(read(server, &kept[0]), "outside");
    wait_until("it is told", || {
        house.status()["running"][0]["notes"].to_string().contains("x was changed by another session as well")
    });
}

/// What has been changed elsewhere is not removed.
pub fn no_removal(server: &mut dyn Server) {
    fs::write(server.files().join("x"), "before").unwrap();
    let house = house(server);
    let mut running = house.start(&["--carry-deletes"], &once_told("sleep 2; rm x; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(server.files().join("x"), "changed").unwrap();
    running.tell();
    wait_until("it is told", || {
        house.status()["running"][0]["notes"].to_string().contains("x has been changed at the destination")
    });
    assert_eq!(read(server, "x"), "changed");
}

/// The server is away while the session runs, and comes back.
pub fn cut_off_and_back(server: &mut dyn Server) {
    let house = house(server);
    let running =
        house.start(&[], "echo 0 >count; i=1; while sleep 0.1; do echo $i >count; i=$((i+1)); done");
    wait_until("it is delivered", || !read(server, "count").is_empty());
    server.stop();
    wait_until("it has failed", || house.status()["running"][0]["failures"].as_u64() > Some(1));
    let status = house.status();
    assert!(status["running"][0]["last_error"].is_string(), "{status}");
    let before = read(server, "count");
    server.start();
    wait_until("it is delivered again", || read(server, "count") != before);
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    assert!(house.spooled().is_empty());
}

/// The server is away at the end: the rest is in the spool, and is delivered later.
pub fn away_at_the_end(server: &mut dyn Server) {
    let house = house(server);
    let mut command =
        house.command(&["--carry-wait", "1s"], "echo 1 >early; read x; echo late >late; exit 0");
    let mut child = command.stdin(Stdio::piped()).spawn().expect("memdev can be run");
    wait_until("it is delivered", || read(server, "early") == "1\n");
    server.stop();
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(74));
    assert_eq!(read(server, "late"), "");
    assert_eq!(house.spooled().len(), 1);
    let failed = house.memdev_carry(&["resume"]);
    assert!(!failed.status.success());
    assert_eq!(house.spooled().len(), 1, "it stays there");
    server.start();
    let resumed = house.memdev_carry(&["resume"]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert_eq!(read(server, "late"), "late\n");
    assert!(house.spooled().is_empty());
}

/// The carrier is killed while it writes, and while the server is away: another takes over, and nothing is torn.
/// What a killed carrier had delivered and not yet written down is kept beside where a server tells nobody's session.
pub fn killed(server: &mut dyn Server) {
    let house = house(server);
    let mut running = house.start(&["--carry-wait", "20s", "--carry-exclude", ".part"], WRITER);
    let mut last: u64 = 0;
    for round in 0..3 {
        for _ in 0..40 {
            last = running.line().trim_end().parse().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(7));
        }
        if round == 1 {
            server.stop();
        }
        kill_carrier(&house);
        if round == 1 {
            server.start();
        }
        numbers_of(&server.files(), true);
    }
    kill(&running.session()["init"], Signal::KILL);
    wait_until("the carrier has ended", || house.status()["running"].as_array().unwrap().is_empty());
    drop(running);
    assert!(house.spooled().is_empty());
    let mut all = numbers_of(&server.files(), true);
    all.sort_unstable();
    let newest = *all.last().unwrap();
    assert!(newest >= last, "{last} was closed, {newest} is there");
    assert!(all.iter().filter(|n| **n + 8 > newest).count() >= 6, "{all:?}");
    let left = names(server).into_iter().filter(|name| name.starts_with(".memdev-carry-")).count();
    // One carrier may have had all of the writer's seven files under way.
    assert!(left <= 7, "one that took over has removed what the one before had left: {left}");
}

/// The carrier is killed in the midst of a long file: half of it never has the name, nor stays.
pub fn killed_while_it_sends(server: &mut dyn Server) {
    const SIZE: u64 = 80_000_000;
    let house = house(server);
    let script = format!(
        "head -c {SIZE} /dev/urandom >.part; sha256sum .part | sed s/.part/big/ >sum; mv .part big; sleep 1000"
    );
    let running = house.start(&["--carry-exclude", ".part"], &script);
    // Some servers have names of their own for what is not whole.
    let begun = || {
        let all = fs::read_dir(server.unfinished()).unwrap().flatten();
        let begins = all.filter(|entry| entry.file_name().to_string_lossy().starts_with('.'));
        begins.flat_map(|entry| entry.metadata()).any(|metadata| metadata.is_file() && metadata.len() > 0)
    };
    wait_until("half of it is there", begun);
    kill_carrier(&house);
    let whole = || match server.files().join("big").metadata() {
        Ok(metadata) => {
            assert_eq!(metadata.len(), SIZE, "it is torn");
            true
        }
        Err(_) => false,
    };
    wait_until("it is delivered", whole);
    kill(&running.session()["init"], Signal::KILL);
    drop(running);
    wait_until("the carrier has ended", || house.status()["running"].as_array().unwrap().is_empty());
    assert_eq!(names(server), ["big", "sum"]);
    self::house(server).sh(&[], "sha256sum -c --quiet sum");
}
