//! The master boot record, and the chain of extended boot records. There is no written standard: what counts is how the
//! kernel numbers what it finds, and that is followed here.

use super::{Disk, Partition, SECTOR, broken, number32};
use crate::error::Result;

/// Where the four entries begin.
const TABLE: usize = 446;
/// Logical partitions begin with this number, however few primary ones there are.
const FIRST_LOGICAL: u32 = 5;
/// Extended boot records that are followed. The kernel numbers no more than 256 partitions of a disk.
const MOST_RECORDS: usize = 256;

/// One of the four entries of a boot record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    kind: u8,
    /// First sector, from somewhere.
    start: u32,
    sectors: u32,
}

impl Entry {
    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    /// Holds others: CHS, LBA, and Linux's own.
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// Says that the disk has a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.kind == 0xee
    }

    fn partition(&self, number: u32, base: u64) -> Partition {
        // 33 bits and 32 bits of sectors at most.
        let offset = (base + u64::from(self.start)) * SECTOR;
        Partition { number, offset, length: u64::from(self.sectors) * SECTOR }
    }
}

/// The entries of a boot record, if these 512 bytes are one.
pub(super) fn entries(sector: &[u8]) -> Option<[Entry; 4]> {
    let table = sector.get(TABLE..512)?;
    if table[64..] != [0x55, 0xaa] {
        return None;
    }
    let entries = [0, 16, 32, 48].map(|at| &table[at..at + 16]);
    // The code of a file system's boot sector lies here, too; an entry begins with "boot from me" or with nothing.
    if entries.iter().any(|entry| entry[0] & 0x7f != 0) {
        return None;
    }
    Some(entries.map(|entry| Entry {
        kind: entry[4],
        start: number32(entry, 8),
        sectors: number32(entry, 12),
    }))
}

/// The partitions, and the numbers of the extended ones among the first four.
pub(super) fn read(disk: &mut Disk<'_>, primary: &[Entry; 4]) -> Result<(Vec<Partition>, Vec<u32>)> {
    let (mut partitions, mut extended) = (Vec::new(), Vec::new());
    let mut logical = FIRST_LOGICAL;
    for (number, entry) in (1..).zip(primary).filter(|(_, entry)| entry.is_used()) {
        if entry.start == 0 {
            return Err(broken(format!("Partition {number} would begin with the partition table itself")));
        }
        if entry.is_extended() {
            extended.push(number);
            follow(disk, u64::from(entry.start), &mut logical, &mut partitions)?;
        } else {
            partitions.push(entry.partition(number, 0));
        }
    }
    Ok((partitions, extended))
}

/// Follows the chain of records in the extended partition that begins with sector `first`.
///
/// A record's own partition is counted from the record; the next record from the extended partition's begin.
fn follow(disk: &mut Disk<'_>, first: u64, logical: &mut u32, found: &mut Vec<Partition>) -> Result<()> {
    let mut record = first;
    let mut seen = Vec::new();
    loop {
        if seen.contains(&record) {
            return Err(broken("The chain of logical partitions leads back into itself"));
        }
        if seen.len() == MOST_RECORDS {
            return Err(broken(format!("There are more than {MOST_RECORDS} logical partitions")));
        }
        seen.push(record);
        let sector = disk.bytes(record * SECTOR, 512, "record of a logical partition")?;
        let Some(entries) = entries(&sector) else {
            return Err(broken(format!(
                "There is no partition record in sector {record}, where one belongs"
            ))
            .advise("the image is damaged"));
        };
        let mut used = entries.iter().filter(|entry| entry.is_used());
        for entry in used.clone().filter(|entry| !entry.is_extended()) {
            if entry.start == 0 {
                let error = format!("Partition {logical} would begin with the record that describes it");
                return Err(broken(error));
            }
            found.push(entry.partition(*logical, record));
            *logical += 1;
        }
        match used.find(|entry| entry.is_extended()) {
            Some(next) => record = first + u64::from(next.start),
            None => return Ok(()),
        }
    }
}
