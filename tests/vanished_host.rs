//! A client whose host is gone from one moment to the next, without a word: switched off, or its cable pulled.
//!
//! Two network namespaces are the two hosts, a veth pair the cable between them. That needs root, so a plain `cargo test`
//! leaves it out; `tools/test` runs it.

mod interop_support;
mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use interop_support::run;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::server::scratch;
use support::{Checked, Client, Image, KIB, MIB, Random, Request, Server, Stream};

/// The addresses are those for documentation (RFC 5737): nobody has them.
const HERE: &str = "198.51.100.1";
const THERE: &str = "198.51.100.2";

/// Two hosts and the cable between them; gone when dropped.
struct Hosts {
    here: String,
    there: String,
}

fn ip(arguments: &str) {
    run("ip", arguments.split(' '));
}

impl Hosts {
    fn new() -> Self {
        let id = std::process::id();
        let hosts = Self { here: format!("memdev-test-{id}-a"), there: format!("memdev-test-{id}-b") };
        let Self { here, there } = &hosts;
        ip(&format!("netns add {here}"));
        ip(&format!("netns add {there}"));
        ip(&format!("-n {here} link add cable type veth peer name cable netns {there}"));
        for (host, address) in [(here, HERE), (there, THERE)] {
            ip(&format!("-n {host} address add {address}/30 dev cable"));
            ip(&format!("-n {host} link set cable up"));
            ip(&format!("-n {host} link set lo up"));
        }
        hosts
    }

    /// Does something on the other host; what it opens belongs there.
    fn there<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.there)).expect("the other host");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(file.as_fd(), network).expect("moving to the other host");
                act()
            });
            thread.join().expect("nothing panics there")
        })
    }

    /// From now on nothing that is sent from here arrives there: the other host is known by a wrong hardware address.
    fn mute_here(&self) {
        ip(&format!(
            "-n {} neigh replace {THERE} lladdr 02:00:00:00:00:99 dev cable nud permanent",
            self.here
        ));
    }

    fn pull_the_cable(&self) {
        ip(&format!("-n {} link set cable down", self.there));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in [&self.here, &self.there] {
            // What could be made is removed, also when the other could not.
            let _ = Command::new("ip").args(["netns", "delete", host]).stderr(Stdio::null()).status();
        }
    }
}

#[test]
fn a_host_that_vanished_is_noticed_within_half_a_minute_whatever_it_waited_for() {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), 8 * MIB, 81);
    let hosts = Hosts::new();
    let folder = scratch();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &hosts.here, env!("CARGO_BIN_EXE_memdev"), "serve"]).arg(&image.path);
    command.arg("--unix").arg(folder.path().join("nbd.sock"));
    command.args(["--insecure", "--tcp", &format!("{HERE}:10809")]).stdin(Stdio::null());
    let mut server = Server::by(command, folder);
    server.wait_for_line("listening on", 2);
    let mut bystander = Checked::new(server.client("base"), &image);
    bystander.read_all();
    let alone = server.usage();

    // One who has nothing to wait for, one for whom a reply is on its way, one who leaves more of them unread than fits.
    let attach = || {
        let stream =
            hosts.there(|| Stream::tcp(&format!("{HERE}:10809")).expect("the cable is in its place"));
        Client::attach_simple(stream, "base").expect("the image is offered")
    };
    let (_idle, mut waiting, mut full) = (attach(), attach(), attach());
    let reads: Vec<Request> = (0..64).map(|n| Request::read(n % 8 * MIB, MIB)).collect();
    full.send_all(&reads);
    support::wait_until("all are connected", || server.usage().descriptors >= alone.descriptors + 3);
    hosts.mute_here();
    waiting.send(&Request::read(0, 64 * KIB));
    // The request has arrived, the reply has not, and never will.
    std::thread::sleep(Duration::from_millis(500));
    hosts.pull_the_cable();

    let pulled = Instant::now();
    let mut random = Random::new(1);
    while server.usage().descriptors > alone.descriptors {
        assert!(pulled.elapsed() < Duration::from_secs(120), "the server keeps {:?}", server.usage());
        bystander.random_step(&mut random, 20_000, true);
        std::thread::sleep(Duration::from_millis(50));
    }
    // 30 s are promised, and a machine that is busy may be late. Without keepalive it would be for ever, without a
    // timeout of what was sent a quarter of an hour.
    let noticed = pulled.elapsed();
    assert!(noticed < Duration::from_secs(45), "noticed after {noticed:?}");
    server.settles_at(alone, 8 * MIB);
    bystander.read_all();
}
