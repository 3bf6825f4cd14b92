"""The servers: how each is started on an image, and the handle on one that runs."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import host, procs

EXPORT = "img"


class Failed(Exception):
    """A server or client did not do what it was started for; the message says why."""


@dataclass
class Tools:
    """The programs under test that are built here, and where overlays of the others go."""

    memdev: Path
    load: Path
    hostile: Path
    overlays: Path


@dataclass
class Server:
    """A way to serve an image so that it is not changed."""

    name: str
    private: bool
    """Every connection has its own copy (else all clients share one)."""
    peer: bool = True
    """Counts for "best peer"; a tuned variant is shown only."""
    rows: tuple[str, ...] = ()
    """The rows that it takes part in; without any, all."""

    def version(self, tools: Tools) -> str | None:
        raise NotImplementedError

    def command(self, run: "Running", images: list[tuple[str, Path]]) -> list:
        raise NotImplementedError

    def prepare(self) -> None:
        """What its process does before it becomes the server."""
        procs.prepare_child()

    def start(self, tools: Tools, images: list[tuple[str, Path]], transport: str) -> "Running":
        """Starts it on the images (those that serve one only take the first) and waits until it answers."""
        run = Running(self, transport, tools)
        try:
            run.start(self.command(run, images))
        except BaseException:
            run.stop()
            raise
        return run


class Memdev(Server):
    options: tuple[str, ...] = ()

    def version(self, tools):
        return host.version(str(tools.memdev), "--version") if tools.memdev.exists() else None

    def command(self, run, images):
        place = ["--unix", run.socket] if run.transport == "unix" else ["--tcp", run.address]
        tls = ["--tls-certificates", run.certificates()] if run.transport == "tls" else []
        named = [f"{name}={path}" for name, path in images]
        return [run.tools.memdev, "serve", *named, *place, *tls, *self.options]


class MemdevOneWorker(Memdev):
    options = ("--workers", "1")


class MemdevSimple(Memdev):
    """Without structured replies, which cost some clients (libnbd 1.14) two more receives a read."""

    options = ("--no-structured-replies",)


class MemdevSmallPages(Memdev):
    """Without huge pages, even where the system would give them."""

    def prepare(self):
        super().prepare()
        procs.refuse_huge_pages()


class MemdevUnlocked(Memdev):
    """With memory that may be swapped out."""

    options = ("--lock-memory", "off")


class MemdevSealed(Memdev):
    """With blocks that are encrypted in memory."""

    options = ("--seal",)


class Ceiling(Server):
    def version(self, tools):
        return host.version(str(tools.load), "--version")

    def command(self, run, images):
        place = ["--unix", run.socket] if run.transport == "unix" else ["--tcp", run.address]
        return [run.tools.load, "ceiling", *place, images[0][1]]


class Nbdkit(Server):
    options: tuple[str, ...] = ()

    def version(self, tools):
        return host.version("nbdkit", "--version")

    def command(self, run, images):
        place = ["-U", run.socket] if run.transport == "unix" else ["-i", "127.0.0.1", "-p", str(run.port)]
        if run.transport == "tls":
            place += ["--tls=require", f"--tls-certificates={run.certificates()}"]
        return ["nbdkit", "-f", *place, "--filter=cow", "file", images[0][1], *self.options]


class NbdkitSmall(Nbdkit):
    """With the block size of the others instead of its default of 64 KiB."""

    options = ("cow-block-size=4096",)


class QemuNbd(Server):
    def version(self, tools):
        return host.version("qemu-nbd", "--version")

    def command(self, run, images):
        place = ["-k", run.socket] if run.transport == "unix" else ["-b", "127.0.0.1", "-p", str(run.port)]
        if run.transport == "tls":
            credentials = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={run.certificates()}"
            place += ["--object", credentials, "--tls-creds", "tls0"]
        # Its defaults: cache=writeback, aio=threads.
        return ["qemu-nbd", "--snapshot", "-t", "-e", "256", "-x", EXPORT, "-f", "raw", *place, images[0][1]]


class NbdServer(Server):
    def version(self, tools):
        return host.version("nbd-server", "--version")

    def command(self, run, images):
        unix = f"unixsock = {run.socket}\n" if run.transport == "unix" else ""
        run.pid_file = run.scratch / "pid"
        config = run.scratch / "config"
        config.write_text(
            f"[generic]\nlistenaddr = 127.0.0.1\nport = {run.port}\n{unix}"
            f"[{EXPORT}]\nexportname = {images[0][1]}\ncopyonwrite = true\ncowdir = {run.overlay}\n"
        )
        return ["nbd-server", "-C", config, "-p", run.pid_file]


MEMDEV = Memdev("memdev", private=True, peer=False)
MEMDEV_ONE_WORKER = MemdevOneWorker(
    "memdev-1-worker", private=True, peer=False, rows=("randread-32", "randwrite-32", "mixed-64", "hog", "hog-128k")
)
CEILING = Ceiling("ceiling", private=False, peer=False)
ALL = [
    MEMDEV,
    CEILING,
    NbdServer("nbd-server", private=True),
    Nbdkit("nbdkit", private=False),
    QemuNbd("qemu-nbd", private=False),
    NbdkitSmall("nbdkit-4k", private=False, peer=False),
    MEMDEV_ONE_WORKER,
    MemdevSmallPages(
        "memdev-4k-pages", private=True, peer=False, rows=("randwrite-32", "write-128k-first", "mixed-64")
    ),
    MemdevUnlocked(
        "memdev-unlocked", private=True, peer=False, rows=("randwrite-32", "write-128k-first", "mixed-64")
    ),
    MemdevSealed(
        "memdev-sealed", private=True, peer=False,
        rows=("randread-32", "randwrite-32", "written-read-32", "read-128k", "write-128k-first", "mixed-64", "end-8g"),
    ),
    MemdevSimple("memdev-simple", private=True, peer=False, rows=("fio-randread", "fio-randwrite")),
]


@dataclass
class Running:
    """A server that runs."""

    server: Server
    transport: str
    """"unix", "tcp", or "tls": that over TCP."""
    tools: Tools
    scratch: Path = field(init=False)
    overlay: Path = field(init=False)
    pid_file: Path | None = field(init=False, default=None)
    pid: int | None = field(init=False, default=None)
    port: int = field(init=False)

    def __post_init__(self):
        self.scratch = Path(tempfile.mkdtemp(prefix="cmp-"))
        self.overlay = Path(tempfile.mkdtemp(prefix="memdev-compare-", dir=self.tools.overlays))
        self.port = free_port()

    @property
    def socket(self) -> Path:
        return self.scratch / "s"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, command: list) -> None:
        with open(self.scratch / "log", "wb") as log:
            child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.overlay)},
                start_new_session=True,
                preexec_fn=self.server.prepare,
            )
        self.pid = child.pid
        if self.pid_file:
            # It goes into the background; what we then have to do with is the process that it names.
            child.wait(timeout=10)
            self._until(lambda: self.pid_file.exists() and self.pid_file.read_text().strip(), lambda: True)
            self.pid = int(self.pid_file.read_text())
        self._until(self._answers)

    def _until(self, condition, hope=None) -> None:
        """Waits for the condition, as long as there is hope: while the process lives."""
        end = time.monotonic() + 20
        while not condition():
            if time.monotonic() > end or not (hope or self.alive)():
                raise Failed(f"{self.server.name} does not start: {self.log()}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether a client gets a greeting."""
        family = socket.AF_UNIX if self.transport == "unix" else socket.AF_INET
        with socket.socket(family) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(self.socket) if self.transport == "unix" else ("127.0.0.1", self.port))
                return probe.recv(18).startswith(b"NBDMAGIC")
            except OSError:
                return False

    def alive(self) -> bool:
        return self.pid is not None and any(process.alive() for process in procs.tree(self.pid)[:1])

    def log(self) -> str:
        """The last line that it wrote."""
        text = (self.scratch / "log").read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it said nothing"

    def memory(self) -> procs.Memory:
        return procs.memory(self.pid, self.overlay)

    def holds(self) -> dict[str, int]:
        """What its process holds, but for what clients wrote."""
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        memory = self.memory()
        return {"descriptors": descriptors, "threads": memory.threads, "bytes": memory.total}

    def comes_to_rest(self, before: dict[str, int] | None) -> dict[str, int]:
        """What it holds once it has no more descriptors and threads, and hardly more memory, than before; without a
        before, once that does not change any more."""
        end = time.monotonic() + 30
        last = None
        while True:
            now = self.holds()
            slack = {"descriptors": 0, "threads": 0, "bytes": 40 << 20}
            if now == last if before is None else all(now[name] <= before[name] + slack[name] for name in now):
                return now
            if time.monotonic() > end:
                raise Failed(f"{self.server.name} keeps {now}, before it had {before or last}")
            last = now
            time.sleep(0.5)

    def goes_quiet(self) -> None:
        """Waits until it works for less than a tenth of a second in one."""
        end = time.monotonic() + 60
        before = procs.cpu_seconds(self.pid)
        while time.monotonic() < end:
            time.sleep(1)
            now = procs.cpu_seconds(self.pid)
            if now - before < 0.1:
                return
            before = now
        raise Failed(f"{self.server.name} does not come to rest beside a crowd that does nothing")

    def certificates(self) -> Path:
        """A folder with a CA, and with a certificate of it for this server and its key."""
        folder = self.scratch / "tls"
        if not folder.exists():
            folder.mkdir()
            host.make_certificates(folder)
        return folder

    def place(self) -> list[str]:
        """Where it is, for memdev-load."""
        if self.transport == "unix":
            return ["--unix", str(self.socket)]
        tls = ["--tls", str(self.certificates() / "ca-cert.pem")] if self.transport == "tls" else []
        return ["--tcp", self.address, *tls]

    def uri(self) -> str:
        if self.transport == "unix":
            return f"nbd+unix:///{EXPORT}?socket={self.socket}"
        return f"nbd://{self.address}/{EXPORT}"

    def stop(self) -> None:
        if self.pid is not None:
            procs.end(self.pid)
            self.pid = None
        # One that went into the background, but was not waited for to the end.
        for process in procs.tree(os.getpid())[1:]:
            if procs.mentions(process.pid, self.scratch):
                procs.end(process.pid)
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.overlay, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
