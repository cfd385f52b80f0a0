"""Draws random crops for training a codec from WebDataset shards or folders of pictures."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dat_workers.images.crops import PictureReader, enlarge
from dat_workers.sources.find import Paths


def to_float(images: Tensor) -> Tensor:
    """Maps uint8 images to fp32 in -1..1."""
    return images.float().div_(127.5).sub_(1)


class CropPool:
    """A pool of decoded pictures from which crops are drawn, while a stream slowly replaces the pictures.

    A data set of at most `capacity` pictures is decoded once; a larger one is streamed, `turnover` new pictures a
    batch. Draws depend only on `seed` and the batch number, so that a resumed run continues as if it had never
    stopped, as long as the pool holds the whole data set. With `skip`, pictures that are not usable are left out;
    with `upright`, pictures are turned by their EXIF orientation. `on_picture` receives the number of pictures
    while the pool is filled. Raises ValueError if there are no pictures, and as `PictureReader` does.
    """

    def __init__(
        self, sources: Paths, crop: int, capacity: int, seed: int, turnover: int = 4, *, skip: bool = False,
        upright: bool = False, on_picture: Callable[[int], None] = lambda count: None,
    ) -> None:  # fmt: skip
        self.reader = PictureReader(sources, skip=skip, upright=upright)
        self.crop, self.seed, self.turnover = crop, seed, turnover
        self.stream = self._endless()
        self.pool: list[np.ndarray] = []
        self.complete = False
        first: str | None = None
        for name, picture in self.stream:
            if name == first:
                self.complete = True
                break
            if len(self.pool) == capacity:
                break
            first = first or name
            self.pool.append(picture)
            on_picture(len(self.pool))

    def _endless(self) -> Iterator[tuple[str, np.ndarray]]:
        while True:
            count = 0
            for count, (name, picture) in enumerate(self.reader, 1):  # noqa: B007 - counted after the loop
                yield name, enlarge(picture, self.crop)
            if not count:
                raise ValueError(f"there are no pictures in {self.reader.source.shards[0].address}")

    def batch(self, number: int, size: int) -> Tensor:
        """Returns crops fp32 [size,3,crop,crop] in -1..1 from random places; half of them are mirrored."""
        rng = random.Random(zlib.crc32(f"{self.seed}/{number}".encode()))
        out = np.empty((size, 3, self.crop, self.crop), np.uint8)
        for i in range(size):
            picture = rng.choice(self.pool)
            top = rng.randint(0, picture.shape[1] - self.crop)
            left = rng.randint(0, picture.shape[2] - self.crop)
            view = picture[:, top : top + self.crop, left : left + self.crop]
            out[i] = view[:, :, ::-1] if rng.random() < 0.5 else view
        if not self.complete:
            for _ in range(self.turnover):
                self.pool[rng.randrange(len(self.pool))] = next(self.stream)[1]
        return to_float(torch.from_numpy(out))
