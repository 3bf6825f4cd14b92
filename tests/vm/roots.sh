#!/bin/sh
# Many roots on one host: a device and a private copy of the same Debian for each of eight, all mounted at once.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"
roots="0 1 2 3 4 5 6 7"
for n in $roots; do
    DEVICE=/dev/nbd$n
    attach -N root
    mkdir -p "/roots/$n"
    mount "$DEVICE" "/roots/$n" || fail "mount $n"
    step "root $n is mounted"
done
for n in $roots; do
    [ ! -e "/roots/$n/etc/mine" ] || fail "root $n is another's"
    chroot "/roots/$n" sh -c "echo $n >/etc/mine; useradd user$n; rm -r /usr/share/doc; sync" || fail "changing root $n"
done
for n in $roots; do
    [ "$(cat "/roots/$n/etc/mine")" = "$n" ] || fail "root $n has $(cat "/roots/$n/etc/mine")"
    [ "$(grep -c '^user[0-9]:' "/roots/$n/etc/passwd")" = 1 ] || fail "root $n has users of others"
    grep -q "^user$n:" "/roots/$n/etc/passwd" || fail "root $n lost its user"
    [ ! -e "/roots/$n/usr/share/doc" ] || fail "root $n has what it deleted"
    DEVICE=/dev/nbd$n
    umount "/roots/$n" || fail "umount $n"
    e2fsck -fn "$DEVICE" >/run/log 2>&1 || fail "$(cat /run/log)"
    detach
done
step "done"
