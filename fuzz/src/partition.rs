//! Partition tables: whatever a disk holds, reading its table ends, and what is found lies in the disk.
//!
//! The checksums of a GPT's header and entries are set right first, or the fuzzer would never get past them.

use memdev::root::partition::{Scheme, Table};

/// One input: a disk from its first byte on.
pub fn body(data: &[u8]) {
    let mut disk = data.to_vec();
    for sector in [512, 4096] {
        sign(&mut disk, sector);
    }
    let Ok(size) = u64::try_from(disk.len()) else { return };
    let mut reads = 0_u32;
    let table = Table::read(size, &mut |offset, bytes| {
        reads += 1;
        assert!(reads < 4096, "it ends");
        let start = usize::try_from(offset).expect("an offset within the disk");
        bytes.copy_from_slice(&disk[start..start + bytes.len()]);
        Ok(())
    });
    let Ok(table) = table else { return };
    let numbers: Vec<_> = table.partitions().iter().map(|partition| partition.number).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "each has a number of its own: {numbers:?}");
    for &number in &numbers {
        let least = if table.scheme() == Scheme::Gpt { 512 } else { 1 };
        if let Ok(found) = table.find(number) {
            assert!(found.offset >= 512 && found.length >= least);
            assert!(found.offset + found.length <= size);
        }
    }
    assert!(table.find(0).is_err() && table.find(u32::MAX).is_err());
}

/// Makes the checksums of the GPT right whose header is at `at`, if there is one.
fn sign(disk: &mut [u8], at: usize) {
    let Some(header) = disk.get(at..at + 512).filter(|header| header.starts_with(b"EFI PART")) else {
        return;
    };
    let number = |at: usize, length: usize| {
        header[at..at + length].iter().rev().fold(0_usize, |value, &byte| value << 8 | usize::from(byte))
    };
    let length = number(12, 4);
    let (start, count, size) = (number(72, 8), number(80, 4), number(84, 4));
    if let Some(start) = start.checked_mul(at)
        && let Some(end) = count.checked_mul(size).and_then(|array| start.checked_add(array))
        && let Some(entries) = disk.get(start..end)
    {
        let sum = crc32(entries);
        disk[at + 88..at + 92].copy_from_slice(&sum);
    }
    disk[at + 16..at + 20].fill(0);
    if let Some(end) = at.checked_add(length)
        && let Some(header) = disk.get(at..end)
    {
        let sum = crc32(header);
        disk[at + 16..at + 20].copy_from_slice(&sum);
    }
}

/// As it stands in the table: the least byte first.
fn crc32(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xedb8_8320 };
        }
    }
    let mut bytes = (!crc).to_be_bytes();
    bytes.reverse();
    bytes
}
