"""Draws the demo's picture: the effects of the codec and of an attack on photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pictures = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.integer]

TILE = 140  # side of a tile in pixels: 5 x 5 of them for each token of a picture of 224²
HEAD, GAP = 18, 4


@dataclass(frozen=True)
class Rows:
    """The data of N rows: pictures uint8 [N,3,H,W], tokens [N,h,w], and δ float [N,3,H,W] for pictures in 0..1."""

    x: Pictures
    q: Pictures
    indices: Indices
    adversarial: Pictures
    delta: npt.NDArray[np.float32]
    adversarial_indices: Indices


def draw(rows: Rows, path: Path) -> None:
    """Writes a PNG with x, Q(x), their difference, the tokens, δ, Q(x + δ) and the tokens that δ changed."""
    changed = rows.indices != rows.adversarial_indices
    amplification = round(0.5 / float(np.quantile(np.abs(rows.delta), 0.995)))
    titles = (
        "x",
        "Q(x)",
        "|x - Q(x)| x 4",
        f"tokens, {changed.shape[1]} x {changed.shape[2]}",
        f"delta x {amplification}",
        "Q(x + delta)",
        f"tokens changed: {changed.mean():.1%}",
    )
    difference = np.abs(rows.x.astype(int) - rows.q) * 4
    delta = 127.5 + 255 * amplification * rows.delta
    columns = (
        rows.x,
        rows.q,
        difference.clip(0, 255).astype(np.uint8),
        colours(rows.indices),
        delta.clip(0, 255).astype(np.uint8),
        rows.adversarial,
        np.repeat(changed[:, None], 3, axis=1).astype(np.uint8) * 255,
    )
    sheet = Image.new("RGB", (len(columns) * (TILE + GAP) - GAP, HEAD + len(rows.x) * (TILE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, cells) in enumerate(zip(titles, columns, strict=True)):
        left = column * (TILE + GAP)
        pen.text((left + 3, 3), title, fill="black")
        for row, cell in enumerate(cells):
            sheet.paste(tile(cell), (left, HEAD + row * (TILE + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def tile(cell: Pictures) -> Image.Image:
    """Scales uint8 [3,h,w] to a tile: tokens are magnified with hard edges, pictures are shrunk."""
    image = Image.fromarray(np.ascontiguousarray(cell.transpose(1, 2, 0)))
    magnified = image.width < TILE
    return image.resize((TILE, TILE), Image.Resampling.NEAREST if magnified else Image.Resampling.LANCZOS)


def colours(indices: Indices) -> Pictures:
    """Colours tokens [N,h,w] as pictures uint8 [N,3,h,w], each token value in its own colour."""
    mixed = indices.astype(np.uint32) * np.uint32(2654435761)
    return np.stack([(mixed >> shift) & 255 for shift in (8, 16, 24)], axis=1).astype(np.uint8)
