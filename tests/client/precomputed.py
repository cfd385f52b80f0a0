"""Writes folders as `dat precompute` does, so that the reader is tested by itself."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

SETTINGS = {
    "format": 1, "codec": "identity", "fingerprint": "none", "engine": "identity", "dtype": "fp32",
    "outputs": ["reconstruction", "indices"], "picture": "png", "quality": 95, "resize": None, "crop": None,
    "augment": 0, "replace_fraction": 0.0, "variants": 1, "seed": 0, "keep": None, "upright": False,
    "classes": None,
}  # fmt: skip


def picture(number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A window into a photograph; `number` moves it. `size`: width, height."""
    from skimage import data

    left, top = 7 * number % 400, 11 * number % 400
    return Image.fromarray(data.astronaut()).crop((left, top, left + size[0], top + size[1]))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Plain WebDataset: `__key__` and fields of bytes. The number of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(dict(sample))
            count += 1
    return count


def write_dst(dst: Path, shards: Mapping[str, Iterable[Mapping[str, Any]]], **settings: Any) -> Path:
    """precompute.json, the shards and their manifest entries."""
    for name, samples in shards.items():
        count = write_shard(dst / name, samples)
        content = (dst / name).read_bytes()
        entry = {
            "shard": name, "samples": count, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
            "settings": "0123", "skipped": [], "source": {"name": f"/src/{name}", "bytes": 1, "sha256": ""},
        }  # fmt: skip
        path = dst / "manifest" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry))
    (dst / "precompute.json").write_text(json.dumps(SETTINGS | settings))
    return dst


def write_pair(
    folder: Path,
    names: Iterable[str],
    samples: int,
    sample: Callable[[int, Image.Image], Mapping[str, Any]],
    *,
    size: tuple[int, int] = (40, 32),
    skipped: Iterable[int] = (),
    **settings: Any,
) -> tuple[Path, Path]:
    """SRC of `samples` pictures a shard, and DST, whose samples hold what `sample(number, picture)` gives.

    Samples count on through the shards; their keys are `0007`, their labels the number modulo 10.
    """
    src, dst = folder / "src", folder / "dst"
    samples_of: dict[str, list[Mapping[str, Any]]] = {}
    for i, name in enumerate(names):
        samples_of[name] = []
        originals = []
        for number in range(i * samples, (i + 1) * samples):
            x = picture(number, size)
            both = {"__key__": f"{number:04}", "cls": str(number % 10).encode()}
            originals.append(both | {"png": encoded(x)})
            if number not in skipped:
                samples_of[name].append(both | sample(number, x))
        write_shard(src / name, originals)
    return src, write_dst(dst, samples_of, **settings)
