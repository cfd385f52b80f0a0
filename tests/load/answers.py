"""Requests of tiny-f8 whose right answers are known; no two requests at the same time hold the same images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.pictures import shifted_photographs
from dat_client import Client
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.perturbation import PRESETS

CODEC = "tiny-f8"
# The order of additions depends on the number of threads, and with it one token in thousands. The service gets as
# many threads as the right answers were computed with, so that they can be compared bit by bit.
SERVE = ("--codec", CODEC, "--threads", "1")
# With the default, easyrobust, the reconstruction beside Q(x + δ) is not bit for bit that of a plain request.
PRESET = "paper"
KINDS = ("plain", "gradients", "encoded", "decode", "half")


class WrongAnswer(AssertionError):
    """The answer does not belong to the request."""


@dataclass(frozen=True)
class Answers:
    """A pool of images and the right answer for each. On a CPU it does not depend on the rest of the batch."""

    images: np.ndarray  # uint8 [n,3,side,side]
    gradients: np.ndarray  # float32 [n,3,side,side]
    reconstruction: np.ndarray
    adversarial: np.ndarray
    indices: np.ndarray
    png: list[bytes]

    def rows(self, client: int, number: int, most: int) -> np.ndarray:
        """Returns which images request `number` of a client holds: 2 to `most` of them, in a random order."""
        draw = np.random.default_rng([client, number])
        return draw.permutation(len(self.images))[: draw.integers(2, most + 1)]

    def check(self, client: Client, rows: np.ndarray, kind: str = "plain") -> None:
        """Sends one request of these images. Raises WrongAnswer, and the errors of the client."""
        images = self.images[rows]
        if kind == "gradients":
            q = client.discretize(images, gradients=self.gradients[rows], gradient_dtype="FP32", preset=PRESET)
            check_equal("reconstruction", q.reconstruction, self.reconstruction[rows])
            check_equal("adversarial", q.adversarial, self.adversarial[rows])
        elif kind == "encoded":
            q = client.discretize([self.png[row] for row in rows])
            check_equal("reconstruction", q.reconstruction, self.reconstruction[rows])
        elif kind == "decode":
            height, width = images.shape[2:]  # tokens decode to a larger image if f does not divide its sides
            decoded = client.decode(self.indices[rows])[:, :, :height, :width]
            check_equal("decoded", decoded, self.reconstruction[rows])
        elif kind == "half":
            q = client.discretize(images, output_dtype="FP16", outputs=["reconstruction"])
            assert q.reconstruction is not None
            distance = np.abs(q.reconstruction.astype(np.float32) * 255 - self.reconstruction[rows]).max()
            if distance > 0.7:  # half a level of rounding to uint8, and a little of rounding to fp16
                raise WrongAnswer(f"reconstruction in fp16 is {distance:.2f} levels from the right one")
        else:
            q = client.discretize(images, outputs=["reconstruction", "indices"])
            check_equal("reconstruction", q.reconstruction, self.reconstruction[rows])
            check_equal("indices", q.indices, self.indices[rows])


def check_equal(name: str, got: Any, expected: np.ndarray) -> None:
    """Raises WrongAnswer, with the images that differ, if an output is not the expected one."""
    if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongAnswer(f"{name}: {None if got is None else (got.dtype, got.shape)} for {expected.shape}")
    wrong = [i for i in range(len(got)) if not np.array_equal(got[i], expected[i])]
    if wrong:
        raise WrongAnswer(f"{name}: images {wrong} of {len(got)} are not the right ones")


def compute_answers(number: int = 96, side: int = 32) -> Answers:
    """Computes the right answers with the codec in this process, on one thread."""
    images = shifted_photographs(number, side)
    images ^= np.random.default_rng(1).integers(0, 8, images.shape, np.uint8)  # no two are equal
    gradients = np.random.default_rng(2).standard_normal(images.shape, np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        discretizer = Discretizer.from_store(CODEC, EngineConfig(device="cpu"))
        names = ("reconstruction", "adversarial", "indices")
        outputs = discretizer.discretize(images, gradients, step=PRESETS[PRESET], outputs=names)
    finally:
        torch.set_num_threads(threads)
    png = [encode_png(image) for image in images]
    reconstruction, adversarial, indices = (outputs[n] for n in ("reconstruction", "adversarial", "indices"))
    return Answers(images, gradients, reconstruction, adversarial, indices, png)


def encode_png(image: np.ndarray) -> bytes:
    """Returns uint8 [3,H,W] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def kind_of(number: int, kinds: Sequence[str]) -> str:
    """Returns the kind of request `number`: every kind in turn."""
    return kinds[number % len(kinds)]
