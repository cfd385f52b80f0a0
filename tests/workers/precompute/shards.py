"""Small shards of real photographs for tests, and what is in a folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from dat_client.wire.tensors import Array


@cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]


@cache
def picture(number: int, side: int = 40) -> Image.Image:
    """A crop of a photograph, scaled: another one for each number."""
    photograph = photographs()[number % 4]
    left, top = (37 * number) % 150, (23 * number) % 100
    return photograph.crop((left, top, left + 200, top + 160 + number % 7)).resize((side + number % 5, side))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample_files(number: int, side: int = 40) -> list[tuple[str, bytes]]:
    return [(f"{number:04d}.png", encoded(picture(number, side))), (f"{number:04d}.cls", str(number % 10).encode())]


def write_shards(folder: Path, shards: int = 3, samples: int = 5, side: int = 40) -> Path:
    """train-000000.tar and so on, keys 0000, 0001, ... through all of them."""
    for i in range(shards):
        numbers = range(i * samples, (i + 1) * samples)
        write_tar(folder / f"train-{i:06d}.tar", [file for n in numbers for file in sample_files(n, side)])
    return folder


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def as_array(content: bytes) -> Array:
    """uint8 [3,H,W] of an encoded picture."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
