#!/bin/sh
# One of many machines on one image at once: it mounts its private root, reads in it and writes to it.
#
# $NUMBER: which of them. on-host arrive: returns when all are there; the server's memory is measured meanwhile.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"
attach -N root
mount "$DEVICE" /sysroot || fail "mount"
[ ! -e /sysroot/machine ] || fail "it is another's root"
# All of them read the same files, so that the server needs them from the disk once.
libraries() { cat /sysroot/usr/lib/x86_64-linux-gnu/lib[a-f]*.so.*; }
libraries >/run/libraries || fail "reading"
echo "read $(stat -c %s /run/libraries) bytes"
echo "$NUMBER" >/sysroot/machine
dd if=/dev/urandom of=/sysroot/written bs=1M count=4 conv=fsync status=none || fail "writing"
own=$(sha256sum </sysroot/written)
sync
on-host arrive || fail "the others did not all come"
echo 3 >/proc/sys/vm/drop_caches
[ "$(cat /sysroot/machine)" = "$NUMBER" ] || fail "machine $(cat /sysroot/machine) was here"
[ "$(sha256sum </sysroot/written)" = "$own" ] || fail "what was written is not there"
libraries | cmp - /run/libraries || fail "the image's files differ"
umount /sysroot || fail "umount"
e2fsck -fn "$DEVICE" >/run/log 2>&1 || fail "$(cat /run/log)"
detach
step "machine $NUMBER is done"
