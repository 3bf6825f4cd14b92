//! Files of every kind that QEMU makes, read here as it reads them itself.

use super::*;
use std::path::PathBuf;
use std::process::Command;

const MIB: usize = 1 << 20;

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a program of QEMU's beside the files.
    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) {
        let out = Command::new(program).args(args).current_dir(&self.dir).output();
        let out = out.expect("qemu-utils, which tools/setup installs");
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// What is in `name`, as QEMU sees it.
    fn expected(&self, name: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, "expected"]);
        std::fs::read(self.path("expected")).unwrap()
    }

    fn error(&self, name: &str) -> String {
        Saved::open(&self.path(name), None).err().expect("it is refused").to_string()
    }
}

/// What a device is that begins as `saved`, on `base`.
fn content(saved: &mut Saved, base: &[u8]) -> Vec<u8> {
    let (size, mut at) = (saved.size(), 0);
    let mut all = base.to_vec();
    while at < size {
        let Extent { range, kind } = saved.extent(at, size).unwrap();
        assert!(range.start == at && range.end > at && range.end <= size, "{range:?}");
        let place = in_memory(range.start)..in_memory(range.end);
        match kind {
            Kind::Nothing if saved.backing.is_some() => {}
            Kind::Nothing | Kind::Zero => all[place].fill(0),
            Kind::Data => all[place].copy_from_slice(&saved.read(&range).unwrap()),
        }
        at = range.end;
    }
    all
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    (0..bytes)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .collect()
}

#[test]
fn what_qemu_has_written_is_what_is_read() {
    let files = Files::new();
    let base = noise(9 * MIB + 512);
    std::fs::write(files.path("base"), &base).unwrap();
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4096,lazy_refcounts=on",
        "cluster_size=2M",
    ] {
        for over in [true, false] {
            let backing: &[&str] = if over { &["-b", "base", "-F", "raw"] } else { &[] };
            let size: &[&str] = if over { &[] } else { &["9437696"] };
            let args = [&["create", "-q", "-f", "qcow2", "-o", options][..], backing, &["x"], size].concat();
            files.run("qemu-img", &args);
            let commands = [
                "write -P 0xa1 5000 100000",
                "write -P 0xb2 3M 1M",
                "write -z 4M 300k",
                "write -P 0xc3 4198400 512",
                "discard 3500k 64k",
                "write -P 0xd4 9437184 512",
            ];
            let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
            files.run("qemu-io", &[&["-f", "qcow2"], &commands[..], &["x"]].concat());
            // What is in a snapshot is not what the disk is.
            files.run("qemu-img", &["snapshot", "-q", "-c", "before", "x"]);
            files.run("qemu-io", &["-f", "qcow2", "-c", "write -P 0xe5 6M 70000", "x"]);
            let mut saved = Saved::open(&files.path("x"), None).unwrap();
            let backing = Backing { name: "base".into(), format: Some("raw".to_owned()) };
            assert_eq!(saved.backing(), over.then_some(&backing), "{options}");
            assert_eq!(saved.size(), base.len() as u64);
            assert!(content(&mut saved, &base) == files.expected("x"), "{options}, over a base: {over}");
        }
    }
}

#[test]
fn what_is_compressed_is_inflated() {
    let files = Files::new();
    let mut disk = noise(3 * MIB);
    disk[MIB..2 * MIB].fill(7);
    std::fs::write(files.path("disk"), &disk).unwrap();
    for size in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M"] {
        files.run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", size, "disk", "x"]);
        let mut saved = Saved::open(&files.path("x"), None).unwrap();
        assert!(content(&mut saved, &[0; 3 * MIB]) == disk, "{size}");
        // From the midst of a cluster on.
        assert!(saved.read(&(1_500_001..1_700_003)).unwrap() == disk[1_500_001..1_700_003], "{size}");
    }
    let mut damaged = std::fs::read(files.path("x")).unwrap();
    let end = damaged.len();
    damaged[end / 2..].fill(0xff);
    std::fs::write(files.path("x"), damaged).unwrap();
    let mut saved = Saved::open(&files.path("x"), None).unwrap();
    let error = (0..3).find_map(|at| saved.read(&(at << 20..(at + 1) << 20)).err()).expect("it is damaged");
    assert!(error.to_string().starts_with("The image has a compressed cluster that is damaged ("), "{error}");
}

