"""The rows: what is measured, and what memdev must reach in it."""

import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import clients, host, procs
from .clients import Crowd, Held, Load
from .servers import EXPORT, MEMDEV, MEMDEV_ONE_WORKER, Failed, Server, Tools

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a row, as a ratio to another server's or (with against="") as it is."""

    metric: str
    sense: str
    """">=" or "<="."""
    bound: float
    against: str = "peer"
    """"peer": the best of them in this row; "ceiling"; "before": a figure of the same run."""

    @property
    def text(self) -> str:
        return f"{'≥' if self.sense == '>=' else '≤'} {self.bound:.3g}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sense == ">=" else value <= self.bound


@dataclass(frozen=True)
class Row:
    """One measurement that every server goes through in every round."""

    key: str
    title: str
    targets: tuple[Target, ...] = ()
    transport: str = "unix"
    metric: str = "iops"
    """The figure that is shown."""
    once: bool = False
    """Measured in the first round only: a count of bytes does not drift."""

    def applies(self, server: Server) -> bool:
        return not server.rows or self.key in server.rows

    def measure(self, server: Server, bench: "Bench") -> dict:
        raise NotImplementedError


@dataclass
class Bench:
    """What a measurement needs: programs, images, and how long it may take."""

    tools: Tools
    images: Path
    seconds: float
    _made: dict = field(default_factory=dict)

    def random_image(self, size: int) -> Path:
        return self._image(f"random-{size}", size, host.make_image)

    def sparse_image(self, size: int) -> Path:
        return self._image(f"sparse-{size}", size, host.make_sparse)

    def _image(self, name, size, make) -> Path:
        if name not in self._made:
            path = self.images / name
            make(path, size)
            self._made[name] = path
        return self._made[name]

    def prepare(self, image: Path, memory: str) -> None:
        """Brings machine and image into the state that every measurement starts from."""
        host.warm(image)
        # Last, as a virtual machine's host takes memory back that was free for a few seconds.
        host.touch(self.tools.load, memory)


    def chill(self, image: Path) -> None:
        """The same for an image that is to be cold: what the page cache takes for it is touched before."""
        host.chill(image)
        host.touch(self.tools.load, "6G")


@dataclass(frozen=True)
class LoadRow(Row):
    """A load on the warm image of 1 GiB."""

    load: Load = Load("randread")
    client: str = "lean"

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        # Reads allocate next to nothing.
        bench.prepare(image, "4G" if self.load.writes else "256M")
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            return clients.measured(run, self.client, self.load, bench.seconds)


@dataclass(frozen=True)
class TlsRow(LoadRow):
    """The same, encrypted, by memdev-load's own TLS at the other end."""

    def applies(self, server):
        # One knows nothing of TLS, the other demands a certificate of its clients.
        return server.name not in ("ceiling", "nbd-server")


@dataclass(frozen=True)
class IdleRow(Row):
    """Memory of sessions that were opened and read one block each."""

    metric: str = "bytes_per_session"
    once: bool = True
    size: int = 10 * GIB

    def applies(self, server):
        return server.name != "ceiling" and super().applies(server)

    def measure(self, server, bench):
        # The others cannot hold as many: a process, a thread or a limit is in their way.
        count = 10_000 if server is MEMDEV else 100
        if server.name == "nbd-server" and self.size > 100 * GIB:
            count = 2  # 1 MiB a GiB of image, each
        image = bench.sparse_image(self.size)
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            before = run.memory()
            with Held(run, count, str(self.size)):
                time.sleep(1)
                after = run.memory()
        return {
            "sessions": count,
            "bytes_per_session": (after.anonymous - before.anonymous) / count,
            "threads_per_session": (after.threads - before.threads) / count,
        }


