"""The guest's files: a cpio archive in memory, made anew for every run.

The kernel unpacks it into its root. It has this project's `init`, busybox, this machine's own programs with the
libraries that they need, the modules, and the job.
"""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

from .failure import Failed
from .kernel import Kernel
from .packages import output_of

HERE = Path(__file__).resolve().parent

PROGRAMS = ["dash", "dd", "cmp", "nbd-client", "mkfs.ext4", "e2fsck", "mount", "umount", "fstrim", "blkdiscard", "blockdev"]
"""What is taken from this machine. The rest is busybox."""

MODULES = ["virtio_pci", "virtio_net", "virtio_rng", "nbd", "ext4"]
"""What is loaded in every guest."""

DIRECTORIES = ["bin", "busybox", "dev", "proc", "sys", "run", "tmp", "root", "mnt", "sysroot", "etc", "lib/modules"]


class Archive:
    """A cpio archive in the form that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        number = len(self._names) + 1
        self._names.add(name)
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        self._parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]

    def directory(self, path: str) -> None:
        """A folder, with all that it is in."""
        path = path.strip("/")
        if path and path not in self._names:
            self.directory(os.path.dirname(path))
            self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file, in its folder. One that is there already is replaced."""
        path = path.strip("/")
        self.directory(os.path.dirname(path))
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._entry(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """A device node, which needs no root here."""
        self._entry(path.strip("/"), stat.S_IFCHR | 0o600, device=(major, minor))

    def copy(self, source: Path, path: str | None = None) -> None:
        """A file of this machine, with the libraries that it is linked with, where they are here."""
        path = path or str(source)
        if path.strip("/") in self._names:
            return
        try:
            data, mode = source.read_bytes(), source.stat().st_mode
        except OSError as error:
            raise Failed(f"{source} cannot be added: {error.strerror}") from None
        self.file(path, data, stat.S_IMODE(mode))
        if data.startswith(b"\x7fELF"):
            for library in libraries(source):
                self.copy(Path(library))

    def whole(self) -> bytes:
        """The archive."""
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)


def libraries(program: Path) -> list[str]:
    """The libraries and the loader of a program, as paths."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if done.returncode:
        # It is static.
        return []
    if missing := re.search(r"^\s*(\S+) => not found$", done.stdout, re.M):
        raise Failed(f"{program} needs {missing.group(1)}, which is not on this machine")
    return re.findall(r"(/\S+) \(0x", done.stdout)


def which(program: str) -> Path:
    """The path of a program; a Debian user's PATH leaves out some."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if not found:
        raise Failed(f"{program} is missing; run tools/setup vm")
    return Path(found)


def build(kernel: Kernel, job: Path, added: list[tuple[Path, str]], modules: list[str], variables: dict[str, str]) -> bytes:
    """The archive for one run of a job."""
    archive = Archive()
    for name in DIRECTORIES:
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (HERE / "guest-init").read_bytes(), 0o755)
    archive.file("bin/on-host", (HERE / "on-host").read_bytes(), 0o755)

    archive.file("busybox/busybox", (kernel.folder / "busybox").read_bytes(), 0o755)
    for applet in output_of([kernel.folder / "busybox", "--list"], "busybox does not run").split():
        if applet != "busybox":
            archive.link(f"busybox/{applet}", "busybox")
    for program in PROGRAMS:
        # Under one folder, whatever this machine has it in: who unpacks it looks there before busybox.
        archive.copy(which(program), f"bin/{program}")
    # dash, not busybox: its shell runs its own applets whatever PATH says.
    archive.link("bin/sh", "dash")
    archive.link("etc/mtab", "/proc/mounts")

    order = []
    for path in kernel.modules(MODULES + modules):
        name = path.name.removesuffix(".xz")
        archive.file(f"lib/modules/{name}", kernel.module(path))
        order.append(name)
    archive.file("lib/modules/load", "".join(f"{name}\n" for name in order).encode())

    for source, path in added:
        archive.copy(source, path)
    archive.copy(job, "job")
    quoted = (f"{name}='{value.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}'\n" for name, value in variables.items())
    archive.file("job.env", "".join(quoted).encode())
    return archive.whole()
