"""Q behind one pure function: `Discretizer.discretize` is what HTTP, Ray, precompute and the CLI call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dat_workers.batching.device_copies import Array, Compute, Job, through
from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.engines.config import DEFAULT_ENGINE, EngineConfig
from dat_workers.engines.factory import create
from dat_workers.engines.identity import IdentityEngine
from dat_workers.errors import EngineError, InvalidInput
from dat_workers.perturbation import PRESETS, Step, perturb, replace_tokens
from dat_workers.request import (
    OUTPUTS,
    Task,
    Work,
    check_gradients,
    check_images,
    check_indices,
    check_outputs,
    default_outputs,
    pick_output_dtype,
)

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

    def __init__(self, spec: CodecSpec, fingerprint: str, engine: Engine) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.engine = engine

    @classmethod
    def from_store(cls, name: str, config: EngineConfig = DEFAULT_ENGINE) -> Discretizer:
        """Loads the codec `name`, embedded or installed. Raises CodecError if it is neither.

        The codec `identity` has its own engine and ignores `config`.
        """
        from dat_workers.codecs.store import CodecStore, load_model

        file = CodecStore().load(name)
        engine = IdentityEngine() if file.spec.architecture == "identity" else create(config, load_model(file))
        return cls(file.spec, file.fingerprint, engine)

    def describe(self) -> dict[str, str]:
        """Returns engine, device, dtype and tricks as text, as `Engine.describe` does."""
        return self.engine.describe()

    def warm_up(self, side: int = 224) -> None:
        """The engine's own preparation and one pass over a grey image: no request pays for first calls."""
        self.engine.warm_up(side)
        self.discretize(np.full((1, 3, side, side), 127, np.uint8))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that this codec has."""
        return OUTPUTS if self.spec.has_tokens else OUTPUTS[:2]

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
        work = self.work(
            images,
            gradients,
            gradient_scales=gradient_scales,
            step=step,
            replace_fraction=replace_fraction,
            seed=seed,
            outputs=outputs,
            output_dtype=output_dtype,
        )
        return self._run(work)

    def work(
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
    ) -> Work:
        """What `discretize` computes, with everything about it checked. Raises InvalidInput."""
        check_images(images, self.spec.factor)
        attacked = gradients is not None or replace_fraction > 0
        if outputs is None:
            outputs = default_outputs(attacked)
        check_outputs(outputs, self.outputs)
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
        arrays = {"images": images}
        if gradients is not None and adversarial:
            arrays["gradients"] = gradients
            if gradient_scales is not None:
                arrays["gradient_scales"] = gradient_scales
        if not adversarial:  # what changes nothing keeps no rows apart
            step, replace_fraction, seed = PRESETS["paper"], 0.0, 0
        given = tuple((name, str(array.dtype)) for name, array in arrays.items())
        height, width = images.shape[2:]
        task = Task((height, width), given, tuple(sorted(set(outputs))), dtype, step, replace_fraction, seed)
        unchanged = self.engine.returns_images_unchanged and not adversarial and images.dtype == dtype
        return Work(task, arrays, {"reconstruction": images} if unchanged else None)

    def _discretize(self, given: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The wanted outputs of one batch on its device, as `finish` leaves them, and what is finite."""
        step, outputs, adversarial = task.step, task.outputs, task.adversarial
        x = as_float(given["images"])
        gradients = given.get("gradients")
        finite: Finite = {}
        made: dict[str, Tensor] = {}
        size = x.shape[2:]
        indices = self._encode(x, finite)
        from_q = adversarial and gradients is not None and step.base == "reconstruction"
        q = x
        if from_q or "reconstruction" in outputs:
            q = self._decode(indices, size, finite, exact=from_q)
        if adversarial:
            attacked = indices
            if gradients is not None:
                moved = perturb(x, q, scaled_gradients(gradients, given.get("gradient_scales")), step)
                attacked = self._encode(moved, finite)
            if task.replace_fraction:
                attacked = replace_tokens(attacked, x, task.replace_fraction, task.seed, self.spec.codebook_size)
            if "adversarial" in outputs:
                made["adversarial"] = self._decode(attacked, size, finite)
            if self.spec.has_tokens:
                # Q is not idempotent: a step from Q(x) is judged against the tokens of Q(x) itself
                unmoved = self._encode(q, finite) if from_q else indices
                made["adversarial_indices"] = attacked
                made["tokens_changed"] = attacked.ne(unmoved).flatten(1).float().mean(1)
        made["indices"], made["reconstruction"] = indices, q
        wanted = {
            name: finish(name, value, task.dtype)
            for name, value in made.items()
            if name in outputs or name == "tokens_changed"
        }
        return wanted | finite

    def decode(self, indices: Array, *, output_dtype: str | None = None) -> Array:
        """Pictures [N,3,h*f,w*f] of tokens: unsigned or int32 [N,h,w], each below K. UINT8 by default."""
        return self._run(self.decode_work(indices, output_dtype=output_dtype))["reconstruction"]

    def decode_work(self, indices: Array, *, output_dtype: str | None = None) -> Work:
        """What `decode` computes, with everything about it checked. Raises InvalidInput."""
        if not self.spec.has_tokens:
            raise InvalidInput("indices", f"codec {self.spec.name}", "a codec that has a codebook")
        check_indices(indices, self.spec.name, self.spec.codebook_size)
        dtype = pick_output_dtype(output_dtype, np.dtype(np.uint8))
        f = self.spec.factor
        size = (indices.shape[1] * f, indices.shape[2] * f)
        task = Task(size, (("indices", "int32"),), ("reconstruction",), dtype)
        return Work(task, {"indices": indices.astype(np.int32, copy=False)})

    def compute(self, task: Task) -> Compute:
        """What turns a batch's tensors into its results, all on the engine's device."""
        if not task.decodes:
            return lambda given: self._discretize(given, task)

        def decode(given: dict[str, Tensor]) -> dict[str, Tensor]:
            finite: Finite = {}
            tokens = given["indices"].long()
            picture = self._decode(tokens, torch.Size(task.size), finite)
            return {"reconstruction": finish("reconstruction", picture, task.dtype), **finite}

        return decode

    def rows_at_once(self, task: Task) -> int:
        """Rows of a task that are worth handing to the engine at once, and that its memory holds."""
        pixels = task.size[0] * task.size[1]
        return rows_at_once(self.engine, pixels)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def stream(self, jobs: Iterable[Job | None]) -> Iterator[dict[str, Array]]:
        """Results of one job after the other, copies beside the computing where the engine does that."""
        return through(self.device, jobs, overlap=self.engine.tricks.overlap)

    def _run(self, work: Work) -> dict[str, Array]:
        """The results of a request of its own, by name. Raises EngineError for an image that is not finite."""
        if work.result is not None:
            return work.result
        batch, compute = self.rows_at_once(work.task), self.compute(work.task)
        starts = range(0, work.rows, batch)
        jobs = (
            Job({name: [array[start : start + batch]] for name, array in work.arrays.items()}, compute)
            for start in starts
        )
        parts: dict[str, list[Array]] = {}
        for start, made in zip(starts, self.stream(jobs), strict=True):
            for name, array in self.collect(made, start).items():
                parts.setdefault(name, []).append(array)
        return {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in parts.items()}

    def collect(self, made: dict[str, Array], start: int) -> dict[str, Array]:
        """The outputs among one job's results; `start` is the number of its first image in the request.

        Raises EngineError where an image is not finite.
        """
        for name, what in FINITE.items():
            bad = [start + i for i, good in enumerate(made.get(name, ())) if not good]
            if bad:
                raise EngineError(
                    f"codec {self.spec.name} on {self.describe()}: {what} of images {bad[:8]} came out with values "
                    "that are not finite; run it with --dtype fp32"
                )
        # tokens travel as int32: few operations of PyTorch know uint16
        return {
            name: array.astype(np.uint16) if name.endswith("indices") else array
            for name, array in made.items()
            if name not in FINITE
        }

    def _encode(self, x: Tensor, finite: Finite) -> Tensor:
        """Returns the tokens of fp32 [n,3,H,W]."""
        f = self.spec.factor
        below, right = -x.shape[2] % f, -x.shape[3] % f
        indices = self.engine.encode(F.pad(x, (0, right, 0, below), mode="reflect") if below or right else x)
        note(finite, "finite_latents", indices.ge(0))
        return indices

    def _decode(self, indices: Tensor, size: torch.Size, finite: Finite, exact: bool = False) -> Tensor:
        """Returns the images of tokens, cropped to `size`. `exact` as for Engine.decode."""
        picture = self.engine.decode(indices, exact=exact)[:, :, : size[0], : size[1]]
        # before clipping, which would turn infinity into white
        note(finite, "finite_pictures", picture.isfinite())
        return picture.clamp(0, 1)


def note(finite: Finite, name: str, good: Tensor) -> None:
    """Keeps, on the device, which images are good in all elements, this time and every time before."""
    images = good.flatten(1).all(1)
    finite[name] = finite[name] & images if name in finite else images


def scaled_gradients(gradients: Tensor, scales: Tensor | None) -> Tensor:
    """fp32 [n,3,H,W]: scale times value."""
    g = gradients.float()
    return g if scales is None else g * scales[:, None, None, None]


def finish(name: str, value: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """An output as it leaves the device: pictures of `dtype`, tokens as int32, shares as float32."""
    if name.endswith("indices"):
        return value.int()
    return value if name == "tokens_changed" else as_dtype(value, dtype)


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
