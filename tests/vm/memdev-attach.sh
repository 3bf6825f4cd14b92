#!/bin/sh
# memdev attach where the kernel has an nbd driver, on both backends: images, named sessions of a server on the host, devices
# in use, and the death of everybody who has a part in a device: server, daemon, command.
#
# /disk.img: an ext4 image of $SIZE bytes, with $SUM as its sha256; servers on the host have the same as `disk`: $PORT for good,
# $FIRST and $SECOND until on-host kill_nbd and kill_fuse.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"

records() { ls -A /run/memdev-attach; }
daemons() { grep -lx memdev-attach /proc/[0-9]*/comm 2>/dev/null; }
# is_free DEVICE: the kernel has nothing connected to it.
is_free() { [ ! -e "/sys/block/${1#/dev/}/pid" ] && [ ! -e "/sys/block/${1#/dev/}/loop/backing_file" ]; }
# nothing_left: no record, no daemon, no device.
nothing_left() {
    [ -z "$(records)" ] || fail "records: $(records)"
    [ -z "$(memdev attach --list)" ] || fail "still attached: $(memdev attach --list)"
    for device in /sys/block/nbd* /sys/block/loop*; do
        is_free "/dev/${device##*/}" || fail "$device is in use"
    done
    [ -z "$(daemons)" ] || fail "a daemon is left: $(daemons)"
}
none_alive() { ! memdev attach --list --json | grep -q '"alive": true'; }
daemon_of_all() { memdev attach --list --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p'; }

# make WORDS...: attaches by $backend; $device is ready then, without a wait.
make() {
    device=$(memdev attach --backend "$backend" "$@") || fail "attach --backend $backend $*"
    [ "$(blockdev --getsize64 "$device")" = "$SIZE" ] || fail "$device has $(blockdev --getsize64 "$device") bytes"
}
take() {
    memdev detach "$device" || fail "detach $device"
    is_free "$device" || fail "the kernel keeps $device"
}
# says WORDS COMMAND...: the command fails, and says the words.
says() {
    words=$1
    shift
    refused "$@"
    grep -qF "$words" /run/refused.log || fail "$* says: $(cat /run/refused.log)"
}

# The kernel's own client is what is chosen where there is one; a device of one's own choice, once.
device=$(memdev attach /disk.img) || fail "attach"
case $device in /dev/nbd*) ;; *) fail "$device was chosen" ;; esac
take
device=$(memdev attach --device /dev/nbd5 /disk.img) || fail "attach --device"
[ "$device" = /dev/nbd5 ] || fail "asked for /dev/nbd5, got $device"
says 'is connected already' memdev attach --device /dev/nbd5 /disk.img
take
# What others attach is neither taken nor touched.
attach -N disk
says 'is connected already' memdev attach --device "$DEVICE" /disk.img
says 'memdev has not attached it' memdev detach "$DEVICE"
device=$(memdev attach /disk.img) || fail "attach"
[ "$device" != "$DEVICE" ] || fail "a device was taken from somebody else"
take
e2fsck -fn "$DEVICE" >/run/log 2>&1 || fail "$(cat /run/log)"
detach
nothing_left
step "the kernel's client is chosen"

