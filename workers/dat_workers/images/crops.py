"""Reads pictures from files, folders and shards, and crops them to squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from dat_client.dataset_format.left_out import LeftOut
from dat_client.dataset_format.naming import picture_field
from dat_client.dataset_format.tar_samples import DamagedShard
from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import DATA_FORMATS, as_image, decode_picture, pixels
from dat_workers.sources.find import Paths, find
from dat_workers.sources.folders import Shard
from dat_workers.sources.reader import ShardReader, place_of

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # shipped with scikit-image
UNUSABLE = "these pictures are not usable"  # the reason in LeftOut


class PictureReader:
    """Reads and decodes the pictures of shards, folders and files: the same pictures as `dat precompute` reads.

    >>> reader = PictureReader(["photos", "train-{0..9}.tar"])                  # doctest: +SKIP
    >>> for name, picture in reader: ...                                        # doctest: +SKIP

    Each pass yields (name, picture uint8 [3,H,W]). Sources are found when the reader is created, which raises as
    `find` does. A picture that is not usable raises InvalidInput; if `skip` is set, it is left out. `left_out` has
    everything that was left out so far; later passes add nothing, because they read the same.
    """

    def __init__(self, sources: Paths, *, skip: bool = False, upright: bool = False) -> None:
        self.source = find(sources, labelled=False, skip=skip)
        self.skip, self.upright = skip, upright
        self.left_out = LeftOut(self.source.left_out)
        self._counted: set[int] = set()  # the positions of shards whose reading has begun once

    def __iter__(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        for number, shard in enumerate(self.source.shards):
            first_time = number not in self._counted
            self._counted.add(number)
            yield from self._pictures(shard, self.left_out if first_time else LeftOut())

    def _pictures(self, shard: Shard, left_out: LeftOut) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        reader = ShardReader(shard)

        def unusable(key: str, reason: str) -> None:
            place = place_of(key)
            message = f"{shard.address}, {place}: {reason}"
            if not self.skip:
                hint = f"{message}; --on-error skip (skip=True) leaves such pictures out"
                raise InvalidInput(shard.address, place, reason, hint)
            left_out.add(UNUSABLE, message)

        try:
            for sample in reader:
                try:
                    if sample.problem:
                        raise ValueError(sample.problem)
                    field = picture_field(sample.fields)
                    data = sample.fields[field]
                    picture = decode_picture(data, field=field, upright=self.upright, formats=DATA_FORMATS)
                except ValueError as error:
                    unusable(sample.key, str(error))
                else:
                    yield f"{shard.address}, sample {sample.key}", picture
        except DamagedShard as error:
            unusable(error.key, str(error))
        finally:  # the caller may want no more pictures
            for reason, count, names in reader.left_out.rows:
                left_out.update([(reason, count, tuple(f"{shard.address}: {name}" for name in names))])


def centre_crops(
    sources: Paths, size: int, limit: int | None = None, *, skip: bool = False, upright: bool = False,
    left_out: LeftOut | None = None, on_picture: Callable[[int], None] = lambda count: None,
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """Returns centre crops of the pictures in `sources`, at most `limit`, as uint8 [N,3,size,size].

    Smaller pictures are enlarged first. What is left out is added to `left_out`. `on_picture` receives the number
    of crops after each one. Raises InvalidInput if the sources hold no pictures, and as `PictureReader` does.
    """
    reader = PictureReader(sources, skip=skip, upright=upright)
    crops = []
    for _, picture in islice(reader, limit):
        crops.append(centre_crop(picture, size))
        on_picture(len(crops))
    if left_out is not None:
        left_out.update(reader.left_out.rows)
    if not crops:
        raise InvalidInput("pictures", sources, "shards or folders that hold pictures that are usable")
    return np.stack(crops)


def sample_crops(
    sources: Paths | None, size: int, limit: int, *, skip: bool = False, upright: bool = False,
    left_out: LeftOut | None = None,
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """Returns centre crops of `sources`, or else of photographs in scikit-image, as uint8 [N,3,size,size].

    Raises as `centre_crops` does, and RuntimeError if scikit-image is needed and not installed.
    """
    if sources:
        return centre_crops(sources, size, limit, skip=skip, upright=upright, left_out=left_out)
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
