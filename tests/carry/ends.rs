//! Whoever is killed: what was closed before is delivered or in the spool, and nothing at the destination is torn.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::house::House;
use crate::interop_support::{run, said};
use crate::machine::kill;
use crate::remote::{Server, house};
use crate::servers::Slow;
use crate::sftp::Sftp;
use crate::spool::Small;
use crate::support::wait_until;

/// How many rounds; a few by default.
fn rounds() -> u64 {
    std::env::var("MEMDEV_CARRY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// Writes files one after the other for ever, as programs do that want to be killed at any moment, each with its own number
/// in all of its lines, and says which is there.
pub const WRITER: &str =
    "i=0; while :; do yes $i | head -n 2000 >.part; mv .part f$((i % 7)); echo $i; i=$((i+1)); done";

fn carrier(house: &House) -> Option<Value> {
    house.status()["running"][0]["pid"].as_u64().map(Value::from)
}

/// Kills the carrier, and waits for the one that takes its place.
#[track_caller]
pub fn kill_carrier(house: &House) {
    wait_until("there is a carrier", || carrier(house).is_some());
    let first = carrier(house);
    kill(first.as_ref().unwrap(), Signal::KILL);
    wait_until("another one takes over", || {
        let now = carrier(house);
        now.is_some() && now != first
    });
}

/// The numbers of the files at the destination. Panics if one is torn. Versions that are kept beside, if there may be such, are looked
/// at and not counted.
#[track_caller]
pub fn numbers_of(directory: &Path, may_be_kept: bool) -> Vec<u64> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // What is not whole, and what servers keep beside.
        if name.starts_with('.') {
            continue;
        }
        let is_kept = name.contains("conflict");
        assert!(!is_kept || may_be_kept, "{name}: nobody else has changed anything");
        let text = match fs::read_to_string(&path) {
            // Some servers remove what is replaced before they rename.
            Err(error) if may_be_kept && error.kind() == std::io::ErrorKind::NotFound => continue,
            text => text.unwrap(),
        };
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() == 2000 && lines.iter().all(|line| *line == lines[0]), "{name} is torn");
        if !is_kept {
            all.push(lines[0].parse().unwrap());
        }
    }
    all
}

#[test]
fn killed_at_any_moment() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let mut random = u64::from(seed) | 1;
    for number in 0..rounds() {
        // Xorshift: which moment it is.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let victim = ["launcher", "process 1", "carrier"][usize::try_from(number % 3).unwrap()];
        let trouble = ["none", "full", "cut off", "slow"][usize::try_from(number / 3 % 4).unwrap()];
        let round = Round { victim, trouble, moment: 30 + random % 60, hurry: number % 2 == 1 };
        println!("round {number}, seed {seed}: {round:?}");
        match trouble {
            "full" => {
                let house = House::new();
                let small = Small::at(house.dest(""), "48k");
                let room = ["-o", "remount,size=8m", house.dest("").to_str().unwrap()].map(str::to_owned);
                round.play(&house, &house.dest(""), &mut |is_away| {
                    if !is_away {
                        run("mount", &room);
                    }
                });
                drop(small);
            }
            "cut off" => {
                let mut server = Sftp::new();
                let (house, files) = (house(&server), server.files());
                round.play(&house, &files, &mut |is_away| {
                    if is_away { server.stop() } else { server.start() }
                });
            }
            "slow" => {
                let server = Slow::new(4096, 4096);
                round.play(&house(&server), &server.files(), &mut |_| {});
            }
            _ => {
                let house = House::new();
                round.play(&house, &house.dest(""), &mut |_| {});
            }
        }
    }
}

/// Somebody is killed at some moment, at a destination that has its own trouble.
#[derive(Debug)]
struct Round {
    victim: &'static str,
    trouble: &'static str,
    /// How many files are closed before.
    moment: u64,
    hurry: bool,
}

