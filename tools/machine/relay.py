"""Standard input and output to a unix socket and back, for one connection of a guest: relay.py SOCKET."""

import os
import socket
import sys
import threading


def pump(source: int, sink: int) -> None:
    """Copies until the end."""
    while data := os.read(source, 1 << 16):
        while data:
            data = data[os.write(sink, data) :]


def main() -> None:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(sys.argv[1])

    def outwards() -> None:
        try:
            pump(0, peer.fileno())
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            # The guest is gone in the middle of something, or the server is: the other direction ends, too.
            peer.close()

    threading.Thread(target=outwards, daemon=True).start()
    try:
        pump(peer.fileno(), 1)
    except OSError:
        pass
    # Not by way of the thread, which may still wait for the guest.
    os._exit(0)


main()
