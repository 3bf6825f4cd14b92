//! Extended attributes as ext4 keeps them: behind the inode's fields, and in a block that inodes may share.

use super::fields::{le16, le32};

/// What an area of them begins with, in an inode and in a block.
const MAGIC: u32 = 0xea02_0000;
/// Bytes at the beginning of a block of them.
const BLOCK_HEAD: usize = 32;
/// Bytes of an entry before its name.
const HEAD: usize = 16;

/// The number for names that begin with `system.`: of no use to programs.
const SYSTEM: u8 = 7;
/// The name under which an inode keeps what does not fit where others have their blocks.
const DATA: &[u8] = b"data";

/// One attribute, or part of an inode's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attribute {
    /// `None`: it is the rest of the inode's data.
    pub(super) name: Option<Vec<u8>>,
    pub(super) value: Value,
}

/// What an attribute holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Bytes(Vec<u8>),
    /// An inode that holds it, and how many bytes it has.
    Inode(u32, u32),
}

/// The attributes in what is left of an inode behind its fields; what is wrong with them, if something is.
pub(super) fn in_inode(area: &[u8]) -> Result<Vec<Attribute>, &'static str> {
    if area.len() < 8 || le32(area, 0) != MAGIC {
        return Ok(Vec::new());
    }
    // Values are found from the first entry on.
    parse(&area[4..], 0)
}

/// The attributes in a block of them.
pub(super) fn in_block(block: &[u8]) -> Result<Vec<Attribute>, &'static str> {
    if le32(block, 0) != MAGIC || le32(block, 8) != 1 {
        return Err("has a block of attributes that is none");
    }
    parse(block, BLOCK_HEAD)
}

fn parse(area: &[u8], first: usize) -> Result<Vec<Attribute>, &'static str> {
    let (mut at, mut found) = (first, Vec::new());
    loop {
        // Four bytes of zero are the end, and so is the area's.
        let Some(entry) = area.get(at..).filter(|rest| rest.len() >= 4 && le32(rest, 0) != 0) else {
            return Ok(found);
        };
        if entry.len() < HEAD {
            return Err("has an attribute that is cut off");
        }
        let (length, index) = (usize::from(entry[0]), entry[1]);
        let name = entry.get(HEAD..HEAD + length).ok_or("has an attribute whose name is cut off")?;
        if name.contains(&0) {
            return Err("has an attribute whose name cannot be one");
        }
        let (offset, inode, size) = (usize::from(le16(entry, 2)), le32(entry, 4), le32(entry, 8));
        let value = if inode != 0 {
            Value::Inode(inode, size)
        } else {
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            let end = offset.checked_add(size).filter(|&end| end <= area.len());
            let end = end.ok_or("has an attribute whose value lies elsewhere")?;
            Value::Bytes(area.get(offset..end).unwrap_or_default().to_vec())
        };
        at += (HEAD + length).next_multiple_of(4);
        let is_list = matches!(index, 2 | 3);
        if index == SYSTEM && name == DATA {
            found.push(Attribute { name: None, value });
        } else if let Some(prefix) = prefix(index) {
            let value = match value {
                Value::Bytes(bytes) if is_list => Value::Bytes(access_list(&bytes)?),
                value => value,
            };
            found.push(Attribute { name: Some([prefix, name].concat()), value });
        }
    }
}

/// What the number stands for; `None` for what programs do not get to see.
fn prefix(index: u8) -> Option<&'static [u8]> {
    Some(match index {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        10 => b"gnu.",
        _ => return None,
    })
}

