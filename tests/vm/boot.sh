#!/bin/sh
# A machine whose root is /dev/nbd0: Debian, with systemd, up to multi-user and off again. Two of them run at once on one
# image; each changes its root, and neither finds what the other changed, nor what anybody changed before.
#
# $EXPORT: what to attach. $HOW: by nbd-client, or by the script of Debian's initramfs, /nbd-script, which finds the way on
# the kernel's command line. $NAME: this machine's name. $FRESH: whether its root must be the image; else it must be the
# machine's own. $BOOT: whether to go on. on-host together: returns when both machines have called it.
# shellcheck source=lib.sh
. /lib.sh
SERVER="$HOST $PORT"
case $HOW in
client) attach -N "$EXPORT" ;;
debian)
    # Of initramfs-tools no more than what the script calls; the network is up.
    mkdir /scripts
    cat >/scripts/functions <<'END'
log_begin_msg() { echo "$*"; }
log_failure_msg() { echo "$*"; }
wait_for_udev() { :; }
configure_networking() { :; }
modprobe() { :; }
END
    NBDCLIENT=nbd-client sh /nbd-script || fail "the script of Debian's initramfs"
    wait_for 30 has_size || fail "the script of Debian's initramfs attached nothing"
    ;;
esac
# As a diskless client's initramfs would: mount, and leave the rest to the root's own init.
mount "$DEVICE" /sysroot || fail "mount"
found=$(cd /sysroot/etc && echo changed-by-*)
case $FRESH in
yes) [ "$found" = 'changed-by-*' ] || fail "the root is not fresh: $found" ;;
no) [ "$found" = "changed-by-$NAME" ] || fail "the root is not its own: $found" ;;
esac
step "$NAME: the root is mounted"
if [ "$BOOT" = no ]; then
    umount /sysroot
    detach
    exit 0
fi

: "${CALL_together:?}"
# What the machine does when it is up. It is written into the root itself: it is private.
install() {
    cat >"/sysroot$1"
    chmod "$2" "/sysroot$1"
}
mkdir -p /sysroot/usr/local/vm
cp /bin/on-host /busybox/busybox /sysroot/usr/local/vm/
ln -s busybox /sysroot/usr/local/vm/nc
echo "$NAME" >/sysroot/etc/hostname
install /etc/systemd/system/vm-job.service 644 <<END
[Unit]
After=multi-user.target

[Service]
Type=oneshot
Environment=NAME=$NAME PATH=/usr/local/vm:/usr/sbin:/usr/bin "CALL_together=$CALL_together"
ExecStart=/usr/local/vm/job
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStopPost=/bin/sh -c 'echo "exit \$\$EXIT_STATUS" >/dev/ttyS1'
ExecStopPost=systemctl --no-block poweroff

[Install]
WantedBy=graphical.target
END
# A login prompt would hang up on what else uses the line.
ln -s /dev/null /sysroot/etc/systemd/system/serial-getty@ttyS0.service
mkdir -p /sysroot/etc/systemd/system/graphical.target.wants
ln -s ../vm-job.service /sysroot/etc/systemd/system/graphical.target.wants/
install /usr/local/vm/job 755 <<'END'
#!/bin/sh
fail() {
    echo "FAILED: $NAME: $*"
    exit 1
}
read -r now _ </proc/uptime
echo "== $now s: $NAME: $(. /etc/os-release && echo "$PRETTY_NAME") is up on $(findmnt -no SOURCE,FSTYPE,OPTIONS /)"
[ "$(findmnt -no SOURCE /)" = /dev/nbd0 ] || fail "the root is not /dev/nbd0"
[ "$(cat /proc/1/comm)" = systemd ] || fail "the first process is $(cat /proc/1/comm)"
systemctl is-active --quiet multi-user.target || fail "multi-user.target is not reached"
systemctl --failed --no-legend --plain
[ "$(hostname)" = "$NAME" ] || fail "the host's name is $(hostname)"

# Its own changes: of a file that is in the image, of new files, of the journal's kind.
echo "$NAME" >"/etc/changed-by-$NAME"
echo "# $NAME" >>/etc/profile
useradd --create-home "user-$NAME" || fail "useradd"
dd if=/dev/urandom of=/var/tmp/big bs=1M count=4 conv=fsync status=none || fail "writing"
sha256sum /var/tmp/big >/root/sums
sync
on-host together || fail "the other machine does not come"

# Not from the page cache.
echo 3 >/proc/sys/vm/drop_caches
sha256sum --quiet -c /root/sums || fail "its own file has changed"
grep -q "^# $NAME$" /etc/profile || fail "its own change is lost"
[ "$(ls /etc/changed-by-*)" = "/etc/changed-by-$NAME" ] || fail "it finds $(ls /etc/changed-by-*)"
[ "$(grep -c '^# machine' /etc/profile)" = 1 ] || fail "it finds $(grep '^# machine' /etc/profile)"
[ "$(ls /home)" = "user-$NAME" ] || fail "it finds $(ls /home)"
on-host together || fail "the other machine does not come"
read -r now _ </proc/uptime
echo "== $now s: $NAME: has its own changes and none of the other's; power off"
END
echo /sysroot >/run/new-root