#[test]
fn what_is_not_read_here_is_refused_and_says_what_to_do() {
    let files = Files::new();
    let create =
        |options: &str| files.run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "x", "1M"]);
    create("data_file=data,data_file_raw=on");
    assert!(
        files.error("x").starts_with("The image keeps its data in another file ("),
        "{}",
        files.error("x")
    );
    assert!(files.error("x").ends_with("; convert it: qemu-img convert -O qcow2"));
    create("extended_l2=on,cluster_size=128k");
    assert!(files.error("x").starts_with("The image has subclusters"), "{}", files.error("x"));
    create("compression_type=zstd");
    assert!(files.error("x").starts_with("The image is not compressed by deflate"), "{}", files.error("x"));

    create("compat=1.1");
    let sound = std::fs::read(files.path("x")).unwrap();
    let broken = |at: usize, bytes: &[u8]| {
        let mut broken = sound.clone();
        broken[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(files.path("x"), broken).unwrap();
        files.error("x")
    };
    for (at, bytes, why) in [
        (4, &[0, 0, 0, 4][..], "The image is qcow2 of version 4"),
        (8, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5], "The image has a backing file without a name"),
        (20, &[0, 0, 0, 40], "The image has clusters of a size that there is not"),
        (24, &[0xff; 8], "The image has a table that does not fit its size"),
        (32, &[0, 0, 0, 1], "The image is encrypted"),
        (36, &[0, 0, 0, 0], "The image has a table that does not fit its size"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 9], "The image has a table between clusters"),
        (40, &[0, 0, 0, 9, 0, 0, 0, 0], "The image ends before its data does"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "The image is marked as corrupt"),
        (72, &[0x80], "The image has features that are not known here"),
        (100, &[0, 0, 0, 8], "The image has a header of a length that there is not"),
    ] {
        let said = broken(at, bytes);
        assert!(said.starts_with(why), "{at}: {said}");
    }
    std::fs::write(files.path("x"), &sound[..50]).unwrap();
    assert!(files.error("x").starts_with("The image ends within its header"));
    assert!(files.error("none").starts_with("Cannot read"));
    assert!(files.error(".").starts_with("Not a file:"));
}

#[test]
fn a_file_that_was_cut_off_is_not_taken_for_zeroes() {
    let files = Files::new();
    std::fs::write(files.path("disk"), noise(MIB)).unwrap();
    files.run("qemu-img", &["convert", "-O", "qcow2", "disk", "x"]);
    let file = File::options().write(true).open(files.path("x")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 70_000).unwrap();
    let mut saved = Saved::open(&files.path("x"), None).unwrap();
    let error = saved.read(&(0..1 << 20)).unwrap_err();
    assert!(error.to_string().starts_with("The image ends before its data does ("), "{error}");
}

#[test]
fn what_looks_like_qcow2_can_be_read_as_raw() {
    let files = Files::new();
    files.run("qemu-img", &["create", "-q", "-f", "qcow2", "x", "1M"]);
    let bytes = std::fs::read(files.path("x")).unwrap();
    let mut saved = Saved::open(&files.path("x"), Some(Format::Raw)).unwrap();
    assert_eq!((saved.size(), saved.backing()), (bytes.len() as u64, None));
    let zeroes = vec![0; bytes.len()];
    assert!(content(&mut saved, &zeroes) == bytes);
}

#[test]
fn only_what_differs_is_written() {
    let there = noise(5 * BLOCK + 100);
    let mut wanted = there.clone();
    assert_eq!(differences(&wanted, &there), []);
    wanted[BLOCK - 1] ^= 1;
    wanted[BLOCK] ^= 1;
    wanted[3 * BLOCK..4 * BLOCK].fill(0);
    wanted[5 * BLOCK + 99] ^= 1;
    let expected = [(0..2 * BLOCK, false), (3 * BLOCK..4 * BLOCK, true), (5 * BLOCK..5 * BLOCK + 100, false)];
    assert_eq!(differences(&wanted, &there), expected);
}
