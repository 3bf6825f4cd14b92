"""libnbd starts the server itself: with a listening socket, and with a connected one. It closes a
handle that nobody holds any more.

usage: started_by_client.py MEMDEV IMAGE (1 MiB, named disk.img)
"""

import os
import sys

import nbd

MEMDEV, IMAGE = sys.argv[1:]
with open(IMAGE, "rb") as file:
    content = file.read()


def no_children():
    """The server has ended, and libnbd has taken note of it."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise AssertionError("the server is still there")


def use(h):
    assert h.get_size() == len(content)
    assert h.pread(len(content), 0) == content
    h.pwrite(b"x" * 5000, 12345)
    assert h.pread(5002, 12344) == content[12344:12345] + b"x" * 5000 + content[17345:17346]


# By socket activation: the server listens, so several connections would do. Its end is a signal from libnbd.
h = nbd.NBD()
h.set_export_name("disk")
h.connect_systemd_socket_activation([MEMDEV, "serve", IMAGE])
use(h)
h.shutdown()
del h
no_children()

# The same without a goodbye.
h = nbd.NBD()
h.connect_systemd_socket_activation([MEMDEV, "serve", IMAGE])
use(h)
del h
no_children()

# With a connected socket as standard input and output: the server ends with the connection, or letting go of the handle would wait for
# ever.
for goodbye in (True, False):
    h = nbd.NBD()
    h.set_export_name("disk@one")
    h.connect_command([MEMDEV, "serve", IMAGE, "--fd", "0"])
    assert h.can_multi_conn()
    use(h)
    if goodbye:
        h.shutdown()
    del h
    no_children()

with open(IMAGE, "rb") as file:
    assert file.read() == content
