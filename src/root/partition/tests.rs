//! Tables that no tool makes: damaged, hostile, or at the edge of what can be. What tools make is in
//! `tests/partitions.rs`.

use super::{Partition, Scheme, Table};
use crate::error::{ErrorKind, Result};

const SECTORS: u64 = 4096;
const SIZE: u64 = SECTORS * 512;

/// A disk of so few bytes that a test writes them down.
fn read(bytes: &[(u64, &[u8])]) -> Result<Table> {
    Table::read(SIZE, &mut |offset, buffer| {
        buffer.fill(0);
        for &(at, bytes) in bytes {
            for (place, &byte) in (at..).zip(bytes) {
                if let Some(index) = place.checked_sub(offset).and_then(|index| usize::try_from(index).ok())
                    && let Some(slot) = buffer.get_mut(index)
                {
                    *slot = byte;
                }
            }
        }
        Ok(())
    })
}

fn small(value: u64) -> [u8; 4] {
    let bytes = u32::try_from(value).unwrap().to_be_bytes();
    [bytes[3], bytes[2], bytes[1], bytes[0]]
}

/// A boot record with these entries: kind, start, sectors.
fn record(entries: &[(u8, u64, u64)]) -> Vec<u8> {
    let mut sector = vec![0; 512];
    for (index, &(kind, start, sectors)) in entries.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&small(start));
        entry[12..16].copy_from_slice(&small(sectors));
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn refused(bytes: &[(u64, &[u8])]) -> String {
    let error = read(bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    error.to_string()
}

#[test]
fn what_has_no_table_says_so() {
    for bytes in [vec![], record(&[]), vec![0xff; 512]] {
        let error = read(&[(0, &bytes)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().starts_with("The image has no partition table; if it is one"), "{error}");
    }
    let tiny = Table::read(100, &mut |_, _| panic!("there is nothing to read")).unwrap_err();
    assert_eq!(tiny.kind(), ErrorKind::NotFound);
}

#[test]
fn logical_partitions_are_counted_from_their_record_and_records_from_the_extended_partition() {
    let disk = record(&[(0x83, 8, 8), (0x0f, 100, 200)]);
    let first = record(&[(0x83, 2, 10), (0x05, 50, 20)]);
    let second = record(&[(0x82, 3, 11)]);
    let table = read(&[(0, &disk), (100 * 512, &first), (150 * 512, &second)]).unwrap();
    assert_eq!(table.scheme(), Scheme::Mbr);
    let at =
        |number, first: u64, sectors: u64| Partition { number, offset: first * 512, length: sectors * 512 };
    assert_eq!(table.partitions(), [at(1, 8, 8), at(5, 102, 10), at(6, 153, 11)]);
    assert_eq!(table.find(6).unwrap(), at(6, 153, 11));
    let extended = table.find(2).unwrap_err().to_string();
    assert!(extended.starts_with("Partition 2 is an extended one, which only holds others"), "{extended}");
    let none = table.find(3).unwrap_err();
    assert_eq!(
        (none.kind(), none.to_string().as_str()),
        (ErrorKind::NotFound, "The image has no partition 3, but 1, 5, 6")
    );
}

#[test]
fn a_partition_that_is_not_all_there_is_refused_and_the_others_are_not() {
    let disk = record(&[(0x83, 8, 8), (0x83, 16, SECTORS), (0x83, 0xffff_ffff, 0xffff_ffff)]);
    let table = read(&[(0, &disk)]).unwrap();
    table.find(1).unwrap();
    for number in [2, 3] {
        let error = table.find(number).unwrap_err().to_string();
        let expected = format!(
            "Partition {number} goes beyond the image's end, at {SIZE} bytes; the image is not whole"
        );
        assert_eq!(error, expected);
    }
}

#[test]
fn chains_that_do_not_end_are_refused() {
    let disk = record(&[(0x05, 100, 200)]);
    let to_itself = record(&[(0x83, 2, 1), (0x05, 0, 20)]);
    assert!(refused(&[(0, &disk), (100 * 512, &to_itself)]).contains("back into itself"));
    let (there, back) = (record(&[(0x05, 50, 20)]), record(&[(0x05, 10, 20)]));
    let circle: &[(u64, &[u8])] = &[(0, &disk), (100 * 512, &there), (150 * 512, &back), (110 * 512, &there)];
    assert!(refused(circle).contains("back into itself"));
    let endless: Vec<_> =
        (1..400).map(|next| ((99 + next) * 512, record(&[(0x83, 1, 1), (0x05, next, 2)]))).collect();
    let mut bytes: Vec<(u64, &[u8])> = vec![(0, &disk)];
    bytes.extend(endless.iter().map(|(at, record)| (*at, &**record)));
    assert!(refused(&bytes).contains("more than 256 logical"));
}

#[test]
fn chains_that_lead_nowhere_are_refused() {
    let far = record(&[(0x05, SECTORS, 200)]);
    assert!(refused(&[(0, &far)]).contains("record of a logical partition would lie beyond the image's end"));
    let disk = record(&[(0x05, 100, 200)]);
    let line = refused(&[(0, &disk)]);
    assert_eq!(line, "There is no partition record in sector 100, where one belongs; the image is damaged");
}

#[test]
fn partitions_that_would_be_their_own_table_are_refused() {
    assert!(refused(&[(0, &record(&[(0x83, 0, 100)]))]).contains("Partition 1 would begin with the"));
    let disk = record(&[(0x05, 100, 200)]);
    let own = record(&[(0x83, 0, 10)]);
    assert!(refused(&[(0, &disk), (100 * 512, &own)]).contains("Partition 5 would begin with the"));
}

/// A GPT with one entry, whose checksums are right, after `change` was made to header and entries.
fn gpt(change: impl Fn(&mut [u8], &mut [u8])) -> Result<Table> {
    let mut entries = vec![0; 4 * 128];
    entries[..16].fill(7);
    entries[32..36].copy_from_slice(&small(40));
    entries[40..44].copy_from_slice(&small(49));
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    for (at, value) in [(8, 0x1_0000), (12, 92), (24, 1), (40, 34), (48, 4000), (72, 2), (80, 4), (84, 128)] {
        header[at..at + 4].copy_from_slice(&small(value));
    }
    change(&mut header, &mut entries);
    if header[88..92] == [0; 4] {
        let sum = super::gpt::crc32(&entries);
        header[88..92].copy_from_slice(&small(sum.into()));
    }
    if header[16..20] == [0; 4] {
        let sum = super::gpt::crc32(&header[..92]);
        header[16..20].copy_from_slice(&small(sum.into()));
    }
    read(&[(0, &record(&[(0xee, 1, SECTORS - 1)])), (512, &header), (1024, &entries)])
}

#[test]
fn a_gpt_that_is_right_is_read() {
    let table = gpt(|_, _| {}).unwrap();
    assert_eq!(table.scheme(), Scheme::Gpt);
    assert_eq!(table.partitions(), [Partition { number: 1, offset: 40 * 512, length: 10 * 512 }]);
}

#[test]
fn a_gpt_that_cannot_be_right_says_what_is_wrong() {
    type Damage<'a> = &'a dyn Fn(&mut [u8], &mut [u8]);
    let cases: &[(Damage<'_>, &str)] = &[
        (&|header, _| header[0] = b'e', "no header in its second sector"),
        (&|header, _| header[10] = 2, "a revision that is not known"),
        (&|header, _| header[12] = 91, "a length that makes no sense"),
        (&|header, _| header[14] = 1, "a length that makes no sense"),
        (&|header, _| header[16] = 1, "a wrong checksum"),
        (&|header, _| header[24] = 2, "another sector's number"),
        (&|header, _| header[40] = 1, "no room for itself"),
        (&|header, _| header[84] = 127, "an array of entries of a size"),
        (&|header, _| header[84..86].copy_from_slice(&[0x80, 1]), "an array of entries of a size"),
        (&|header, _| header[80] = 0, "an array of entries of a size"),
        (&|header, _| header[80..84].fill(0xff), "an array of entries of a size"),
        (&|header, _| header[72..80].fill(0xff), "its entries nowhere"),
        (&|header, _| header[73] = 0x20, "array of entries would lie beyond the image's end"),
        (&|header, _| header[88] = 1, "The entries of the GPT have a wrong checksum"),
        (&|_, entries| entries[40] = 39, "Partition 1 of the GPT ends before it begins"),
        (&|_, entries| entries[32] = 33, "lies outside of what the table calls usable"),
        (&|_, entries| entries[43] = 1, "lies outside of what the table calls usable"),
        (
            &|header, entries| {
                header[48..56].fill(0xff);
                entries[40..48].fill(0xff);
            },
            "lies beyond any disk's end",
        ),
    ];
    for (change, expected) in cases {
        let error = gpt(change).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let line = error.to_string();
        assert!(line.contains(expected), "{expected} in {line}");
        assert!(line.contains("nor can the copy at the image's end be used"), "{line}");
    }
}

#[test]
fn what_cannot_be_read_is_the_readers_error() {
    let error = Table::read(SIZE, &mut |_, _| Err(std::io::Error::from_raw_os_error(5))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().starts_with("Cannot read the partition table's first sector: "), "{error}");
}
