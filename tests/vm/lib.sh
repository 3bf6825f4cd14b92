# shellcheck shell=sh
# What the jobs in this folder share. Sourced in the guest, from /lib.sh.

# Every attached device is attached by these: nbd-client's words, and what it is to be afterwards.
DEVICE=${DEVICE-/dev/nbd0}
SIZE=${SIZE-}

fail() {
    echo "FAILED: $*"
    exit 1
}

# step WORDS...: says what follows, with the time since boot.
step() {
    read -r now _ </proc/uptime
    echo "== $now s: $*"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    end=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$end" ] || return 1
        sleep 0.1
    done
}

sysfs() { cat "/sys/block/${DEVICE#/dev/}/$1"; }
has_size() { [ "$(blockdev --getsize64 "$DEVICE")" = "$SIZE" ]; }
let_go() { [ ! -e "/sys/block/${DEVICE#/dev/}/pid" ] && [ "$(blockdev --getsize64 "$DEVICE")" = 0 ]; }

# Without netlink, nbd-client leaves a child that looks after the device and may outlive it by 100 ms: whoever attaches
# meanwhile shares the device's old configuration, with its dead connections.
no_client() { ! pidof nbd-client >/run/nbd-client.pids; }

# attach WORDS...: nbd-client with these words, whose place for the device is left out: the way to the server first, in
# $SERVER. It may return before the device has its size.
attach() {
    # shellcheck disable=SC2086  # host and port, or -unix and a path
    nbd-client $SERVER "$DEVICE" "$@" >/run/nbd-client.log 2>&1 || {
        cat /run/nbd-client.log
        fail "nbd-client $SERVER $DEVICE $*"
    }
    wait_for 30 has_size || fail "$DEVICE has $(blockdev --getsize64 "$DEVICE") bytes, not $SIZE"
}

# detach: until the kernel has let go.
detach() {
    nbd-client -d "$DEVICE" >/run/nbd-client.log 2>&1 || {
        cat /run/nbd-client.log
        fail "nbd-client -d $DEVICE"
    }
    wait_for 30 let_go || fail "the kernel keeps $DEVICE"
}

# forget: what was read before is read again from the server.
forget() {
    blockdev --flushbufs "$DEVICE"
    echo 3 >/proc/sys/vm/drop_caches
}

# refused COMMAND...: it must fail.
refused() {
    if "$@" >/run/refused.log 2>&1; then
        cat /run/refused.log
        fail "this was not refused: $*"
    fi
}

# leave_initramfs FILE...: starts the job again, with these files, in a file system that can be pivoted away from, which an
# initramfs cannot; then goes on.
leave_initramfs() {
    if [ -z "$MOVED" ]; then
        mkdir /new
        mount -t tmpfs none /new || fail "tmpfs"
        for file; do mv "$file" /new; done
        for entry in /*; do
            case $entry in /new | /proc | /sys | /dev) ;; *) cp -a "$entry" /new ;; esac
        done
        # New ones: those of before are whoever's who started this job.
        mkdir /new/proc /new/sys /new/dev
        for system in proc:proc sysfs:sys devtmpfs:dev; do
            mount -t "${system%:*}" none "/new/${system#*:}" || fail "mount $system"
        done
        cd /new || fail "cd"
        mount --move . / || fail "moving the root"
        MOVED=1 exec chroot . /bin/sh "/${0##*/}"
    fi
    cd / || fail "cd"
}
