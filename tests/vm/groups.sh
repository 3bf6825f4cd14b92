#!/bin/sh
# Private roots in control groups of version $VERSION: limits hold, nothing is left, and what cannot be promised is refused.
#
# /disk.img: an empty file, for a file system.
# shellcheck source=lib.sh
. /lib.sh

leave_initramfs /disk.img
GROUPS_AT=/sys/fs/cgroup

# As small a root as can be.
mkfs.ext4 -q /disk.img >/run/log 2>&1 || fail "$(cat /run/log)"
mount -o loop /disk.img /mnt || fail "mount"
mkdir /mnt/bin /mnt/dev /mnt/proc /mnt/sys /mnt/run /mnt/tmp
cp /busybox/busybox /mnt/bin/busybox || fail "busybox"
for applet in sh awk cat dd sleep kill yes head grep cut mount; do ln -s busybox "/mnt/bin/$applet"; done
umount /mnt

case $VERSION in
1)
    mount -t tmpfs none $GROUPS_AT || fail "tmpfs"
    for kind in memory pids freezer; do
        mkdir $GROUPS_AT/$kind
        mount -t cgroup -o $kind none $GROUPS_AT/$kind || fail "mount $kind"
    done
    memory=$GROUPS_AT/memory
    ;;
2)
    mount -t cgroup2 none $GROUPS_AT || fail "mount cgroup2"
    memory=$GROUPS_AT
    ;;
esac

groups() { find $GROUPS_AT -name 'memdev-*'; }
none_left() { [ -z "$(groups)" ]; }
daemons() { grep -lx memdev-attach /proc/[0-9]*/comm 2>/dev/null; }
served_no_more() { [ -z "$(daemons)" ]; }
nothing_left() {
    wait_for 30 none_left || fail "left: $(groups)"
    wait_for 30 served_no_more || fail "a daemon is left"
}
# run OPTIONS... -- COMMAND...
run() {
    options=
    while [ "$1" != -- ]; do
        options="$options $1"
        shift
    done
    # shellcheck disable=SC2086  # words
    memdev run --backend fuse $options /disk.img "$@"
}

run -- cut -d: -f3 /proc/self/cgroup >/run/out || fail "run: $(cat /run/out)"
[ "$(sort -u /run/out)" = / ] || fail "it sees $(cat /run/out)"
nothing_left
step "it is in a group that looks like the topmost"

# shellcheck disable=SC2016  # the shell inside expands it
many='i=0; while [ $i -lt 20 ]; do sleep 100 & i=$((i + 1)); done; echo all'
run --pids-limit 60 -- sh -c "$many" >/run/out 2>&1 || fail "60 processes: $(cat /run/out)"
grep -qx all /run/out || fail "$(cat /run/out)"
run --pids-limit 8 -- sh -c "$many" >/run/out 2>&1 && fail "8 processes: $(cat /run/out)"
grep -qi 'fork' /run/out || fail "$(cat /run/out)"
run --memory-limit 128M -- dd if=/dev/zero of=/dev/null bs=64M count=1 2>/run/out || fail "$(cat /run/out)"
run --memory-limit 24M -- dd if=/dev/zero of=/dev/null bs=64M count=1 2>/run/out
[ $? = 137 ] || fail "over the limit: $(cat /run/out)"
nothing_left
step "limits hold"

# Killed launchers: what is left is removed by who comes next. The groups are empty, or will be.
memdev run --backend fuse /disk.img -- sleep 1000 &
members() { cat "$memory"/memdev-*/inside/cgroup.procs; }
begun() { [ "$(members 2>/dev/null | wc -l)" = 2 ]; }
ended() { [ -z "$(members)" ]; }
wait_for 30 begun || fail "it does not run"
kill -KILL $!
wait_for 30 ended || fail "left: $(members)"
[ -n "$(groups)" ] || fail "whose group has gone?"
memdev enter --list >/run/out || fail "list: $(cat /run/out)"
nothing_left
step "the launcher was killed"

if [ "$VERSION" = 2 ]; then
    # As a service manager has it: processes in a leaf, whose parent's children can be limited.
    mkdir -p $GROUPS_AT/slice/scope
    echo "+memory +pids" >$GROUPS_AT/slice/cgroup.subtree_control || fail "subtree_control"
    (
        echo 0 >$GROUPS_AT/slice/scope/cgroup.procs
        exec memdev run --backend fuse --pids-limit 9 /disk.img -- sh -c 'echo here; sleep 2'
    ) >/run/out &
    wait_for 30 grep -q here /run/out || fail "in a scope: $(cat /run/out)"
    [ "$(cat $GROUPS_AT/slice/memdev-*/pids.max)" = 9 ] || fail "$(groups)"
    wait
    nothing_left
    step "it is beside who started it"
    run --swap never -- sh -c 'echo here' >/run/out || fail "never: $(cat /run/out)"
else
    run --swap never -- sh -c 'echo here' >/run/out 2>&1 && fail "never: $(cat /run/out)"
    grep -qF "Cannot promise that nothing is swapped out: version 1" /run/out || fail "$(cat /run/out)"
fi

step "what cannot be promised is refused"
nothing_left
