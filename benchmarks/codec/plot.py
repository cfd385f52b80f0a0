"""Draws the results with Pillow: a panel for each size and batch, a bar for each contestant."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, BAR, GAP = 1000, 300, 16, 6  # pixels; LEFT is the names' column
COLOURS = {"torch": "#1f6fb4", "taming": "#8a8a8a", "diffusers": "#d9822b"}
OTHER = "#3a923a"  # any other engine


def plot(results: dict[str, Any]) -> bytes:
    """Returns a PNG: the median images/s of Q, with a line from the slowest to the fastest round."""
    panels = []
    for cell in results["cells"]:
        ran = [r for r in cell["results"] if "images_per_s" in r.get("q", {})]
        panels.append((cell, sorted(ran, key=lambda r: -r["q"]["images_per_s"])))
    heights = [40 + len(ran) * (BAR + GAP) for _, ran in panels]
    image = Image.new("RGB", (WIDTH, 40 + sum(heights)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    codec, where = results["codec"], results["machine"]
    title = f"Q of {codec['name']} ({codec['weights']}), images/s, on {where.get('gpu', where['cpu'])}"
    draw.text((10, 12), title, "black", font)
    top = 40
    for (cell, ran), height in zip(panels, heights, strict=True):
        draw.text((10, top + 8), f"batch {cell['batch']}, {cell['size']} x {cell['size']}", "black", font)
        longest = max((r["q"]["high"] for r in ran), default=1.0)
        scale = (WIDTH - LEFT - 170) / longest
        for i, r in enumerate(ran):
            y, q = top + 30 + i * (BAR + GAP), r["q"]
            kind = r["contestant"].split()[0]
            draw.text((LEFT - 8, y + BAR / 2), r["contestant"], "black", font, anchor="rm")
            draw.rectangle((LEFT, y, LEFT + q["images_per_s"] * scale, y + BAR), COLOURS.get(kind, OTHER))
            draw.line((LEFT + q["low"] * scale, y + BAR / 2, LEFT + q["high"] * scale, y + BAR / 2), "black", 1)
            times = q.get("times_baseline", {}).get("median")
            label = f"{q['images_per_s']:.4g}" + (f"  ({times:.2f} x {cell['baseline']})" if times else "")
            draw.text((LEFT + q["high"] * scale + 6, y + BAR / 2), label, "black", font, anchor="lm")
        top += height
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
