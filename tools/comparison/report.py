"""From raw runs to medians, ratios and tables."""

from collections import defaultdict
from statistics import median

from .rows import GIB, MIB, ROWS, Row, SweepRow, Target
from .servers import ALL

PEERS = [server.name for server in ALL if server.peer]
LOWER_IS_BETTER = {"p50", "cpu_per_million", "cpu_per_gib", "bytes_per_session"}


def medians(runs: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Row, server and figure to the median over the rounds; a figure that a round could not give is left out."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        for name, value in run.get("result", {}).items():
            if isinstance(value, (int, float)):
                found[run["row"]][run["server"]][name].append(value)
    return {
        row: {server: {name: median(values) for name, values in figures.items()} for server, figures in servers.items()}
        for row, servers in found.items()
    }


def best_peer(figures: dict, metric: str) -> tuple[str, float] | None:
    """The best of the peers in one row."""
    values = [(name, figures[name][metric]) for name in PEERS if figures.get(name, {}).get(metric) is not None]
    pick = min if metric in LOWER_IS_BETTER else max
    return pick(values, key=lambda pair: pair[1]) if values else None


def verdict(target: Target, figures: dict) -> tuple[float, bool] | None:
    """What memdev reached of a target: the value or ratio that the bound is on, and whether it holds."""
    mine = figures.get("memdev", {}).get(target.metric)
    other = None
    if target.against == "peer" and (peer := best_peer(figures, target.metric)):
        other = peer[1]
    elif target.against == "ceiling":
        other = figures.get("ceiling", {}).get(target.metric)
    elif target.against == "":
        other = 1
    if mine is None or not other:
        return None
    return mine / other, target.met(mine / other)


def show(value: float | None, metric: str) -> str:
    """A figure with its unit."""
    if value is None:
        return "-"
    if metric == "iops":
        return f"{value / 1000:.1f} k/s"
    if metric in ("p50", "p99", "mean"):
        return f"{value:.1f} µs"
    if metric == "gone_seconds":
        return f"{value:.2f} s"
    if metric in ("beyond", "left", "kept"):
        return f"{value * 100:.2f} %"
    if metric in ("bytes_per_session", "grown"):
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
            if abs(value) >= size:
                return f"{value / size:.2f} {unit}"
        return f"{value:.0f} B"
    return f"{value:.3g}"


def shown(result: dict, metric: str) -> str:
    """What a measurement has to say for itself while the next ones run."""
    if "points" in result:
        return " ".join(f"{point}:{value / 1000:.0f}" for point, value in result["points"].items()) + " k/s"
    return show(result.get(metric), metric)


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns: for the terminal and for the documentation."""
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def row(cells: list[str]) -> str:
        first, *rest = (cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    return "\n".join([row(head), rule, *map(row, lines)])


def rows_of(found: dict) -> list[Row]:
    return [row for row in ROWS if row.key in found and not isinstance(row, SweepRow)]


def ratios(found: dict) -> str:
    """memdev against its targets, one line each."""
    lines = []
    for row in rows_of(found):
        figures = found[row.key]
        for target in row.targets:
            if target.metric == "cpu_per_million":
                continue
            reached = verdict(target, figures)
            if target.against == "peer":
                peer = best_peer(figures, target.metric)
                other = f"{peer[0]} {show(peer[1], target.metric)}" if peer else "-"
            elif target.against == "ceiling":
                other = f"ceiling {show(figures.get('ceiling', {}).get(target.metric), target.metric)}"
            else:
                other = ""
            ratio = "-" if reached is None else f"{reached[0]:.2f}" if target.against else ""
            bound = target.text if target.against else f"{target.sense.replace('>=', '≥').replace('<=', '≤')} {show(target.bound, target.metric)}"
            lines.append([
                row.title,
                "p50" if target.metric == "p50" else "",
                show(figures.get("memdev", {}).get(target.metric), target.metric),
                other,
                ratio,
                bound,
                "" if reached is None else "met" if reached[1] else "MISSED",
            ])
    return table(["row", "", "memdev", "against", "ratio", "target", ""], lines)


def figures(found: dict, servers: list[str]) -> str:
    """Every server's figure in every row."""
    lines = []
    for row in rows_of(found):
        cells = [show(found[row.key].get(name, {}).get(row.metric), row.metric) for name in servers]
        lines.append([row.title, *cells])
    return table(["median", *servers], lines)


def cpu(found: dict, servers: list[str]) -> str:
    """Server CPU seconds per million requests (small ones) and per GiB (large ones)."""
    lines = []
    for row in rows_of(found):
        large = "128k" in row.key
        metric = "cpu_per_gib" if large else "cpu_per_million"
        figures = found[row.key]
        if not any(metric in values for values in figures.values()):
            continue
        mine, peer = figures.get("memdev", {}).get(metric), best_peer(figures, metric)
        ratio = mine / peer[1] if mine is not None and peer and peer[1] else None
        target = next((target for target in row.targets if target.metric == metric), None)
        note = "" if ratio is None or target is None else "met" if target.met(ratio) else "MISSED"
        lines.append([
            row.title,
            "GiB" if large else "million",
            *(show(figures.get(name, {}).get(metric), "seconds") for name in servers),
            "-" if ratio is None else f"{ratio:.2f}",
            target.text if target else "",
            note,
        ])
    return table(["server CPU seconds", "per", *servers, "memdev / best peer", "target", ""], lines)


def failures(runs: list[dict]) -> str:
    """What could not be measured, and why."""
    seen: dict[tuple, list[int]] = defaultdict(list)
    for run in runs:
        if "failed" in run:
            seen[run["row"], run["server"], run["failed"]].append(run["round"])
    return "\n".join(
        f"{row}, {server}, round {', '.join(map(str, rounds))}: {why}" for (row, server, why), rounds in seen.items()
    )


def render(results: dict) -> str:
    """All tables of a run."""
    found = medians(results["runs"])
    servers = [name for name in results["versions"] if any(name in row for row in found.values())]
    parts = [figures(found, servers), cpu(found, servers)]
    if "memdev" in servers:
        parts.insert(0, ratios(found))
    if failed := failures(results["runs"]):
        parts.append("Not measured:\n" + failed)
    return "\n\n".join(part for part in parts if part) + "\n"
