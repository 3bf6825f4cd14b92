#!/bin/sh
# A session as a virtual machine's disk, by qemu's own NBD driver: the guest needs no NBD.
#
# $ROUND: 1 writes, 2 finds it again. on-host memory: the server's private memory in KiB.
# shellcheck source=lib.sh
. /lib.sh
memory_below() { [ "$(on-host memory)" -le "$1" ]; }

mount -o "$MOUNT_OPTIONS" /dev/vda /mnt || fail mount
case $ROUND in
1)
    [ "$(blockdev --getsize64 /dev/vda)" = "$SIZE" ] || fail "the disk's size"
    [ ! -e /mnt/mine ] || fail "it is another's disk"
    before=$(on-host memory)
    dd if=/dev/urandom of=/mnt/big bs=1M count=64 conv=fsync status=none || fail "writing"
    full=$(on-host memory)
    [ "$full" -ge $((before + 32 * 1024)) ] || fail "64 MiB were written; the server has $full KiB, before it had $before"
    rm /mnt/big
    sync
    fstrim /mnt || fail fstrim
    wait_for 60 memory_below $((full - 32 * 1024)) || fail "trimmed, and the server has $(on-host memory) KiB"
    echo "the server's private memory: $before KiB, with 64 MiB written $full KiB, after fstrim $(on-host memory) KiB"
    echo mine >/mnt/mine
    ;;
2)
    [ "$(cat /mnt/mine)" = mine ] || fail "it is not the disk of before"
    ;;
fresh)
    [ ! -e /mnt/mine ] || fail "it is another's disk"
    ;;
esac
umount /mnt || fail umount
e2fsck -fn /dev/vda || fail e2fsck
