//! Partition tables as foreign tools make them: what sfdisk and sgdisk write down, memdev reads as they tell it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use memdev::root::partition::{Partition, Scheme, Table};
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// An empty disk.
fn disk(size: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    (dir, path)
}

/// Runs a tool that is in a directory for administrators; what it writes.
#[track_caller]
fn tool(name: &str, args: &[&str], disk: &Path, input: &str) -> String {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(args).arg(disk);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}; run tools/setup"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The partitions as sfdisk lists them, but for extended ones.
#[track_caller]
fn as_sfdisk_says(disk: &Path) -> Vec<Partition> {
    let list: Value = serde_json::from_str(&tool("sfdisk", &["--json"], disk, "")).unwrap();
    let sector = list["partitiontable"]["sectorsize"].as_u64().unwrap();
    let listed = list["partitiontable"]["partitions"].as_array().unwrap();
    let mut partitions: Vec<_> = listed
        .iter()
        .filter(|partition| !["5", "f", "85"].contains(&partition["type"].as_str().unwrap()))
        .map(|partition| Partition {
            number: partition["node"].as_str().unwrap().rsplit("disk.img").next().unwrap().parse().unwrap(),
            offset: partition["start"].as_u64().unwrap() * sector,
            length: partition["size"].as_u64().unwrap() * sector,
        })
        .collect();
    partitions.sort_unstable_by_key(|partition| partition.number);
    partitions
}

#[track_caller]
fn table(disk: &Path) -> Table {
    Table::of_file(&File::open(disk).unwrap()).unwrap()
}

#[track_caller]
fn assert_as_sfdisk_says(disk: &Path, scheme: Scheme, numbers: &[u32]) {
    let table = table(disk);
    assert_eq!(table.scheme(), scheme);
    assert_eq!(table.partitions(), as_sfdisk_says(disk));
    assert!(table.partitions().iter().map(|partition| partition.number).eq(numbers.iter().copied()));
    for &number in numbers {
        table.find(number).unwrap();
    }
}

#[test]
fn primary_partitions_of_an_mbr() {
    let (_dir, disk) = disk(64 * MIB);
    tool(
        "sfdisk",
        &[],
        &disk,
        "label: dos\nstart=2048, size=10M, type=83, bootable\n2: size=5M, type=c\n4: size=7M\n",
    );
    assert_as_sfdisk_says(&disk, Scheme::Mbr, &[1, 2, 4]);
}

#[test]
fn logical_partitions_in_each_kind_of_extended_one() {
    for kind in ["5", "f", "85"] {
        let (_dir, disk) = disk(64 * MIB);
        let script = format!(
            "label: dos\n1: size=10M\n2: size=40M, type={kind}\n3: size=5M\n5: size=3M\n6: size=4M, type=82\n7: size=5M\n"
        );
        tool("sfdisk", &[], &disk, &script);
        assert_as_sfdisk_says(&disk, Scheme::Mbr, &[1, 3, 5, 6, 7]);
        let error = table(&disk).find(2).unwrap_err().to_string();
        assert!(error.contains("extended"), "{error}");
    }
}

#[test]
fn logical_partitions_that_are_chained_in_another_order() {
    let (_dir, disk) = disk(64 * MIB);
    tool(
        "sfdisk",
        &[],
        &disk,
        "label: dos\n1: start=4096, size=50M, type=f\n5: start=40960, size=3M\n6: start=8192, size=4M\n",
    );
    assert_as_sfdisk_says(&disk, Scheme::Mbr, &[5, 6]);
}

#[test]
fn a_gpt_by_sfdisk_and_one_by_sgdisk() {
    let (_dir, disk) = disk(64 * MIB);
    tool("sfdisk", &[], &disk, "label: gpt\n1: size=1M, type=U\n2: size=20M\n15: size=8M\n");
    assert_as_sfdisk_says(&disk, Scheme::Gpt, &[1, 2, 15]);
    let (_dir, disk) = self::disk(64 * MIB);
    tool("sgdisk", &["--clear", "--new=1:0:+5M", "--new=128:0:+6M"], &disk, "");
    assert_as_sfdisk_says(&disk, Scheme::Gpt, &[1, 128]);
}

