"""Reads pictures from files, folders and shards, and crops them to squares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dat_client.dataset_format.tar_samples import DamagedShard, samples_in_tar
from dat_client.wire.vocabulary import PICTURE_SUFFIXES
from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import as_image, decode_picture, pixels

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # shipped with scikit-image


def encoded_pictures(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, encoded bytes) of every picture in `source`: a tar shard, a folder or a single picture.

    The pictures of a shard come in the order of the tar, and are named by webdataset's rule; those of a folder are
    sorted by name. Raises InvalidInput for a shard that is damaged or not a tar file, and FileNotFoundError.
    """
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES):
            yield str(path.relative_to(source)), path.read_bytes()
        return
    if source.suffix.lower() in PICTURE_SUFFIXES and source.is_file():
        yield source.name, source.read_bytes()
        return
    try:
        with source.open("rb") as file:
            for sample in samples_in_tar(file):
                for field, content in sample.fields.items():
                    if f".{field}".endswith(PICTURE_SUFFIXES):
                        yield f"{sample.key}.{field}", content
    except DamagedShard as error:
        raise InvalidInput(str(source), error, "a whole tar shard, a folder or a picture") from error


def centre_crops(sources: Sequence[Path], size: int, limit: int | None = None) -> npt.NDArray[np.uint8]:
    """Returns centre crops of the pictures in `sources`, at most `limit`, as uint8 [N,3,size,size].

    Smaller pictures are enlarged first. Raises InvalidInput if the sources hold no pictures.
    """
    crops = []
    for source in sources:
        for name, data in encoded_pictures(source):
            crops.append(centre_crop(decode_picture(data, field=f"{source}: {name}"), size))
            if limit is not None and len(crops) == limit:
                return np.stack(crops)
    if not crops:
        raise InvalidInput("pictures", [str(s) for s in sources], "shards or folders that hold some")
    return np.stack(crops)


def sample_crops(sources: Sequence[Path] | None, size: int, limit: int) -> npt.NDArray[np.uint8]:
    """Returns centre crops of `sources`, or else of photographs in scikit-image, as uint8 [N,3,size,size].

    Raises as `centre_crops` does, and RuntimeError if scikit-image is needed and not installed.
    """
    if sources:
        return centre_crops(sources, size, limit)
    try:
        from skimage import data
    except ImportError:
        raise RuntimeError("no pictures to compare on: name some, or run pip install 'dat-service[demo]'") from None
    pictures = (np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)) for name in PHOTOGRAPHS[:limit])
    return np.stack([centre_crop(picture, size) for picture in pictures])


def centre_crop(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Returns the centre crop of a picture, uint8 [3,size,size]; a smaller picture is enlarged first."""
    picture = enlarge(picture, size)
    top, left = (picture.shape[1] - size) // 2, (picture.shape[2] - size) // 2
    return picture[:, top : top + size, left : left + size]


def enlarge(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Returns a picture, scaled up so that its shorter side equals `size` if that side is shorter than `size`."""
    _, height, width = picture.shape
    if min(height, width) >= size:
        return picture
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return pixels(as_image(picture).resize(target, Image.Resampling.BICUBIC))
