#!/bin/sh
# memdev attach in a machine whose kernel has an nbd driver: both backends, in an initramfs, where nobody is but us.
# In the guest: /usr/bin/memdev, the modules nbd, loop, fuse and ext4. $HOST:$PORT: a server with export "disk" (32 MiB or
# more, of which nothing is asked).
set -eu
fail() {
    echo "FAILED: $*"
    dmesg | tail -n 20
    exit 1
}
# is_free DEVICE: the kernel has nothing connected to it.
is_free() {
    [ ! -e "/sys/block/${1#/dev/}/pid" ] && [ ! -e "/sys/block/${1#/dev/}/loop/backing_file" ]
}
# nothing_left: no record, no daemon, no device.
nothing_left() {
    [ -z "$(ls -A /run/memdev-attach)" ] || fail "records: $(cat /run/memdev-attach/*)"
    [ "$(memdev attach --list)" = '' ] || fail "still attached: $(memdev attach --list)"
    for device in /sys/block/nbd* /sys/block/loop*; do
        is_free "/dev/${device##*/}" || fail "$device is in use"
    done
    for comm in /proc/[0-9]*/comm; do
        [ "$(cat "$comm" 2>/dev/null)" != memdev-attach ] || fail "a daemon is left: $comm"
    done
}

dd if=/dev/zero of=/root/image.img bs=1M count=32 2>/dev/null
mkfs.ext4 -q -F /root/image.img
before=$(sha256sum /root/image.img)
uri=nbd://$HOST:$PORT/disk
mkdir -p /mnt

# The kernel's own client is what is chosen where there is one.
device=$(memdev attach /root/image.img)
case $device in /dev/nbd*) ;; *) fail "auto chose $device" ;; esac
memdev detach "$device"
nothing_left

for backend in nbd fuse; do
    echo "backend $backend"
    # An image: written, read back past the cache, gone.
    device=$(memdev attach --backend $backend /root/image.img)
    echo "  $(memdev attach --list)"
    [ "$(blockdev --getsize64 "$device")" = $((32 << 20)) ] || fail "size of $device"
    [ "$(blockdev --getss "$device")" = 512 ] || fail "sectors of $device"
    mount -t ext4 "$device" /mnt
    memdev detach "$device" 2>/tmp/error && fail "a mounted device was detached"
    grep -q "it is mounted on /mnt" /tmp/error || fail "$(cat /tmp/error)"
    dd if=/dev/urandom of=/mnt/file bs=64k count=100 conv=fsync 2>/dev/null
    sum=$(sha256sum </mnt/file)
    umount /mnt
    mount -t ext4 "$device" /mnt
    [ "$(sha256sum </mnt/file)" = "$sum" ] || fail "the file has changed"
    fstrim /mnt || fail "fstrim"
    umount /mnt
    e2fsck -fn "$device" >/dev/null || fail "the file system is not in order"
    (
        exec 9<"$device"
        memdev detach "$device" 2>/tmp/error && fail "a device that is open was detached"
        grep -q "has it open" /tmp/error || fail "$(cat /tmp/error)"
    )
    memdev detach "$device"
    is_free "$device" || fail "$device is in use"
    nothing_left

    # Read-only.
    device=$(memdev attach --backend $backend --read-only /root/image.img)
    [ "$(blockdev --getro "$device")" = 1 ] || fail "$device can be written"
    memdev detach "$device"
    nothing_left

    # A named session of the server on the host, by several connections; found again.
    device=$(memdev attach --backend $backend --connections 2 "$uri@vm-$backend")
    dd if=/dev/urandom of=/root/random bs=64k count=64 2>/dev/null
    dd if=/root/random of="$device" bs=64k seek=7 conv=fsync 2>/dev/null
    memdev detach "$device"
    device=$(memdev attach --backend $backend "$uri@vm-$backend")
    dd if="$device" of=/root/found bs=64k skip=7 count=64 2>/dev/null
    cmp /root/random /root/found || fail "the session has lost what was written"
    memdev detach "$device"
    nothing_left
    memdev attach --backend $backend --connections 2 "$uri" 2>/tmp/error && fail "two copies behind one device"
    grep -q "name a session" /tmp/error || fail "$(cat /tmp/error)"

    # The daemon dies: the device fails, is known to be dead, and is freed by the next attach.
    device=$(memdev attach --backend $backend /root/image.img)
    pid=$(memdev attach --list --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
    kill -9 "$pid"
    while memdev attach --list --json | grep -q '"alive": true'; do sleep 0.1; done
    echo 3 >/proc/sys/vm/drop_caches
    dd if="$device" of=/dev/null bs=64k skip=100 count=1 2>/dev/null && fail "$device still reads"
    other=$(memdev attach --backend $backend /root/image.img)
    [ "$(memdev attach --list | wc -l)" = 1 ] || fail "the dead device stays: $(memdev attach --list)"
    memdev detach "$other"
    nothing_left

    # The command is killed at some moment: whatever is left goes with the next.
    for delay in 0.0 0.02 0.04 0.06 0.08 0.1 0.15 0.2 0.3; do
        memdev attach --backend $backend /root/image.img >/tmp/device 2>/dev/null &
        sleep $delay
        kill -9 $! 2>/dev/null || true
        wait $! && memdev detach "$(cat /tmp/device)"
        while memdev attach --list --json | grep -q '"alive": true'; do sleep 0.1; done
    done
    device=$(memdev attach --backend $backend /root/image.img)
    memdev detach "$device"
    nothing_left
done

# An nbd device of one's own choice; one that is connected is refused.
device=$(memdev attach --device /dev/nbd5 /root/image.img)
[ "$device" = /dev/nbd5 ] || fail "asked for /dev/nbd5, got $device"
memdev attach --device /dev/nbd5 /root/image.img 2>/tmp/error && fail "one device twice"
grep -q "is connected already" /tmp/error || fail "$(cat /tmp/error)"
memdev detach /dev/nbd5
nothing_left
[ "$(sha256sum /root/image.img)" = "$before" ] || fail "the image has changed"
echo "all is well"
