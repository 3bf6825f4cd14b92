//! A block of a directory: names and the inodes that they lead to. The index by which the kernel finds a name faster
//! looks like entries of nothing here.

use super::fields::{le16, le32};
use crate::changes::tree::Name;

/// Bytes of an entry before its name.
const HEAD: usize = 8;

/// Adds the entries of `block` to `entries`; what is wrong with it, if something is. `names_have_kinds`: the byte behind a
/// name's length is not part of it.
pub(super) fn parse(block: &[u8], entries: &mut Vec<(Name, u32)>) -> Result<(), &'static str> {
    let mut at = 0;
    while at < block.len() {
        let rest = &block[at..];
        if rest.len() < HEAD {
            return Err("ends in the midst of an entry");
        }
        let length = entry_length(le16(rest, 4), block.len());
        if length < HEAD + 4 || !length.is_multiple_of(4) || length > rest.len() {
            return Err("has an entry of a length that cannot be");
        }
        let (inode, name_length) = (le32(rest, 0), usize::from(rest[6]));
        if HEAD + name_length > length {
            return Err("has a name that is longer than its entry");
        }
        let name = &rest[HEAD..HEAD + name_length];
        if inode != 0 && name != b"." && name != b".." {
            if name.is_empty() || name.iter().any(|&byte| byte == b'/' || byte == 0) {
                return Err("has a name that cannot be one");
            }
            entries.push((name.into(), inode));
        }
        at += length;
    }
    Ok(())
}

/// Where blocks have 64 KiB, the length of one that is all of it does not fit.
fn entry_length(length: u16, block: usize) -> usize {
    let length = usize::from(length);
    match length {
        0 | 0xffff if block >= 0x1_0000 => block,
        _ if block > 0x1_0000 => (length & 0xfffc) | (length & 3) << 16,
        _ => length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(inode: u8, length: u16, name: &[u8]) -> Vec<u8> {
        let [high, low] = length.to_be_bytes();
        let mut bytes = vec![inode, 0, 0, 0, low, high, u8::try_from(name.len()).unwrap(), 1];
        bytes.extend(name);
        bytes.resize(usize::from(length).max(bytes.len()), 0);
        bytes
    }

    fn names(block: &[u8]) -> Result<Vec<(String, u32)>, &'static str> {
        let mut entries = Vec::new();
        parse(block, &mut entries)?;
        Ok(entries.into_iter().map(|(name, inode)| (String::from_utf8_lossy(&name).into(), inode)).collect())
    }

    #[test]
    fn names_lead_to_inodes() {
        let block = [
            entry(2, 12, b"."),
            entry(2, 12, b".."),
            entry(11, 20, b"lost+found"),
            entry(0, 16, b"gone"),
            entry(12, 28, b"a"),
            // The checksum at the end.
            entry(0, 12, b""),
        ];
        let expected = vec![("lost+found".to_owned(), 11), ("a".to_owned(), 12)];
        assert_eq!(names(&block.concat()), Ok(expected));
        assert_eq!(names(&[]), Ok(vec![]));
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        for (block, why) in [
            (vec![1, 0, 0, 0, 12], "midst"),
            (entry(1, 8, b""), "length"),
            ([entry(1, 12, b"a"), entry(1, 8, b""), entry(1, 12, b"a")].concat(), "length"),
            (entry(1, 0, b"abcd"), "length"),
            (entry(1, 14, b"abcd"), "length"),
            (entry(1, 64, b"a")[..32].to_vec(), "length"),
            (entry(1, 12, b"a/b"), "name that cannot"),
            (entry(1, 12, b"a\0b"), "name that cannot"),
            (entry(1, 12, b""), "name that cannot"),
            (entry(1, 12, b"abcdefgh"), "longer"),
        ] {
            let found = names(&block).unwrap_err();
            assert!(found.contains(why), "{found} where {why} was expected");
        }
        assert_eq!(entry_length(0xffff, 0x1_0000), 0x1_0000);
        assert_eq!(entry_length(12, 0x1_0000), 12);
    }
}
