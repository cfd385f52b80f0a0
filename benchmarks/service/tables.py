"""The results of the service benchmark as tables, every figure beside its target: for screens and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.service import echo, scaling, throughput
from benchmarks.tables import aligned, machine_line, markdown, rate, times


@dataclass(frozen=True)
class Table:
    """A heading, rows of cells of which the first names the columns, and lines below."""

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def table(part: dict[str, Any]) -> Table:
    """Returns the table of one part's result."""
    makers = {"bytes": _bytes, "codec": _codec, "small": _codec, "scaling": _scaling}
    return makers[part["part"]](part)


def as_text(t: Table) -> str:
    """Returns the table for a screen."""
    return "\n".join(["", t.title, aligned(t.rows), *t.notes])


def as_markdown(results: dict[str, Any]) -> str:
    """Returns all parts that are done, with command, date and machine above them."""
    lines = [
        f"`{results['command']}`, {results['date']}, dat-service {results['version']}: "
        f"{machine_line(results['machine'])}. Medians of the rounds, lowest to highest in brackets."
    ]
    for t in map(table, results["parts"]):
        lines += ["", f"**{t.title}**", "", markdown(t.rows), "", *(f"- {note}" for note in t.notes)]
    return "\n".join(lines) + "\n"


def verdict(value: float, target: float, *, at_most: bool = False) -> str:
    """Returns a figure, its target, and whether it is met."""
    met = value <= target if at_most else value >= target
    return f"{value:.3g}, target at {'most' if at_most else 'least'} {target:g}: {'met' if met else 'MISSED'}"


def _bytes(part: dict[str, Any]) -> Table:
    rows = [["contestant", "MB/s", "median", "p99", f"{echo.SERVE} is times as fast"]]
    notes = []
    for r in part["results"]:
        if "error" in r:
            notes.append(f"{r['contestant']} failed: {r['error']}")
            continue
        p99 = f"{1000 * r['tail']['p99_s']:.1f} ms" if "tail" in r else "–"
        numbers = [f"{r['mb_per_s']:.0f}", f"{1000 * r['median_s']:.1f} ms", p99, times(r.get("ours_times"))]
        rows.append([r["contestant"], *numbers])
        target = echo.TARGETS.get(r["contestant"])
        if target is not None:
            notes.append(f"times {r['contestant']}: {verdict(r['ours_times']['median'], target)}")
        if r["contestant"] == echo.SERVE:
            tail = verdict(r["tail"]["p99_over_median"], echo.TAIL_TARGET, at_most=True)
            notes.append(f"{echo.SERVE}, p99 over the median of {r['tail']['calls']} calls: {tail}")
    notes += [f"left out: {name} ({reason})" for name, reason in part["left_out"].items()]
    size = f"{part['images']} images of {part['side']} x {part['side']} uint8"
    return Table(f"bytes: {size}, {part['bytes'] / 1e6:.1f} MB each way", rows, notes)


def _codec(part: dict[str, Any]) -> Table:
    rows = [["contestant", "images/s", f"{throughput.SERVICE} is times as fast"]]
    notes = []
    rows.append([throughput.SERVICE, rate(part["images_per_s"]), "–"])
    target = throughput.TARGETS[part["part"]]
    for r in part["engines"]:
        name = f"{r['contestant']}, batches of {r['best_batch']}"
        rows.append([name, rate(r["images_per_s"]), times(r["ours_times"])])
        notes.append(f"times {r['contestant']}: {verdict(r['ours_times']['median'], target)}")
    batches = f"batches of {', '.join(map(str, sorted(set(part['clients']))))}"
    side, clients = part["side"], len(part["clients"])
    return Table(f"{part['part']}: {part['codec']}, {side} x {side}, {clients} clients, {batches}", rows, notes)


def _scaling(part: dict[str, Any]) -> Table:
    rows = [["replicas", "sleep", "clients", "images/s", "of linear", "of no overhead", "requests/s", "cores full"]]
    for r in part["results"]:
        ideal = r["images_per_s"] / r["linear_images_per_s"]
        rows.append([
            str(r["replicas"]), f"{r['sleep_ms']:g} ms", str(r["clients"]), rate(r["rounds"]),
            f"{r['of_linear']:.1%}", f"{ideal:.1%}", f"{r['requests_per_s']:.0f}", f"{r['cpu_share']:.0%}",
        ])  # fmt: skip
    before_full = [r["of_linear"] for r in part["results"] if not scaling.is_full(r)]
    notes = []
    if before_full:
        notes.append(
            f"least share of linear before the cores are full: {verdict(min(before_full), scaling.TARGET)}"
        )
    full = part["full_at"]
    if full:
        load = f"{full['replicas']} replicas of {full['sleep_ms']:g} ms, {full['requests_per_s']:.0f} requests/s"
        notes.append(f"the cores, clients included, are full at {load} of {part['batch']} images")
    else:
        notes.append("the cores were never full")
    side, batch = part["side"], part["batch"]
    return Table(f"scaling: a stand-in that only sleeps, {batch} images of {side} x {side} a request", rows, notes)
