"""Every command of the transmission phase, with structured and with simple replies, checked byte by byte.

usage: commands.py URI IMAGE (8 MiB; 1 MiB to 2 MiB is a hole)
"""

import errno
import sys

import nbd

KIB, MIB = 1 << 10, 1 << 20
URI, IMAGE = sys.argv[1:]
BASE = open(IMAGE, "rb").read()
SIZE = len(BASE)
assert SIZE == 8 * MIB


def connect(structured=True, context=True):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if context:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(URI)
    assert h.get_protocol() == "newstyle-fixed"
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_size() == SIZE
    return h


def status(h, count, offset, flags=0):
    found = []

    def extent(context, at, entries, error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION
        for length, state in zip(entries[::2], entries[1::2]):
            found.append((at, length, state))
            at += length

    h.block_status(count, offset, extent, flags)
    return found


def state(h, offset, count):
    """The one state of a range, asked for in as many requests as it takes."""
    states, at = set(), offset
    while at < offset + count:
        for start, length, flags in status(h, offset + count - at, at):
            assert start == at and length > 0
            states.add(flags)
            at += length
    assert len(states) == 1, (offset, count, states)
    return states.pop()


def chunks(h, count, offset, flags=0):
    found = []

    def chunk(data, at, kind, error):
        found.append((kind, at, len(data)))
        assert error.value == 0

    data = h.pread_structured(count, offset, chunk, flags)
    return data, found


def refused(call, wanted):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == wanted, (error, wanted)
    else:
        raise AssertionError("it was not refused")


def compare(h, model):
    for at in range(0, SIZE, MIB):
        assert h.pread(MIB, at) == bytes(model[at : at + MIB]), f"differs in the MiB at {at}"


def every_command(h, structured):
    model = bytearray(BASE)

    def write(data, offset, flags=0):
        h.pwrite(data, offset, flags)
        model[offset : offset + len(data)] = data

    compare(h, model)
    # Ranges that no block size divides, over block borders, at the very start and end.
    for offset, count in [(0, 1), (1, 511), (4095, 2), (MIB - 3, 7), (12345, 67890), (SIZE - 5, 5)]:
        write(bytes((offset + i) & 0xFF for i in range(count)), offset)
        assert h.pread(count, offset) == bytes(model[offset : offset + count])
    write(b"\x5a" * (2 * MIB), 3 * MIB + 100, nbd.CMD_FLAG_FUA)
    write(bytes(64 * KIB), 4 * MIB)
    h.flush()

    h.zero(100000, 5 * MIB + 33)
    model[5 * MIB + 33 : 5 * MIB + 33 + 100000] = bytes(100000)
    h.zero(64 * KIB, 6 * MIB, nbd.CMD_FLAG_NO_HOLE)
    model[6 * MIB : 6 * MIB + 64 * KIB] = bytes(64 * KIB)
    h.zero(64 * KIB, 7 * MIB, nbd.CMD_FLAG_FUA)
    model[7 * MIB : 7 * MIB + 64 * KIB] = bytes(64 * KIB)
    assert h.can_fast_zero()
    h.zero(64 * KIB, 7 * MIB + 128 * KIB, nbd.CMD_FLAG_FAST_ZERO)
    model[7 * MIB + 128 * KIB : 7 * MIB + 192 * KIB] = bytes(64 * KIB)
    h.trim(MIB, 2 * MIB)
    model[2 * MIB : 3 * MIB] = bytes(MIB)
    h.cache(MIB, 0)
    compare(h, model)

    # What is out of range is refused, and the connection stays in step.
    h.set_strict_mode(0)
    refused(lambda: h.pread(2, SIZE - 1), errno.EINVAL)
    refused(lambda: h.pwrite(b"xy", SIZE - 1), errno.ENOSPC)
    refused(lambda: h.zero(2, SIZE - 1), errno.ENOSPC)
    refused(lambda: h.trim(2, SIZE - 1), errno.EINVAL)
    refused(lambda: h.pread(4096, 1 << 62), errno.EINVAL)
    compare(h, model)

    # 96 requests in flight, every one its own range, then all of them read back at once.
    pieces = [bytes([i + 1]) * 5000 for i in range(96)]
    wait_all(h, [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(p)), i * 5000) for i, p in enumerate(pieces)])
    for i, piece in enumerate(pieces):
        model[i * 5000 : (i + 1) * 5000] = piece
    buffers = [nbd.Buffer(5000) for _ in pieces]
    wait_all(h, [h.aio_pread(buffer, i * 5000) for i, buffer in enumerate(buffers)])
    for buffer, piece in zip(buffers, pieces):
        assert buffer.to_bytearray() == piece
    compare(h, model)

    # A payload as large as any client may send.
    large = bytes(range(256)) * (8 * MIB // 256)
    write(large, 0)
    assert h.pread(SIZE, 0) == large


def wait_all(h, cookies):
    waiting = set(cookies)
    while waiting:
        waiting = {cookie for cookie in waiting if not h.aio_command_completed(cookie)}
        if waiting:
            h.poll(-1)


def structured_only(h):
    hole_zero = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert state(h, 0, MIB) == 0
    assert state(h, MIB, MIB) == hole_zero, "the image's own hole"

    # A read over data, a hole and data again: the hole costs no payload.
    data, found = chunks(h, 3 * MIB, 0)
    assert data == BASE[: 3 * MIB]
    kinds = {kind for kind, _, _ in found}
    assert kinds == {nbd.READ_DATA, nbd.READ_HOLE}, found
    # With DF it is one chunk.
    assert h.can_df()
    data, found = chunks(h, 60 * KIB, 2 * MIB - 30 * KIB, nbd.CMD_FLAG_DF)
    assert data == BASE[2 * MIB - 30 * KIB : 2 * MIB + 30 * KIB]
    assert len(found) == 1, found

    # One extent only, when that is asked for, and none beyond the range.
    one = status(h, 3 * MIB, 0, nbd.CMD_FLAG_REQ_ONE)
    assert len(one) == 1 and one[0][1] <= 3 * MIB, one
    total = sum(length for _, length, _ in status(h, SIZE, 0))
    assert 0 < total <= SIZE

    h.trim(MIB, 2 * MIB)
    assert state(h, 2 * MIB, MIB) == hole_zero
    h.zero(MIB, 3 * MIB)
    assert state(h, 3 * MIB, MIB) & nbd.STATE_ZERO
    h.zero(MIB, 4 * MIB, nbd.CMD_FLAG_NO_HOLE)
    assert not state(h, 4 * MIB, MIB) & nbd.STATE_HOLE
    h.pwrite(b"x" * 64 * KIB, MIB)
    assert state(h, MIB, 64 * KIB) == 0


structured = connect()
structured_only(structured)
structured.shutdown()

structured = connect()
every_command(structured, True)

simple = connect(structured=False, context=False)
every_command(simple, False)
simple.shutdown()
structured.shutdown()

# Everything was private to its connection.
assert connect().pread(SIZE, 0) == BASE