for backend in nbd fuse; do
    # An image: mounted, written, read back past the cache, freed; in use; its daemon.
    make /disk.img
    [ "$(blockdev --getss "$device")" = 512 ] || fail "sectors of $device"
    memdev attach --list
    mount -t ext4 "$device" /mnt || fail mount
    says 'it is mounted on /mnt' memdev detach "$device"
    memdev attach --list | grep -qF "$device: disk@" || fail "it is not listed"
    memdev attach --list | grep -qF "by $backend; it is mounted on /mnt" || fail "$(memdev attach --list)"
    dd if=/dev/urandom of=/mnt/file bs=64k count=100 conv=fsync status=none || fail "writing"
    sum=$(sha256sum </mnt/file)
    umount /mnt
    mount -t ext4 "$device" /mnt || fail mount
    [ "$(sha256sum </mnt/file)" = "$sum" ] || fail "the file has changed"
    fstrim /mnt || fail fstrim
    umount /mnt
    e2fsck -fn "$device" >/run/log 2>&1 || fail "$(cat /run/log)"
    exec 9<"$device"
    says 'has it open' memdev detach "$device"
    exec 9<&-
    # In memory for good, and told to the kernel as one who writes dirty pages back: PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE.
    pid=$(daemon_of_all)
    [ "$(sed -n 's/^VmLck:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status")" -gt 0 ] || fail "the daemon's memory is not locked"
    for stat in /proc/"$pid"/task/*/stat; do
        # shellcheck disable=SC2046  # the fields behind the name
        set -- $(sed 's/.*) //' "$stat")
        [ $(($7 & 0x180000)) = $((0x180000)) ] || fail "a thread of the daemon has the flags $7"
    done
    [ "$(readlink "/proc/$pid/ns/mnt")" != "$(readlink /proc/self/ns/mnt)" ] || fail "the daemon lives among others' mounts"
    take
    nothing_left
    make --read-only /disk.img
    [ "$(blockdev --getro "$device")" = 1 ] || fail "$device can be written"
    refused dd if=/dev/urandom of="$device" bs=4k count=1 conv=fsync,notrunc
    take
    nothing_left
    step "$backend: an image"

    # A named session: a file system is made, and found again by way of several connections.
    session=nbd://$HOST:$PORT/disk@$backend
    make "$session"
    memdev attach --list | grep -qF "$device: disk@$backend ($session)" || fail "$(memdev attach --list)"
    mkfs.ext4 -q -F -L "$backend" "$device" || fail mkfs
    mount -t ext4 "$device" /mnt || fail mount
    dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=fsync status=none || fail "writing"
    dd if=/dev/urandom of=/mnt/other bs=1000 count=99 status=none || fail "writing"
    sum=$(cat /mnt/file /mnt/other | sha256sum)
    sync
    umount /mnt
    take
    nothing_left
    make --connections 3 "$session"
    e2fsck -fn "$device" >/run/log 2>&1 || fail "$(cat /run/log)"
    mount -t ext4 "$device" /mnt || fail mount
    [ "$(cat /mnt/file /mnt/other | sha256sum)" = "$sum" ] || fail "the session has lost what was written"
    umount /mnt
    take
    says 'name a session' memdev attach --backend "$backend" --connections 2 "nbd://$HOST:$PORT/disk"
    nothing_left
    step "$backend: a named session"

    # The server dies under a mounted file system: errors and no hang, freed, and the next server serves.
    case $backend in
    nbd) doomed=$FIRST ;;
    fuse) doomed=$SECOND ;;
    esac
    make --connections 2 "nbd://$HOST:$doomed/disk@killed"
    mount -t ext4 "$device" /mnt || fail mount
    dd if=/dev/urandom of=/mnt/before bs=1M count=2 conv=fsync status=none || fail "writing"
    on-host "kill_$backend" || fail "the server cannot be killed"
    refused dd if=/dev/urandom of=/mnt/after bs=1M count=2 conv=fsync status=none
    grep -qE 'Input/output error|Read-only file system' /run/refused.log || fail "another error was expected: $(cat /run/refused.log)"
    wait_for 30 none_alive || fail "its server is gone, and nobody notices"
    memdev attach --list | grep -qF 'its server is gone; it is mounted on /mnt' || fail "$(memdev attach --list)"
    says 'it is mounted on /mnt' memdev detach "$device"
    umount /mnt || fail umount
    take
    nothing_left
    make "nbd://$HOST:$PORT/disk@next-$backend"
    e2fsck -fn "$device" >/run/log 2>&1 || fail "the next server's disk is not in order: $(cat /run/log)"
    mount -t ext4 "$device" /mnt || fail mount
    [ ! -e /mnt/before ] || fail "it is not the image"
    dd if=/dev/urandom of=/mnt/again bs=1M count=2 conv=fsync status=none || fail "writing to the next server"
    umount /mnt || fail umount
    take
    nothing_left
    step "$backend: the server was killed"

    # The daemon dies: the device fails, is known to be dead, and is freed by the next attach.
    make /disk.img
    dead=$device
    kill -9 "$(daemon_of_all)"
    wait_for 30 none_alive || fail "the daemon is dead, and nobody notices"
    echo 3 >/proc/sys/vm/drop_caches
    refused dd if="$dead" of=/dev/null bs=64k skip=100 count=1
    make /disk.img
    [ "$(memdev attach --list | wc -l)" = 1 ] || fail "the dead device stays: $(memdev attach --list)"
    take
    nothing_left
    step "$backend: the daemon was killed"

    # The command is killed at some moment: whatever is left goes with the next.
    for delay in 0.05 0.1 0.2 0.3 0.4 0.6 0.9 1.3; do
        memdev attach --backend "$backend" /disk.img >/run/device 2>/dev/null &
        sleep "$delay"
        kill -9 $! 2>/dev/null
        if wait $!; then
            device=$(cat /run/device)
            take
        elif ! wait_for 30 none_alive; then
            # Killed behind its last step, after it has said which device it is.
            device=$(cat /run/device)
            [ -b "$device" ] || fail "the command is dead, and its daemon does not notice"
            take
        fi
    done
    make /disk.img
    take
    nothing_left
    step "$backend: the command was killed"
done
[ "$(sha256sum </disk.img)" = "$SUM  -" ] || fail "the image has changed"
