//! "Full privileges, except mknod": making device nodes, in each way there is.

use std::path::Path;

use crate::machine::{MODES, attack, attack_outside, image, program, run, sh, sh_outside, succeed};
use crate::support::server::scratch;

/// Device nodes in each of the directories given, by both calls. Numbers that every Linux has: a loop device, memory, the
/// kernel's log, `null`.
const MKNOD: &str = r#"
    for my $dir (@ARGV) {
        for (["b 7 0", 0060600, 0x700], ["c 1 1", 0020600, 0x101], ["c 1 3", 0020600, 0x103], ["c 1 11", 0020600, 0x10b]) {
            my ($what, $mode, $device) = @$_;
            my $path = "$dir/redteam";
            call("mknod $dir $what", SYS_mknod, $path, $mode, $device); unlink $path;
            call("mknodat $dir $what", SYS_mknodat, -100, $path, $mode, $device); unlink $path;
        }
    }
"#;

/// Where things can be written inside: the image, and the file systems that were mounted for it.
const PLACES: &[&str] = &["/root", "/dev", "/tmp", "/run"];

#[test]
fn device_nodes_cannot_be_made() {
    let dir = scratch();
    attack_outside(MKNOD, &[dir.path().to_str().unwrap()]).assert_all_ok();
    for mode in MODES {
        attack(mode, &[], MKNOD, PLACES).assert_all_refused(mode, &["EPERM"]);
    }
}

/// In a user namespace of one's own one has every capability, over what belongs to that namespace.
#[test]
fn nor_in_user_and_mount_namespaces_of_ones_own() {
    let dir = scratch();
    let place = dir.path().to_str().unwrap();
    let script = "mount -t tmpfs none \"$1\"; exec perl -e \"$0\" \"$@\"";
    // Without the user namespace, what is made in a mount of one's own is a device node.
    let outside = sh_outside(
        "mount -t tmpfs none \"$1\"; shift; exec \"$@\"",
        &[place, "perl", "-e", &program(MKNOD), place],
    );
    assert!(outside.lines().count() == 8 && outside.lines().all(|line| line.ends_with("\tOK")), "{outside}");
    for mode in MODES {
        for unshare in [&["unshare", "-Ur"][..], &["unshare", "-Urm"], &["unshare", "-Urmpf"]] {
            let own_mount = unshare[1].contains('m');
            let mut command = run(mode, &image(), &[]);
            command.args(unshare);
            if own_mount {
                command.args(["sh", "-euc", script]);
            } else {
                command.args(["perl", "-e"]);
            }
            let text = succeed(command.arg(program(MKNOD)).args(["/mnt", "/root", "/tmp"]));
            assert_eq!(text.lines().count(), 3 * 8);
            assert!(text.lines().all(|line| line.ends_with("\tEPERM")), "{mode:?} {unshare:?}: {text}");
        }
    }
}

/// Programs that unpack archives make whatever the archive says. The host's own are lent to the session, which has not all
/// of them.
#[test]
fn nor_by_tar_cpio_and_rsync() {
    let dir = scratch();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    let place = tree.to_str().unwrap();
    let made = r#"cd "$1"; mknod block b 7 0; mknod char c 1 1; echo >file
        tar -cf ../a.tar block char file; printf 'block\nchar\nfile\n' | cpio --quiet -oH newc >../a.cpio"#;
    sh_outside(made, &[place]);
    let unpack = r#"cd "$1"; mkdir tar cpio rsync
        tar -C tar -xf "$2/a.tar" || :; (cd cpio; cpio --quiet -idm <"$2/a.cpio" || :); rsync -a "$2/tree/" rsync || :
        find tar cpio rsync -type f | wc -l; find tar cpio rsync '(' -type b -o -type c ')' | wc -l"#;
    let there = dir.path().to_str().unwrap();
    let to = dir.path().join("to");
    std::fs::create_dir(&to).unwrap();
    assert_eq!(sh_outside(unpack, &[to.to_str().unwrap(), there]), "3\n6\n", "outside, all are made");
    let bind = format!("{there}:/opt/from:ro");
    let unpack = unpack.replace("cd \"$1\"; mkdir", "cd /root; mkdir").replace("$2", "/opt/from");
    for mode in MODES {
        for kind in ["tar", "cpio", "rsync"] {
            assert!(
                ["/usr/bin/", "/bin/"].iter().any(|dir| Path::new(dir).join(kind).exists()),
                "{kind} is there"
            );
        }
        let script = format!(
            "export PATH=$PATH:/opt/host/bin LD_LIBRARY_PATH=/opt/host/lib/x86_64-linux-gnu; {unpack}"
        );
        let said = sh(mode, &["--bind", &bind, "--bind", "/usr:/opt/host:ro"], &script);
        assert_eq!(said, "3\n0\n", "{mode:?}: files are made, nodes are not");
    }
}

#[test]
fn fifos_sockets_and_files_can_be_made_by_mknod() {
    let made = r#"
        for my $dir (@ARGV) {
            for (["fifo", 0010600, "p"], ["socket", 0140600, "S"], ["file", 0100600, "f"], ["nothing", 0600, "f"]) {
                my ($what, $mode, $test) = @$_;
                my $path = "$dir/redteam";
                for my $call ("mknod", "mknodat") {
                    my @args = $call eq "mknod" ? (SYS_mknod, $path) : (SYS_mknodat, -100, $path);
                    my $number = shift @args;
                    if (syscall($number, @args, $mode, 0) == -1) { report("$call $dir $what", why()) }
                    else { report("$call $dir $what", eval "-$test \$path" ? "OK" : "it is something else") }
                    unlink $path;
                }
            }
        }
    "#;
    for mode in MODES {
        attack(mode, &[], made, PLACES).assert_all_ok();
    }
}

#[test]
fn a_fifo_made_by_its_command_works() {
    for mode in MODES {
        let said =
            sh(mode, &[], "cd /root; mknod pipe p; mkfifo other; echo through >pipe & cat pipe; ls -1F");
        assert_eq!(said, "through\nother|\npipe|\n", "{mode:?}");
    }
}
