//! What an image seems to hold, from the signatures in its first 128 KiB. Pure: bytes in, findings out.
//!
//! Only for people: the server treats every image as raw bytes. All that it does about what it finds there is to say so, so
//! an image cannot make it open another file.

/// How much of an image's start [`probe`] wants: the farthest signature, that of btrfs, lies just above 64 KiB.
pub const PROBE_SIZE: usize = 128 << 10;

/// How much of it shows whether it is a raw disk: a page, so that little has to wait for a disk.
pub const ADVICE_SIZE: usize = 4096;

/// One thing that an image seems to be or to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Its name as `blkid` and `qemu-img` write it: `ext4`, `gpt`, `qcow2`.
    pub kind: &'static str,
    /// What that is, for people.
    pub what: &'static str,
    /// The label that its maker gave it.
    pub label: Option<String>,
    /// The UUID of the file system.
    pub uuid: Option<String>,
    /// The image is no raw disk: what to do before it is served.
    pub advice: Option<&'static str>,
}

const CONVERT: &str = "convert it first: qemu-img convert -O raw IMAGE IMAGE.raw";
const UNPACK: &str = "unpack it first";

/// Signatures that need no second look: offset, magic bytes, kind, what it is, advice.
type Signature = (usize, &'static [u8], &'static str, &'static str, Option<&'static str>);
const SIGNATURES: &[Signature] = &[
    (0, b"XFSB", "xfs", "XFS file system", None),
    (0, b"hsqs", "squashfs", "squashfs file system (compressed, read-only)", None),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs", "EROFS file system (read-only)", None),
    (1024, b"\x10\x20\xf5\xf2", "f2fs", "F2FS file system", None),
    (3, b"NTFS    ", "ntfs", "NTFS file system", None),
    (54, b"FAT1", "vfat", "FAT file system", None),
    (82, b"FAT32", "vfat", "FAT file system", None),
    (65536 + 64, b"_BHRfS_M", "btrfs", "btrfs file system", None),
    (32768 + 1, b"CD001", "iso9660", "ISO 9660 file system (read-only)", None),
    (4096 - 10, b"SWAPSPACE2", "swap", "swap space", None),
    (0, b"LUKS\xba\xbe", "crypto_LUKS", "LUKS encrypted volume", None),
    (512, b"LABELONE", "LVM2_member", "LVM physical volume", None),
    (0, b"QFI\xfb", "qcow2", "qcow2 image", Some(CONVERT)),
    (0, b"KDMV", "vmdk", "VMDK image", Some(CONVERT)),
    (0, b"COWD", "vmdk", "VMDK image", Some(CONVERT)),
    (0, b"# Disk DescriptorFile", "vmdk", "VMDK descriptor, not the disk itself", Some(CONVERT)),
    (64, b"\x7f\x10\xda\xbe", "vdi", "VirtualBox image", Some(CONVERT)),
    (0, b"vhdxfile", "vhdx", "VHDX image", Some(CONVERT)),
    (0, b"conectix", "vpc", "VHD image", Some(CONVERT)),
    (0, b"\x1f\x8b\x08", "gzip", "gzip compressed file", Some(UNPACK)),
    (0, b"\xfd7zXZ\0", "xz", "xz compressed file", Some(UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", "zstd", "zstd compressed file", Some(UNPACK)),
    (0, b"BZh", "bzip2", "bzip2 compressed file", Some(UNPACK)),
];

/// What `start`, the first [`PROBE_SIZE`] bytes of an image (fewer if it is shorter), shows signatures of.
/// Several answers can be true at once: a hybrid ISO has a partition table, too.
#[must_use]
pub fn probe(start: &[u8]) -> Vec<Content> {
    let mut found = Vec::new();
    for &(offset, magic, kind, what, advice) in SIGNATURES {
        if start.get(offset..).is_some_and(|rest| rest.starts_with(magic)) {
            let mut content = Content { kind, what, advice, ..Content::default() };
            add_names(&mut content, start);
            found.push(content);
        }
    }
    found.extend(ext(start));
    // The boot sector of a FAT or NTFS file system ends as a partition table does.
    if !found.iter().any(|content| matches!(content.kind, "vfat" | "ntfs")) {
        found.extend(partition_table(start));
    }
    found
}

/// Label and UUID where the format keeps them in plain sight.
fn add_names(content: &mut Content, start: &[u8]) {
    let (label, uuid) = match content.kind {
        "xfs" => (Some((108, 12)), Some(32)),
        "btrfs" => (Some((65536 + 0x12b, 256)), Some(65536 + 0x20)),
        "erofs" => (Some((1024 + 64, 16)), Some(1024 + 48)),
        "iso9660" => (Some((32768 + 40, 32)), None),
        "swap" => (Some((1024 + 28, 16)), Some(1024 + 12)),
        _ => (None, None),
    };
    content.label = label.and_then(|(offset, length)| text(start, offset, length));
    content.uuid = uuid.and_then(|offset| uuid_at(start, offset));
}

/// ext2, ext3 and ext4 share a magic; which one it is shows in the features, as `blkid` tells them apart.
fn ext(start: &[u8]) -> Option<Content> {
    const SUPERBLOCK: usize = 1024;
    const COMPAT_HAS_JOURNAL: u32 = 0x4;
    /// The `incompat` features that an ext3 driver knows: filetype, recover, meta_bg.
    const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x10;
    /// The `ro_compat` features that an ext3 driver knows: sparse_super, large_file, btree_dir.
    const EXT3_RO_COMPAT: u32 = 0x1 | 0x2 | 0x4;
    if start.get(SUPERBLOCK + 56..SUPERBLOCK + 58) != Some(&[0x53, 0xef]) {
        return None;
    }
    let compat = le32(start, SUPERBLOCK + 92)?;
    let incompat = le32(start, SUPERBLOCK + 96)?;
    let ro_compat = le32(start, SUPERBLOCK + 100)?;
    let (kind, what) = if incompat & !EXT3_INCOMPAT != 0 || ro_compat & !EXT3_RO_COMPAT != 0 {
        ("ext4", "ext4 file system")
    } else if compat & COMPAT_HAS_JOURNAL != 0 {
        ("ext3", "ext3 file system")
    } else {
        ("ext2", "ext2 file system")
    };
    let (label, uuid) = (text(start, SUPERBLOCK + 120, 16), uuid_at(start, SUPERBLOCK + 104));
    Some(Content { kind, what, label, uuid, advice: None })
}

/// A GPT, or else an MBR whose four entries make sense (the signature alone ends every boot sector).
fn partition_table(start: &[u8]) -> Option<Content> {
    // The header of a GPT is in the second sector, which may have 4096 bytes.
    if [512, 4096].iter().any(|&at| start.get(at..).is_some_and(|rest| rest.starts_with(b"EFI PART"))) {
        return Some(Content { kind: "gpt", what: "GPT partition table", ..Content::default() });
    }
    if start.get(510..512) != Some(&[0x55, 0xaa]) {
        return None;
    }
    let entries: Vec<&[u8]> = start[446..510].chunks_exact(16).collect();
    let sensible = entries.iter().all(|entry| matches!(entry[0], 0 | 0x80));
    let used = entries.iter().any(|entry| entry[4] != 0 && entry[12..16] != [0; 4]);
    (sensible && used).then(|| Content { kind: "dos", what: "MBR partition table", ..Content::default() })
}

/// On disk these formats are little-endian.
fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
}

/// A label: padded with NULs or spaces, and not to be trusted with a terminal.
fn text(bytes: &[u8], at: usize, length: usize) -> Option<String> {
    let bytes = bytes.get(at..at + length)?;
    let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let label = String::from_utf8_lossy(bytes);
    let label = label.trim_end().replace(char::is_control, "\u{fffd}");
    (!label.is_empty()).then_some(label)
}

fn uuid_at(bytes: &[u8], at: usize) -> Option<String> {
    let bytes = bytes.get(at..at + 16)?;
    if bytes.iter().all(|&b| b == 0) {
        return None;
    }
    let mut uuid = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            uuid.push('-');
        }
        uuid.push_str(&format!("{byte:02x}"));
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(patches: &[(usize, &[u8])]) -> Vec<u8> {
        let mut image = vec![0; PROBE_SIZE];
        for &(offset, bytes) in patches {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        image
    }

    fn kinds(image: &[u8]) -> Vec<&'static str> {
        probe(image).iter().map(|content| content.kind).collect()
    }

    #[test]
    fn every_signature_is_found_and_lies_in_the_probed_part() {
        for &(offset, magic, kind, _, advice) in SIGNATURES {
            assert_eq!(kinds(&image(&[(offset, magic)])), [kind]);
            assert!(advice.is_none() || offset + magic.len() <= ADVICE_SIZE);
        }
        assert_eq!(kinds(&image(&[])), [""; 0]);
    }

    #[test]
    fn short_images_hold_nothing_and_do_no_harm() {
        let full =
            image(&[(1024 + 56, b"\x53\xef"), (510, b"\x55\xaa"), (65536 + 64, b"_BHRfS_M"), (0, b"XFSB")]);
        for length in [0, 1, 3, 100, 447, 511, 512, 1081, 1083, 1120, 1200, 65536 + 70] {
            let _ = probe(&full[..length]);
        }
        assert_eq!(kinds(b""), [""; 0]);
    }

    #[test]
    fn the_ext_family_is_told_apart_and_named() {
        let ext = |compat: u8, incompat: u8, ro_compat: u8| {
            image(&[
                (1024 + 56, b"\x53\xef"),
                (1024 + 92, &[compat, 0, 0, 0]),
                (1024 + 96, &[incompat, 0, 0, 0]),
                (1024 + 100, &[ro_compat, 0, 0, 0]),
                (1024 + 104, &[0xab; 16]),
                (1024 + 120, b"rootfs\0junk"),
            ])
        };
        assert_eq!(kinds(&ext(0, 0x2, 0x3)), ["ext2"]);
        assert_eq!(kinds(&ext(0x4, 0x2, 0x3)), ["ext3"]);
        assert_eq!(kinds(&ext(0x4, 0x42, 0x3)), ["ext4"], "extents");
        assert_eq!(kinds(&ext(0x4, 0x2, 0x8)), ["ext4"], "huge_file");
        let found = probe(&ext(0x4, 0x42, 0x3)).remove(0);
        assert_eq!(found.label.as_deref(), Some("rootfs"));
        assert_eq!(found.uuid.as_deref(), Some("abababab-abab-abab-abab-abababababab"));
    }

    #[test]
    fn partition_tables() {
        let mbr: &[(usize, &[u8])] =
            &[(446, &[0x80, 0, 0, 0, 0x83]), (446 + 12, &[0, 8, 0, 0]), (510, b"\x55\xaa")];
        assert_eq!(kinds(&image(mbr)), ["dos"]);
        assert_eq!(kinds(&image(&[(510, b"\x55\xaa")])), [""; 0], "a boot sector without partitions");
        assert_eq!(kinds(&image(&[mbr[0], mbr[1], mbr[2], (512, b"EFI PART")])), ["gpt"]);
        assert_eq!(kinds(&image(&[(4096, b"EFI PART")])), ["gpt"], "sectors of 4096 bytes");
        assert_eq!(kinds(&image(&[(54, b"FAT16   "), mbr[0], mbr[1], mbr[2]])), ["vfat"]);
        assert_eq!(kinds(&image(&[(32769, b"CD001"), mbr[0], mbr[1], mbr[2]])), ["iso9660", "dos"]);
    }

    #[test]
    fn what_is_no_raw_disk_comes_with_advice() {
        let found = probe(&image(&[(0, b"QFI\xfb")])).remove(0);
        assert!(found.advice.unwrap().contains("qemu-img convert -O raw"));
        assert!(probe(&image(&[(0, b"\x1f\x8b\x08")])).remove(0).advice.unwrap().contains("unpack"));
        assert!(probe(&image(&[(0, b"XFSB")])).remove(0).advice.is_none());
    }

    #[test]
    fn a_label_cannot_play_with_the_terminal() {
        let found = probe(&image(&[(0, b"XFSB"), (108, b"a\x1b[31m\xff  ")])).remove(0);
        assert_eq!(found.label.as_deref(), Some("a\u{fffd}[31m\u{fffd}"));
    }
}
