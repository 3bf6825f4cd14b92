//! Block status: the extents of a range, for every metadata context that was asked for, from one look at the device.

use super::reply::{Asked, BlockState};
use super::{Output, validate::StatusQuery};
use crate::cow::{Device, Extent};
use crate::handshake::KnownContext;
use crate::proto::{DIRTY_WRITTEN, DIRTY_ZERO, REPLY_FLAG_DONE, STATE_HOLE, STATE_ZERO};

/// Extents of one context in one reply; a client that wants more asks again.
const MOST_EXTENTS: usize = 1024;
/// Runs that one request may look at, whatever it finds: what comes behind them is not told. Less than a millisecond's work.
const MOST_LOOKS: usize = 16 << 10;

/// What was found for one context so far.
struct Tally {
    context: KnownContext,
    most: usize,
    extents: Vec<BlockState>,
    /// An extent was left out: all later ones are, too.
    full: bool,
}

impl Tally {
    fn add(&mut self, extent: &Extent) {
        let (length, flags, count) = (extent.len, flags(self.context, extent), self.extents.len());
        match self.extents.last_mut() {
            _ if self.full => {}
            Some(last) if last.flags == flags => last.length += length,
            _ if count == self.most => self.full = true,
            _ => self.extents.push(BlockState { length, flags }),
        }
    }
}

/// What a context says about an extent.
fn flags(context: KnownContext, extent: &Extent) -> u32 {
    match (context, extent) {
        (KnownContext::BaseAllocation, Extent { hole: true, .. }) => STATE_HOLE | STATE_ZERO,
        (KnownContext::BaseAllocation, _) | (KnownContext::Dirty, Extent { dirty: false, .. }) => 0,
        (KnownContext::Dirty, Extent { hole: true, .. }) => DIRTY_WRITTEN | DIRTY_ZERO,
        (KnownContext::Dirty, _) => DIRTY_WRITTEN,
    }
}

/// Answers a block status request: a chunk a context.
pub(super) fn answer(device: &Device, asked: Asked, query: StatusQuery, output: &mut Output) {
    output.note_answer(asked);
    let StatusQuery { range, one, contexts } = query;
    let most = if one { 1 } else { MOST_EXTENTS };
    let mut tallies: Vec<Tally> =
        contexts.iter().map(|context| Tally { context, most, extents: Vec::new(), full: false }).collect();
    let mut looks = 0;
    device.extents(range, |extent| {
        tallies.iter_mut().for_each(|tally| tally.add(&extent));
        looks += 1;
        looks < MOST_LOOKS && tallies.iter().any(|tally| !tally.full)
    });
    let count = tallies.len();
    for (number, Tally { context, extents, .. }) in (1..).zip(tallies) {
        let flags = if number == count { REPLY_FLAG_DONE } else { 0 };
        asked.put_status(flags, context, &extents, output);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_extent_has_its_flags() {
        for (hole, dirty, allocation, dirtiness) in
            [(false, false, 0, 0), (true, false, 3, 0), (false, true, 0, 1), (true, true, 3, 3)]
        {
            let extent = Extent { len: 1, hole, dirty };
            assert_eq!(flags(KnownContext::BaseAllocation, &extent), allocation, "{extent:?}");
            assert_eq!(flags(KnownContext::Dirty, &extent), dirtiness, "{extent:?}");
        }
    }

    #[test]
    fn a_tally_merges_and_ends_where_an_extent_is_left_out() {
        let mut tally =
            Tally { context: KnownContext::BaseAllocation, most: 2, extents: Vec::new(), full: false };
        let lengths = |tally: &Tally| tally.extents.iter().map(|extent| extent.length).collect::<Vec<_>>();
        for (len, hole, dirty) in [(5, false, false), (6, false, true), (7, true, false), (8, true, true)] {
            tally.add(&Extent { len, hole, dirty });
        }
        assert_eq!((lengths(&tally), tally.full), (vec![11, 15], false));
        tally.add(&Extent { len: 1, hole: false, dirty: false });
        tally.add(&Extent { len: 1, hole: true, dirty: false });
        assert_eq!((lengths(&tally), tally.full), (vec![11, 15], true));
    }
}
