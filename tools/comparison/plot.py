"""The plot: throughput over depth and over connections, as an SVG drawn by hand."""

from collections import defaultdict
from html import escape
from math import log2
from statistics import median

from .rows import ROWS, SweepRow

WIDTH, HEIGHT = 1120, 520
TOP, BOTTOM, LEFT, PANEL, GAP = 96, 440, 84, 430, 100
# Distinct for the colour-blind too (Okabe and Ito), and each with a mark of its own.
STYLES = {
    "memdev": ("#D55E00", "circle", 3),
    "ceiling": ("#555555", "dash", 2),
    "nbd-server": ("#0072B2", "square", 2),
    "nbdkit": ("#009E73", "diamond", 2),
    "nbdkit-4k": ("#56B4E9", "diamond", 1.5),
    "qemu-nbd": ("#CC79A7", "triangle", 2),
}


def draw(results: dict) -> str | None:
    """The SVG of all sweeps of a run; None if there was none."""
    sweeps = [(row, lines_of(results["runs"], row.key)) for row in ROWS if isinstance(row, SweepRow)]
    sweeps = [(row, lines) for row, lines in sweeps if lines]
    if not sweeps:
        return None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for index, (row, lines) in enumerate(sweeps):
        parts += panel(row, lines, LEFT + index * (PANEL + GAP))
    names = [name for name in STYLES if any(name in lines for _, lines in sweeps)]
    parts += legend(names)
    host = results["host"]
    note = f"{results['date'][:10]}, {host['cpu']}, {host['cores']} cores, Linux {host['kernel']}; unix socket, medians"
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 14}" font-size="12" fill="#555">{escape(note)}</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)


def lines_of(runs: list[dict], key: str) -> dict[str, list[tuple[int, float]]]:
    """Each server's points, as medians over the rounds."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["row"] == key and "result" in run:
            for point, value in run["result"]["points"].items():
                found[run["server"]][int(point)].append(value)
    return {
        server: sorted((point, median(values)) for point, values in points.items()) for server, points in found.items()
    }


def panel(row: SweepRow, lines: dict, left: int) -> list[str]:
    """Axes and lines of one sweep."""
    points = sorted({point for line in lines.values() for point, _ in line})
    top_value = nice(max(value for line in lines.values() for _, value in line))
    span = max(1, log2(points[-1]) - log2(points[0]))

    def x(point: int) -> float:
        return left + PANEL * (log2(point) - log2(points[0])) / span

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / top_value

    out = [f'<text x="{left + PANEL / 2}" y="{TOP - 14}" text-anchor="middle" font-weight="bold">{escape(row.title)}</text>']
    for tick in range(6):
        value = top_value * tick / 5
        out.append(
            f'<line x1="{left}" y1="{y(value):.1f}" x2="{left + PANEL}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y(value) + 5:.1f}" text-anchor="end">{value / 1000:g}</text>'
        )
    for point in points:
        out.append(
            f'<line x1="{x(point):.1f}" y1="{BOTTOM}" x2="{x(point):.1f}" y2="{BOTTOM + 5}" stroke="#333"/>'
            f'<text x="{x(point):.1f}" y="{BOTTOM + 21}" text-anchor="middle">{point}</text>'
        )
    out.append(f'<line x1="{left}" y1="{BOTTOM}" x2="{left + PANEL}" y2="{BOTTOM}" stroke="#333"/>')
    label = "requests in flight (one connection)" if row.over == "depth" else "connections (4 requests in flight on each)"
    out.append(f'<text x="{left + PANEL / 2}" y="{BOTTOM + 44}" text-anchor="middle">{label}</text>')
    middle = (TOP + BOTTOM) / 2
    out.append(
        f'<text transform="translate({left - 58} {middle}) rotate(-90)" text-anchor="middle">thousand requests / s</text>'
    )
    for name, (colour, shape, width) in STYLES.items():
        if name not in lines:
            continue
        path = " ".join(f"{x(point):.1f},{y(value):.1f}" for point, value in lines[name])
        dashes = ' stroke-dasharray="7 4"' if shape == "dash" else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>')
        out += [mark(x(point), y(value), shape, colour) for point, value in lines[name]]
    return out


def legend(names: list[str]) -> list[str]:
    out, left = [], LEFT
    for name in names:
        colour, shape, width = STYLES[name]
        dashes = ' stroke-dasharray="7 4"' if shape == "dash" else ""
        out.append(f'<line x1="{left}" y1="34" x2="{left + 36}" y2="34" stroke="{colour}" stroke-width="{width}"{dashes}/>')
        out.append(mark(left + 18, 34, shape, colour))
        out.append(f'<text x="{left + 44}" y="39">{escape(name)}</text>')
        left += 44 + 9 * len(name) + 34
    return out


def mark(x: float, y: float, shape: str, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        "triangle": [(0, -5.5), (5, 4), (-5, 4)],
    }.get(shape, [])
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" fill="{colour}"/>' if corners else ""


def nice(value: float) -> float:
    """The next round number that five steps divide well."""
    size = 1.0
    while size * 10 < value:
        size *= 10
    return next(size * factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7.5, 10) if size * factor >= value)
