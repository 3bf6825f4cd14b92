#!/bin/sh
# Nothing of what a private root had in memory is in swap, in cores, in files or in the machine's memory when it has ended; and
# it is found in each, by the same means, where nothing keeps it from there.
#
# /disk.img: an empty file, for a file system. The kernel clears what is freed (init_on_free=1): so what is found in the
# machine's memory is what somebody still has.
# shellcheck source=lib.sh
. /lib.sh

# The kernel runs the handler of cores where it began itself, which is below the root that this job moves to.
if [ -z "$MOVED" ]; then
    mkdir /cores
    # shellcheck disable=SC2016  # the handler expands it
    printf '#!/bin/sh\nexec /busybox/cat >/cores/$1\n' >/handler
    chmod 755 /handler
fi
leave_initramfs /disk.img
CORES=/proc/1/root/cores
GROUP=/sys/fs/cgroup/slice
echo '|/handler %P' >/proc/sys/kernel/core_pattern
# The kernel waits until the handler has it all.
echo 4 >/proc/sys/kernel/core_pipe_limit

# As small a root as can be.
mkfs.ext4 -q /disk.img >/run/log 2>&1 || fail "$(cat /run/log)"
mount -o loop /disk.img /mnt || fail mount
mkdir /mnt/bin /mnt/dev /mnt/proc /mnt/sys /mnt/run /mnt/tmp /mnt/root
cp /busybox/busybox /mnt/bin/busybox || fail busybox
for applet in sh head kill sleep sync vi yes; do ln -s busybox "/mnt/bin/$applet"; done
umount /mnt
mount -t devpts none /dev/pts || fail devpts
mount -t cgroup2 none /sys/fs/cgroup || fail cgroup2
mkdir -p $GROUP/scope
echo +memory >/sys/fs/cgroup/cgroup.subtree_control || fail subtree_control
echo +memory >$GROUP/cgroup.subtree_control || fail subtree_control

sixteen() { cut -c 1-8,10-13,15-18 /proc/sys/kernel/random/uuid; }

# new_marker: one of 32 digits that nobody has whole before it is put together inside, in $front and $back; $pattern finds it and
# does not hold it, so that who looks for it does not find itself.
new_marker() {
    front=$(sixteen) back=$(sixteen)
    pattern="[${front%"${front#?}"}_]${front#?}${back%?}[${back#"${back%?}"}_]"
}

# found PATTERN: how often it is in what comes, at least. Zeroes end what grep takes for lines.
found() { LC_ALL=C grep -zcaE "$1"; }
none() { [ "$1" = 0 ] || fail "the marker is in $2: $1 times"; }
some() { [ "$1" -gt 0 ] || fail "the marker would not be found in $2"; }

in_swap() {
    blockdev --flushbufs /dev/zram0
    found "$1" </dev/zram0
}
in_cores() { cat $CORES/* 2>/dev/null | found "$1"; }
in_files() { find / /proc/1/root/ -xdev -type f -exec cat {} + | found "$1"; }
# All of the machine's memory, free or not: the parts of /proc/kcore that have a physical address.
in_memory() {
    count=$(od -An -t u2 -j 56 -N 2 /proc/kcore)
    od -An -v -t x8 -j 64 -N $((count * 56)) /proc/kcore | xargs -n 7 >/run/parts
    while read -r kind offset _ physical size _; do
        case $kind,$physical in *1,*fffffffff | *4,*) continue ;; esac
        dd if=/proc/kcore bs=1M iflag=skip_bytes,count_bytes skip=$((0x$offset)) count=$((0x$size)) status=none
    done </run/parts | found "$1"
}

# squeeze: the kernel takes from the group what it can.
squeeze() {
    for _ in 1 2 3; do echo 512M >$GROUP/memory.reclaim; done 2>/dev/null
    true
}

# In the group that is squeezed.
cat >/run/in-group <<END
#!/bin/sh
echo 0 >$GROUP/scope/cgroup.procs && exec "\$@"
END
chmod 755 /run/in-group

# A shell that has the marker, files of it in each place that is in memory and on the disk, and an editor with the largest of them.
# shellcheck disable=SC2016  # the shell inside expands it
INSIDE='kept=$front$back
for file in /root/note /run/note /dev/shm/note; do echo $kept >$file; done
yes $kept | head -n 50000 >/tmp/note
sync
vi /tmp/note
echo $kept'
mkfifo /run/keys
exec 3<>/run/keys

# What is typed before it listens is lost.
writes() {
    printf ':w! /run/written\r' >&3
    sleep 0.5
    [ -s "/proc/$(pidof vi)/root/run/written" ]
}
# begin OPTIONS...: a session on a terminal, until the editor has read and shown its file.
begin() {
    new_marker
    run="/run/in-group memdev run --backend fuse $* --env front=$front --env back=$back /disk.img"
    script -qc "$run -- sh -c '$INSIDE'" /dev/null <&3 >/dev/null 2>/run/log &
    wait_for 60 pidof vi >/run/log || fail "the editor does not begin: $(cat /run/log)"
    wait_for 60 writes || fail "the editor does not write"
}
daemons() { grep -lx memdev-attach /proc/[0-9]*/comm 2>/dev/null; }
groups() { find /sys/fs/cgroup -name 'memdev-*'; }
# Who comes next removes what a launcher leaves that was killed.
quiet() {
    memdev enter --list >/run/log
    [ -z "$(daemons)$(groups)" ] && ! pidof memdev script >/run/log
}
nothing_left() { wait_for 30 quiet || fail "left: $(daemons) $(groups) $(cat /run/log)"; }
no_core() { [ -z "$(ls $CORES)" ] || fail "a core of $1: $(ls -l $CORES)"; }
# nowhere: neither in files nor, for all that still has it, in memory.
nowhere() {
    none "$(in_swap "$pattern")" swap
    some "$(in_files "$bait")" files
    none "$(in_files "$pattern")" files
    none "$(in_memory "$pattern")" memory
}

# A swap device, and somebody in the same group as sessions who may be swapped out.
echo 64M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/run/log || fail "$(cat /run/log)"
swapon /dev/zram0 || fail swapon
echo 200 >/proc/sys/vm/swappiness
new_marker
bait=$pattern
/run/in-group awk -v a="$front" -v b="$back" 'BEGIN {
    for (n = 0; n < 20000; n++) lines[n] = a b; print a b >"/run/set"; fflush(); while (1) system("sleep 1000") }' &
