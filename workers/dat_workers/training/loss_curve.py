"""Draws the loss terms of a training run as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 30, 50  # margins in pixels; the legend stands in the right one
MAX_POINTS = 400  # of a line; a longer one is drawn from the means of as many parts
COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728")

Point = tuple[float, float]  # step, value


def loss_curve(lines: Mapping[str, Sequence[Point]], steps: int) -> str:
    """Returns an SVG of the named lines over the steps 0 to `steps`; the scale of the values is logarithmic.

    A value that is not positive has no place on this scale and is not drawn: a term is 0 as long as it is not used.
    """
    drawn = {name: _thinned([p for p in points if p[1] > 0]) for name, points in lines.items()}
    values = [value for points in drawn.values() for _, value in points if math.isfinite(value)]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(steps, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        "<title>Loss terms of the training</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for quarter in range(5):
        step = steps * quarter // 4
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{x(steps / 2):.1f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    for i, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        last = f"{lines[name][-1][1]:.4g}" if points else "not used yet"
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 14 + 20 * i}" fill="{colour}">{name} {last}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Returns the points, or the means of MAX_POINTS parts of them if there are more."""
    if len(points) <= MAX_POINTS:
        return list(points)
    bounds = [len(points) * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    parts = [points[start:end] for start, end in pairwise(bounds)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
