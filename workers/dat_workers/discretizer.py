"""The discretizer Q as a pure function, `Discretizer.discretize`, which HTTP, Ray, precompute and the CLI call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dat_client.wire.tensors import Array
from dat_client.wire.vocabulary import OUTPUTS, default_outputs
from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.engines.config import DEFAULT_ENGINE, EngineConfig
from dat_workers.engines.device_copies import Compute, DeviceBatch, run_on_device
from dat_workers.engines.factory import create
from dat_workers.engines.identity import IdentityEngine
from dat_workers.errors import EngineError, InvalidInput, TooLarge
from dat_workers.perturbation import DEFAULT_STEP, NO_STEP, Step, perturb, replace_tokens
from dat_workers.request import (
    DEFAULT_PARAMETERS,
    CodecRequest,
    Parameters,
    Task,
    check_gradients,
    check_images,
    check_indices,
    check_outputs,
    pick_output_dtype,
)

# Extra results of a batch, bool [n], that say which of its images are finite. They are copied from the device
# together with the outputs, because checking them earlier would wait for the GPU once more.
FINITE_CHECKS = {"finite_latents": "latent vectors", "finite_images": "images"}


class Discretizer:
    """Runs one codec on one engine.

    >>> q = Discretizer.from_store("tiny-f8")                                     # doctest: +SKIP
    >>> q.discretize(images, outputs=("reconstruction", "indices"))["indices"]    # doctest: +SKIP

    It is pure: a result depends on the arguments alone and not on earlier calls. On a CPU the result of an image
    does not depend on the other images of its batch either. (On CUDA the order of additions may depend on the batch
    size, which can decide a near-tie between two codebook entries differently.)
    """

    def __init__(self, spec: CodecSpec, fingerprint: str, engine: Engine) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.engine = engine

    @classmethod
    def from_store(cls, name: str, config: EngineConfig = DEFAULT_ENGINE) -> Discretizer:
        """Loads the codec `name`. Raises CodecError if it is neither shipped in the package nor installed.

        The codec `identity` has its own engine and ignores `config`.
        """
        from dat_workers.codecs.store import CodecStore, load_model

        file = CodecStore().load(name)
        engine = IdentityEngine() if file.spec.architecture == "identity" else create(config, load_model(file))
        return cls(file.spec, file.fingerprint, engine)

    @classmethod
    def warm_from_store(cls, name: str, config: EngineConfig, side: int = 224) -> Discretizer:
        """Sets PyTorch's number of threads in this process, then loads a codec, warms it up and returns it.

        Call it in the thread that will run the codec.
        """
        torch.set_num_threads(config.cpu_threads)
        discretizer = cls.from_store(name, config)
        discretizer.warm_up(side)
        return discretizer

    def warm_up(self, side: int = 224) -> None:
        """Prepares the engine and discretizes one grey image, so that no request waits for preparations."""
        self.engine.warm_up(side)
        self.discretize(np.full((1, 3, side, side), 127, np.uint8))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs that this codec can compute."""
        return OUTPUTS if self.spec.has_tokens else OUTPUTS[:2]

    def discretize(
        self,
        images: Array,
        gradients: Array | None = None,
        *,
        gradient_scales: Array | None = None,
        step: Step = DEFAULT_STEP,
        replace_fraction: float = 0.0,
        seed: int = 0,
        outputs: Collection[str] | None = None,
        output_dtype: str | None = None,
    ) -> dict[str, Array]:
        """Computes Q(x) = decode(encode(x)) (Eq. 3-4) and, from gradients, Q(x + δ) (Algorithm 1, line 4).

        images: uint8 [N,3,H,W], or float16/32 in 0..1; sides that are not multiples of f are padded by reflection
        on the right and below, and the results are cropped back. gradients: float16/32 or int8 [N,3,H,W].
        gradient_scales: float32 [N]; the gradient of sample i is gradients[i] times gradient_scales[i].
        replace_fraction: the share of each sample's adversarial tokens (or of the tokens of Q(x), if there are no
        gradients) that are replaced by different tokens, drawn at random from `seed`.

        Returns the requested `outputs` by name: `reconstruction` and `adversarial` [N,3,H,W] of `output_dtype`
        (UINT8, FP16 or FP32; by default the dtype of `images`), and `indices` and `adversarial_indices` uint16
        [N,ceil(H/f),ceil(W/f)]. If an adversarial output is requested, it also returns `tokens_changed` float32
        [N]: the share of each sample's tokens that differ from the tokens of the step's base (x, or Q(x) if the
        step starts there). By default `outputs` is `reconstruction`, and also `adversarial` if there are gradients
        or a positive replace_fraction. Raises InvalidInput for arguments that are not usable, and EngineError if
        the codec overflows.
        """
        parameters = Parameters(step, replace_fraction, seed, output_dtype)
        return self._run(
            self.prepare(images, gradients, gradient_scales=gradient_scales, parameters=parameters, outputs=outputs)
        )

    def decode(self, indices: Array, *, output_dtype: str | None = None) -> Array:
        """Decodes tokens uint16 or int32 [N,h,w], each in 0..K-1, to images [N,3,h*f,w*f], by default uint8."""
        return self._run(self.prepare_decode(indices, output_dtype=output_dtype))["reconstruction"]

    def prepare(
        self,
        images: Array,
        gradients: Array | None = None,
        *,
        gradient_scales: Array | None = None,
        parameters: Parameters = DEFAULT_PARAMETERS,
        outputs: Collection[str] | None = None,
    ) -> CodecRequest:
        """Checks the arguments of `discretize` and returns them as a request, ready for a `Batcher`.

        Raises InvalidInput for arguments that are not usable.
        """
        check_images(images, self.spec.factor)
        step, replace_fraction, seed = parameters.step, parameters.replace_fraction, parameters.seed
        has_attack = gradients is not None or replace_fraction > 0
        if outputs is None:
            outputs = default_outputs(has_attack)
        check_outputs(outputs, self.outputs)
        adversarial = any(name.startswith("adversarial") for name in outputs)
        if adversarial and not has_attack:
            raise InvalidInput(
                "outputs", "adversarial without gradients", "gradients, or a replace_fraction above 0"
            )
        if replace_fraction and self.spec.codebook_size < 2:
            limit = f"0 for codec {self.spec.name}, which does not have two different tokens"
            raise InvalidInput("replace_fraction", replace_fraction, limit)
        self._check_memory("images", images.shape[2], images.shape[3])
        check_gradients(gradients, gradient_scales, images.shape)
        dtype = pick_output_dtype(parameters.output_dtype, images.dtype)
        arrays = {"images": images}
        if gradients is not None and adversarial:
            arrays["gradients"] = gradients
            if gradient_scales is not None:
                arrays["gradient_scales"] = gradient_scales
        if not adversarial:  # rows that differ only in parameters without effect may share a batch
            replace_fraction, seed = 0.0, 0
        if "gradients" not in arrays:
            step = NO_STEP
        inputs = tuple((name, str(array.dtype)) for name, array in arrays.items())
        height, width = images.shape[2:]
        task = Task((height, width), inputs, tuple(sorted(set(outputs))), dtype, step, replace_fraction, seed)
        unchanged = self.engine.returns_images_unchanged and not adversarial and images.dtype == dtype
        return CodecRequest(task, arrays, {"reconstruction": images} if unchanged else None)

    def prepare_decode(self, indices: Array, *, output_dtype: str | None = None) -> CodecRequest:
        """Checks the arguments of `decode` and returns them as a request. Raises InvalidInput for unusable ones."""
        if not self.spec.has_tokens:
            raise InvalidInput("indices", f"codec {self.spec.name}", "a codec that has a codebook")
        check_indices(indices, self.spec.name, self.spec.codebook_size)
        dtype = pick_output_dtype(output_dtype, np.dtype(np.uint8))
        f = self.spec.factor
        size = (indices.shape[1] * f, indices.shape[2] * f)
        self._check_memory("indices", *size)
        task = Task(size, (("indices", "int32"),), ("reconstruction",), dtype)
        return CodecRequest(task, {"indices": indices.astype(np.int32, copy=False)})

    def _check_memory(self, field: str, height: int, width: int) -> None:
        """Raises TooLarge for images that do not fit the memory of the engine's device."""
        f, most = self.spec.factor, self.engine.most_pixels
        pixels = -(-height // f) * -(-width // f) * f * f
        if most is not None and pixels > most:
            side = int(most**0.5) // f * f
            limit = f"at most {most} pixels for each image, such as {side}x{side}"
            memory = "more do not fit the GPU's memory, or this process's share of it"
            raise TooLarge(field, f"{width}x{height} pixels", f"{limit}; {memory}")

    def compute(self, task: Task) -> Compute:
        """Returns the function that computes a batch's results from its inputs; all tensors are on the device."""
        return partial(self._decode_batch if task.decodes else self._discretize_batch, task)

    def rows_at_once(self, task: Task) -> int:
        """Returns how many rows of a task to compute together."""
        return rows_at_once(self.engine, task.size[0] * task.size[1])

    def stream(self, batches: Iterable[DeviceBatch | None]) -> Iterator[dict[str, Array]]:
        """Yields the results of each batch in order, as `run_on_device` does."""
        return run_on_device(self.engine.device, batches, overlap=self.engine.tricks.overlap)

    def outputs_of(self, results: dict[str, Array], start: int) -> dict[str, Array]:
        """Returns the outputs among a batch's results, without the results of FINITE_CHECKS.

        `start` is the position of the batch's first image in the request. Raises EngineError if an image is not
        finite.
        """
        for name, checked in FINITE_CHECKS.items():
            bad = [start + i for i, finite in enumerate(results.get(name, ())) if not finite]
            if bad:
                raise EngineError(
                    f"codec {self.spec.name} on {self.engine.describe()}: {checked} of images {bad[:8]} have "
                    "values that are not finite; run the codec with --dtype fp32"
                )
        # On the device tokens are int32, because few operations of PyTorch support uint16.
        return {
            name: array.astype(np.uint16) if name.endswith("indices") else array
            for name, array in results.items()
            if name not in FINITE_CHECKS
        }

    def _run(self, request: CodecRequest) -> dict[str, Array]:
        """Computes one request by itself, in as many batches as it needs."""
        if request.result is not None:
            return request.result
        capacity, compute = self.rows_at_once(request.task), self.compute(request.task)
        starts = range(0, request.rows, capacity)
        batches = (
            DeviceBatch(
                {name: [array[start : start + capacity]] for name, array in request.arrays.items()}, compute
            )
            for start in starts
        )
        outputs: dict[str, list[Array]] = {}
        for start, results in zip(starts, self.stream(batches), strict=True):
            for name, array in self.outputs_of(results, start).items():
                outputs.setdefault(name, []).append(array)
        return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in outputs.items()}

    def _discretize_batch(self, task: Task, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        step, adversarial = task.step, task.adversarial
        x = as_float(inputs["images"])
        size = (x.shape[2], x.shape[3])
        gradients = inputs.get("gradients")
        finite: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        indices = self._encode(x, finite)
        from_q = adversarial and gradients is not None and step.base == "reconstruction"
        q = x
        if from_q or "reconstruction" in task.outputs:
            q = self._decode(indices, size, finite, exact=from_q)
        if adversarial:
            attacked = indices
            if gradients is not None:
                scaled = scaled_gradients(gradients, inputs.get("gradient_scales"))
                attacked = self._encode(perturb(x, q, scaled, step), finite)
            if task.replace_fraction:
                attacked = replace_tokens(attacked, x, task.replace_fraction, task.seed, self.spec.codebook_size)
            if "adversarial" in task.outputs:
                outputs["adversarial"] = self._decode(attacked, size, finite)
            if self.spec.has_tokens:
                # Q is not idempotent: a step from Q(x) is compared with the tokens of Q(x) itself.
                unmoved = self._encode(q, finite) if from_q else indices
                outputs["adversarial_indices"] = attacked
                outputs["tokens_changed"] = attacked.ne(unmoved).flatten(1).float().mean(1)
        outputs["indices"], outputs["reconstruction"] = indices, q
        return finite | {
            name: to_output(name, value, task.output_dtype)
            for name, value in outputs.items()
            if name in task.outputs or name == "tokens_changed"
        }

    def _decode_batch(self, task: Task, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        finite: dict[str, Tensor] = {}
        images = self._decode(inputs["indices"].long(), task.size, finite)
        return finite | {"reconstruction": to_output("reconstruction", images, task.output_dtype)}

    def _encode(self, x: Tensor, finite: dict[str, Tensor]) -> Tensor:
        """Encodes images fp32 [n,3,H,W] to tokens; records in `finite` which images have finite latent vectors."""
        f = self.spec.factor
        below, right = -x.shape[2] % f, -x.shape[3] % f
        indices = self.engine.encode(F.pad(x, (0, right, 0, below), mode="reflect") if below or right else x)
        if not self.engine.returns_images_unchanged:
            record_finite(finite, "finite_latents", indices.ge(0))
        return indices

    def _decode(
        self, indices: Tensor, size: tuple[int, int], finite: dict[str, Tensor], exact: bool = False
    ) -> Tensor:
        """Decodes tokens to images of `size`, and records in `finite` which images are finite."""
        images = self.engine.decode(indices, exact=exact)[:, :, : size[0], : size[1]]
        if self.engine.returns_images_unchanged:
            return images
        # This must happen before clipping, which would turn infinity into white.
        record_finite(finite, "finite_images", images.isfinite())
        return images.clamp(0, 1)


def record_finite(finite: dict[str, Tensor], name: str, elements: Tensor) -> None:
    """Sets finite[name], bool [n], to True for images whose elements [n,...] are all True, in every call so far."""
    images = elements.flatten(1).all(1)
    finite[name] = finite[name] & images if name in finite else images


def scaled_gradients(gradients: Tensor, scales: Tensor | None) -> Tensor:
    """Returns each gradient [n,3,H,W] times its scale [n], as fp32; without scales the gradients alone."""
    g = gradients.float()
    return g if scales is None else g * scales[:, None, None, None]


def to_output(name: str, value: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Converts an output before its copy to the host: images to `dtype`, tokens to int32; shares stay float32."""
    if name.endswith("indices"):
        return value.int()
    return value if name == "tokens_changed" else as_dtype(value, dtype)


def as_float(images: Tensor) -> Tensor:
    """Returns images, uint8 or float, as fp32 in 0..1."""
    if images.dtype != torch.uint8:
        return images.float()
    # The divisor is a tensor, because for a Python number CUDA would multiply by 1/255, which sometimes rounds to a
    # different fp32 than a CPU's division. It is filled on the device, because a copy from the host would wait.
    return images.float().div_(torch.full((), 255.0, device=images.device))


def as_dtype(images: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Returns images in 0..1 as `dtype`; uint8 is rounded to the nearest of 256 levels."""
    if dtype == np.uint8:
        return images.mul(255).round_().to(torch.uint8).contiguous()
    return images.to(torch.float16 if dtype == np.float16 else torch.float32).contiguous()
