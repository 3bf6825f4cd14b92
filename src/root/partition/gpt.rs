//! The GUID partition table (UEFI specification 2.10, section 5.3).

use super::{Disk, LARGE_SECTOR, Partition, SECTOR, broken, number, number32};
use crate::error::{Error, Result};

/// What a header begins with.
const SIGNATURE: &[u8] = b"EFI PART";
/// Bytes of a header that mean something.
const HEADER: usize = 92;
/// Bytes of an entry, at least; larger ones are 128 times a power of two.
const ENTRY: usize = 128;
/// An array of entries that is larger than this is taken for damage: it is 64 times the usual one.
const LARGEST_ARRAY: u64 = 1 << 20;

/// The partitions. When the first header or its array is damaged, by the second one at the disk's end.
pub(super) fn read(disk: &mut Disk<'_>) -> Result<Vec<Partition>> {
    // The sectors' size is not written down anywhere but in where the first header is.
    let mut sector = None;
    for size in [SECTOR, LARGE_SECTOR] {
        let header = disk.bytes(size, SIGNATURE.len(), "header");
        if header.is_ok_and(|found| found == SIGNATURE) {
            sector = Some(size);
            break;
        }
    }
    let first = match sector {
        Some(size) => by_header(disk, size, 1),
        None => Err(broken("The disk should have a GPT, but there is no header in its second sector")),
    };
    let Err(why) = first else { return first };
    for size in sector.map_or(vec![SECTOR, LARGE_SECTOR], |size| vec![size]) {
        let Some(last) = (disk.size / size).checked_sub(1).filter(|&last| last > 1) else { continue };
        if let Ok(partitions) = by_header(disk, size, last) {
            return Ok(partitions);
        }
    }
    Err(why.advise("nor can the copy at the image's end be used; the image is damaged or not whole"))
}

/// The partitions by the header in sector `place`.
fn by_header(disk: &mut Disk<'_>, sector: u64, place: u64) -> Result<Vec<Partition>> {
    let wrong = |what: &str| broken(format!("The header of the GPT has {what}"));
    // Both sizes of sectors fit into anything.
    let header = disk.bytes(place * sector, usize::try_from(sector).unwrap_or(HEADER), "header")?;
    if !header.starts_with(SIGNATURE) {
        return Err(wrong("no signature"));
    }
    if number(&header, 10, 2) != 1 {
        return Err(wrong("a revision that is not known"));
    }
    let length = usize::try_from(number32(&header, 12)).unwrap_or(usize::MAX);
    if !(HEADER..=header.len()).contains(&length) {
        return Err(wrong("a length that makes no sense"));
    }
    // The checksum is that of a header whose own checksum is zero.
    let mut summed = header[..length].to_vec();
    summed[16..20].fill(0);
    if crc32(&summed) != number32(&header, 16) {
        return Err(wrong("a wrong checksum"));
    }
    if number(&header, 24, 8) != place {
        return Err(wrong("another sector's number"));
    }
    let usable = number(&header, 40, 8)..=number(&header, 48, 8);
    if *usable.start() < 2 {
        return Err(wrong("no room for itself"));
    }
    let count = number(&header, 80, 4);
    let size = number(&header, 84, 4);
    let is_size = size >= ENTRY as u64 && size.is_power_of_two();
    if !is_size || count == 0 || count * size > LARGEST_ARRAY {
        return Err(wrong("an array of entries of a size that makes no sense"));
    }
    let start = number(&header, 72, 8).checked_mul(sector).ok_or_else(|| wrong("its entries nowhere"))?;
    let array = disk.bytes(start, usize::try_from(count * size).unwrap_or(usize::MAX), "array of entries")?;
    if crc32(&array) != number32(&header, 88) {
        return Err(broken("The entries of the GPT have a wrong checksum"));
    }
    // At most LARGEST_ARRAY.
    let size = usize::try_from(size).unwrap_or(ENTRY);
    let used = (1..).zip(array.chunks_exact(size)).filter(|(_, entry)| entry[..16] != [0; 16]);
    used.map(|(at, entry)| partition(at, entry, &usable, sector)).collect()
}

fn partition(
    at: u32,
    entry: &[u8],
    usable: &std::ops::RangeInclusive<u64>,
    sector: u64,
) -> Result<Partition> {
    let wrong = |what: &str| -> Error { broken(format!("Partition {at} of the GPT {what}")) };
    let (first, last) = (number(entry, 32, 8), number(entry, 40, 8));
    if last < first {
        return Err(wrong("ends before it begins"));
    }
    if !usable.contains(&first) || !usable.contains(&last) {
        return Err(wrong("lies outside of what the table calls usable"));
    }
    let bytes = |sectors: u64| sectors.checked_mul(sector).ok_or_else(|| wrong("lies beyond any disk's end"));
    let end = bytes(last.checked_add(1).ok_or_else(|| wrong("lies beyond any disk's end"))?)?;
    let offset = bytes(first)?;
    Ok(Partition { number: at, offset, length: end - offset })
}

/// CRC-32 as ISO 3309 has it. A table is read once: no need to be fast.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1)))
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_the_usual_one() {
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(super::crc32(b"123456789"), 0xcbf4_3926);
    }
}
