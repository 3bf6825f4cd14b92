#!/bin/sh
# Every way in which nbd-client attaches a device: by netlink and by ioctl, one connection and four, three sector sizes,
# over TCP to the host and over a unix socket to a server in the guest, read-write and read-only. What is written through
# one is found through the next, which attaches to the same named session.
#
# $SIZE and $SUM: the image's size, and the sha256 of its first MiB.
# shellcheck source=lib.sh
. /lib.sh

# A server in the guest, too: only there has it a unix socket.
memdev serve disk=/disk.img --unix /run/memdev.sock 2>/run/memdev.log &
server=$!
wait_for 30 grep -q '^listening on' /run/memdev.log || fail "the guest's server: $(cat /run/memdev.log)"

number=0
for way in netlink ioctl; do
    for connections in 1 4; do
        for sector in 512 1024 4096; do
            for SERVER in "$HOST $PORT" "-unix /run/memdev.sock"; do
                # The way to the server and the size of sectors have little to do with each other.
                [ "$sector" = 4096 ] || [ "$SERVER" = "$HOST $PORT" ] || continue
                case $way in
                netlink) set -- ;;
                ioctl) set -- -nonetlink ;;
                esac
                what="$way, $connections connections, sectors of $sector, ${SERVER%% *}"
                number=$((number + 1))
                session=disk@attach-$number
                attach -N "$session" -C "$connections" -b "$sector" "$@"
                [ "$(sysfs queue/logical_block_size)" = "$sector" ] || fail "$what: sectors of $(sysfs queue/logical_block_size)"
                [ "$(dd if="$DEVICE" bs=1M count=1 iflag=direct status=none | sha256sum)" = "$SUM  -" ] || fail "$what: the base"

                # Whole sectors, at a place that is a multiple of nothing else.
                dd if=/dev/urandom of=/run/written bs="$sector" count=65 status=none
                dd if=/run/written of="$DEVICE" bs="$sector" seek=33 oflag=direct conv=fsync,notrunc status=none || fail "$what: write"
                dd if="$DEVICE" of=/run/read bs="$sector" skip=33 count=65 iflag=direct status=none
                cmp /run/written /run/read || fail "$what: what was written"

                # In the page cache and back: flushes, not direct requests.
                dd if=/run/written of="$DEVICE" bs=4096 seek=300 conv=fsync,notrunc status=none || fail "$what: write and fsync"
                detach
                attach -N "$session" "$@"
                dd if="$DEVICE" of=/run/read bs="$sector" skip=33 count=65 status=none
                cmp /run/written /run/read || fail "$what: found after attaching again"
                dd if="$DEVICE" bs=4096 skip=300 status=none | cmp -n "$(stat -c %s /run/written)" /run/written - ||
                    fail "$what: found after attaching again, from the page cache"
                detach
                step "$what"
            done
        done
    done
    SERVER="$HOST $PORT"
    attach -N disk -R "$@"
    [ "$(blockdev --getro "$DEVICE")" = 1 ] || fail "$way: read-only"
    refused dd if=/run/written of="$DEVICE" bs=4096 oflag=direct conv=fsync,notrunc
    [ "$(dd if="$DEVICE" bs=1M count=1 status=none | sha256sum)" = "$SUM  -" ] || fail "$way, read-only: the base"
    detach
    step "$way, read-only"
done

kill "$server"
wait "$server" || fail "the guest's server ended with $?: $(cat /run/memdev.log)"
[ ! -e /run/memdev.sock ] || fail "the guest's server left its socket"
