"""A named session over several connections, and its neighbours.

usage: sessions.py SOCKET NAME (8 MiB)
"""

import sys

import nbd

KIB, MIB = 1 << 10, 1 << 20
SOCKET, NAME = sys.argv[1:]


def connect(name):
    h = nbd.NBD()
    h.set_export_name(name)
    h.connect_unix(SOCKET)
    return h


fresh = connect(NAME)
assert not fresh.can_multi_conn()
base = fresh.pread(8 * MIB, 0)

a, b = connect(f"{NAME}@one"), connect(f"{NAME}@one")
other = connect(f"{NAME}@two")
assert a.can_multi_conn() and b.can_multi_conn()

# FLUSH on one connection is seen by all of them; FUA needs none.
a.pwrite(b"a" * 64 * KIB, 0)
a.flush()
assert b.pread(64 * KIB, 0) == b"a" * 64 * KIB
b.pwrite(b"b" * 100, 30000, nbd.CMD_FLAG_FUA)
assert a.pread(100, 30000) == b"b" * 100
a.trim(MIB, MIB)
a.flush()
assert b.pread(MIB, MIB) == bytes(MIB)

assert other.pread(8 * MIB, 0) == base
assert fresh.pread(8 * MIB, 0) == base
fresh.pwrite(b"f" * 512, 0)
assert a.pread(512, 0) == b"a" * 512
assert connect(NAME).pread(512, 0) == base[:512]

# It outlives its connections for a while.
want = a.pread(8 * MIB, 0)
a.shutdown()
b.shutdown()
assert connect(f"{NAME}@one").pread(8 * MIB, 0) == want

# Names that break the rule are no exports.
for bad in (f"{NAME}@", f"{NAME}@a/b", f"{NAME}@{'x' * 65}", f"{NAME}@a@b", "nothing@one"):
    try:
        connect(bad)
    except nbd.Error:
        pass
    else:
        raise AssertionError(f"{bad} was accepted")
connect(f"{NAME}@{'x' * 64}").shutdown()
connect(f"{NAME}@A.b_c-9").shutdown()
