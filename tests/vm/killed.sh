#!/bin/sh
# The server dies under a mounted ext4. What uses the file system gets errors, not silence and no hang; the device can be
# detached, and attached to the next server.
#
# $FIRST and $SECOND: the ports of two servers with an ext4 image as `disk`. on-host kill: kills the first.
# shellcheck source=lib.sh
. /lib.sh

for way in netlink ioctl; do
    case $way in
    netlink) SERVER="$HOST $FIRST" ;;
    ioctl) SERVER="$HOST $SECOND" ;;
    esac
    case $way in
    netlink) set -- ;;
    ioctl) set -- -nonetlink ;;
    esac
    step "$way: a file system is mounted, and its server is killed"
    attach -N disk@killed -C 2 "$@"
    mount "$DEVICE" /mnt || fail mount
    dd if=/dev/urandom of=/mnt/before bs=1M count=2 conv=fsync status=none || fail "writing"
    on-host "kill_$way" || fail "the server cannot be killed"

    refused dd if=/dev/urandom of=/mnt/after bs=1M count=2 conv=fsync status=none
    cat /run/refused.log
    grep -qE 'Input/output error|Read-only file system' /run/refused.log || fail "another error was expected"
    echo 3 >/proc/sys/vm/drop_caches
    refused dd if="$DEVICE" of=/dev/null bs=1M count=1 iflag=direct
    grep -q 'Input/output error' /run/refused.log || fail "EIO was expected"
    umount /mnt || fail "umount"
    nbd-client -d "$DEVICE" || echo "nbd-client -d: $?"
    wait_for 30 let_go || fail "the kernel keeps $DEVICE: $(blockdev --getsize64 "$DEVICE") bytes"
    step "$way: detached"

    SERVER="$HOST $THIRD"
    attach -N disk@next "$@"
    e2fsck -fn "$DEVICE" || fail "the next server's disk is not in order"
    mount "$DEVICE" /mnt || fail "mount"
    [ ! -e /mnt/before ] || fail "it is not the image"
    dd if=/dev/urandom of=/mnt/again bs=1M count=2 conv=fsync status=none || fail "writing to the next server"
    umount /mnt || fail "umount"
    detach
    step "$way: attached to another server"
done
