//! What must work: full privileges, except mknod.

use std::fs;
use std::path::{Path, PathBuf};

use crate::machine::{MEMDEV, MODES, Mode, image, run, sh, succeed, tool};
use crate::support::server::scratch;

/// Where root inside may not mount by itself, it may in namespaces of its own.
fn mounts(mode: Mode) -> &'static str {
    if mode == Mode::User { "" } else { "unshare -Urm " }
}

/// A package with a user, files of other owners, and a script, as a maintainer makes them.
fn package(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    let write = |path: &str, text: &str| {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        tool("chmod", &["755".as_ref(), path.as_os_str()]);
    };
    write(
        "DEBIAN/control",
        "Package: memdev-redteam\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n\
         Description: tries what packages do\n",
    );
    write(
        "DEBIAN/postinst",
        "#!/bin/sh\nset -e\nuseradd --system redteam\nchown redteam: /usr/share/redteam\nchown root:tty /usr/bin/redteam\n\
         chmod 2755 /usr/bin/redteam\n",
    );
    write("usr/bin/redteam", "#!/bin/sh\necho installed\n");
    write("usr/share/redteam", "data\n");
    let deb = dir.join("memdev-redteam_1_all.deb");
    tool("dpkg-deb", &["--root-owner-group".as_ref(), "--build".as_ref(), tree.as_os_str(), deb.as_os_str()]);
    deb
}

#[test]
fn packages_are_installed_by_apt_and_by_dpkg() {
    let dir = scratch();
    tool("chmod", &["755".as_ref(), dir.path().as_os_str()]);
    let deb = package(dir.path());
    let bind = format!("{}:/opt/deb:ro", deb.parent().unwrap().display());
    let script = r#"cp /opt/deb/*.deb /var/tmp
        apt-get install -y /var/tmp/memdev-redteam_1_all.deb >/tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
        redteam; stat -c '%U %a' /usr/share/redteam /usr/bin/redteam; dpkg --verify memdev-redteam
        dpkg --purge memdev-redteam >/dev/null; dpkg --install /var/tmp/*.deb >/dev/null 2>&1 || :; redteam"#;
    for mode in MODES {
        let said = sh(mode, &["--bind", &bind], script);
        assert!(
            said.starts_with("installed\nredteam 755\nroot 2755\n") && said.ends_with("installed\n"),
            "{mode:?}: {said}"
        );
    }
}

#[test]
fn users_owners_and_other_peoples_files() {
    let script = r#"useradd --create-home joe; id -un joe; chown joe: /etc/hostname; stat -c %U /etc/hostname
        chown 12345:54321 /etc/hostname; stat -c %u:%g /etc/hostname; touch /usr/bin/new; rm -rf /usr/share/doc; rm /etc/passwd-
        su joe -c 'id -un; cat /etc/shadow 2>/dev/null || echo no; echo >~/file'; stat -c %U /home/joe/file
        su -s /bin/sh nobody -c 'id -un'; userdel -r joe 2>/dev/null; test ! -e /home/joe; echo ok"#;
    for mode in MODES {
        let said = sh(mode, &[], script);
        assert_eq!(said, "joe\njoe\n12345:54321\njoe\nno\njoe\nnobody\nok\n", "{mode:?}");
    }
}

/// A program that is root whoever runs it: the flag and the capabilities of files count inside.
#[test]
fn setuid_programs_and_file_capabilities() {
    let script = r#"useradd joe; cp /usr/bin/id /usr/bin/setuid-id; chmod 4755 /usr/bin/setuid-id
        su joe -c 'setuid-id -u'"#;
    for mode in MODES {
        assert_eq!(sh(mode, &[], script), "0\n", "{mode:?}");
    }
}

#[test]
fn tmpfs_overlay_and_bind_mounts() {
    let script = r#"cd /mnt; mount -t tmpfs none /mnt; cd /mnt; mkdir up work all b
        mount -t overlay -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work none /mnt/all
        rm all/hostname; test ! -e all/hostname; test -e /etc/hostname
        mount --bind /usr b; test -x b/bin/env; umount b; mount -t proc proc b 2>/dev/null || :
        umount -l all; echo ok"#;
    for mode in MODES {
        let mut command = run(mode, &image(), &[]);
        command.args(mounts(mode).split_whitespace()).args(["sh", "-euc", script]);
        assert_eq!(succeed(&mut command), "ok\n", "{mode:?}");
    }
}

#[test]
fn chroots_and_nested_namespaces() {
    let script = r#"mkdir -p /srv/root; cp -a /bin /lib /lib64 /srv/root 2>/dev/null || :
        mkdir -p /srv/root/usr; cp -a /usr/bin /usr/lib /usr/lib64 /srv/root/usr
        chroot /srv/root /usr/bin/env echo chroot
        unshare -U -r id -u; unshare -Urpf $PROC sh -c 'echo $$'; unshare -Urn true; unshare -Urm true; echo ok"#;
    for mode in MODES {
        // Where what user 0 could do to the host is covered up in /proc, nobody inside gets a fresh one.
        let proc = if mode == Mode::User { "--mount-proc" } else { "" };
        assert_eq!(sh(mode, &["--env", &format!("PROC={proc}")], script), "chroot\n0\n1\nok\n", "{mode:?}");
    }
}

#[test]
fn memdev_ns_inside_twice() {
    let bind = format!("{MEMDEV}:/opt/memdev:ro");
    let script = r#"/opt/memdev ns -q -- sh -euc 'mount -t tmpfs none /mnt; touch /mnt/first
            /opt/memdev ns -q -- sh -euc "mount -t tmpfs none /srv; touch /srv/second; ls /mnt /srv"; ls /srv'
        ls /mnt /srv"#;
    for mode in MODES {
        let said = sh(mode, &["--bind", &bind], script);
        assert_eq!(said, "/mnt:\nfirst\n\n/srv:\nsecond\n/mnt:\n\n/srv:\n", "{mode:?}");
    }
}

/// The host's `ping`: the Debian root has none.
#[test]
fn ping_where_it_is_allowed() {
    let script = r#"export LD_LIBRARY_PATH=/opt/host/lib/x86_64-linux-gnu
        /opt/host/bin/ping -q -c 1 -W 60 127.0.0.1 | grep -c '1 received'"#;
    for mode in MODES {
        let said = sh(mode, &["--net", "none", "--bind", "/usr:/opt/host:ro"], script);
        assert_eq!(said, "1\n", "{mode:?}");
    }
}

#[test]
fn each_change_is_gone_and_the_image_is_as_it_was() {
    let before = fs::metadata(image()).unwrap();
    for mode in MODES {
        sh(
            mode,
            &[],
            "test ! -e /usr/redteam; touch /usr/redteam; echo changed >/etc/hostname; rm -rf /usr/share; sync",
        );
        assert_ne!(sh(mode, &[], "cat /etc/hostname; ls -d /usr/share"), "changed\n");
    }
    let after = fs::metadata(image()).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((before.mtime_nsec(), before.blocks()), (after.mtime_nsec(), after.blocks()));
}
