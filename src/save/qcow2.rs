//! Writing qcow2, version 3, as QEMU's `docs/interop/qcow2.txt` has it: the whole layout is known before the first byte is
//! written.
//!
//! ```text
//!   header | L1 table | refcount table | refcount blocks | L2 tables | data clusters, in order
//! ```

use super::target::Target;
use super::{Kind, Progress, Source, clusters, copy};
use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A cluster where only what was written is saved: the smallest block that an overlay can have, so that nothing of the base
/// is.
const OVER_BASE: u32 = 12;
/// A cluster where all is saved: QEMU's default.
const WHOLE: u32 = 16;
/// Only one reference to a cluster: it may be written in place.
const COPIED: u64 = 1 << 63;
/// The cluster reads as zeroes.
const ZERO: u64 = 1;
/// The longest L1 table that QEMU reads, in bytes.
const MOST_L1: u64 = 32 << 20;
/// Bits of a refcount, as a power of two.
const REFCOUNT_ORDER: u32 = 4;
const HEADER: u32 = 104;

/// Where everything lies, in clusters.
struct Layout {
    bits: u32,
    size: u64,
    l1_entries: u64,
    l1: Range<u64>,
    refcount_table: Range<u64>,
    refcount_blocks: Range<u64>,
    l2: Range<u64>,
    data: Range<u64>,
}

impl Layout {
    fn new(bits: u32, size: u64, l2_tables: u64, data_clusters: u64) -> Self {
        let cluster = 1_u64 << bits;
        let per_l2 = cluster / 8;
        let l1_entries = size.div_ceil(cluster * per_l2);
        let l1 = 1..1 + (l1_entries * 8).div_ceil(cluster).max(1);
        let per_block = (cluster * 8) >> REFCOUNT_ORDER;
        // They count themselves, too.
        let (mut table, mut blocks) = (1, 1);
        loop {
            let all = l1.end + table + blocks + l2_tables + data_clusters;
            let (wanted_blocks, wanted_table) = (all.div_ceil(per_block), (blocks * 8).div_ceil(cluster));
            if wanted_blocks <= blocks && wanted_table <= table {
                break;
            }
            (table, blocks) = (wanted_table.max(table), wanted_blocks.max(blocks));
        }
        let refcount_table = l1.end..l1.end + table;
        let refcount_blocks = refcount_table.end..refcount_table.end + blocks;
        let l2 = refcount_blocks.end..refcount_blocks.end + l2_tables;
        let data = l2.end..l2.end + data_clusters;
        Self { bits, size, l1_entries, l1, refcount_table, refcount_blocks, l2, data }
    }

    fn byte(&self, cluster: u64) -> u64 {
        cluster << self.bits
    }

    /// The first cluster: header, its extensions, the backing file's name.
    fn header(&self, backing: Option<&[u8]>) -> Vec<u8> {
        let mut extensions = Vec::new();
        if backing.is_some() {
            // Backing file format.
            extensions.extend_from_slice(&0xe279_2aca_u32.to_be_bytes());
            extensions.extend_from_slice(&3_u32.to_be_bytes());
            extensions.extend_from_slice(b"raw\0\0\0\0\0");
        }
        extensions.extend_from_slice(&[0; 8]);
        let name = backing.unwrap_or_default();
        let name_at = if backing.is_some() { HEADER as usize + extensions.len() } else { 0 };
        let mut out = Vec::new();
        let u32s = |out: &mut Vec<u8>, values: &[u32]| {
            values.iter().for_each(|value| out.extend_from_slice(&value.to_be_bytes()));
        };
        let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        u32s(&mut out, &[0x5146_49fb, 3]);
        out.extend_from_slice(&(name_at as u64).to_be_bytes());
        u32s(&mut out, &[short(name.len() as u64), self.bits]);
        out.extend_from_slice(&self.size.to_be_bytes());
        // No encryption.
        u32s(&mut out, &[0, short(self.l1_entries)]);
        out.extend_from_slice(&self.byte(self.l1.start).to_be_bytes());
        out.extend_from_slice(&self.byte(self.refcount_table.start).to_be_bytes());
        // No snapshots.
        u32s(&mut out, &[short(self.refcount_table.end - self.refcount_table.start), 0]);
        out.extend_from_slice(&0_u64.to_be_bytes());
        // No features: incompatible, compatible, autoclear.
        out.extend_from_slice(&[0; 24]);
        u32s(&mut out, &[REFCOUNT_ORDER, HEADER]);
        debug_assert_eq!(out.len(), HEADER as usize);
        out.extend_from_slice(&extensions);
        out.extend_from_slice(name);
        out
    }
}

