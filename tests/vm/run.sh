#!/bin/sh
# memdev run where the kernel has an nbd driver: a private Debian root on /dev/nbdX, in both modes, of a named session of a
# server on the host, and of a partition in the guest by FUSE; nothing is left, however it ends.
#
# /disk.img: a disk with one partition, from the first MiB to its end; the server on the host has a Debian as `root`: $PORT.
# shellcheck source=lib.sh
. /lib.sh

leave_initramfs /disk.img

daemons() { grep -lx memdev-attach /proc/[0-9]*/comm 2>/dev/null; }
connected() { ls -d /sys/block/nbd*/pid /sys/block/loop*/loop 2>/dev/null; }
quiet() { [ -z "$(daemons)" ] && [ -z "$(connected)" ] && [ -z "$(memdev attach --list)" ]; }
sleeps() { grep -qx dozer /proc/[0-9]*/comm 2>/dev/null; }
# nothing_left: no device, no daemon, no record; in a second or so where machines are not emulated.
nothing_left() {
    wait_for 30 quiet || fail "left: $(daemons) $(connected) $(memdev attach --list)"
    ! grep -q ^/dev /proc/mounts || fail "a mount is left: $(grep ^/dev /proc/mounts)"
}

for mode in "" --privileged; do
    # shellcheck disable=SC2086  # no word, or one
    out=$(memdev run $mode --session "nbd://$HOST:$PORT/root@one$mode" -- sh -c '
        [ ! -e /etc/mine ] || exit 3
        grep -o "^/dev/nbd[0-9]* / ext4" /proc/mounts || exit 4
        ! mknod /dev/x b 43 0 2>/dev/null || exit 5
        echo mine >/etc/mine && useradd joe && id -u') || fail "run $mode: $? $out"
    case $out in "/dev/nbd"*" / ext4
0") ;; *) fail "run $mode says: $out" ;; esac
    nothing_left
    step "${mode:-unprivileged}: a session's root was changed"
    # shellcheck disable=SC2086
    memdev run $mode --session "nbd://$HOST:$PORT/root@one$mode" -- sh -c 'cat /etc/mine && id joe' >/run/out ||
        fail "what was changed is not there: $(cat /run/out)"
    nothing_left
    step "${mode:-unprivileged}: it was found again"
done

# A partition of an image that only this machine has, as small a root as can be.
losetup -o 1048576 /dev/loop7 /disk.img || fail losetup
mkfs.ext4 -q /dev/loop7 >/run/log 2>&1 || fail "$(cat /run/log)"
mkdir /mnt 2>/dev/null
mount -t ext4 /dev/loop7 /mnt || fail mount
mkdir /mnt/bin /mnt/dev /mnt/proc /mnt/sys /mnt/run /mnt/tmp
cp "$(command -v busybox)" /mnt/bin/busybox || fail busybox
for libraries in /lib /lib64; do
    [ ! -e $libraries ] || cp -a $libraries /mnt || fail "$libraries"
done
echo "the first partition" >/mnt/told
umount /mnt
losetup -d /dev/loop7
refused memdev run --backend nbd --partition 1 /disk.img -- /bin/busybox true
grep -qF 'Only a loop device can be a part of an image; use --backend fuse' /run/refused.log || fail "$(cat /run/refused.log)"
out=$(memdev run --partition 1 /disk.img -- /bin/busybox cat /told) || fail "run --partition: $out"
[ "$out" = "the first partition" ] || fail "the partition says: $out"
nothing_left
step "a partition was a root"

# The launcher killed: its session goes with it.
memdev run --session "nbd://$HOST:$PORT/root@killed" -- sh -c 'cp /bin/sleep /root/dozer; exec /root/dozer 1000' &
wait_for 30 sleeps || fail "the command does not run"
[ -n "$(connected)" ] || fail "no device"
kill -KILL $!
nothing_left
! sleeps || fail "its command lives"
step "the launcher was killed"
