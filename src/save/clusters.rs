//! Extents of bytes as runs of clusters.

use super::{Extent, Kind};
use std::ops::Range;

/// The runs of clusters of `size` bytes that hold data or are zero, in order. A cluster that is of several kinds is data,
/// as all of it can be read.
pub(super) fn runs(extents: &[Extent], size: u64) -> Vec<(Range<u64>, Kind)> {
    let mut runs: Vec<(Range<u64>, Kind)> = Vec::new();
    let mut add = |clusters: Range<u64>, kind: Kind| {
        if clusters.is_empty() {
            return;
        }
        match runs.last_mut() {
            Some((last, of)) if last.end == clusters.start && *of == kind => last.end = clusters.end,
            _ => runs.push((clusters, kind)),
        }
    };
    // The cluster that the last extent ended in the midst of, and what is known of it.
    let mut open: Option<(u64, Kind)> = None;
    for Extent { range, kind } in extents.iter().filter(|extent| !extent.range.is_empty()) {
        let (first, last) = (range.start / size, (range.end - 1) / size);
        let mut from = first;
        if let Some((cluster, known)) = open.take() {
            if cluster == first {
                let both = if known == *kind { known } else { Kind::Data };
                if range.end < (cluster + 1) * size {
                    open = Some((cluster, both));
                    continue;
                }
                add(cluster..cluster + 1, both);
                from = cluster + 1;
            } else {
                add(cluster..cluster + 1, known);
            }
        }
        let to = range.end / size;
        if from < to {
            add(from..to, *kind);
        }
        if !range.end.is_multiple_of(size) && to >= from {
            open = Some((last, *kind));
        }
    }
    if let Some((cluster, known)) = open {
        add(cluster..cluster + 1, known);
    }
    runs.retain(|(_, kind)| *kind != Kind::Nothing);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_cluster_is_what_its_bytes_are(lengths in prop::collection::vec((1..40_u64, 0..3), 0..30)) {
            let (mut extents, mut bytes, mut at) = (Vec::new(), Vec::new(), 0);
            for (length, kind) in lengths {
                let kind = [Kind::Nothing, Kind::Zero, Kind::Data][usize::try_from(kind).unwrap()];
                extents.push(Extent { range: at..at + length, kind });
                bytes.resize(bytes.len() + usize::try_from(length).unwrap(), kind);
                at += length;
            }
            let runs = runs(&extents, 16);
            for (cluster, bytes) in (0..).zip(bytes.chunks(16)) {
                let found = runs.iter().find(|(run, _)| run.contains(&cluster));
                let found = found.map_or(Kind::Nothing, |(_, kind)| *kind);
                let expected = if bytes.iter().all(|kind| *kind == bytes[0]) { bytes[0] } else { Kind::Data };
                prop_assert_eq!(found, expected, "cluster {}", cluster);
            }
            prop_assert!(runs.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
        }
    }
}
