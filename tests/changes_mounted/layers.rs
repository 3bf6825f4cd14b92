//! Layers, put over the base by those who read such: GNU tar, and umoci as a tool of OCI images. What comes of it has to be
//! what the session has, with owners, modes, attributes, links and times.

use std::fs;
use std::path::{Path, PathBuf};

use super::edits::script;
use super::interop_support::mounted::Mounted;
use super::interop_support::{PYTHON, run};
use super::support::server::scratch;
use super::support::{MIB, Random};
use super::walk::{Walk, assert_same, in_order};
use super::{House, sync};

/// Takes away what the layer marks as gone, and directories where it has something else, and names what GNU tar has then
/// to extract.
const PREPARE: &str = "
import os, shutil, sys, tarfile
root = os.fsencode(sys.argv[1])
def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)
for member in tarfile.open(sys.argv[2], errors='surrogateescape'):
    path = os.path.join(root, os.fsencode(member.name))
    directory, name = os.path.split(path)
    if name == b'.wh..wh..opq':
        for entry in os.listdir(directory):
            remove(os.path.join(directory, entry))
    elif name.startswith(b'.wh.'):
        remove(os.path.join(directory, name[4:]))
    elif os.path.lexists(path) and os.path.isdir(path) != member.isdir() or os.path.islink(path):
        remove(path)
";

/// A tree that can be written to over one that cannot.
struct Over {
    dir: tempfile::TempDir,
}

impl Over {
    fn new(lower: &Path) -> Self {
        let dir = scratch();
        for name in ["upper", "work", "merged"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let place = |name: &str| dir.path().join(name).display().to_string();
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), place("upper"), place("work"));
        run("mount", ["-t", "overlay", "overlay", "-o", &options, &place("merged")]);
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("merged")
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        run("umount", [self.root()]);
    }
}

/// The tree without what no archive holds.
fn without_sockets(mut walk: Walk) -> Walk {
    walk.0.retain(|_, seen| seen.kind != "socket");
    walk
}

#[track_caller]
fn assert_same_tree(found: &Walk, expected: &Walk, what: &str) {
    let mut differing: Vec<_> = expected.expected(found).into_iter().collect();
    differing.sort_by_key(|(path, _)| in_order(path));
    assert_same(&differing, &std::collections::BTreeMap::new(), what);
}

#[test]
fn gnu_tar_makes_of_the_base_what_the_session_has() {
    let house = House::debian();
    let base = Mounted::new(&house.uri("untouched"));
    for seed in 1000..1002 {
        let session = format!("layer-{seed}");
        let mounted = Mounted::new(&house.uri(&session));
        let done = script(&mounted.root(), &mut Random::new(seed), 60);
        sync(&mounted);
        let over = Over::new(&base.root());
        let layer = over.dir.path().join("layer.tar");
        house.changes(&session, &["--tar", layer.to_str().unwrap()]);
        // The same again, to standard output.
        let again = house.changes(&session, &["--tar", "-"]);
        assert!(again == fs::read(&layer).unwrap(), "a layer is the same each time");
        run(PYTHON, ["-c".as_ref(), PREPARE.as_ref(), over.root().as_os_str(), layer.as_os_str()]);
        let (root, layer) = (over.root().display().to_string(), layer.display().to_string());
        run(
            "tar",
            [
                "-xpf",
                &layer,
                "-C",
                &root,
                "--xattrs",
                "--xattrs-include=*",
                "--numeric-owner",
                "--same-owner",
                "--exclude=.wh.*",
            ],
        );
        let what = format!("script {seed}: {done:#?}");
        assert_same_tree(&Walk::of(&over.root()), &without_sockets(Walk::of(&mounted.root())), &what);
        drop(over);
        mounted.detach();
    }
    base.detach();
    house.server.stop();
}

#[test]
fn umoci_makes_of_the_base_what_the_session_has() {
    let dir = scratch();
    let tree = dir.path().join("tree");
    for directory in ["etc/inner", "usr/bin", "gone/below", "replaced"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    let mut random = Random::new(3);
    for (number, directory) in
        (0..400).zip(["etc", "etc/inner", "usr/bin", "gone", "gone/below", "replaced"].iter().cycle())
    {
        let length = random.below(20_000);
        fs::write(tree.join(directory).join(format!("file{number}")), random.bytes(length)).unwrap();
    }
    fs::hard_link(tree.join("usr/bin/file2"), tree.join("usr/bin/second")).unwrap();
    let house = House::of_tree(&tree, 64 * MIB);
    let base = Mounted::new(&house.uri("untouched"));
    let mounted = Mounted::new(&house.uri("x"));
    script(&mounted.root(), &mut random, 80);
    // What the script may have left out.
    let at = |path: &str| mounted.path(path);
    let _ = fs::remove_dir_all(at("replaced"));
    fs::create_dir(at("replaced")).unwrap();
    fs::write(at("replaced/new"), "new").unwrap();
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(70 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", 65 * MIB).unwrap();
    drop(sparse);
    fs::hard_link(at("sparse"), at("sparse-too")).unwrap();
    run("setcap", ["cap_net_raw+ep".as_ref(), at("replaced/new").as_os_str()]);
    sync(&mounted);

    let layer = dir.path().join("layer.tar");
    house.changes("x", &["--tar", layer.to_str().unwrap()]);
    let list = run("tar", ["-tf", layer.to_str().unwrap()]);
    assert!(list.contains("replaced/.wh..wh..opq\n"), "{list}");
    let whole = dir.path().join("base.tar");
    let root = base.root();
    run(
        "tar",
        [
            "-cpf".as_ref(),
            whole.as_os_str(),
            "--xattrs".as_ref(),
            "--xattrs-include=*".as_ref(),
            "--numeric-owner".as_ref(),
            "--format=posix".as_ref(),
            "-C".as_ref(),
            root.as_os_str(),
            ".".as_ref(),
        ],
    );
    let image = dir.path().join("image");
    let (image, tag) = (image.to_str().unwrap(), format!("{}:tag", image.to_str().unwrap()));
    run("umoci", ["init", "--layout", image]);
    run("umoci", ["new", "--image", &tag]);
    for layer in [&whole, &layer] {
        run("umoci", ["raw", "add-layer", "--image", &tag, layer.to_str().unwrap()]);
    }
    let unpacked = dir.path().join("unpacked");
    run("umoci", ["raw", "unpack", "--image", &tag, unpacked.to_str().unwrap()]);
    assert_same_tree(&Walk::of(&unpacked), &without_sockets(Walk::of(&mounted.root())), "unpacked by umoci");
    // Another one of that kind takes the image as it is.
    let copied = format!("dir:{}", dir.path().join("copied").display());
    run("skopeo", ["--insecure-policy", "copy", &format!("oci:{tag}"), &copied]);
    let inspected = run("skopeo", ["inspect", &copied]);
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Layers"].as_array().map(Vec::len), Some(2), "{inspected}");
    mounted.detach();
    base.detach();
    house.server.stop();
}
