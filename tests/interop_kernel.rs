//! The Linux kernel's NBD driver as the client, in emulated machines with Debian's kernels 6.1 and 6.12 (`tools/vm`).
//!
//! They take minutes, so a plain `cargo test` leaves them out; `tools/test` runs them and lets none be missing. What is
//! checked is in the jobs, `tests/vm/*.sh`; here are the servers that they talk to, and what must be true of these.

mod interop_support;
mod support;

use std::fs;
use std::path::Path;

use interop_support::vm::{Meeting, Vm, failure, turn};
use interop_support::{run, uri};
use support::server::{Serve, scratch};
use support::tls::{Age, Authority, Role};
use support::{Image, MIB, Server};

fn sum_of_first_mib(image: &Image) -> String {
    let command = format!("head -c 1M '{}' | sha256sum", image.path.display());
    run("sh", ["-c", &command])[..64].to_owned()
}

/// A script for a guest.
fn script(dir: &Path, text: &str) -> std::path::PathBuf {
    let path = dir.join("job.sh");
    fs::write(&path, text).expect("writing a job");
    path
}

fn tcp_server(image: &Image) -> Server {
    Serve::image(image).tcp().start()
}

/// Every way of nbd-client; see the job.
fn attaches(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::partly(dir.path().join("disk.img"), 16 * MIB, 0..8 * MIB, 1);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    Vm::job(kernel, "attach.sh")
        .memdev(dir.path())
        .add(&image.path, "/disk.img")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .env("SUM", sum_of_first_mib(&image))
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn nbd_client_attaches_in_every_way_linux_6_1() {
    attaches("6.1");
}

#[test]
fn nbd_client_attaches_in_every_way_linux_6_12() {
    attaches("6.12");
}

/// A device over TLS, and none for whoever has the wrong certificates; see the job.
#[test]
fn nbd_client_attaches_over_tls() {
    let _turn = turn();
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 3);
    let before = image.fingerprint();
    let (authority, other) = (Authority::new("The CA"), Authority::new("Another CA"));
    let certificates = |name: &str| dir.path().join(name);
    authority.equip_server(&certificates("server"), &authority.sign(Role::Server, Age::Good));
    let clients = [
        ("good", &authority, Some(authority.sign(Role::Client, Age::Good))),
        ("none", &authority, None),
        ("expired", &authority, Some(authority.sign(Role::Client, Age::Expired))),
        ("stranger", &authority, Some(other.sign(Role::Client, Age::Good))),
        ("wrong-ca", &other, Some(authority.sign(Role::Client, Age::Good))),
    ];
    let server = Serve::image(&image)
        .tcp()
        .args(["--tls-verify-peer".into(), "--tls-certificates".into(), certificates("server")])
        .start();
    let vm = Vm::job("6.12", "tls.sh").port("PORT", &server).env("SIZE", image.size);
    let mut vm = vm.env("SUM", sum_of_first_mib(&image));
    for (name, trusted, issued) in &clients {
        trusted.equip_client(&certificates(name), issued.as_ref());
        for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
            let path = certificates(name).join(file);
            if path.exists() {
                vm = vm.add(&path, &format!("/tls/{name}/{file}"));
            }
        }
    }
    vm.succeed();
    for why in [
        "it shows no certificate, and one is demanded",
        "its certificate has expired",
        "its certificate is not signed by a CA in ca-cert.pem",
        "trust",
        "it speaks plain text, and TLS is demanded",
    ] {
        assert!(server.log().iter().any(|line| line.contains("WARN") && line.contains(why)), "{why}");
    }
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

