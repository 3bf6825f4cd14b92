"""Process trees: what they cost in CPU and memory, and their certain end."""

import ctypes
import os
import resource
import signal
import stat
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1
PR_SET_THP_DISABLE = 41
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Daemons that a server leaves behind become children of this process, which can then wait for them."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def prepare_child() -> None:
    """Runs in a child before exec: it dies with this process, and may open as many files as the system lets it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def refuse_huge_pages() -> None:
    """Runs in a child before exec: the system gives it no huge pages for its memory."""
    _libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started: int

    def alive(self) -> bool:
        fields = stat_fields(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] != "Z"

    def signal(self, number: int) -> None:
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before it may hold spaces and brackets of its own.
    return text[text.rindex(")") + 2 :].split()


def tree(root: int) -> list[Process]:
    """The process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    fields_of: dict[int, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat_fields(int(entry))):
            fields_of[int(entry)] = fields
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        if pid in fields_of:
            found.append(Process(pid, int(fields_of[pid][19])))
            queue += parents.get(pid, [])
    return found


def mentions(pid: int, path: Path) -> bool:
    """Whether the path, or something below it, is on the process's command line."""
    try:
        return str(path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_seconds(root: int) -> float:
    """CPU time that the tree has used so far, that of children who have ended and been waited for included."""
    total = 0
    for process in tree(root):
        if fields := stat_fields(process.pid):
            total += sum(int(field) for field in fields[11:15])
    return total / TICKS


def settled_cpu_seconds(root: int, patience: float = 2.0) -> float:
    """The same, once the tree has come to rest: what a server does after the last reply (wiping, reaping) is part of
    what a request costs."""
    end = time.monotonic() + patience
    last = cpu_seconds(root)
    while time.monotonic() < end:
        time.sleep(0.1)
        now = cpu_seconds(root)
        if now == last:
            break
        last = now
    return last


@dataclass
class Memory:
    """What a tree holds, in bytes."""

    anonymous: int
    """RssAnon and huge pages."""
    overlay_files: int
    """Blocks of the files in its overlay folder, and of memfds and deleted files, that it has open for writing."""
    threads: int

    @property
    def total(self) -> int:
        return self.anonymous + self.overlay_files


def memory(root: int, overlay: Path) -> Memory:
    """Memory of the tree, with that of overlay files, but not the page cache of the base image."""
    anonymous = threads = shared = 0
    files: dict[tuple[int, int], int] = {}
    for process in tree(root):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        anonymous += _kibibytes(values, "RssAnon") + _kibibytes(values, "HugetlbPages")
        shared += _kibibytes(values, "RssShmem")
        threads += int(values.get("Threads", "0"))
        files.update(_written_files(process.pid, overlay))
    # A memfd that is mapped and still open would otherwise count twice.
    return Memory(anonymous, max(sum(files.values()), shared), threads)


def _kibibytes(values: dict[str, str], name: str) -> int:
    return int(values.get(name, "0 kB").split()[0]) * 1024


def _written_files(pid: int, overlay: Path) -> dict[tuple[int, int], int]:
    files = {}
    folder = Path(f"/proc/{pid}/fd")
    try:
        entries = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # memdev lets only root look; it has no file open for writing.
        return files
    for entry in entries:
        try:
            info = os.stat(folder / entry)
            flags = Path(f"/proc/{pid}/fdinfo/{entry}").read_text().split("flags:")[1].split()[0]
        except (OSError, IndexError):
            continue
        ours = info.st_nlink == 0 or os.readlink(folder / entry).startswith(str(overlay))
        if ours and stat.S_ISREG(info.st_mode) and int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
            files[info.st_dev, info.st_ino] = info.st_blocks * 512
    return files


def end(root: int, patience: float = 20.0) -> None:
    """Ends the tree: politely, then not; returns when every process of it is gone."""
    doomed = tree(root)
    for process in doomed[:1]:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + patience
    while any(process.alive() for process in doomed):
        if time.monotonic() > deadline:
            for process in doomed:
                process.signal(signal.SIGKILL)
        if doomed and not doomed[0].alive():
            # Children of a process per client do not always go with their parent.
            for process in doomed[1:]:
                process.signal(signal.SIGTERM)
        for process in doomed:
            _reap(process.pid)
        time.sleep(0.01)
    for process in doomed:
        _reap(process.pid)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
