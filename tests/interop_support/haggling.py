"""Option haggling: questions, refusals, and that the connection is usable after each of them.

usage: haggling.py SOCKET NAME
"""

import sys

import nbd

SOCKET, NAME = sys.argv[1:]


def start():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCKET)
    return h


def refused(call):
    try:
        call()
    except nbd.Error:
        return
    raise AssertionError("it was not refused")


h = start()
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == [NAME], names

h.set_export_name("nothing")
refused(h.opt_info)
refused(h.opt_go)

h.set_export_name(NAME)
h.opt_info()
size = h.get_size()

contexts = []
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation", "memdev:dirty"], contexts
for query, found in [
    ("base:", ["base:allocation"]),
    ("memdev:", ["memdev:dirty"]),
    ("memdev:dirty", ["memdev:dirty"]),
    ("no:", []),
]:
    contexts = []
    h.clear_meta_contexts()
    h.add_meta_context(query)
    h.opt_list_meta_context(contexts.append)
    assert contexts == found, (query, contexts)
h.clear_meta_contexts()
h.add_meta_context("base:allocation")
h.add_meta_context("memdev:dirty")
h.add_meta_context("no:such")
h.opt_go()
assert h.get_size() == size
assert h.can_meta_context("base:allocation")
assert h.can_meta_context("memdev:dirty")
assert not h.can_meta_context("no:such")
h.pread(512, 0)
h.shutdown()

# A client that says goodbye instead.
h = start()
h.opt_abort()

# One that insists on TLS is refused; one that would like it goes on without.
h = nbd.NBD()
if h.supports_tls():
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_export_name(NAME)
    refused(lambda: h.connect_unix(SOCKET))
    h = nbd.NBD()
    h.set_tls(nbd.TLS_ALLOW)
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    assert not h.get_tls_negotiated()
    h.pread(512, 0)
    h.shutdown()

# The oldest way in: no fixed newstyle, so EXPORT_NAME instead of GO; with and without the 124 zeroes.
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    assert h.get_protocol() == "newstyle"
    assert h.get_size() == size
    h.pread(512, 0)
    h.shutdown()
