//! The map of an export, as block status tells it: `base:allocation` says what is data and what is zero, `memdev:dirty`
//! whose it is.

use memdev::client::{Extent, Haggling};
use memdev::net::Uri;
use memdev::proto::{
    CommandFlags, DIRTY_WRITTEN, META_NAME_BASE_ALLOCATION, META_NAME_MEMDEV_DIRTY, STATE_HOLE, STATE_ZERO,
};
use memdev::session::Request;
use memdev::{Error, ErrorKind, Result};

use super::{Extents, Holds};

/// The longest range that is asked about at once: as much as a request can say, in whole blocks of any size.
const MOST: u32 = !0xffff;

/// What the export that `uri` names holds.
///
/// # Errors
/// Nobody answers, the server refuses, there is no such export, or the server cannot tell where there is data.
pub(super) fn extents(uri: &Uri) -> Result<Extents> {
    let mut server = Haggling::connect(uri)?;
    let blind = |why: &str| {
        Error::new(ErrorKind::Unsupported, format!("The server cannot tell where there is data: {why}"))
            .advise("read all of it, or use a server that has block status")
    };
    if !server.structured_replies() {
        return Err(blind("it has no structured replies"));
    }
    // Looking must not make a session that is not there: it would be the looker's, and others would be kept out of it.
    let export = match Request::parse(&uri.export) {
        Request::Named(..) if is_memdev(&mut server, &uri.export) => format!("{}?", uri.export),
        _ => uri.export.clone(),
    };
    let no_such_session = |error: Error| match error.kind() {
        ErrorKind::NotFound if export != uri.export => {
            let error = Error::new(ErrorKind::NotFound, "No such session").on(&uri.export);
            error.advise("one begins when a client attaches to it, and ends when it was left for some time")
        }
        _ => error,
    };
    let contexts = server
        .set_meta_contexts(&export, &[META_NAME_BASE_ALLOCATION, META_NAME_MEMDEV_DIRTY])
        .map_err(no_such_session)?;
    let number = |name: &str| contexts.iter().find(|context| context.name == name).map(|context| context.id);
    let allocation = number(META_NAME_BASE_ALLOCATION)
        .ok_or_else(|| blind("it has no metadata context base:allocation"))?;
    let dirty = number(META_NAME_MEMDEV_DIRTY);

    let mut client = server.go(&export).map_err(no_such_session)?;
    let size = client.size();
    let mut extents = Extents::default();
    let mut at = 0;
    while at < size {
        let length = u32::try_from(size - at).unwrap_or(MOST).min(MOST);
        let told = client.block_status(at, length, CommandFlags::NONE)?;
        let of =
            |context| -> Vec<&Extent> { told.iter().filter(|extent| extent.context == context).collect() };
        at = join(at, size, &of(allocation), dirty.map(of).as_deref(), &mut extents)?;
    }
    // What we came for is here; a server that fails now takes nothing from it.
    let _ = client.disconnect();
    Ok(extents)
}

/// Whether the server has sessions: another one may mean something else by such a name.
fn is_memdev(server: &mut Haggling, export: &str) -> bool {
    // Where asking fails, what is asked next will, and says why.
    server.list_meta_contexts(export, &[META_NAME_MEMDEV_DIRTY]).is_ok_and(|contexts| !contexts.is_empty())
}

/// Adds what both contexts tell of from `at` on, as far as both reach within `size` bytes; gives where that is.
fn join(
    start: u64,
    size: u64,
    allocation: &[&Extent],
    dirty: Option<&[&Extent]>,
    extents: &mut Extents,
) -> Result<u64> {
    let mut allocation = Cursor(allocation);
    let mut dirty = dirty.map(Cursor);
    let mut at = start;
    // The last extent may reach beyond the range that was asked about, and a strange server's beyond the export.
    while at < size {
        let Some((state, end)) = allocation.at(at) else { break };
        // Without the other context there is one layer.
        let Some((written, other_end)) =
            dirty.as_mut().map_or(Some((DIRTY_WRITTEN, end)), |dirty| dirty.at(at))
        else {
            break;
        };
        let until = end.min(other_end).min(size);
        let holds = Holds {
            depth: u8::from(written & DIRTY_WRITTEN == 0),
            data: state & STATE_HOLE == 0,
            zero: state & STATE_ZERO != 0,
        };
        extents.push(until - at, holds);
        at = until;
    }
    if at == start {
        return Err(Error::new(
            ErrorKind::Protocol,
            "The server tells nothing of a metadata context that it has",
        ));
    }
    Ok(at)
}

/// The extents of one context, which follow each other without a gap.
struct Cursor<'a>(&'a [&'a Extent]);

impl Cursor<'_> {
    /// The flags of the extent that `at` is in, and where it ends.
    fn at(&mut self, at: u64) -> Option<(u32, u64)> {
        while let [first, rest @ ..] = self.0 {
            let end = first.offset.saturating_add(first.length);
            if end > at {
                return Some((first.flags, end));
            }
            self.0 = rest;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLE: u32 = STATE_HOLE | STATE_ZERO;

    fn told(context: u32, offset: u64, list: &[(u64, u32)]) -> Vec<Extent> {
        let mut at = offset;
        let extent = |&(length, flags): &(u64, u32)| {
            at += length;
            Extent { context, offset: at - length, length, flags }
        };
        list.iter().map(extent).collect()
    }

    /// Where it ended; and length, depth, data and zero of every extent.
    type Joined = (u64, Vec<(u64, u8, bool, bool)>);

    fn joined(
        start: u64,
        size: u64,
        allocation: &[(u64, u32)],
        dirty: Option<&[(u64, u32)]>,
    ) -> Option<Joined> {
        let allocation = told(1, start, allocation);
        let dirty = dirty.map(|list| told(2, start, list));
        let allocation: Vec<_> = allocation.iter().collect();
        let dirty: Option<Vec<_>> = dirty.as_ref().map(|list| list.iter().collect());
        let mut extents = Extents::default();
        let end = join(start, size, &allocation, dirty.as_deref(), &mut extents).ok()?;
        Some((end, extents.0.into_iter().map(|(length, h)| (length, h.depth, h.data, h.zero)).collect()))
    }

    #[test]
    fn layers_are_joined_as_far_as_both_are_known() {
        let both = joined(100, 1000, &[(50, 0), (60, HOLE)], Some(&[(20, 0), (40, 1), (20, 3)]));
        let expected = [(20, 1, true, false), (30, 0, true, false), (30, 0, false, true)];
        assert_eq!(both, Some((180, expected.to_vec())));
        let short = joined(0, 1000, &[(10, 0)], Some(&[(500, 0)]));
        assert_eq!(short, Some((10, vec![(10, 1, true, false)])));
    }

    #[test]
    fn another_server_has_one_layer() {
        assert_eq!(
            joined(0, 1000, &[(10, 0), (10, HOLE), (10, STATE_HOLE), (10, STATE_ZERO)], None),
            Some((
                40,
                vec![(10, 0, true, false), (10, 0, false, true), (10, 0, false, false), (10, 0, true, true)]
            ))
        );
    }

    #[test]
    fn what_reaches_beyond_the_end_is_cut_and_what_is_missing_is_an_error() {
        let beyond = joined(990, 1000, &[(u64::MAX - 990, HOLE)], Some(&[(50, 0)]));
        assert_eq!(beyond, Some((1000, vec![(10, 1, false, true)])));
        assert_eq!(joined(0, 1000, &[(10, 0)], Some(&[])), None);
        assert_eq!(joined(0, 1000, &[], None), None);
    }
}
