"""Debian's kernels for virtual machines, with what of busybox a guest needs, fetched once and kept.

```
CACHE/kernel-6.12/vmlinux         the kernel as an ELF file: qemu starts it without its decompressing itself first
                  lib/modules/    its modules, as the package has them
                  busybox         the static one
                  release         its full name; written last: a folder without it is not whole
```
"""

import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from .failure import Failed
from .packages import Suite, output_of, say

SUITES = {"6.1": "bookworm", "6.12": "trixie"}
"""The suite that has each kernel. Suites are taken by name, so that the kernel does not change with the machine."""

META = "linux-image-cloud-amd64"
"""The versioned package's name changes with every update, and the old one goes away; this one tells the name."""


def cache_folder() -> Path:
    """Where fetched things are kept; beside tools/make-image's images."""
    base = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/root") / ".cache"
    return Path(base) / "memdev" / "vm"


@dataclass(frozen=True)
class Kernel:
    """A kernel that is there."""

    version: str
    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "vmlinux"

    @property
    def release(self) -> str:
        return (self.folder / "release").read_text().strip()

    def modules(self, names: list[str]) -> list[Path]:
        """The files of these modules and of what they need, in the order of loading. Built-in ones have none."""
        found: list[Path] = []
        for name in names:
            command = ["modprobe", "--dirname", self.folder, "--set-version", self.release]
            command += ["--config", "/dev/null", "--show-depends", name]
            for line in output_of(command, f"kernel {self.release} has no module {name}").splitlines():
                words = line.split()
                if words[0] == "insmod" and (path := Path(words[1])) not in found:
                    found.append(path)
        return found

    def module(self, path: Path) -> bytes:
        """A module as the kernel's loader takes it."""
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data


def get(version: str) -> Kernel:
    """The kernel, fetched if it is not there yet. Of several that ask at once, one fetches."""
    cache = cache_folder()
    kernel = Kernel(version, cache / f"kernel-{version}")
    if not (kernel.folder / "release").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"kernel-{version}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (kernel.folder / "release").exists():
                _fetch(kernel, cache)
    return kernel


def _fetch(kernel: Kernel, cache: Path) -> None:
    suite = Suite(SUITES[kernel.version], cache)
    suite.update()
    depends = suite.field(META, "Depends")
    found = re.search(r"\blinux-image-(\S+)", depends)
    if not found:
        raise Failed(f"{META} of {suite.name} names no kernel: {depends}")
    release = found.group(1)
    if not release.startswith(f"{kernel.version}."):
        raise Failed(f"{suite.name} has no kernel {kernel.version}, but {release}")
    with tempfile.TemporaryDirectory(dir=cache, prefix="new.") as work:
        packages, new = Path(work) / "packages", Path(work) / "kernel"
        packages.mkdir()
        new.mkdir()
        suite.unpack(f"linux-image-{release}", packages)
        suite.unpack("busybox-static", packages)
        suite.forget()
        # Since Debian 13, packages have usr/bin and usr/lib/modules where they had bin and lib/modules.
        one = lambda pattern: next(iter(sorted(packages.glob(pattern)) + sorted((packages / "usr").glob(pattern))))
        vmlinuz = (packages / "boot" / f"vmlinuz-{release}").read_bytes()
        (new / "vmlinux").write_bytes(unpacked(vmlinuz))
        (new / "lib").mkdir()
        shutil.move(one("lib/modules"), new / "lib" / "modules")
        shutil.move(one("bin/busybox"), new / "busybox")
        output_of(["depmod", "--basedir", new, release], "depmod failed")
        (new / "release").write_text(f"{release}\n")
        shutil.rmtree(kernel.folder, ignore_errors=True)
        new.rename(kernel.folder)
    say(f"kept {release} in {kernel.folder}")


def unpacked(vmlinuz: bytes) -> bytes:
    """The ELF file in a bzImage (Documentation/arch/x86/boot.rst of the kernel: payload_offset, payload_length)."""
    if vmlinuz[0x202:0x206] != b"HdrS":
        raise Failed("the kernel's package has no bzImage")
    setup_sectors = vmlinuz[0x1F1] or 4
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The payload's last four bytes are the size of what it holds.
    payload = vmlinuz[start : start + length - 4]
    if payload.startswith(b"\xfd7zXZ"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = zlib.decompressobj(31).decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        elf = filtered(["zstd", "-dc"], payload)
    elif payload.startswith(b"\x02\x21\x4c\x18"):
        elf = filtered(["lz4", "-dc"], payload)
    else:
        raise Failed(f"the kernel is packed in an unknown way: {payload[:6].hex()}")
    if not elf.startswith(b"\x7fELF"):
        raise Failed("there is no ELF file in the kernel's image")
    return elf


def filtered(command: list[str], data: bytes) -> bytes:
    """What a filter makes of the data."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is missing; run tools/setup vm") from None
    if done.returncode:
        raise Failed(f"{command[0]} cannot unpack the kernel: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
