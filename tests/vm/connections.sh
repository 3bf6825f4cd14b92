#!/bin/sh
# Four connections to a plain NAME would be four private copies behind one device. nbd-client does not look at
# CAN_MULTI_CONN; the kernel does, and refuses. NAME@ID is one copy, whatever the number of connections.
#
# on-host connections: how many the server has.
# shellcheck source=lib.sh
. /lib.sh
set -- "$HOST" "$PORT" "$DEVICE" -N disk -C 4
SERVER="$HOST $PORT"
none_left() { [ "$(on-host connections)" = 0 ]; }
log() { dmesg | grep -c 'nbd0: server does not support multiple connections per device'; }

for way in netlink ioctl; do
    case $way in
    netlink)
        refused nbd-client "$@"
        [ "$(log)" = 1 ] || fail "$way: the kernel does not say why"
        words=
        ;;
    ioctl)
        # It returns before its child hands the device over, and so cannot tell.
        nbd-client "$@" -nonetlink
        said_twice() { [ "$(log)" = 2 ]; }
        wait_for 30 said_twice || fail "$way: the kernel does not refuse"
        words=-nonetlink
        ;;
    esac
    wait_for 30 no_client || fail "$way: nbd-client stays, as $(cat /run/nbd-client.pids)"
    wait_for 30 let_go || fail "$way: a device of several private copies"
    wait_for 30 none_left || fail "$way: the server keeps $(on-host connections) connections"
    step "$way: four connections to a plain name are refused"

    attach -N disk@one -C 4 ${words:+"$words"}
    [ "$(on-host connections)" = 4 ] || fail "$way: $(on-host connections) connections"
    # Every processor of the kernel has a connection of its own at best; many requests at once go over all of them.
    fio --name=all --filename="$DEVICE" --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bs=4k --size=8m \
        --verify=crc32c --verify_fatal=1 --minimal >/run/log 2>&1 || fail "fio: $(cat /run/log)"
    detach
    wait_for 30 no_client || fail "$way: nbd-client stays, as $(cat /run/nbd-client.pids)"
    wait_for 30 none_left || fail "$way: the server keeps $(on-host connections) connections"
    step "$way: four connections to a named session are one device"
done
