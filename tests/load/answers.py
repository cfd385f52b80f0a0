"""Requests of tiny-f8 whose right answers are known, each of them with images that no other request has so."""

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

CODEC = "tiny-f8"
# The order of additions goes with the number of threads, and with it a token in thousands: the service is started
# with as many as the right answers are made with, so that they can be compared bit by bit.
SERVE = ("--codec", CODEC, "--threads", "1")
KINDS = ("plain", "gradients", "encoded", "decode", "half")


class WrongAnswer(AssertionError):
    """An answer that is not the one to the request."""


@dataclass(frozen=True)
class Answers:
    """A pool of pictures and what becomes of each; on a CPU that does not depend on what comes with it."""

    images: np.ndarray  # uint8 [n,3,side,side]
    gradients: np.ndarray  # float32, as many
    reconstruction: np.ndarray
    adversarial: np.ndarray
    indices: np.ndarray
    png: list[bytes]

    def rows(self, client: int, number: int, most: int) -> np.ndarray:
        """Which pictures request `number` of a client holds: some of them, in an order of its own."""
        draw = np.random.default_rng([client, number])
        return draw.permutation(len(self.images))[: draw.integers(2, most + 1)]

    def ask(self, client: Client, rows: np.ndarray, kind: str = "plain") -> None:
        """One request of these pictures. Raises WrongAnswer, and what the client raises."""
        images = self.images[rows]
        if kind == "gradients":
            q = client.discretize(images, gradients=self.gradients[rows], gradient_dtype="FP32")
            same("reconstruction", q.reconstruction, self.reconstruction[rows])
            same("adversarial", q.adversarial, self.adversarial[rows])
        elif kind == "encoded":
            q = client.discretize([self.png[row] for row in rows])
            same("reconstruction", q.reconstruction, self.reconstruction[rows])
        elif kind == "decode":
            height, width = images.shape[2:]  # tokens do not know where f does not divide the sides
            decoded = client.decode(self.indices[rows])[:, :, :height, :width]
            same("decoded", decoded, self.reconstruction[rows])
        elif kind == "half":
            q = client.discretize(images, output_dtype="FP16", outputs=["reconstruction"])
            assert q.reconstruction is not None
            near = np.abs(q.reconstruction.astype(np.float32) * 255 - self.reconstruction[rows]).max()
            if near > 0.7:  # half a level of rounding to uint8, and a little of rounding to fp16
                raise WrongAnswer(f"reconstruction in fp16 is {near:.2f} levels from the right one")
        else:
            q = client.discretize(images, outputs=["reconstruction", "indices"])
            same("reconstruction", q.reconstruction, self.reconstruction[rows])
            same("indices", q.indices, self.indices[rows])


def same(what: str, got: Any, expected: np.ndarray) -> None:
    if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongAnswer(f"{what}: {None if got is None else (got.dtype, got.shape)} for {expected.shape}")
    wrong = [i for i in range(len(got)) if not np.array_equal(got[i], expected[i])]
    if wrong:
        raise WrongAnswer(f"{what}: images {wrong} of {len(got)} are not the right ones")


def answers(number: int = 96, side: int = 32) -> Answers:
    """Made by the codec in this process, on one thread."""
    images = shifted_photographs(number, side)
    images ^= np.random.default_rng(1).integers(0, 8, images.shape, np.uint8)  # no two alike, whatever `side` is
    gradients = np.random.default_rng(2).standard_normal(images.shape, np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        discretizer = Discretizer.from_store(CODEC, EngineConfig(device="cpu"))
        made = discretizer.discretize(images, gradients, outputs=("reconstruction", "adversarial", "indices"))
    finally:
        torch.set_num_threads(threads)
    png = [encode_png(image) for image in images]
    return Answers(images, gradients, made["reconstruction"], made["adversarial"], made["indices"], png)


def encode_png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def kind_of(number: int, kinds: Sequence[str]) -> str:
    """Every kind in turn."""
    return kinds[number % len(kinds)]