@dataclass(frozen=True)
class MemoryRow(Row):
    """What a written session costs."""

    once: bool = True
    size: int = GIB
    step: str = ""
    written: int = 0
    """Bytes of data that the step leaves behind."""

    def applies(self, server):
        return server.name != "ceiling" and super().applies(server)

    def measure(self, server, bench):
        image = bench.sparse_image(self.size)
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            with Held(run, 1, str(self.size)) as held:
                before = run.memory().total
                outcome = held.work(self.step)
                if outcome["errors"]:
                    raise Failed(f"{server.name}: {outcome['errors']} writes failed")
                time.sleep(0.5)
                grown = run.memory().total - before
        return {"before": before, "grown": grown, "beyond": (grown - self.written) / self.written}


@dataclass(frozen=True)
class TrimRow(Row):
    """Whether a trim gives memory back, and how soon."""

    metric: str = "left"
    once: bool = True

    def applies(self, server):
        return server.name != "ceiling" and super().applies(server)

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            with Held(run, 1, "1G") as held:
                before = run.memory().total
                held.work("write 128K 1G")
                written = run.memory().total
                refused = held.work("trim 32M 1G")["errors"]
                start, after, took = time.monotonic(), written, None
                while took is None and time.monotonic() - start < 1:
                    after = run.memory().total
                    if after - before <= 0.02 * GIB:
                        took = time.monotonic() - start
                    time.sleep(0.01)
        return {
            "before": before,
            "written": written,
            "after": after,
            "refused": refused,
            "left": (after - before) / GIB,
            "seconds": took,
        }


@dataclass(frozen=True)
class EndRow(Row):
    """The end of a session that has written much: how soon its memory is back, and what others notice."""

    metric: str = "gone_seconds"
    once: bool = True
    gib: int = 8

    def applies(self, server):
        return server.name in ("memdev", "memdev-sealed")

    def measure(self, server, bench):
        image = bench.sparse_image(16 * GIB)
        written = self.gib * GIB
        bench.prepare(image, f"{self.gib + 1}G")
        load = Load("mixed:2:1")
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            before = run.memory().total
            held = Held(run, 1, "16G")
            try:
                outcome = held.work(f"write 128K {self.gib}G")
                if outcome["errors"]:
                    raise Failed(f"{server.name}: {outcome['errors']} writes failed")
                grown = run.memory().total - before
                if grown < 0.9 * written:
                    raise Failed(f"{server.name}: {grown} bytes for {written} that were written")
                alone = clients.lean(run, load, bench.seconds)
                with clients.Beside(run, load, bench.seconds + 2) as other:
                    time.sleep(0.5)
                    start, gone = time.monotonic(), None
                    held.close()
                    while gone is None and time.monotonic() - start < 60:
                        # What the other has written is at most its span.
                        if run.memory().total - before <= GIB + 0.02 * written:
                            gone = time.monotonic() - start
                        time.sleep(0.01)
                    beside = other.result()
            finally:
                held.close()
        if gone is None:
            raise Failed(f"{server.name}: the memory of a session is not back after a minute")
        return {
            "written": written,
            "gone_seconds": gone,
            **{f"{name}_alone": alone[name] for name in ("iops", "p50", "p99", "max")},
            **{f"{name}_beside": beside[name] for name in ("iops", "p50", "p99", "max")},
            "p99_rise": beside["p99"] / alone["p99"],
        }


@dataclass(frozen=True)
class WrittenRow(Row):
    """Reads of what the session itself has written."""

    def applies(self, server):
        return server.name in ("memdev", "memdev-sealed")

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        bench.prepare(image, "2G")
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            # Entered by name, so that it is there when others read.
            with Held(run, 1, "1G", f"{EXPORT}@written") as held:
                if held.work("write 128K 1G")["errors"]:
                    raise Failed(f"{server.name}: writes failed")
                return clients.lean(run, Load("randread", depth=32), bench.seconds, f"{EXPORT}@written")


@dataclass(frozen=True)
class ColdRow(Row):
    """Reads of an image that is not in the page cache."""

    def applies(self, server):
        # It waits for the disk, page by page: what it reaches there is no bound for anybody.
        return server.name != "ceiling" and super().applies(server)

    def measure(self, server, bench):
        image = bench.random_image(8 * GIB)
        bench.chill(image)
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            return clients.measured(run, "lean", Load("randread", depth=32, span="8G"), bench.seconds)


