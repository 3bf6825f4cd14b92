"""Two writes and a trim in a session, for a look at its map."""

import sys

import nbd

KIB, MIB = 1 << 10, 1 << 20

h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pwrite(b"\xaa" * 16 * KIB, 3 * MIB)
h.trim(32 * KIB, 96 * KIB)
h.flush()
h.shutdown()
