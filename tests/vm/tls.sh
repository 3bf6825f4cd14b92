#!/bin/sh
# nbd-client over TLS: it gives the kernel one end of a pair of sockets, and stands between the other end and the server.
# What is written is found through the next device, which attaches to the same session; who has no certificate, an expired
# one, one of another CA, or speaks plain text, gets no device.
#
# $SIZE and $SUM: the image's size, and the sha256 of its first MiB. /tls/*: what clients are given, good and bad.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"

# with NAME WORDS...: the words, with the credentials of /tls/NAME as nbd-client takes them, go to the command $ACT.
with() {
    folder=/tls/$1
    shift
    if [ -e "$folder/client-cert.pem" ]; then
        set -- "$@" -certfile "$folder/client-cert.pem" -keyfile "$folder/client-key.pem"
    fi
    $ACT "$@" -cacertfile "$folder/ca-cert.pem" -tlshostname localhost
}

# no_device WORDS...: nbd-client must leave without a device. It may say so only by its words.
no_device() {
    # shellcheck disable=SC2086  # host and port
    nbd-client $SERVER "$DEVICE" "$@" >/run/nbd-client.log 2>&1 && echo "nbd-client ends with 0"
    sleep 1
    [ "$(blockdev --getsize64 "$DEVICE")" = 0 ] || fail "a device for nbd-client $*"
}

for way in netlink ioctl; do
    case $way in
    netlink) set -- ;;
    ioctl) set -- -nonetlink ;;
    esac
    session=disk@tls-$way
    ACT=attach
    with good -N "$session" "$@"
    [ "$(dd if="$DEVICE" bs=1M count=1 iflag=direct status=none | sha256sum)" = "$SUM  -" ] || fail "$way: the base"
    dd if=/dev/urandom of=/run/written bs=64k count=65 status=none
    dd if=/run/written of="$DEVICE" bs=64k seek=3 oflag=direct conv=fsync,notrunc status=none || fail "$way: write"
    forget
    dd if="$DEVICE" bs=64k skip=3 count=65 status=none | cmp - /run/written || fail "$way: what was written"
    detach
    with good -N "$session" "$@"
    dd if="$DEVICE" bs=64k skip=3 count=65 iflag=direct status=none | cmp - /run/written || fail "$way: found after attaching again"
    detach
    step "$way: read and written"

    ACT=no_device
    for who in none expired stranger wrong-ca; do
        with "$who" -N "$session" "$@"
    done
    no_device -N "$session" "$@"
    step "$way: refused where it should be"
done
