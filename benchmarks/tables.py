"""Tables of results, as aligned text and as Markdown, and the way figures are written in them.

Plain text only: benchmarks/codec must run where rich is not installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as columns, the first aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as a Markdown table, of which the first row is the heading."""
    heading, *body = rows
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rate(values: Sequence[float]) -> str:
    """Returns the median, and the lowest and highest in brackets."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def times(ratio: dict[str, float] | None) -> str:
    """Returns how many times as fast, from the `median`, `low` and `high` of the rounds."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "–"


def machine_line(machine: dict[str, Any]) -> str:
    """Returns one line about the machine that `benchmarks.machine.describe` describes."""
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return f"{gpu}{machine['cores']} cores {machine['cpu']}, Python {machine['python']}, torch {machine['torch']}"