wait_for 30 [ -s /run/set ] || fail "the bait is not out"

for mode in "" --privileged; do
    begin $mode
    [ -n "$mode" ] || some "$(in_memory "$pattern")" memory
    squeeze
    some "$(in_swap "$bait")" swap
    none "$(in_swap "$pattern")" swap
    step "${mode:-unprivileged}: the machine swaps, but not what is inside"
    case $mode in
    "") printf ':q!\r' >&3 ;;
    *) kill -ABRT "$(sed -n 's/.*"launcher": *\([0-9]*\).*/\1/p' /run/memdev-root/*)" ;;
    esac
    nothing_left
    no_core "a launcher"
    nowhere
    step "${mode:-unprivileged}: its end has left nothing"
done

begin --swap allow
squeeze
some "$(in_swap "$pattern")" "swap where that is allowed"
kill -ABRT "$(daemons | cut -d/ -f3)"
nothing_left
no_core "a device's daemon"
step "what may be swapped out is found"

# dies WORDS: a shell inside that has the marker and is aborted, after it has done as it is told.
dies() {
    new_marker
    memdev run --backend fuse --env front="$front" --env back="$back" /disk.img -- \
        sh -c "kept=\$front\$back; $1; kill -ABRT \$\$; sleep 100"
    [ $? = 134 ] || fail "it was not aborted: $1"
}
dies true
no_core "a process inside"
dies 'ulimit -c 0'
[ -n "$(ls $CORES)" ] || fail "the handler is not run by a limit of 0"
none "$(in_cores "$pattern")" "a core of a process with a limit of its own"
dies 'ulimit -c 0; echo 0x3f >/proc/self/coredump_filter'
some "$(in_cores "$pattern")" "a core of a process that wants one"
rm $CORES/*
step "the handler of cores gets nothing that a process does not give it"

for confine in auto off; do
    new_marker
    server=$pattern
    Server=$front$back memdev serve --unix /run/nbd.sock --memory 32M --confine $confine /disk.img >/run/log 2>&1 &
    pid=$!
    wait_for 30 [ -S /run/nbd.sock ] || fail "no server: $(cat /run/log)"
    nbd-client -unix /run/nbd.sock /dev/nbd0 -N disk >/run/nbd.log 2>&1 || fail "$(cat /run/nbd.log)"
    DEVICE=/dev/nbd0
    new_marker
    yes "$front$back" | dd of=$DEVICE bs=1M count=4 iflag=fullblock oflag=direct status=none || fail "writing"
    kill -ABRT $pid
    wait $pid
    detach
    none "$(in_cores "$pattern")" "a server's core"
    case $confine in
    off) some "$(in_cores "$server")" "a core of a server that is not confined" ;;
    auto) no_core "a server" ;;
    esac
    rm /run/nbd.sock
done
step "the handler of cores gets nothing of what a server serves"
