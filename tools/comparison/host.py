"""The machine: what it is, and the state that it is brought into before each measurement."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path


def describe() -> dict:
    """What a reader of the figures must know of the machine."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
    return {
        "name": re.sub(r"[^A-Za-z0-9-]", "-", platform.node()) or "host",
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
    }


def make_image(path: Path, size: int) -> None:
    """An image of random bytes. Large ones repeat: what lies in it matters to nobody, only that it is no hole."""
    piece = os.urandom(min(size, 256 << 20))
    with open(path, "wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def make_sparse(path: Path, size: int) -> None:
    """An image that is one hole."""
    with open(path, "wb") as file:
        file.truncate(size)


def warm(path: Path) -> None:
    """Reads the whole image into the page cache."""
    buffer = bytearray(4 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def chill(path: Path) -> None:
    """Drops the image from the page cache. Nobody may have it mapped."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(load: Path, size: str) -> None:
    """Has memory touched and freed, so that nobody's first write pays for what the host does at a first touch."""
    subprocess.run([load, "touch", size], check=True, timeout=300)


def memory_folder() -> Path | None:
    """A folder in memory, if the system has one."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else None


def version(*command: str) -> str | None:
    """The first line of what the command says with a number in it; None when it is not installed."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    for line in (done.stdout + done.stderr).splitlines():
        if re.search(r"\d+\.\d+", line):
            return line.strip()
    return "unknown version"


def make_certificates(folder: Path) -> None:
    """A CA, and a certificate of it for a server called localhost, with its key, under the names that all servers know."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout"]
    authority = ["-CA", folder / "ca-cert.pem", "-CAkey", folder / "ca-key.pem", "-CAcreateserial"]
    usage = folder / "usage"
    usage.write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
        "keyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth\n"
    )
    for command in (
        ["req", "-x509", *key, folder / "ca-key.pem", "-out", folder / "ca-cert.pem", "-days", "2", "-subj", "/CN=compare",
         "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"],
        ["req", *key, folder / "server-key.pem", "-out", folder / "request", "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", folder / "request", *authority, "-days", "2", "-extfile", usage,
         "-out", folder / "server-cert.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True, timeout=60)
