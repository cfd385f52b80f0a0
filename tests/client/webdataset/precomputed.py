"""Writes folders as `dat precompute` does, so that the reader is tested by itself, and says what they hold."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from torch import Tensor

SETTINGS = {
    "format": 1, "codec": "identity", "fingerprint": "none", "engine": "identity", "dtype": "fp32",
    "outputs": ["reconstruction", "indices"], "picture": "png", "quality": 95, "resize": None, "crop": None,
    "augment": 0, "replace_fraction": 0.0, "variants": 1, "seed": 0, "keep": None, "upright": False,
    "classes": None,
}  # fmt: skip

NAMES = [f"train-{i:06}.tar" for i in range(5)]
KEPT = [n for n in range(20) if n not in (0, 6, 19)]  # what `pair` of conftest.py holds
VIEWS = [
    {"box": [3, 5, 20, 24], "size": [16, 16], "flip": False, "variant": 0, "seed": 1},
    {"box": [0, 0, 40, 32], "size": [16, 16], "flip": True, "variant": 0, "seed": 2},
    {"box": [11, 1, 9, 13], "size": [16, 16], "flip": True, "variant": 0, "seed": 3},
]


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
    labels: bool = True,
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
            both: dict[str, Any] = {"__key__": f"{number:04}"}
            if labels:
                both["cls"] = str(number % 10).encode()
            originals.append(both | {"png": encoded(x)})
            if number not in skipped:
                samples_of[name].append(both | sample(number, x))
        write_shard(src / name, originals)
    return src, write_dst(dst, samples_of, **settings)


def q_of(x: Image.Image) -> Image.Image:
    """Stands in for Q."""
    return ImageOps.invert(x)


def one_view(number: int, x: Image.Image) -> dict[str, Any]:
    return {"png": encoded(q_of(x)), "indices.npy": npy(np.full((4, 5), 65535 - number, np.uint16))}


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def pictures(number: int) -> tuple[Tensor, Tensor]:
    """Returns x and Q(x) of a sample."""
    x = picture(number)
    return tensor(x), tensor(q_of(x))


def numbers(items: Any) -> list[int]:
    """Which samples these are, by their tokens."""
    return [65535 - int(tokens.flatten()[0]) for tokens, _ in items]


def pillows_own(x: Image.Image, view: dict[str, Any]) -> Image.Image:
    left, top, width, height = view["box"]
    box = (left, top, left + width, top + height)
    cut = x.resize(view["size"][::-1], Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(cut) if view["flip"] else cut


def three_views(number: int, x: Image.Image) -> dict[str, Any]:
    fields: dict[str, Any] = {"views.json": json.dumps(VIEWS).encode()}
    for i, view in enumerate(VIEWS):
        cut = pillows_own(x, view)
        fields[f"{i}.png"] = encoded(q_of(cut))
        fields[f"{i}.indices.npy"] = npy(np.full((2, 2), 65535 - number - 100 * i, np.uint16))
        fields[f"{i}.image.png"] = encoded(cut)
    return fields


def edited(dst: Path, path: str, **changes: Any) -> None:
    (dst / path).write_text(json.dumps(json.loads((dst / path).read_text()) | changes))