@dataclass(frozen=True)
class NeighbourRow(Row):
    """A session on a warm image while another one reads a cold image on the same server."""

    metric: str = "p99_rise"

    def applies(self, server):
        return server is MEMDEV

    def measure(self, server, bench):
        cold, warm = bench.random_image(8 * GIB), bench.random_image(GIB)
        bench.chill(cold)
        host.warm(warm)
        load = Load("randread")
        with server.start(bench.tools, [(EXPORT, warm), ("cold", cold)], self.transport) as run:
            # All of the warm image through the server once, so that it knows what it has in memory.
            clients.lean(run, Load("read", "128K", 8, once=True), bench.seconds)
            alone = clients.lean(run, load, bench.seconds)
            command = [bench.tools.load, "run", *run.place(), "--export", "cold", "--span", "8G", "--depth", "32"]
            command += ["--seconds", str(bench.seconds + 1), "--json"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=procs.prepare_child) as other:
                try:
                    time.sleep(0.5)
                    beside = clients.lean(run, load, bench.seconds)
                finally:
                    other.terminate()
        return {
            "p99_alone": alone["p99"],
            "p99_beside": beside["p99"],
            "p99_rise": beside["p99"] / alone["p99"],
            "iops_alone": alone["iops"],
            "iops_beside": beside["iops"],
        }


@dataclass(frozen=True)
class HogRow(Row):
    """Twenty clients that wait for each reply, alone and beside one with 256 requests in flight, all on one worker."""

    metric: str = "p99_rise"
    hog: Load = Load("randread", depth=256)

    def applies(self, server):
        return server is MEMDEV_ONE_WORKER

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        bench.prepare(image, "2G")
        load = Load("randread", connections=20)
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            # All of the image through the server once, so that it knows what it has in memory.
            clients.lean(run, Load("read", "128K", 8, once=True), bench.seconds)
            hog_alone = clients.lean(run, self.hog, bench.seconds)
            alone = clients.lean(run, load, bench.seconds)
            with clients.Beside(run, self.hog, bench.seconds + 2) as hog:
                time.sleep(0.5)
                beside = clients.lean(run, load, bench.seconds)
                hog_beside = hog.result()
        return {
            **{f"{name}_alone": alone[name] for name in ("iops", "p50", "p99", "max")},
            **{f"{name}_beside": beside[name] for name in ("iops", "p50", "p99", "max")},
            "p99_rise": beside["p99"] / alone["p99"],
            "hog_iops_alone": hog_alone["iops"],
            "hog_iops_beside": hog_beside["iops"],
        }


@dataclass(frozen=True)
class HostileRow(Row):
    """A client that streams, alone and beside ten thousand that misbehave."""

    metric: str = "kept"
    kinds: str = ""
    at_once: int = 10_000
    settled: bool = False
    """Measured once the crowd has come to where it does nothing more, and long enough for all who are hung up on in their
    handshake to have come again; else while it comes and goes."""

    def applies(self, server):
        return server is MEMDEV

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        load = Load("read", "128K", 8)
        seconds = max(bench.seconds, 12) if self.settled else bench.seconds
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            def stream():
                # A virtual machine's host takes back memory that is not used for seconds, the image's pages too, and who
                # touches it next waits for that.
                bench.prepare(image, "4G")
                return clients.lean(run, load, seconds)

            # A stream and a crowd, so that the server has what it keeps for later.
            stream()
            with Crowd(run, self.kinds, 100, 100) as crowd:
                crowd.end()
            run.comes_to_rest(None)
            before = run.holds()
            found = {"alone": [], "beside": []}
            found["alone"].append(stream())
            with Crowd(run, self.kinds, 10_000, self.at_once) as crowd:
                if self.settled:
                    run.goes_quiet()
                found["beside"].append(stream())
                came = crowd.end()
            after = run.comes_to_rest(before)
            found["alone"].append(stream())
        failed = sum(part["errors"] for parts in found.values() for part in parts)
        if failed:
            raise Failed(f"{server.name}: {failed} requests of the client that behaves failed")
        mean = lambda which, what: sum(part[what] for part in found[which]) / len(found[which])
        return {
            **{f"{name}_{which}": mean(which, name) for which in found for name in ("iops", "p50", "p99", "max")},
            "kept": mean("beside", "iops") / mean("alone", "iops"),
            "p99_rise": mean("beside", "p99") / mean("alone", "p99"),
            "crowd": came["clients"],
            "crowd_hung_up": came["hung_up"],
            "crowd_at_once": came["most_at_once"],
            **{f"{name}_left": after[name] - before[name] for name in before},
        }


