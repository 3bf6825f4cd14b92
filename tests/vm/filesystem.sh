#!/bin/sh
# ext4 on a session's device, as the kernel drives it: made, written, detached, found again; discards that give the server's
# memory back; zeroing; flushes and FUA of the journal; fio's verification beside.
#
# The server has the export `empty` of $SIZE bytes, all of them a hole. on-host memory: the server's private memory in KiB.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"
MIB=1048576

# settles_below KIB: the server keeps what it was given for a moment.
settles_below() {
    wait_for 60 memory_below "$1" || fail "$2: the server has $(on-host memory) KiB, more than $1"
}
memory_below() { [ "$(on-host memory)" -le "$1" ]; }

step "a file system is made and filled"
attach -N empty@files -C 4
[ "$(sysfs queue/write_cache)" = "write back" ] || fail "the cache is said to be $(sysfs queue/write_cache)"
[ "$(sysfs queue/fua)" = 1 ] || fail "there is no FUA"
mkfs.ext4 -q -F "$DEVICE" || fail mkfs
mount -t tracefs trace /sys/kernel/tracing || fail "no tracefs"
cd /sys/kernel/tracing || fail "no tracefs"
echo 'dev == 45088768' >events/block/block_rq_issue/filter || fail "no filter"
echo 1 >events/block/block_rq_issue/enable
mount "$DEVICE" /mnt || fail mount
cd /mnt || fail mount
for n in 1 2 3 4 5 6 7 8; do
    mkdir "$n"
    for m in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of="$n/$m" bs=1000 count=$((n * m * 4)) conv=fsync status=none || fail "a file is written"
    done
done
find . -type f | sort | xargs sha256sum >/run/sums
rm -r 8
grep -v ' ./8/' /run/sums >/run/sums.kept
cd /
umount /mnt || fail umount
echo 0 >/sys/kernel/tracing/events/block/block_rq_issue/enable
# Flags of a request: F before the letter of the operation is a flush before it, F behind it is FUA.
grep -oE ' 43,0 [A-Z]+ ' /sys/kernel/tracing/trace | sort | uniq -c
grep -qE ' 43,0 F?W[A-Z]*F' /sys/kernel/tracing/trace || fail "no write came with FUA"
grep -qE ' 43,0 FF? ' /sys/kernel/tracing/trace || fail "no flush was issued"
detach

step "attached again, the file system is found and in order"
attach -N empty@files
e2fsck -fn "$DEVICE" || fail "e2fsck"
mount -o ro "$DEVICE" /mnt || fail mount
(cd /mnt && sha256sum -c /run/sums.kept >/run/log) || fail "$(cat /run/log)"
[ ! -e /mnt/8 ] || fail "what was deleted is there"
umount /mnt
detach
attach -N empty -C 1
refused mount "$DEVICE" /mnt
detach

for way in fstrim discard; do
    step "freed space goes back to the server: $way"
    attach -N "empty@$way"
    mkfs.ext4 -q -F "$DEVICE" || fail mkfs
    case $way in
    discard) options=discard ;;
    fstrim) options=nodiscard ;;
    esac
    mount -o "$options" "$DEVICE" /mnt || fail mount
    sync
    before=$(on-host memory)
    dd if=/dev/urandom of=/mnt/big bs=1M count=64 conv=fsync status=none || fail "writing"
    full=$(on-host memory)
    # Of what it had before, some may have been memory kept ready.
    [ "$full" -ge $((before + 32 * 1024)) ] || fail "64 MiB were written; the server has $full KiB, before it had $before"
    rm /mnt/big
    sync
    [ $way = discard ] || fstrim -v /mnt || fail fstrim
    # Some is kept ready for the next write.
    settles_below $((full - 32 * 1024)) "$way"
    echo "the server's private memory: $before KiB, with 64 MiB written $full KiB, after $way $(on-host memory) KiB"
    umount /mnt
    e2fsck -fn "$DEVICE" >/run/log || fail "$(cat /run/log)"
    detach
done

step "BLKDISCARD and BLKZEROOUT"
attach -N empty@zero
# zero FROM COUNT: whether these bytes of what was read are zero, FROM counted from 17 MiB.
zero() { cmp -s -i "$1:0" -n "$2" /run/read /dev/zero; }
for way in "" -z; do
    before=$(on-host memory)
    dd if=/dev/urandom of="$DEVICE" bs=1M count=32 seek=16 oflag=direct conv=notrunc status=none || fail "writing"
    # From the middle of a block to the middle of another.
    blkdiscard $way -o $((17 * MIB + 512)) -l $((20 * MIB)) "$DEVICE" || fail "blkdiscard $way"
    dd if="$DEVICE" of=/run/read bs=1M skip=17 count=21 iflag=direct status=none
    # A discard may leave the blocks that it covers in part; zeroing is exact.
    from=4096 to=$((20 * MIB))
    [ -z "$way" ] || { from=512 to=$((20 * MIB + 512)); }
    zero $from $((to - from)) || fail "blkdiscard $way: not all is zero"
    zero 0 512 && fail "blkdiscard $way: the sector before is zero"
    zero $((20 * MIB + 512)) 512 && fail "blkdiscard $way: the sector behind is zero"
    echo "blkdiscard $way: the server's private memory was $before KiB, and is $(on-host memory) KiB with 12 MiB more data"
done
rm /run/read
blkdiscard "$DEVICE" || fail "blkdiscard of the whole device"
detach

step "fio verifies what it writes"
attach -N empty@fio -C 4
fio --name=random --filename="$DEVICE" --ioengine=libaio --direct=1 --iodepth=16 --rw=randwrite --bsrange=512-64k \
    --blockalign=512 --size=16m --verify=crc32c --verify_fatal=1 --fsync=64 --minimal >/run/log 2>&1 ||
    fail "fio: $(cat /run/log)"
fio --name=trim --filename="$DEVICE" --ioengine=libaio --direct=1 --iodepth=1 --rw=randtrimwrite --bs=4k --offset=64m \
    --size=4m --verify=crc32c --verify_fatal=1 --minimal >/run/log 2>&1 || fail "fio: $(cat /run/log)"
detach
step "done"
