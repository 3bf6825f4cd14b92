"""The emulated machine: started, watched, and ended whatever happens."""

import ctypes
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .failure import HUNG, NO_STATUS, PANICKED, TIME_LIMIT, Failed
from .kernel import Kernel

HERE = Path(__file__).resolve().parent
GUEST_SIDE = "10.0.2.100"
"""The address at which a guest finds what is passed through to it, one port each."""
FIRST_PORT = 10809
OFF_PATIENCE = 5
"""Seconds between the guest's word that it has ended and the end of its machine's process."""
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Passages:
    """What a guest reaches of the host beside its network: unix sockets, and commands that it may have run."""

    sockets: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The guest's environment: NAME="HOST PORT" for a socket, CALL_NAME for a command."""
        names = [*self.sockets, *(f"CALL_{name}" for name in self.commands)]
        return {name: f"{GUEST_SIDE} {FIRST_PORT + index}" for index, name in enumerate(names)}

    def options(self, work: Path) -> str:
        """What qemu's user network is to be told. For each connection it runs a command with the connection as its
        standard input and output; the commands are written into files, which need no quoting."""
        relay = shlex.join([sys.executable, "-S", "-E", str(HERE / "relay.py")])
        scripts = [f"exec {relay} {shlex.quote(socket)}" for socket in self.sockets.values()]
        scripts += [f"({command}\n) 2>&1\nprintf 'status %d' $?" for command in self.commands.values()]
        options = ""
        for index, script in enumerate(scripts):
            path = work / f"passage-{index}"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o700)
            options += f",guestfwd=tcp:{GUEST_SIDE}:{FIRST_PORT + index}-cmd:{path}"
        return options


def _prepare_child() -> None:
    """Runs in qemu before exec: it ends with this process, however that ends, and leaves the processor to others."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.nice(10)


@dataclass
class Machine:
    """A machine that can be run once."""

    kernel: Kernel
    archive: bytes
    memory: str = "512M"
    append: str = ""
    drives: list[str] = field(default_factory=list)
    passages: Passages = field(default_factory=Passages)
    time_limit: float = 300
    hang_limit: float = 60

    def run(self) -> int:
        """Runs it; what the guest says goes to standard output. Returns its exit status."""
        qemu = shutil.which("qemu-system-x86_64")
        if not qemu:
            raise Failed("qemu-system-x86_64 is missing; run tools/setup vm")
        with tempfile.TemporaryDirectory(prefix="memdev-vm.") as folder:
            work = Path(folder)
            (work / "initramfs").write_bytes(self.archive)
            process = subprocess.Popen(
                self._command(qemu, work),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_prepare_child,
            )
            try:
                return Watch(self, process, work / "status").outcome()
            finally:
                # Also what it started for the guest's connections, which is in its process group.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
                process.stdout.close()

    def _command(self, qemu: str, work: Path) -> list[str]:
        append = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on tsc=reliable "
        # On a busy machine the timer may seem not to work when it is tried, and the kernel would panic; and what the
        # kernel measures of the processor's clock may be wrong by far, so that ten of its seconds are one.
        append += "no_timer_check clocksource=acpi_pm " + self.append
        drives = []
        for uri in self.drives:
            # A comma would begin qemu's next option.
            drives += ["-drive", f"file={uri.replace(',', ',,')},format=raw,if=virtio,discard=unmap,detect-zeroes=unmap"]
        return [
            qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc", "-cpu", "max",
            # More processors would be slower: they are all emulated.
            "-accel", "tcg,thread=multi", "-smp", "1", "-m", self.memory,
            "-kernel", str(self.kernel.image), "-initrd", str(work / "initramfs"), "-append", append.strip(),
            "-serial", "stdio", "-serial", f"file:{work / 'status'}",
            "-netdev", f"user,id=n0,ipv6=off{self.passages.options(work)}",
            "-device", "virtio-net-pci,netdev=n0,romfile=", "-device", "virtio-rng-pci", *drives,
        ]  # fmt: skip


class Watch:
    """What is known of a running guest: its console, its signs of life, how long it has been at it."""

    def __init__(self, machine: Machine, process: subprocess.Popen, status: Path):
        self.machine = machine
        self.process = process
        self.status = status
        self.tail = b""
        self.panicked = False
        self.heard = 0
        self.alive_at = self.started = time.monotonic()
        self.ready = selectors.DefaultSelector()
        os.set_blocking(process.stdout.fileno(), False)
        self.ready.register(process.stdout, selectors.EVENT_READ)

    def outcome(self) -> int:
        """Waits for the guest's end; its exit status, or why there is none."""
        while True:
            self.ready.select(timeout=0.2)
            open_still = self._listen()
            if not open_still:
                return self._ended()
            now = time.monotonic()
            said = self._word()
            if said is not None and now - self.alive_at > OFF_PATIENCE + self.machine.hang_limit:
                raise Failed(f"the guest's job ended with {said}, but it does not switch off", HUNG)
            if now - self.started > self.machine.time_limit:
                raise Failed(f"the job did not end in {self.machine.time_limit:g} s", TIME_LIMIT)
            if not self.leaving and now - self.alive_at > self.machine.hang_limit:
                raise Failed(f"the guest gives no sign of life for {self.machine.hang_limit:g} s: it hangs", HUNG)

    def _listen(self) -> bool:
        """Passes on what the guest has said since; whether there may be more."""
        text = self._said()
        if len(text) > self.heard:
            self.heard, self.alive_at = len(text), time.monotonic()
        while True:
            try:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.tail = (self.tail + data)[-(1 << 16) :]
            self.panicked = self.panicked or b"Kernel panic - not syncing" in self.tail
            sys.stdout.buffer.write(data.replace(b"\r", b""))
            sys.stdout.buffer.flush()

    def _said(self) -> str:
        try:
            return self.status.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def leaving(self) -> bool:
        return "leaving" in self._said()

    def _word(self) -> int | None:
        """The exit status, if the guest has said it."""
        found = re.search(r"^exit (\d+)\s*$", self._said(), re.M)
        return int(found.group(1)) if found else None

    def _ended(self) -> int:
        code = self.process.wait()
        if self.panicked:
            raise Failed("the guest's kernel panicked; its last words are above", PANICKED)
        if (word := self._word()) is not None:
            return word
        if code:
            raise Failed(f"qemu ended with {code}")
        raise Failed("the guest switched off without an exit status", NO_STATUS)
