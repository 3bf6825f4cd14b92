//! Whatever happened, and however often: afterwards there is no device, process, mount, record or descriptor more than
//! before. `tools/bench-attach` does the same a thousand times.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::machine::{State, kill};
use crate::interop_support::{said, uri};
use crate::support::server::{Serve, scratch};
use crate::support::{Image, MIB, PATIENCE, Random, Server, wait_until};

/// An image whose name no other test's devices carry, and a server of it.
struct Setting {
    state: State,
    name: String,
    image: Image,
    server: Server,
    _dir: tempfile::TempDir,
}

impl Setting {
    fn new(seed: u64) -> Self {
        let dir = scratch();
        let name = format!("leaks-{}-{seed}", std::process::id());
        let image = Image::random(dir.path().join(format!("{name}.img")), 16 * MIB, seed);
        let server = Self::serve(&image);
        Self { state: State::new(), name, image, server, _dir: dir }
    }

    fn serve(image: &Image) -> Server {
        Serve::image(image).args(["--linger", "1h"]).start()
    }

    /// An image and a session, in turn.
    fn source(&self, number: u64) -> String {
        match number % 2 {
            0 => self.image.path.to_str().expect("text").to_owned(),
            _ => self.session(),
        }
    }

    fn session(&self) -> String {
        uri(&self.server, &format!("{}@one", self.name))
    }

    fn cycle(&self, number: u64) {
        self.state.attach(&self.source(number), &[]).detach();
    }

    /// Devices, processes, mounts and records of this test's, and the server's descriptors.
    fn holdings(&self) -> Vec<String> {
        let mut all = Vec::new();
        for block in fs::read_dir("/sys/block").expect("block devices").flatten() {
            let file = fs::read_to_string(block.path().join("loop/backing_file")).unwrap_or_default();
            if file.contains(&self.name) {
                all.push(block.path().display().to_string());
            }
        }
        for process in fs::read_dir("/proc").expect("processes").flatten() {
            let words = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            if words.contains("attach-daemon") && words.contains(&self.name) {
                all.push(process.path().display().to_string());
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let state = self.state.directory();
        let state = state.to_str().expect("text");
        all.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&self.name) || line.contains(state) || line.contains("memdev:"))
                .map(str::to_owned),
        );
        let names = |directory: &Path| {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
        };
        all.extend(names(&self.state.directory()));
        all.extend(names(Path::new(&format!("/proc/{}/fd", self.server.pid()))));
        all.sort();
        all
    }

    /// Panics unless nothing more is there than `before`. A server hears of a connection's end after the client.
    #[track_caller]
    fn nothing_more_than(&self, before: &[String]) {
        let more = || self.holdings().into_iter().filter(|one| !before.contains(one)).collect::<Vec<_>>();
        let start = Instant::now();
        while !more().is_empty() {
            assert!(start.elapsed() < PATIENCE, "left behind: {:?}", more());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A command that is about to be killed: not by way of `timeout`, which would be killed in its place.
    fn doomed(&self, args: &[&str]) -> Child {
        std::process::Command::new(env!("CARGO_BIN_EXE_memdev"))
            .args(args)
            .arg("--state")
            .arg(self.state.directory())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("memdev can be run")
    }

    /// Detaches what lives on. What is dead is left for the next.
    fn settle(&self) {
        for listed in self.state.list() {
            let device = listed["device"].as_str().expect("a device");
            if listed["alive"] == true {
                let output = self.state.output("detach", &[device]);
                let alive = || self.state.list().iter().any(|listed| listed["alive"] == true);
                assert!(output.status.success() || !alive(), "{}", said(&output));
            }
        }
    }
}

#[test]
fn many_cycles_leave_nothing() {
    let setting = Setting::new(21);
    setting.cycle(0);
    setting.cycle(1);
    let before = setting.holdings();
    for number in 0..30 {
        setting.cycle(number);
    }
    setting.nothing_more_than(&before);
    setting.state.assert_empty();
    setting.server.stop();
}

#[test]
fn whoever_is_killed_at_whatever_moment_leaves_nothing() {
    let mut setting = Setting::new(22);
    let mut random = Random::new(22);
    setting.cycle(0);
    setting.cycle(1);
    let mut before = setting.holdings();
    let start = Instant::now();
    setting.cycle(1);
    // Half of it attaches, half detaches, at this moment on this machine.
    let longest = u64::try_from(start.elapsed().as_micros()).expect("not that long") / 2;
    for round in 0..32 {
        let moment = Duration::from_micros(random.below(longest));
        let source = if round % 4 == 3 { setting.session() } else { setting.source(round / 4) };
        match round % 4 {
            0 => {
                let mut command = setting.doomed(&["attach", "--backend", "fuse", &source]);
                std::thread::sleep(moment);
                command.kill().and_then(|()| command.wait()).expect("killing the command");
            }
            1 => {
                let device = setting.state.attach(&source, &[]).text().to_owned();
                let mut command = setting.doomed(&["detach", &device]);
                std::thread::sleep(moment);
                command.kill().and_then(|()| command.wait()).expect("killing the command");
            }
            party => {
                let (path, daemon) = {
                    let disk = setting.state.attach(&source, &[]);
                    (disk.path.clone(), disk.daemon())
                };
                let writer = std::thread::spawn(move || {
                    let file = fs::File::options().write(true).open(path).expect("opening the device");
                    (0..).map(|n| n % 16).try_for_each(|at| {
                        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 1 << 20], at * MIB)?;
                        file.sync_data()
                    })
                });
                std::thread::sleep(moment);
                if party == 2 {
                    kill(&daemon, Signal::KILL);
                } else {
                    setting.server.signal(Signal::KILL);
                    setting.server.wait();
                }
                assert!(writer.join().expect("the writer ends").is_err());
                if party == 3 {
                    setting.server = Setting::serve(&setting.image);
                }
            }
        }
        setting.settle();
        setting.cycle(round / 4);
        if round % 4 == 3 {
            // The new server has descriptors of its own, some of them from its first sessions on.
            setting.cycle(1);
            wait_until("nothing is attached", || setting.state.list().is_empty());
            before = setting.holdings();
        }
        setting.nothing_more_than(&before);
        setting.state.assert_empty();
    }
    setting.server.stop();
}