impl Round {
    /// `away` is told when the trouble begins, if it has not, and when it is over.
    fn play(&self, house: &House, files: &Path, away: &mut dyn FnMut(bool)) {
        let wait = if self.trouble == "cut off" || self.trouble == "full" { "1s" } else { "20s" };
        let mut running = house.start(&["--carry-wait", wait, "--carry-exclude", ".part"], WRITER);
        let mut last = 0;
        for _ in 0..self.moment {
            last = running.line().trim_end().parse().unwrap();
            if !self.hurry {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        away(true);
        match self.victim {
            "launcher" => kill(&running.launcher(), Signal::KILL),
            "process 1" => kill(&running.session()["init"], Signal::KILL),
            _ => {
                kill_carrier(house);
                kill(&running.session()["init"], Signal::KILL);
            }
        }
        // A server does not tell whose a version is: what a carrier had delivered that was killed then may be kept beside.
        let may_be_kept = matches!(self.trouble, "cut off" | "slow");
        numbers_of(files, may_be_kept);
        wait_until("the carrier has ended", || house.status()["running"].as_array().unwrap().is_empty());
        drop(running);
        away(false);
        for one in house.spooled() {
            let resumed = house.memdev_carry(&["resume", one["id"].as_str().unwrap()]);
            assert!(resumed.status.success(), "{self:?}: {}", said(&resumed));
        }
        // One file may have been open at that moment; every other has its newest number.
        let mut all = numbers_of(files, may_be_kept);
        all.sort_unstable();
        let newest = *all.last().unwrap();
        assert!(newest >= last, "{self:?}: {last} was closed, {newest} is there");
        let expected = all.iter().filter(|n| **n + 8 > newest).count();
        assert!(expected >= 6, "{self:?}: {all:?}");
    }
}

/// The names and numbers of the processes that this one has started.
fn children(pid: u32) -> Vec<(String, u32)> {
    let all = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let all = all.split_whitespace().map(|pid| pid.parse::<u32>().unwrap());
    let name =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    all.map(|pid| (name(&pid), pid)).collect()
}

fn child(pid: u32, name: &str) -> Option<u32> {
    children(pid).into_iter().find(|(found, _)| found == name).map(|(_, pid)| pid)
}

/// Who fills heard of nobody's end: with guard and launcher killed it went on, from a slow server for hours, and kept the device and
/// its memory for as long, for a session that nobody was going to be in.
#[test]
fn nothing_is_filled_in_for_nobody() {
    let server = Slow::new(1 << 16, 256);
    let file = fs::File::create(server.files().join("x")).unwrap();
    file.write_all_at(&vec![1; 100 << 20], 0).unwrap();
    for victims in [&["launcher", "guard"][..], &["guard", "launcher"], &["launcher"], &["process 1"]] {
        let house = house(&server);
        let mut command = house.command(&[], "echo inside");
        let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let guard = || child(launcher.id(), "memdev-guard");
        let carrier = || guard().and_then(|guard| child(guard, "memdev-carry"));
        let has_begun = || carrier().is_some_and(|carrier| !children(carrier).is_empty());
        wait_until("it fills", has_begun);
        let (guard, carrier) = (guard().unwrap(), carrier().unwrap());
        let (init, daemons) = (house.place.written("root")[0]["init"].clone(), house.place.written("attach"));
        assert_eq!(daemons.len(), 1);
        for victim in victims {
            match *victim {
                "launcher" => launcher.kill().unwrap(),
                "guard" => {
                    // It may have ended by itself, where the launcher has.
                    let pid = rustix::process::Pid::from_raw(i32::try_from(guard).unwrap()).unwrap();
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
                _ => kill(&init, Signal::KILL),
            }
        }
        let output = launcher.wait_with_output().unwrap();
        assert!(output.stdout.is_empty() && !output.status.success(), "{victims:?}");
        wait_until("nobody fills any more", || !Path::new(&format!("/proc/{carrier}")).exists());
        let is_served = |daemon: &serde_json::Value| Path::new(&format!("/proc/{}", daemon["pid"])).exists();
        wait_until("the device has gone", || !daemons.iter().any(is_served));
    }
}
