"""Q behind one pure function: `Discretizer.discretize` is what HTTP, Ray, precompute and the CLI call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines import Engine, create
from dat_workers.errors import EngineError, InvalidInput

Array = npt.NDArray[Any]

OUTPUT_DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
OUTPUTS = ("reconstruction", "indices")


class Discretizer:
    """One codec on one engine.

    >>> q = Discretizer.from_store("tiny-f8")                                     # doctest: +SKIP
    >>> q.discretize(images, outputs=("reconstruction", "indices"))["indices"]    # doctest: +SKIP

    Pure: the answer depends on the arguments alone, not on what came before; on a CPU also not on what comes
    together. (CUDA kernels may add in another order for another batch size, which can move a near-tie.)
    """

    def __init__(self, spec: CodecSpec, fingerprint: str, engine: Engine | None) -> None:
        if (engine is None) == spec.has_tokens:
            raise ValueError(f"codec {spec.name!r} with engine {engine!r}: only `identity` runs without one")
        self.spec = spec
        self.fingerprint = fingerprint
        self.engine = engine

    @classmethod
    def from_store(
        cls, name: str, *, engine: str = "torch", device: str = "auto", dtype: str = "auto"
    ) -> Discretizer:
        """The codec `name`, embedded or installed. Raises CodecError where it is neither."""
        from dat_workers.codecs.store import CodecStore, load_model

        store = CodecStore()
        file = store.load(name)
        if not file.spec.has_tokens:
            return cls(file.spec, file.fingerprint, None)
        model = load_model(file)
        return cls(file.spec, file.fingerprint, create(engine, model, device=device, dtype=dtype))

    def describe(self) -> dict[str, str]:
        """Engine, device and dtype in words, for logs and metadata."""
        if self.engine is None:
            return {"engine": "none", "device": "cpu", "dtype": "none"}
        return {"engine": self.engine.name, "device": str(self.engine.device), "dtype": self.engine.dtype}

    def warm_up(self, side: int = 224) -> None:
        """One pass over a grey image, so that the first request does not pay for first calls."""
        self.discretize(np.full((1, 3, side, side), 127, np.uint8))

    def check_outputs(self, outputs: Collection[str]) -> None:
        """Raises InvalidInput for an output that this codec does not have."""
        known = OUTPUTS if self.spec.has_tokens else OUTPUTS[:1]
        for name in outputs:
            if name not in known:
                raise InvalidInput("outputs", repr(name), f"of {', '.join(known)}")

    def check_images(self, images: Array) -> None:
        """Raises InvalidInput unless `images` is uint8 or float16/32 in 0..1, [N,3,H,W], N and sides enough."""
        if images.dtype not in (np.uint8, np.float16, np.float32):
            raise InvalidInput("images", f"dtype {images.dtype}", "UINT8, FP16 or FP32")
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 1:
            raise InvalidInput("images", f"shape {list(images.shape)}", "[N,3,H,W] with N of 1 or more")
        least = self.spec.factor
        if min(images.shape[2:]) < least:
            raise InvalidInput("images", f"{images.shape[2]}x{images.shape[3]} pixels", f"sides of {least} or more")
        if images.dtype != np.uint8:
            low, high = float(images.min()), float(images.max())  # a NaN anywhere makes both NaN
            if not (low >= 0 and high <= 1):
                raise InvalidInput("images", f"a value range of {low:.9g}..{high:.9g}", "finite values in 0..1")

    def discretize(
        self, images: Array, *, outputs: Collection[str] = OUTPUTS[:1], output_dtype: str | None = None
    ) -> dict[str, Array]:
        """Q(x) = decode(encode(x)) (Eq. 3-4).

        images: uint8 [N,3,H,W], or float16/32 in 0..1; sides that f does not divide are padded by reflection
        on the right and below, and cropped back. Returns, by name: `reconstruction` [N,3,H,W] of
        `output_dtype` (UINT8, FP16 or FP32; by default that of `images`), `indices` uint16
        [N,ceil(H/f),ceil(W/f)]. Raises InvalidInput, and EngineError where the codec overflows.
        """
        self.check_images(images)
        self.check_outputs(outputs)
        dtype = pick_output_dtype(output_dtype, images.dtype)
        if self.engine is None:
            return (
                {"reconstruction": as_dtype(as_float(images), dtype)}
                if images.dtype != dtype
                else {"reconstruction": images}
            )
        n, _, height, width = images.shape
        parts: dict[str, list[Array]] = {name: [] for name in outputs}
        batch = self._batch(height * width)
        for start in range(0, n, batch):
            x = self._pad(as_float(images[start : start + batch]))
            indices = self.engine.encode(x)
            if "indices" in parts:
                parts["indices"].append(indices.numpy().astype(np.uint16))
            if "reconstruction" in parts:
                picture = self._decode(indices)[:, :, :height, :width]
                parts["reconstruction"].append(as_dtype(picture, dtype))
        return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}

    def decode(self, indices: Array, *, output_dtype: str | None = None) -> Array:
        """Pictures [N,3,h*f,w*f] of tokens: unsigned or int32 [N,h,w], each below K. UINT8 by default."""
        if not self.spec.has_tokens or self.engine is None:
            raise InvalidInput("indices", f"codec {self.spec.name}", "a codec that has a codebook")
        if indices.dtype not in (np.uint16, np.int32):
            raise InvalidInput("indices", f"dtype {indices.dtype}", "UINT16 or INT32")
        if indices.ndim != 3 or min(indices.shape) < 1:
            raise InvalidInput("indices", f"shape {list(indices.shape)}", "[N,h,w], none of them 0")
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.spec.codebook_size:
            wrong = low if low < 0 else high
            raise InvalidInput("indices", wrong, f"0 to {self.spec.codebook_size - 1} (codec {self.spec.name})")
        dtype = pick_output_dtype(output_dtype, np.dtype(np.uint8))
        tokens = torch.from_numpy(indices.astype(np.int64))
        batch = self._batch(tokens[0].numel() * self.spec.factor**2)
        parts = [as_dtype(self._decode(chunk), dtype) for chunk in torch.split(tokens, batch)]
        return np.concatenate(parts)

    def _batch(self, pixels: int) -> int:
        """Images of so many pixels to hand to the engine at once: its memory goes with the pixels."""
        assert self.engine is not None
        return max(1, min(self.engine.batch, self.engine.batch * 224 * 224 // pixels))

    def _pad(self, x: Tensor) -> Tensor:
        f = self.spec.factor
        below, right = -x.shape[2] % f, -x.shape[3] % f
        return F.pad(x, (0, right, 0, below), mode="reflect") if below or right else x

    def _decode(self, indices: Tensor) -> Tensor:
        # finite is checked before clipping, which would turn infinity into white
        assert self.engine is not None
        picture = self.engine.decode(indices)
        finite = picture.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [i for i, good in enumerate(finite.tolist()) if not good]
            raise EngineError(
                f"codec {self.spec.name} on {self.describe()}: images {bad[:8]} of a batch of {len(indices)} came "
                "out with values that are not finite; run it with --dtype fp32"
            )
        return picture.clamp(0, 1)


def pick_output_dtype(name: str | None, default: np.dtype[Any]) -> np.dtype[Any]:
    """The numpy dtype that an `output_dtype` parameter names."""
    if name is None:
        return default
    if not isinstance(name, str) or name not in OUTPUT_DTYPES:
        raise InvalidInput("output_dtype", repr(name), "UINT8, FP16 or FP32")
    return np.dtype(OUTPUT_DTYPES[name])


def as_float(images: Array) -> Tensor:
    """fp32 tensor in 0..1 of images uint8 or float."""
    x = torch.tensor(np.ascontiguousarray(images))
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def as_dtype(picture: Tensor, dtype: np.dtype[Any]) -> Array:
    """A picture in 0..1 as a numpy array; uint8 is rounded to the nearest of 256 levels."""
    if dtype == np.uint8:
        return picture.mul(255).round_().to(torch.uint8).numpy()
    array: Array = picture.numpy().astype(dtype, copy=False)
    return np.ascontiguousarray(array)