/// Writes what `source` holds; over `backing`, only what was written.
pub(super) fn write(
    source: &mut impl Source,
    target: &mut Target,
    backing: Option<&Path>,
    progress: Progress<'_>,
) -> Result<()> {
    let name = backing.map(|path| path.as_os_str().as_bytes());
    if name.is_some_and(|name| name.len() > 1023) {
        let error = Error::new(ErrorKind::Invalid, "The base's path is longer than qcow2 can say");
        return Err(error.advise("make a shorter link to it"));
    }
    let bits = if backing.is_some() { OVER_BASE } else { WHOLE };
    let cluster = 1_u64 << bits;
    let per_l2 = cluster / 8;
    // QEMU knows sectors only.
    let size = source.size().next_multiple_of(512);
    if size.div_ceil(cluster * per_l2) * 8 > MOST_L1 {
        let error = Error::new(ErrorKind::Unsupported, "The device is larger than qcow2 can be here");
        return Err(error.advise("save it as raw"));
    }
    let mut runs = clusters::runs(&source.extents(backing.is_some())?, cluster);
    if backing.is_none() {
        // Without a base what is not there is zero.
        runs.retain(|(_, kind)| *kind == Kind::Data);
    }
    let data_clusters =
        runs.iter().filter(|(_, kind)| *kind == Kind::Data).map(|(run, _)| run.end - run.start).sum();
    let tables = count_tables(&runs, per_l2);
    let layout = Layout::new(bits, size, tables, data_clusters);

    let mut next = layout.data.start;
    let mut ranges = Vec::new();
    for (run, _) in runs.iter().filter(|(_, kind)| *kind == Kind::Data) {
        ranges.push((layout.byte(next), run.start * cluster..run.end * cluster));
        next += run.end - run.start;
    }
    // Also the end of the last cluster, where the device ends before it.
    target.set_len(layout.byte(layout.data.end))?;
    copy(source, target, ranges, progress)?;
    write_tables(&layout, &runs, per_l2, target)?;
    write_refcounts(&layout, target)?;
    target.write(0, &layout.header(name))
}

/// How many L2 tables the runs are in.
fn count_tables(runs: &[(Range<u64>, Kind)], per_l2: u64) -> u64 {
    let (mut count, mut next) = (0, 0);
    for (run, _) in runs {
        let (first, end) = ((run.start / per_l2).max(next), (run.end - 1) / per_l2 + 1);
        count += end.saturating_sub(first);
        next = next.max(end);
    }
    count
}

fn write_tables(
    layout: &Layout,
    runs: &[(Range<u64>, Kind)],
    per_l2: u64,
    target: &mut Target,
) -> Result<()> {
    let in_memory = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    let mut l1 = vec![0; in_memory(layout.l1_entries)];
    let mut l2 = vec![0; in_memory(per_l2)];
    let (mut table, mut at) = (None, layout.l2.start);
    let mut data = layout.data.start;
    let mut put = |table: &mut Option<u64>, index: Option<u64>, l2: &mut Vec<u64>| -> Result<()> {
        if let Some(done) = *table {
            l1[in_memory(done)] = layout.byte(at) | COPIED;
            target.write(layout.byte(at), &words(l2))?;
            l2.fill(0);
            at += 1;
        }
        *table = index;
        Ok(())
    };
    for (run, kind) in runs {
        for guest in run.clone() {
            if table != Some(guest / per_l2) {
                put(&mut table, Some(guest / per_l2), &mut l2)?;
            }
            l2[in_memory(guest % per_l2)] = if *kind == Kind::Data {
                data += 1;
                layout.byte(data - 1) | COPIED
            } else {
                ZERO
            };
        }
    }
    put(&mut table, None, &mut l2)?;
    debug_assert_eq!((at, data), (layout.l2.end, layout.data.end));
    target.write(layout.byte(layout.l1.start), &words(&l1))
}

/// Every cluster of the file has one reference.
fn write_refcounts(layout: &Layout, target: &mut Target) -> Result<()> {
    let blocks: Vec<u64> = layout.refcount_blocks.clone().map(|block| layout.byte(block)).collect();
    target.write(layout.byte(layout.refcount_table.start), &words(&blocks))?;
    let one = 1_u16.to_be_bytes();
    let per_block = (1_u64 << layout.bits) / one.len() as u64;
    for (block, at) in (0..).zip(blocks) {
        let here = layout.data.end.saturating_sub(block * per_block).min(per_block);
        target.write(at, &one.repeat(usize::try_from(here).unwrap_or(usize::MAX)))?;
    }
    Ok(())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