/// An access control list as programs get it: on the disk, entries that need no id have none.
fn access_list(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    let bad = "has an access control list that makes no sense";
    if bytes.len() < 4 || le32(bytes, 0) != 1 {
        return Err(bad);
    }
    let mut list = vec![2, 0, 0, 0];
    let mut rest = &bytes[4..];
    while !rest.is_empty() {
        let tag = if rest.len() < 4 { 0 } else { le16(rest, 0) };
        // The owner, the owning group, the mask and all others need no id; users and groups do.
        let length = match tag {
            0x01 | 0x04 | 0x10 | 0x20 => 4,
            0x02 | 0x08 => 8,
            _ => return Err(bad),
        };
        let entry = rest.get(..length).ok_or(bad)?;
        list.extend_from_slice(entry);
        if length == 4 {
            list.extend_from_slice(&[0xff; 4]);
        }
        rest = &rest[length..];
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn little(value: u32) -> [u8; 4] {
        let mut bytes = value.to_be_bytes();
        bytes.reverse();
        bytes
    }

    /// An area of two hundred bytes with entries (index, name, value), values from its end on.
    fn area(entries: &[(u8, &str, &[u8])]) -> Vec<u8> {
        let mut area = little(MAGIC).to_vec();
        let mut end = 200;
        area.resize(4 + end, 0);
        let mut at = 4;
        for (index, name, value) in entries {
            end -= value.len().next_multiple_of(4);
            area[4 + end..4 + end + value.len()].copy_from_slice(value);
            area[at] = u8::try_from(name.len()).unwrap();
            area[at + 1] = *index;
            area[at + 2] = u8::try_from(end).unwrap();
            area[at + 8..at + 12].copy_from_slice(&little(u32::try_from(value.len()).unwrap()));
            area[at + HEAD..at + HEAD + name.len()].copy_from_slice(name.as_bytes());
            at += (HEAD + name.len()).next_multiple_of(4);
        }
        area
    }

    fn named(name: &str, value: &[u8]) -> Attribute {
        Attribute { name: Some(name.into()), value: Value::Bytes(value.to_vec()) }
    }

    #[test]
    fn names_get_what_their_numbers_stand_for() {
        let bytes =
            area(&[(1, "a", b"one"), (6, "capability", b"12345"), (7, "data", b"rest"), (9, "c", b"?")]);
        let rest = Attribute { name: None, value: Value::Bytes(b"rest".to_vec()) };
        let expected = [named("user.a", b"one"), named("security.capability", b"12345"), rest];
        assert_eq!(in_inode(&bytes).unwrap(), expected);
        assert_eq!(in_inode(&[]).unwrap(), []);
        assert_eq!(in_inode(&[0; 50]).unwrap(), []);
    }

    #[test]
    fn lists_get_the_ids_that_they_lack() {
        let disk =
            [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 0x10, 0, 4, 0, 0x20, 0, 0, 0];
        let bytes = area(&[(2, "", &disk)]);
        let none = [0xff; 4];
        let list = [
            &[2, 0, 0, 0, 1, 0, 6, 0],
            &none[..],
            &[2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0],
            &none,
            &[0x10, 0, 4, 0],
            &none,
            &[0x20, 0, 0, 0],
            &none,
        ];
        assert_eq!(in_inode(&bytes).unwrap(), [named("system.posix_acl_access", &list.concat())]);
        for bad in
            [&[][..], &[2, 0, 0, 0], &[1, 0, 0, 0, 1], &[1, 0, 0, 0, 2, 0, 0, 0], &[1, 0, 0, 0, 7, 0, 0, 0]]
        {
            assert!(in_inode(&area(&[(2, "", bad)])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_lies_elsewhere_is_said() {
        let mut bytes = area(&[(1, "a", b"one")]);
        bytes[4 + 2] = 199;
        assert!(in_inode(&bytes).unwrap_err().contains("elsewhere"));
        bytes[4] = 200;
        assert!(in_inode(&bytes).unwrap_err().contains("name is cut off"));
        assert!(in_inode(&bytes[..4 + 10]).unwrap_err().contains("cut off"));
        let mut elsewhere = area(&[(1, "a", b"one")]);
        elsewhere[4 + 4] = 77;
        assert_eq!(in_inode(&elsewhere).unwrap()[0].value, Value::Inode(77, 3));
        assert!(in_block(&[0; 1024]).is_err());
    }
}
