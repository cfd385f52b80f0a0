"""Q behind one pure function: `Discretizer.discretize` is what HTTP, Ray, precompute and the CLI call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines import Engine, create, rows_at_once
from dat_workers.errors import EngineError, InvalidInput
from dat_workers.perturbation import PRESETS, Step, perturb, replace_tokens
from dat_workers.transfer import Array, Compute, through

OUTPUT_DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
OUTPUTS = ("reconstruction", "adversarial", "indices", "adversarial_indices")
# Which images of a batch came out finite, bool [n]: kept on the device and looked at with the results, since each
# look waits for the GPU.
FINITE = {"finite_latents": "latent vectors", "finite_pictures": "pictures"}
Finite = dict[str, Tensor]


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
        cls, name: str, *, engine: str = "auto", device: str = "auto", dtype: str = "auto", tricks: str = "auto"
    ) -> Discretizer:
        """The codec `name`, embedded or installed. Raises CodecError where it is neither."""
        from dat_workers.codecs.store import CodecStore, load_model

        file = CodecStore().load(name)
        if not file.spec.has_tokens:
            return cls(file.spec, file.fingerprint, None)
        model = load_model(file)
        return cls(file.spec, file.fingerprint, create(engine, model, device=device, dtype=dtype, tricks=tricks))

    def describe(self) -> dict[str, str]:
        """Engine, device, dtype and tricks in words, for logs and metadata; of ONNX Runtime its provider too."""
        if self.engine is None:
            return {"engine": "none", "device": "cpu", "dtype": "none", "tricks": "none"}
        e = self.engine
        said = {"engine": e.name, "device": str(e.device), "dtype": e.dtype, "tricks": str(e.tricks)}
        provider = getattr(e, "provider", None)
        return said | ({"provider": provider} if provider else {})

    def warm_up(self, side: int = 224) -> None:
        """The engine's own preparation and one pass over a grey image: no request pays for first calls."""
        if self.engine is not None:
            self.engine.warm_up(side)
        self.discretize(np.full((1, 3, side, side), 127, np.uint8))

    def check_outputs(self, outputs: Collection[str]) -> None:
        """Raises InvalidInput for an output that this codec does not have."""
        known = OUTPUTS if self.spec.has_tokens else OUTPUTS[:2]
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
        self,
        images: Array,
        gradients: Array | None = None,
        *,
        gradient_scales: Array | None = None,
        step: Step = PRESETS["paper"],
        replace_fraction: float = 0.0,
        seed: int = 0,
        outputs: Collection[str] | None = None,
        output_dtype: str | None = None,
    ) -> dict[str, Array]:
        """Q(x) = decode(encode(x)) (Eq. 3-4) and, from gradients, Q(x + δ) (Algorithm 1, line 4).

        images: uint8 [N,3,H,W], or float16/32 in 0..1; sides that f does not divide are padded by reflection
        on the right and below, and cropped back. gradients: float16/32 [N,3,H,W]; gradient_scales: float32
        [N], sample i's gradient being scale[i] times its value. `replace_fraction` of the adversarial tokens
        (of the plain ones where there is no gradient) are swapped for random others, by `seed`.

        Returns, by name: `reconstruction` and `adversarial` [N,3,H,W] of `output_dtype` (UINT8, FP16 or FP32;
        by default that of `images`), `indices` and `adversarial_indices` uint16 [N,ceil(H/f),ceil(W/f)], and
        with anything adversarial `tokens_changed` float32 [N], the share of each sample's tokens that differ
        from those of the step's base (of x, or of Q(x) where the step starts there). `outputs` None:
        `reconstruction`, and `adversarial` where there is something to make it from. Raises InvalidInput, and
        EngineError where the codec overflows.
        """
        self.check_images(images)
        attacked = gradients is not None or replace_fraction > 0
        if outputs is None:
            outputs = default_outputs(attacked)
        self.check_outputs(outputs)
        adversarial = any(name.startswith("adversarial") for name in outputs)
        if adversarial and not attacked:
            raise InvalidInput(
                "outputs", "adversarial without gradients", "gradients, or a replace_fraction over 0"
            )
        if replace_fraction and self.spec.codebook_size < 2:
            limit = f"0 for codec {self.spec.name}: it has no two tokens"
            raise InvalidInput("replace_fraction", replace_fraction, limit)
        check_gradients(gradients, gradient_scales, images.shape)
        dtype = pick_output_dtype(output_dtype, images.dtype)
        if self.engine is None and not adversarial and images.dtype == dtype:
            return {"reconstruction": images}

        def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._discretize(given, step, replace_fraction, seed, outputs, dtype)

        arrays = {"images": images}
        if gradients is not None and adversarial:
            arrays["gradients"] = gradients
            if gradient_scales is not None:
                arrays["gradient_scales"] = gradient_scales
        return self._run(arrays, self._batch(images.shape[2] * images.shape[3]), compute)

    def _discretize(
        self,
        given: dict[str, Tensor],
        step: Step,
        replace_fraction: float,
        seed: int,
        outputs: Collection[str],
        dtype: np.dtype[Any],
    ) -> dict[str, Tensor]:
        """The wanted outputs of one batch on its device, as `finish` leaves them, and what is finite."""
        x = as_float(given["images"])
        gradients = given.get("gradients")
        adversarial = any(name.startswith("adversarial") for name in outputs)
        finite: Finite = {}
        made: dict[str, Tensor] = {}
        size = x.shape[2:]
        indices = self._encode(x, finite)
        from_q = adversarial and gradients is not None and step.base == "reconstruction"
        q = x
        if from_q or "reconstruction" in outputs:
            q = self._decode(indices, x, size, finite, exact=from_q)
        if adversarial:
            attacked, moved = indices, x
            if gradients is not None:
                moved = perturb(x, q, scaled_gradients(gradients, given.get("gradient_scales")), step)
                attacked = self._encode(moved, finite)
            if replace_fraction and attacked is not None:
                attacked = replace_tokens(attacked, x, replace_fraction, seed, self.spec.codebook_size)
            if "adversarial" in outputs:
                made["adversarial"] = self._decode(attacked, moved, size, finite)
            if attacked is not None and indices is not None:
                # Q is not idempotent: a step from Q(x) is judged against the tokens of Q(x) itself
                unmoved = self._encode(q, finite) if from_q else indices
                assert unmoved is not None
                made["adversarial_indices"] = attacked
                made["tokens_changed"] = attacked.ne(unmoved).flatten(1).float().mean(1)
        if indices is not None:
            made["indices"] = indices
        made["reconstruction"] = q
        wanted = {
            name: finish(name, value, dtype)
            for name, value in made.items()
            if name in outputs or name == "tokens_changed"
        }
        return wanted | finite

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
        f = self.spec.factor
        size = torch.Size((indices.shape[1] * f, indices.shape[2] * f))

        def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
            finite: Finite = {}
            tokens = given["indices"].long()
            return {"picture": finish("picture", self._decode(tokens, tokens, size, finite), dtype), **finite}

        return self._run({"indices": indices.astype(np.int32)}, self._batch(size.numel()), compute)["picture"]

    def _run(self, arrays: dict[str, Array], batch: int, compute: Compute) -> dict[str, Array]:
        """`compute` on the engine's device, `batch` rows of `arrays` at a time; results by name, rows joined.

        Raises EngineError for the first batch with an image that is not finite.
        """
        device, overlap = torch.device("cpu"), False
        if self.engine is not None:
            device, overlap = self.engine.device, self.engine.tricks.overlap
        starts = range(0, len(next(iter(arrays.values()))), batch)
        jobs = ({name: array[start : start + batch] for name, array in arrays.items()} for start in starts)
        parts: dict[str, list[Array]] = {}
        for start, made in zip(starts, through(device, jobs, compute, overlap=overlap), strict=True):
            self._check_finite(made, start)
            for name, array in made.items():
                if name not in FINITE:
                    # tokens travel as int32: few operations of PyTorch know uint16
                    parts.setdefault(name, []).append(
                        array.astype(np.uint16) if name.endswith("indices") else array
                    )
        return {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in parts.items()}

    def _check_finite(self, made: dict[str, Array], start: int) -> None:
        """Raises EngineError where one of FINITE is false; `start` is the batch's first image."""
        for name, what in FINITE.items():
            bad = [start + i for i, good in enumerate(made.get(name, ())) if not good]
            if bad:
                raise EngineError(
                    f"codec {self.spec.name} on {self.describe()}: {what} of images {bad[:8]} came out with values "
                    "that are not finite; run it with --dtype fp32"
                )

    def _batch(self, pixels: int) -> int:
        """Images of so many pixels to hand to the engine at once."""
        return rows_at_once(self.engine, pixels) if self.engine else max(1, 64 * 224 * 224 // pixels)

    def _encode(self, x: Tensor, finite: Finite) -> Tensor | None:
        """Tokens of fp32 [n,3,H,W]; None for `identity`."""
        if self.engine is None:
            return None
        f = self.spec.factor
        below, right = -x.shape[2] % f, -x.shape[3] % f
        indices = self.engine.encode(F.pad(x, (0, right, 0, below), mode="reflect") if below or right else x)
        note(finite, "finite_latents", indices.ge(0))
        return indices

    def _decode(
        self, indices: Tensor | None, x: Tensor, size: torch.Size, finite: Finite, exact: bool = False
    ) -> Tensor:
        """The pictures of tokens, cropped to `size`; `x` itself for `identity`. `exact` as for Engine.decode."""
        if self.engine is None or indices is None:
            return x
        picture = self.engine.decode(indices, exact=exact)[:, :, : size[0], : size[1]]
        # before clipping, which would turn infinity into white
        note(finite, "finite_pictures", picture.isfinite())
        return picture.clamp(0, 1)


def note(finite: Finite, name: str, good: Tensor) -> None:
    """Keeps, on the device, which images are good in all elements, this time and every time before."""
    images = good.flatten(1).all(1)
    finite[name] = finite[name] & images if name in finite else images


def default_outputs(attacked: bool) -> tuple[str, ...]:
    """What is made where no output is named: `adversarial` too, where there is something to make it from."""
    return ("reconstruction", "adversarial") if attacked else ("reconstruction",)


def check_gradients(gradients: Array | None, scales: Array | None, shape: tuple[int, ...]) -> None:
    """Raises InvalidInput for what is no gradient of images of that shape, with a scale for each or with none."""
    if gradients is None:
        if scales is not None:
            raise InvalidInput("gradient_scales", "given without gradients", "gradients to scale")
        return
    if gradients.dtype not in (np.float16, np.float32):
        raise InvalidInput("gradients", f"dtype {gradients.dtype}", "FP16 or FP32")
    if gradients.shape != shape:
        raise InvalidInput("gradients", f"shape {list(gradients.shape)}", f"{list(shape)}, that of the images")
    flat = gradients.reshape(len(gradients), -1)
    largest = np.maximum(flat.max(1), -flat.min(1)).astype(np.float64)  # NaN where a sample holds one
    if not np.isfinite(largest).all():
        raise InvalidInput("gradients", "NaN or infinity", "finite values")
    if scales is None:
        return
    if scales.dtype != np.float32 or scales.shape != shape[:1]:
        raise InvalidInput("gradient_scales", f"{scales.dtype} {list(scales.shape)}", f"float32 [{shape[0]}]")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise InvalidInput(
            "gradient_scales", "a value that is negative or not finite", "finite values of 0 or more"
        )
    if (largest * scales).max() > np.finfo(np.float32).max:
        raise InvalidInput("gradient_scales", f"up to {scales.max():g}", "scales that keep fp32 finite")


def scaled_gradients(gradients: Tensor, scales: Tensor | None) -> Tensor:
    """fp32 [n,3,H,W]: scale times value."""
    g = gradients.float()
    return g if scales is None else g * scales[:, None, None, None]


def finish(name: str, value: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """An output as it leaves the device: pictures of `dtype`, tokens as int32, shares as float32."""
    if name.endswith("indices"):
        return value.int()
    return value if name == "tokens_changed" else as_dtype(value, dtype)


def pick_output_dtype(name: str | None, default: np.dtype[Any]) -> np.dtype[Any]:
    """The numpy dtype that an `output_dtype` parameter names."""
    if name is None:
        return default
    if not isinstance(name, str) or name not in OUTPUT_DTYPES:
        raise InvalidInput("output_dtype", repr(name), "UINT8, FP16 or FP32")
    return np.dtype(OUTPUT_DTYPES[name])


def as_float(images: Tensor) -> Tensor:
    """fp32 in 0..1 of images uint8 or float."""
    if images.dtype != torch.uint8:
        return images.float()
    # A tensor and no number: CUDA would multiply by 1/255 for a number, which is another fp32 now and then, and
    # pixels would differ from a CPU's. Filled where it is: a copy from the host would wait.
    return images.float().div_(torch.full((), 255.0, device=images.device))


def as_dtype(picture: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """A picture in 0..1 as `dtype`; uint8 is rounded to the nearest of 256 levels."""
    if dtype == np.uint8:
        return picture.mul(255).round_().to(torch.uint8).contiguous()
    return picture.to(torch.float16 if dtype == np.float16 else torch.float32).contiguous()
