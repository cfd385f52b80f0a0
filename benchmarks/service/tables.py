"""The results of the service benchmark as tables, every figure beside its target: for screens and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.codec.report import columns
from benchmarks.service import echo, scaling, throughput


@dataclass(frozen=True)
class Table:
    """A heading, rows of cells of which the first names the columns, and lines below."""

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def table(part: dict[str, Any]) -> Table:
    """The table of one part's result."""
    return {"bytes": _bytes, "codec": _codec, "small": _codec, "scaling": _scaling}[part["part"]](part)


def as_text(t: Table) -> str:
    return "\n".join(["", t.title, columns(t.rows), *t.notes])


def as_markdown(results: dict[str, Any]) -> str:
    """All parts that are done, with command, date and machine above them."""
    m = results["machine"]
    chip = f"{m['gpu']}, " if "gpu" in m else ""
    lines = [
        f"`{results['command']}`, {results['date']}, dat-service {results['version']}: {chip}{m['cpu']}, "
        f"{m['cores']} cores, Python {m['python']}, torch {m['torch']}. Medians of the rounds, "
        "lowest to highest in brackets."
    ]
    for t in map(table, results["parts"]):
        heading, *rows = t.rows
        lines += ["", f"**{t.title}**", "", _row(heading), _row(["---"] + ["---:"] * (len(heading) - 1))]
        lines += [_row(row) for row in rows]
        lines += ["", *(f"- {note}" for note in t.notes)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times(times: dict[str, float] | None) -> str:
    return f"{times['median']:.2f} ({times['low']:.2f}–{times['high']:.2f})" if times else "–"


def verdict(value: float, bar: float, *, at_most: bool = False) -> str:
    """A figure's standing, in words."""
    met = value <= bar if at_most else value >= bar
    return f"{value:.3g}, bar {'at most' if at_most else 'at least'} {bar:g}: {'met' if met else 'MISSED'}"


def _bytes(part: dict[str, Any]) -> Table:
    rows = [["contestant", "MB/s", "median", "p99", f"{echo.SERVE} is times as fast"]]
    notes = []
    for r in part["results"]:
        if "error" in r:
            notes.append(f"{r['contestant']} failed: {r['error']}")
            continue
        p99 = f"{1000 * r['tail']['p99_s']:.1f} ms" if "tail" in r else "–"
        numbers = [f"{r['mb_per_s']:.0f}", f"{1000 * r['median_s']:.1f} ms", p99, _times(r.get("ours_times"))]
        rows.append([r["contestant"], *numbers])
        bar = echo.BARS.get(r["contestant"])
        if bar is not None:
            notes.append(f"times {r['contestant']}: {verdict(r['ours_times']['median'], bar)}")
        if r["contestant"] == echo.SERVE:
            tail = verdict(r["tail"]["p99_over_median"], echo.TAIL_BAR, at_most=True)
            notes.append(f"{echo.SERVE}, p99 over the median of {r['tail']['calls']} calls: {tail}")
    notes += [f"left out: {name} ({why})" for name, why in part["left_out"].items()]
    size = f"{part['images']} images of {part['side']} x {part['side']} uint8"
    return Table(f"bytes: {size}, {part['bytes'] / 1e6:.1f} MB each way", rows, notes)


def _codec(part: dict[str, Any]) -> Table:
    rows = [["contestant", "images/s", f"{throughput.SERVICE} is times as fast"]]
    notes = []
    rows.append([throughput.SERVICE, _rate(part["images_per_s"]), "–"])
    bar = throughput.BARS[part["part"]]
    for r in part["engines"]:
        name = f"{r['contestant']}, batches of {r['best_batch']}"
        rows.append([name, _rate(r["images_per_s"]), _times(r["ours_times"])])
        notes.append(f"times {r['contestant']}: {verdict(r['ours_times']['median'], bar)}")
    sizes = sorted(set(part["clients"]))
    each = f"batches of {', '.join(map(str, sizes))}"
    side = part["side"]
    return Table(
        f"{part['part']}: {part['codec']}, {side} x {side}, {len(part['clients'])} clients, {each}", rows, notes
    )


def _rate(speeds: Sequence[float]) -> str:
    return f"{statistics.median(speeds):.4g} ({min(speeds):.4g}–{max(speeds):.4g})"


def _scaling(part: dict[str, Any]) -> Table:
    rows = [["replicas", "sleep", "clients", "images/s", "of linear", "of no overhead", "requests/s", "cores full"]]
    for r in part["results"]:
        ideal = r["images_per_s"] / r["linear_images_per_s"]
        rows.append([
            str(r["replicas"]), f"{r['sleep_ms']:g} ms", str(r["clients"]), _rate(r["rounds"]),
            f"{r['of_linear']:.1%}", f"{ideal:.1%}", f"{r['requests_per_s']:.0f}", f"{r['cpu_share']:.0%}",
        ])  # fmt: skip
    before = [r["of_linear"] for r in part["results"] if not scaling.is_full(r)]
    notes = (
        [f"least share of linear before the cores are full: {verdict(min(before), scaling.BAR)}"] if before else []
    )
    full = part["full_at"]
    if full:
        where = f"{full['replicas']} replicas of {full['sleep_ms']:g} ms, {full['requests_per_s']:.0f} requests/s"
        notes.append(f"the cores, clients included, are full at {where} of {part['batch']} images")
    else:
        notes.append("the cores were never full")
    side = part["side"]
    return Table(
        f"scaling: a stand-in that only sleeps, {part['batch']} images of {side} x {side} a request", rows, notes
    )
