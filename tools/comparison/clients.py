"""The clients: the project's lean load generator and fio's nbd engine, with one kind of answer from both."""

import json
import subprocess
from dataclasses import dataclass

from . import procs
from .servers import EXPORT, Failed, Running

FIRST_TOUCH_LIMIT = 2
"""Seconds after which a pass over the whole image is cut off: later, a virtual machine's host may have taken back the
memory that was touched for it, and slow servers would pay for that."""


@dataclass(frozen=True)
class Load:
    """What a client does."""

    pattern: str
    block: str = "4K"
    depth: int = 1
    connections: int = 1
    span: str = "1G"
    once: bool = False
    """Every block once, and then end; else for as long as a run lasts."""

    @property
    def writes(self) -> bool:
        return "write" in self.pattern or "mixed" in self.pattern


def lean(run: Running, load: Load, seconds: float, export: str = EXPORT) -> dict:
    """Drives a server with memdev-load."""
    return _figures(_run(_command(run, load, seconds, export), seconds + 60))


def _command(run: Running, load: Load, seconds: float, export: str = EXPORT) -> list:
    command = [
        run.tools.load, "run", *run.place(), "--export", export, "--json",
        "--pattern", load.pattern, "--block", load.block, "--span", load.span,
        "--depth", load.depth, "--connections", load.connections,
        "--seconds", FIRST_TOUCH_LIMIT if load.once else seconds,
    ]  # fmt: skip
    if load.once:
        command.append("--distinct")
    return command


def _figures(text: str) -> dict:
    out = json.loads(text)
    latency = out["latency_us"]
    return {
        "requests": out["requests"],
        "bytes": out["bytes_per_second"] * out["seconds"],
        "seconds": out["seconds"],
        "errors": out["errors"],
        "iops": out["iops"],
        "bytes_per_second": out["bytes_per_second"],
        **{name: latency[name] for name in ("mean", "p50", "p90", "p99", "p99.9", "max")},
        "client_cpu_seconds": out["client_cpu_seconds"],
    }


def fio(run: Running, load: Load, seconds: float) -> dict:
    """Drives a server with fio's nbd engine (libnbd)."""
    command = [
        "fio", "--name=row", "--ioengine=nbd", f"--uri={run.uri()}", f"--rw={load.pattern}", f"--bs={load.block.lower()}",
        f"--iodepth={load.depth}", f"--size={load.span}", "--thread", "--output-format=json",
        "--percentile_list=50:90:99:99.9", "--group_reporting",
        # Buffers that fio scrambles cost it time; they must only not be zeroes.
        "--refill_buffers=0", "--scramble_buffers=0",
    ]  # fmt: skip
    command += [f"--runtime={FIRST_TOUCH_LIMIT}"] if load.once else ["--time_based", f"--runtime={seconds}"]
    text = _run(command, seconds + 60, cwd=run.scratch)
    job = json.loads(text[text.index("{") :])["jobs"][0]
    part = job["write" if "write" in load.pattern else "read"]
    if job["error"] or not part["total_ios"]:
        raise Failed(f"fio failed on {run.server.name} with error {job['error']}")
    at = part["clat_ns"]["percentile"]
    return {
        "requests": part["total_ios"],
        "bytes": part["io_bytes"],
        "seconds": part["runtime"] / 1000,
        "errors": 0,
        "iops": part["iops"],
        "bytes_per_second": part["bw_bytes"],
        "mean": part["clat_ns"]["mean"] / 1000,
        **{f"p{float(name):g}": value / 1000 for name, value in at.items()},
        "max": part["clat_ns"]["max"] / 1000,
    }


CLIENTS = {"lean": lean, "fio": fio}


def measured(run: Running, client: str, load: Load, seconds: float) -> dict:
    """Runs a client and adds what it cost the server."""
    before = procs.cpu_seconds(run.pid)
    result = CLIENTS[client](run, load, seconds)
    if not run.alive():
        raise Failed(f"{run.server.name} died: {run.log()}")
    cpu = procs.settled_cpu_seconds(run.pid) - before
    result["server_cpu_seconds"] = cpu
    result["cpu_per_million"] = cpu / result["requests"] * 1e6
    result["cpu_per_gib"] = cpu / result["bytes"] * 2**30 if result["bytes"] else None
    return result


class Held:
    """Connections that stay open, and can be told to work."""

    def __init__(self, run: Running, connections: int, span: str, export: str = EXPORT):
        command = [run.tools.load, "idle", *run.place(), "--export", export]
        command += ["--connections", str(connections), "--span", span]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=procs.prepare_child,
        )
        try:
            if self._line() != "ready":
                raise Failed(f"{run.server.name}: {self.process.stderr.read().strip()}")
        except BaseException:
            self.close()
            raise

    def _line(self) -> str:
        return self.process.stdout.readline().strip()

    def work(self, step: str) -> dict:
        """One step (`PATTERN BLOCK SPAN [REQUESTS] [ALIGN]`), on all connections."""
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        line = self._line()
        if not line:
            raise Failed(f"the client failed at '{step}': {self.process.stderr.read().strip()}")
        return json.loads(line)

    def close(self) -> None:
        try:
            self.process.stdin.close()
            self.process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Beside:
    """memdev-load, while something else is measured."""

    def __init__(self, run: Running, load: Load, seconds: float):
        self.process = subprocess.Popen(
            [str(word) for word in _command(run, load, seconds)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=procs.prepare_child,
        )

    def result(self) -> dict:
        """What it reached, when it has ended by itself."""
        return _figures(self.process.communicate(timeout=120)[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Crowd:
    """Clients that misbehave, until they are told to end."""

    def __init__(self, run: Running, kinds: str, count: int, at_once: int):
        command = [run.tools.hostile, *run.place(), "--export", EXPORT, "--kind", kinds, "--until-eof"]
        command += ["--clients", str(count), "--at-once", str(at_once), "--gap", "1"]
        # Elsewhere they would be other machines, which take nothing of the processors that server and client have here. (Who is
        # only `nice` is not interrupted for the others before his time is over, some milliseconds.)
        command = ["chrt", "--idle", "0", *command]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=procs.prepare_child,
        )
        try:
            if self.process.stdout.readline().strip() != "ready":
                raise Failed(f"no crowd came to {run.server.name}: {self.process.stderr.read().strip()}")
        except BaseException:
            self.process.kill()
            self._close()
            raise

    def end(self) -> dict:
        """Tells it to end; what became of its clients."""
        try:
            out, _ = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired as error:
            raise Failed("the crowd does not end") from error
        return json.loads(out.strip().splitlines()[-1])

    def _close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()


def _run(command: list, limit: float, cwd=None) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            cwd=cwd,
            preexec_fn=procs.prepare_child,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} did not end within {limit:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Failed(lines[-1] if lines else f"{command[0]} failed with status {done.returncode}")
    return done.stdout
