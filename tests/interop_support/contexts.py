"""Both metadata contexts at once, what the session wrote in one and what there is in the other.

usage: contexts.py URI (8 MiB, of which the first 2 MiB are data)
"""

import sys

import nbd

KIB, MIB = 1 << 10, 1 << 20
BASE, DIRTY = nbd.CONTEXT_BASE_ALLOCATION, "memdev:dirty"
HOLE_ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO

h = nbd.NBD()
h.add_meta_context(BASE)
h.add_meta_context(DIRTY)
h.connect_uri(sys.argv[1])
assert h.can_meta_context(BASE) and h.can_meta_context(DIRTY)


def status(count, offset, flags=0):
    found = {}

    def extent(context, at, entries, error):
        assert context not in found, "one chunk a context"
        assert at == offset and error.value == 0
        found[context] = list(zip(entries[::2], entries[1::2]))

    h.block_status(count, offset, extent, flags)
    assert sorted(found) == [BASE, DIRTY], found
    return found[BASE], found[DIRTY]


base, dirty = status(8 * MIB, 0)
assert base == [(2 * MIB, 0), (6 * MIB, HOLE_ZERO)], base
assert dirty == [(8 * MIB, 0)], dirty

h.pwrite(b"w" * 5000, MIB)
h.trim(64 * KIB, 0)
h.pwrite(b"w" * 4096, 4 * MIB)
base, dirty = status(8 * MIB, 0)
assert base == [
    (64 * KIB, HOLE_ZERO),
    (2 * MIB - 64 * KIB, 0),
    (2 * MIB, HOLE_ZERO),
    (4096, 0),
    (4 * MIB - 4096, HOLE_ZERO),
], base
assert dirty == [
    (64 * KIB, 3),
    (MIB - 64 * KIB, 0),
    (8192, 1),
    (3 * MIB - 8192, 0),
    (4096, 1),
    (4 * MIB - 4096, 0),
], dirty

base, dirty = status(4 * MIB, MIB + 4096, nbd.CMD_FLAG_REQ_ONE)
assert base == [(MIB - 4096, 0)] and dirty == [(4096, 1)], (base, dirty)
h.shutdown()