@dataclass(frozen=True)
class SweepRow(Row):
    """One line of the plot: throughput over depth or over connections, on one server start."""

    over: str = "depth"
    points: tuple[int, ...] = ()

    def measure(self, server, bench):
        image = bench.random_image(GIB)
        bench.prepare(image, "2G")
        found = {}
        with server.start(bench.tools, [(EXPORT, image)], self.transport) as run:
            for point in self.points:
                if self.over == "depth":
                    load = Load("randread", depth=point)
                else:
                    load = Load("mixed:2:1", depth=4, connections=point)
                found[str(point)] = clients.lean(run, load, min(bench.seconds, 1))["iops"]
                if not run.alive():
                    raise Failed(f"{server.name} died: {run.log()}")
        return {"points": found}


def peers(factor: float, metric: str = "iops", sense: str = ">=") -> Target:
    return Target(metric, sense, factor)


CPU = peers(1 / 3, "cpu_per_million", "<=")

_LOADS = [
    LoadRow(
        "randread-32", "4 KiB random read, depth 32", load=Load("randread", depth=32),
        targets=(peers(4), Target("iops", ">=", 0.9, "ceiling"), CPU),
    ),
    LoadRow(
        "randwrite-32", "4 KiB random first write, depth 32", load=Load("randwrite", depth=32, once=True),
        targets=(peers(4), CPU),
    ),
    LoadRow(
        "randread-1", "4 KiB random read, depth 1", load=Load("randread"),
        targets=(peers(1.5), Target("p50", "<=", 1.15, "ceiling")),
    ),
    LoadRow(
        "randwrite-1", "4 KiB random write, depth 1", load=Load("randwrite"),
        targets=(peers(1.5), Target("p50", "<=", 1.15, "ceiling")),
    ),
    LoadRow(
        "read-128k", "128 KiB sequential read, depth 8", load=Load("read", "128K", 8),
        targets=(peers(1.2), Target("iops", ">=", 0.9, "ceiling")),
    ),
    LoadRow(
        "write-128k", "128 KiB sequential write, depth 8", load=Load("write", "128K", 8),
        targets=(peers(1.5),),
    ),
    LoadRow(
        "write-128k-first", "128 KiB sequential first write, depth 8", load=Load("write", "128K", 8, once=True),
        targets=(peers(1.5),),
    ),
    LoadRow(
        "mixed-64", "4 KiB 2:1 read/write, 64 connections, depth 4",
        load=Load("mixed:2:1", depth=4, connections=64), targets=(peers(4),),
    ),
    LoadRow(
        "fio-randread", "fio: 4 KiB random read, depth 32", client="fio", load=Load("randread", depth=32),
        targets=(peers(1.8),),
    ),
    LoadRow(
        "fio-randwrite", "fio: 4 KiB random first write, depth 32", client="fio",
        load=Load("randwrite", depth=32, once=True), targets=(peers(2.5),),
    ),
]  # fmt: skip