#[test]
fn a_gpt_with_more_entries_than_usual_and_one_with_large_sectors() {
    let (_dir, disk) = disk(64 * MIB);
    tool("sgdisk", &["--clear", "--resize-table=256", "--new=200:0:+6M"], &disk, "");
    assert_as_sfdisk_says(&disk, Scheme::Gpt, &[200]);
    let (_dir, disk) = self::disk(64 * MIB);
    // sfdisk learnt of other sizes of sectors late; fdisk is told by its keys.
    tool("fdisk", &["-b", "4096"], &disk, "g\nn\n1\n512\n1535\nn\n2\n1536\n3583\nw\n");
    let partition = |number, offset, length| Partition { number, offset, length };
    let expected = [partition(1, 2 * MIB, 4 * MIB), partition(2, 6 * MIB, 8 * MIB)];
    assert_eq!(table(&disk).partitions(), expected);
}

#[test]
fn a_gpt_whose_first_copy_is_damaged_is_read_by_the_second() {
    for damaged in [512_u64, 1024 + 20, 512 + 60] {
        let (_dir, disk) = disk(64 * MIB);
        tool("sfdisk", &[], &disk, "label: gpt\n1: size=1M\n2: size=20M\n");
        let whole = table(&disk);
        File::options().write(true).open(&disk).unwrap().write_all_at(b"damage", damaged).unwrap();
        assert_eq!(table(&disk), whole);
    }
}

#[test]
fn a_gpt_that_was_cut_off_is_read_and_what_is_not_there_refused() {
    let (_dir, disk) = disk(64 * MIB);
    tool("sfdisk", &[], &disk, "label: gpt\n1: size=10M\n2: size=40M\n");
    let whole = table(&disk);
    File::options().write(true).open(&disk).unwrap().set_len(30 * MIB).unwrap();
    let cut = table(&disk);
    assert_eq!(cut.partitions(), whole.partitions());
    cut.find(1).unwrap();
    let error = cut.find(2).unwrap_err().to_string();
    assert_eq!(error, "Partition 2 goes beyond the image's end, at 31457280 bytes; the image is not whole");
    // Neither copy is there now.
    File::options().write(true).open(&disk).unwrap().write_all_at(b"damage", 512).unwrap();
    let error = Table::of_file(&File::open(&disk).unwrap()).unwrap_err().to_string();
    assert!(error.contains("there is no header in its second sector; nor can the copy"), "{error}");
}

#[test]
fn a_file_system_without_a_table_is_told_from_a_disk() {
    let (_dir, disk) = disk(8 * MIB);
    tool("mkfs.ext4", &["-q", "-F"], &disk, "");
    let error = Table::of_file(&File::open(&disk).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "The image has no partition table; if it is one file system, leave the partition out");
}

#[test]
fn what_lies_there_is_the_file_system_that_was_put_there() {
    let (dir, disk) = disk(64 * MIB);
    tool("sfdisk", &[], &disk, "label: dos\n1: size=10M\n2: size=40M, type=5\n5: size=3M\n6: size=9M\n");
    let partition = table(&disk).find(6).unwrap();
    let inner = dir.path().join("inner.img");
    File::create(&inner).unwrap().set_len(partition.length).unwrap();
    tool("mkfs.ext4", &["-q", "-F", "-L", "in-six"], &inner, "");
    let bytes = fs::read(&inner).unwrap();
    File::options().write(true).open(&disk).unwrap().write_all_at(&bytes, partition.offset).unwrap();
    let offset = partition.offset.to_string();
    let label = tool("blkid", &["-p", "-O", &offset, "-s", "LABEL", "-o", "value"], &disk, "");
    assert_eq!(label, "in-six\n");
}