/// Four connections are refused on a private copy and one device on a named session; see the job.
fn connections(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::random(dir.path().join("disk.img"), 16 * MIB, 2);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    let port: u16 =
        server.tcp_address().rsplit(':').next().expect("an address has a port").parse().expect("a port");
    // Local address and port in hexadecimal; state 01 is an established connection.
    let established = format!("awk '$2 ~ /:{port:04X}$/ && $4 == \"01\"' /proc/net/tcp | wc -l");
    Vm::job(kernel, "connections.sh")
        .program("fio")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .call("connections", &established)
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn several_connections_need_a_named_session_linux_6_1() {
    connections("6.1");
}

#[test]
fn several_connections_need_a_named_session_linux_6_12() {
    connections("6.12");
}

/// A file system from its making to its finding again, and the server's memory meanwhile; see the job.
fn file_system(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("empty.img"), 256 * MIB);
    let before = image.fingerprint();
    let server = tcp_server(&image);
    Vm::job(kernel, "filesystem.sh")
        .program("fio")
        .port("PORT", &server)
        .env("SIZE", image.size)
        .call_memory(&server)
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn a_file_system_lives_in_a_named_session_linux_6_1() {
    file_system("6.1");
}

#[test]
fn a_file_system_lives_in_a_named_session_linux_6_12() {
    file_system("6.12");
}

/// Servers die under mounted file systems; see the job.
fn killed(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("disk.img"), 64 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let (first, second, third) = (tcp_server(&image), tcp_server(&image), tcp_server(&image));
    Vm::job(kernel, "killed.sh")
        .port("FIRST", &first)
        .port("SECOND", &second)
        .port("THIRD", &third)
        .env("SIZE", image.size)
        .call("kill_netlink", &format!("kill -KILL {}", first.pid()))
        .call("kill_ioctl", &format!("kill -KILL {}", second.pid()))
        .succeed();
    assert_eq!(image.fingerprint(), before);
    third.stop();
}

#[test]
fn a_killed_server_is_an_error_and_no_hang_linux_6_1() {
    killed("6.1");
}

#[test]
fn a_killed_server_is_an_error_and_no_hang_linux_6_12() {
    killed("6.12");
}

/// `memdev attach` on both backends, in a machine that has both; see the job.
fn memdev_attaches(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("disk.img"), 32 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let sum = run("sh", ["-c", &format!("sha256sum <'{}'", image.path.display())]);
    let (server, first, second) = (tcp_server(&image), tcp_server(&image), tcp_server(&image));
    Vm::job(kernel, "memdev-attach.sh")
        .memdev(dir.path())
        .add(&image.path, "/disk.img")
        .option("--module", "loop")
        .option("--module", "fuse")
        .port("PORT", &server)
        .port("FIRST", &first)
        .port("SECOND", &second)
        .env("SIZE", image.size)
        .env("SUM", &sum[..64])
        .call("kill_nbd", &format!("kill -KILL {}", first.pid()))
        .call("kill_fuse", &format!("kill -KILL {}", second.pid()))
        .succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn memdev_attaches_by_both_backends_linux_6_1() {
    memdev_attaches("6.1");
}

#[test]
fn memdev_attaches_by_both_backends_linux_6_12() {
    memdev_attaches("6.12");
}

/// `memdev run` on devices of the kernel's own driver; see the job.
fn private_roots(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let root = cold_root(dir.path());
    let before = root.fingerprint();
    let disk = Image::empty(dir.path().join("disk.img"), 32 * MIB).path;
    run("sh", ["-c", &format!("echo start=2048,type=83 | sfdisk -q '{}'", disk.display())]);
    let server = tcp_server(&root);
    Vm::job(kernel, "run.sh")
        .memdev(dir.path())
        .add(&disk, "/disk.img")
        .option("--module", "loop")
        .option("--module", "fuse")
        .port("PORT", &server)
        .succeed();
    assert_eq!(root.fingerprint(), before);
    server.stop();
}

#[test]
fn private_roots_on_the_kernels_driver_linux_6_1() {
    private_roots("6.1");
}

#[test]
fn private_roots_on_the_kernels_driver_linux_6_12() {
    private_roots("6.12");
}

/// Control groups of private roots, on kernels with what this machine may not have; see the job.
fn control_groups(kernel: &str, version: &str) {
    let _turn = turn();
    let dir = scratch();
    let disk = Image::empty(dir.path().join("disk.img"), 32 * MIB).path;
    let vm = Vm::job(kernel, "groups.sh").memdev(dir.path()).add(&disk, "/disk.img").env("VERSION", version);
    vm.option("--module", "loop").option("--module", "fuse").succeed();
}

#[test]
fn limits_hold_by_control_groups_of_version_2_linux_6_1() {
    control_groups("6.1", "2");
}

#[test]
fn limits_hold_by_control_groups_of_version_2_linux_6_12() {
    control_groups("6.12", "2");
}

#[test]
fn limits_hold_by_control_groups_of_version_1() {
    control_groups("6.1", "1");
}

/// What a private root had in memory is in no swap, core or file, and nowhere in the machine's memory when it has ended; see the job.
fn footprints(kernel: &str) {
    let _turn = turn();
    let dir = scratch();
    let disk = Image::empty(dir.path().join("disk.img"), 32 * MIB).path;
    let vm = Vm::job(kernel, "footprints.sh").memdev(dir.path()).add(&disk, "/disk.img");
    let vm = vm.program("grep").program("script").option("--append", "init_on_free=1");
    let modules = ["loop", "fuse", "zram", "lzo-rle"];
    modules.iter().fold(vm, |vm, module| vm.option("--module", module)).succeed();
}

#[test]
fn nothing_is_left_of_private_roots_linux_6_1() {
    footprints("6.1");
}

#[test]
fn nothing_is_left_of_private_roots_linux_6_12() {
    footprints("6.12");
}

/// A copy of the Debian root image that machines boot from, of which nothing is in memory.
fn cold_root(dir: &Path) -> Image {
    let golden = std::env::var("MEMDEV_ROOT_IMAGE").expect(
        "MEMDEV_ROOT_IMAGE is the path of a Debian root image, as tools/make-image --bootable prints it",
    );
    let size = fs::metadata(&golden).expect("the Debian root image is there").len();
    let image = Image::empty(dir.join("root.img"), size);
    run("cp", ["--sparse=always".as_ref(), golden.as_ref(), image.path.as_os_str()]);
    image
}

/// Puts the image out of the page cache; nobody may have it mapped.
fn chill(image: &Image) {
    let file = fs::File::open(&image.path).expect("the image is there");
    file.sync_all().expect("writing the image to its disk");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advising the kernel");
    assert!(in_memory(image) < MIB, "the image is out of the page cache; is TMPDIR on a disk?");
}

/// How many bytes of the image are in the page cache.
fn in_memory(image: &Image) -> u64 {
    let out = run("fincore", ["-bnro", "RES", image.path.to_str().expect("text")]);
    out.trim().parse().expect("fincore prints a number")
}

/// How many bytes the process had read from disks.
fn read_from_disk(server: &Server) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", server.pid())).expect("the server lives");
    let line = io.lines().find_map(|line| line.strip_prefix("read_bytes: ")).expect("the kernel counts");
    line.parse().expect("a number")
}

#[test]
fn two_machines_boot_from_one_image_and_change_it_each_for_itself() {
    let _turn = turn();
    let dir = scratch();
    let image = cold_root(dir.path());
    let before = image.fingerprint();
    let server = Serve::image(&image).tcp().args(["--linger", "1h"]).start();
    let meeting = Meeting::new(dir.path().join("meeting"));
    let port = server.tcp_address().rsplit(':').next().expect("an address has a port").to_owned();
    let machine = |kernel: &str, name: &str, export: &str, fresh: &str, boot: &str| {
        let vm = Vm::job(kernel, "boot.sh")
            .env("PORT", &port)
            .env("SIZE", image.size)
            .env("NAME", name)
            .env("EXPORT", export)
            .env("FRESH", fresh)
            .env("BOOT", boot)
            .call("together", &meeting.command(name))
            .option("--time-limit", "500");
        let script = Path::new("/usr/share/initramfs-tools/scripts/local-top/nbd");
        let vm = if kernel == "6.1" {
            let append = format!("root=/dev/nbd0 nbdroot=10.0.2.2:{port}/{export}");
            vm.env("HOW", "debian").add(script, "/nbd-script").option("--append", append)
        } else {
            vm.env("HOW", "client")
        };
        vm.start()
    };

    // One in a session of one connection, one in a named session: for a machine they are the same. The second attaches
    // its root as Debian's initramfs does.
    let mut machines = [
        ("machine-a", machine("6.12", "machine-a", "root", "yes", "yes")),
        ("machine-b", machine("6.1", "machine-b", "root@machine-b", "yes", "yes")),
    ];
    for round in 1..=2 {
        meeting.wait(round, &mut machines);
        meeting.go(round);
    }
    for (_, machine) in machines {
        let output = machine.succeed();
        assert!(output.contains("is up on /dev/nbd0"), "{output}");
    }
    assert_eq!(image.fingerprint(), before);

    // Off and on again: the session of one connection is over, and the other is still there.
    machine("6.12", "machine-a", "root", "yes", "no").succeed();
    machine("6.12", "machine-b", "root", "yes", "no").succeed();
    machine("6.12", "machine-b", "root@machine-b", "no", "no").succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn eight_roots_on_one_host() {
    let _turn = turn();
    let dir = scratch();
    let image = cold_root(dir.path());
    let before = image.fingerprint();
    let server = tcp_server(&image);
    Vm::job("6.12", "roots.sh").port("PORT", &server).env("SIZE", image.size).succeed();
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

/// No NBD in the guest: its disk is a session that qemu attaches.
#[test]
fn a_machine_has_a_session_as_its_disk() {
    let _turn = turn();
    let dir = scratch();
    let image = Image::empty(dir.path().join("disk.img"), 256 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), image.path.as_os_str()]);
    let before = image.fingerprint();
    let server = Serve::image(&image).args(["--linger", "1h"]).start();
    let machine = |export: &str, round: &str, options: &str| {
        Vm::job("6.12", "drive.sh")
            .option("--drive", uri(&server, export))
            .env("ROUND", round)
            .env("MOUNT_OPTIONS", options)
            .env("SIZE", image.size)
            .call_memory(&server)
            .succeed();
    };
    machine("disk@machine", "1", "rw");
    machine("disk@machine", "2", "ro");
    machine("disk", "fresh", "ro");
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

#[test]
fn sixteen_machines_on_one_server() {
    const MACHINES: u64 = 16;
    let _turn = turn();
    let dir = scratch();
    let image = cold_root(dir.path());
    let before = image.fingerprint();
    chill(&image);
    let server = tcp_server(&image);
    let (idle, read_before) = (server.usage(), read_from_disk(&server));
    let meeting = Meeting::new(dir.path().join("meeting"));
    let names: Vec<_> = (1..=MACHINES).map(|number| format!("machine-{number}")).collect();
    let mut machines: Vec<_> = (1..=MACHINES)
        .zip(&names)
        .map(|(number, name)| {
            let vm = Vm::job("6.12", "crowd.sh")
                .port("PORT", &server)
                .env("SIZE", image.size)
                .env("NUMBER", number)
                .call("arrive", &meeting.command(name))
                .option("--memory", "256M")
                .option("--hang-limit", "300")
                .option("--time-limit", "500");
            (name.as_str(), vm.start())
        })
        .collect();

    // All are there, have read the same files, and have written 4 MiB each.
    meeting.wait(1, &mut machines);
    let private = server.usage().private - idle.private;
    let (from_disk, cached) = (read_from_disk(&server) - read_before, in_memory(&image));
    meeting.go(1);

    let mut served = 0;
    for (_, machine) in machines {
        let output = machine.succeed();
        let bytes = output.lines().find_map(|line| line.strip_prefix("read ")?.strip_suffix(" bytes"));
        served += bytes.expect("the job says what it read").parse::<u64>().expect("a number");
    }
    println!(
        "{MACHINES} machines: {} KiB of private memory each, of which 4096 were written as a file; they read {} MiB \
         of files, the server {} MiB from the disk, and {} MiB of the image are in memory",
        private / MACHINES / 1024,
        served / MIB,
        from_disk / MIB,
        cached / MIB
    );
    assert!(private >= MACHINES * 4 * MIB, "{private} bytes cannot hold what all wrote");
    assert!(private <= MACHINES * 8 * MIB, "{private} bytes for {MACHINES} sessions of 4 MiB");
    assert!(from_disk > 0, "the image is not on a disk; set TMPDIR");
    // The machines' files, and what the kernel reads ahead; each byte once.
    assert!(from_disk <= cached + MIB, "{from_disk} bytes read, {cached} of them different");
    assert!(from_disk < served / 4, "{from_disk} bytes read for {served} served");
    assert_eq!(image.fingerprint(), before);
    server.stop();
}

/// The harness's own promise: whatever happens to a guest, it is told as what it is.
#[test]
fn a_guest_that_does_not_end_as_it_should_is_told_apart() {
    let _turn = turn();
    let dir = scratch();
    let outcome_on = |kernel: &str, text: &str, options: &[(&str, &str)]| {
        let vm = Vm::script(kernel, &script(dir.path(), text)).program("chrt");
        let vm = options.iter().fold(vm, |vm, (name, value)| vm.option(name, value));
        let ended = vm.env("WORDS", "it's \"one\" $word").argument("a b").end();
        (ended.status.code(), ended.output)
    };

    let outcome = |text: &str, options: &[(&str, &str)]| outcome_on("6.12", text, options);

    // The job's own status, environment, arguments, and calls to this machine with their status.
    let (status, output) = outcome(
        "echo \"$# $1, $WORDS\"; on-host speak; on-host fail; echo \"status $?\"; on-host other; echo \"status $?\"; exit 7",
        &[("--call", "speak=echo spoken"), ("--call", "fail=exit 3")],
    );
    assert_eq!(status, Some(7), "{output}");
    for words in ["1 a b, it's \"one\" $word", "spoken", "status 3", "status 127"] {
        assert!(output.contains(words), "{words:?} is missing in {output}");
    }

    let (status, output) =
        outcome("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 99", &[]);
    assert_eq!(status, Some(failure::PANICKED), "{output}");

    let (status, output) = outcome("poweroff -f; sleep 99", &[]);
    assert_eq!(status, Some(failure::NO_STATUS), "{output}");

    // Nothing else gets the guest's only processor any more. (6.12 keeps a part of it for ordinary processes.)
    let hang = "echo -1 >/proc/sys/kernel/sched_rt_runtime_us; chrt -f 99 sh -c 'while :; do :; done'";
    let (status, output) = outcome_on("6.1", hang, &[("--hang-limit", "20")]);
    assert_eq!(status, Some(failure::HUNG), "{output}");

    let (status, output) = outcome("sleep 999", &[("--time-limit", "25")]);
    assert_eq!(status, Some(failure::TIME_LIMIT), "{output}");
}