ROWS: list[Row] = [
    *_LOADS,
    LoadRow(
        "open", "connect, handshake, first read, disconnect", metric="p50", load=Load("open"),
        targets=(peers(1, "p50", "<="), Target("p50", "<=", 150, "")),
    ),
    *(
        replace(row, key=f"tcp-{row.key}", title=f"TCP: {row.title}", transport="tcp", targets=(peers(1),))
        for row in _LOADS
    ),
    *(
        TlsRow(
            f"tls-{row.key}", f"TLS over TCP: {row.title}", load=row.load, transport="tls",
            targets=(peers(1), peers(1, "cpu_per_million", "<=")),
        )
        for row in _LOADS
        if row.key in ("randread-32", "read-128k", "write-128k")
    ),
    ColdRow("cold", "cold 8 GiB image, 4 KiB random read, depth 32", targets=(peers(1),)),
    NeighbourRow("cold-neighbour", "a warm session's p99 beside it", targets=(Target("p99_rise", "<=", 1.25, ""),)),
    IdleRow(
        "idle-10g", "memory of an idle session, 10 GiB image",
        targets=(Target("bytes_per_session", "<=", 8192, ""), Target("threads_per_session", "<=", 0, "")),
    ),
    IdleRow(
        "idle-1t", "memory of an idle session, 1 TiB image", size=1 << 40,
        targets=(Target("bytes_per_session", "<=", 8192, ""), Target("threads_per_session", "<=", 0, "")),
    ),
    MemoryRow(
        "beyond-1g", "memory beyond 1 GiB of random 4 KiB writes, 1 GiB image", metric="beyond",
        step="randwrite 4K 1G", written=GIB, targets=(Target("beyond", "<=", 0.02, ""),),
    ),
    MemoryRow(
        "beyond-10g", "memory beyond 1 GiB of random 4 KiB writes, 10 GiB image", metric="beyond", size=10 * GIB,
        step="randwrite 4K 10G 262144", written=GIB, targets=(Target("beyond", "<=", 0.02, ""),),
    ),
    MemoryRow(
        "scattered-1g", "one byte into each of 1,000 blocks, 1 GiB image", metric="grown",
        step="randwrite 1 1G 1000 4K", written=1000, targets=(Target("grown", "<=", 4.2 * MIB, ""),),
    ),
    MemoryRow(
        "scattered-10g", "one byte into each of 1,000 blocks, 10 GiB image", metric="grown", size=10 * GIB,
        step="randwrite 1 10G 1000 4K", written=1000, targets=(Target("grown", "<=", 4.2 * MIB, ""),),
    ),
    TrimRow(
        "trim-back", "memory left a second after 1 GiB was written and trimmed",
        targets=(Target("left", "<=", 0.02, ""),),
    ),
    EndRow("end-8g", "time until the memory of a session that wrote 8 GiB is back, when it has ended"),
    WrittenRow("written-read-32", "4 KiB random read of what was written, depth 32"),
    HogRow("hog", "the p99 of 20 clients at depth 1 beside one at depth 256, one worker"),
    HogRow(
        "hog-128k", "the same beside one that reads 128 KiB at depth 256", hog=Load("randread", "128K", depth=256),
    ),
    HostileRow(
        "hostile-stall", "a 128 KiB stream beside 10,000 clients that stall", kinds="stall,never-read",
        settled=True, targets=(Target("kept", ">=", 0.9, ""), Target("p99_rise", "<=", 1.1, "")),
    ),
    HostileRow(
        "hostile-slow", "the same beside 10,000 that send or read a byte a second",
        kinds="slow-handshake,slow-payload,slow-reading",
    ),
    HostileRow(
        "hostile-cut", "the same beside 200 at a time that cut, reset, lie and send garbage",
        kinds="cut,reset,half-close,garbage,lie", at_once=200,
    ),
    HostileRow("hostile-flood", "the same beside 16 at a time that flood", kinds="flood", at_once=16),
    SweepRow("sweep-depth", "4 KiB random read over depth", points=(1, 2, 4, 8, 16, 32, 64, 128)),
    SweepRow(
        "sweep-connections", "4 KiB 2:1 read/write over connections", over="connections",
        points=(1, 2, 4, 8, 16, 32, 64),
    ),
]  # fmt: skip
