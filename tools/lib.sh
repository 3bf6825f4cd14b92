# shellcheck shell=bash
# What the scripts in tools/ share. Sourced, never run. No side effect but PATH.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export repo

# Debian keeps mkfs, losetup and nbd-client where an ordinary user's PATH does not look, and rustup's own PATH line is
# read by login shells only.
PATH=$PATH:/usr/sbin:/sbin
command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
export PATH

if [[ -t 1 && -z ${NO_COLOR-} ]]; then
    bold=$'\e[1m' plain=$'\e[0m'
else
    bold='' plain=''
fi

# A step's heading; then what happens in it, indented; then, at the worst, why it cannot go on.
step() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }
say() { printf '    %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root: directly, or through sudo.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "this needs root: run it as root, or install sudo"
    fi
}

# Whether as_root would work without asking anybody for a password.
can_be_root() {
    ((EUID == 0)) || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# wait_until SECONDS COMMAND...: tries the command until it succeeds.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.05
    done
}
