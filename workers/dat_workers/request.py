"""Checks codec requests, and describes a checked request: its arrays, and what to compute from each row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dat_client.errors import shown
from dat_client.wire.scan import largest_magnitudes, range_outside_0_1
from dat_client.wire.tensors import Array
from dat_client.wire.vocabulary import (
    GRADIENT_DTYPES,
    INDEX_DTYPES,
    OUTPUT_DTYPES,
    PARAMETERS,
    violated_limit,
    with_defaults,
)
from dat_workers.errors import InvalidInput
from dat_workers.perturbation import DEFAULT_STEP, NO_STEP, Step


@dataclass(frozen=True)
class Parameters:
    """The parsed parameters of a request.

    `output_dtype` is the datatype of the returned images: UINT8, FP16 or FP32. None means the datatype of the
    images in the request, or UINT8 if the request has tokens instead.
    """

    step: Step = DEFAULT_STEP
    replace_fraction: float = 0.0
    seed: int = 0
    output_dtype: str | None = None


DEFAULT_PARAMETERS = Parameters()


def parse_parameters(parameters: Mapping[str, Any]) -> Parameters:
    """Checks the names and values of a request's parameters; a preset (`easyrobust` by default) fills in the step.

    >>> parse_parameters({"preset": "easyrobust", "alpha": 0.2}).step
    Step(base='reconstruction', normalize='l2', alpha=0.2, epsilon=None)

    Raises InvalidInput for a parameter that does not exist, and for a value outside the parameter's limit.
    """
    for name, value in parameters.items():
        if name not in PARAMETERS:
            message = f"parameters: {shown(name)} does not exist; use only {', '.join(PARAMETERS)}"
            raise InvalidInput("parameters", shown(name), f"only {', '.join(PARAMETERS)}", message)
        check_parameter(name, value)
    values = with_defaults(parameters)
    epsilon = values["epsilon"]
    step = Step(
        values["base"], values["normalize"], float(values["alpha"]), None if epsilon is None else float(epsilon)
    )
    return Parameters(step, float(values["replace_fraction"]), values["seed"], values["output_dtype"])


def check_parameter(name: str, value: Any) -> None:
    """Raises InvalidInput if `value` is outside the limit of the parameter `name`."""
    if limit := violated_limit(name, value):
        is_plain = value is None or isinstance(value, bool | int | float)
        raise InvalidInput(name, value if is_plain and value == value else shown(value), limit)


@dataclass(frozen=True)
class Task:
    """Describes what to compute from a row. Rows with equal tasks may share a batch.

    size: height and width of the resulting images. inputs: name and dtype of each array. output_dtype: the dtype of
    the resulting images.
    """

    size: tuple[int, int]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    output_dtype: np.dtype[Any]
    step: Step = NO_STEP
    replace_fraction: float = 0.0
    seed: int = 0

    @property
    def decodes(self) -> bool:
        """True if the request holds tokens, which are only decoded."""
        return self.inputs[0][0] == "indices"

    @property
    def adversarial(self) -> bool:
        """True if an adversarial output is requested."""
        return any(name.startswith("adversarial") for name in self.outputs)

    @property
    def cost(self) -> float:
        """The cost of one row: (passes through the encoder + 2 x passes through the decoder) x pixels."""
        encodes, decodes = (0, 1) if self.decodes else (1, int("reconstruction" in self.outputs))
        if self.adversarial:
            from_q = self.step.base == "reconstruction"
            encodes += 2 if from_q else 1
            decodes = max(decodes, from_q) + int("adversarial" in self.outputs)
        return (encodes + 2 * decodes) * float(self.size[0] * self.size[1])


@dataclass(frozen=True)
class CodecRequest:
    """A request that passed all checks: `arrays` by name, each [N,...], and the task of their rows.

    If the outputs are known without running the codec, `result` holds them; otherwise it is None.
    """

    task: Task
    arrays: dict[str, Array]
    result: dict[str, Array] | None = None

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))


def pick_output_dtype(name: str | None, default: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the numpy dtype that the parameter `output_dtype` names. Raises InvalidInput if it names none."""
    check_parameter("output_dtype", name)
    return default if name is None else OUTPUT_DTYPES[name]


def check_outputs(outputs: Collection[str], known: Collection[str]) -> None:
    """Raises InvalidInput for an output that is not among `known`."""
    for name in outputs:
        if name not in known:
            raise InvalidInput("outputs", shown(name), f"one of {', '.join(known)}")


def check_images(images: Array, least_side: int) -> None:
    """Raises InvalidInput unless `images` is [N,3,H,W], uint8 or float16/32 in 0..1, with N of 1 or more.

    Both sides must have `least_side` pixels or more.
    """
    if images.dtype not in OUTPUT_DTYPES.values():
        raise InvalidInput("images", f"dtype {images.dtype}", "UINT8, FP16 or FP32")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) < 1:
        raise InvalidInput("images", f"shape {list(images.shape)}", "[N,3,H,W] with N of 1 or more")
    if min(images.shape[2:]) < least_side:
        raise InvalidInput(
            "images", f"{images.shape[2]}x{images.shape[3]} pixels", f"sides of {least_side} or more"
        )
    if images.dtype != np.uint8 and (outside := range_outside_0_1(images)):
        low, high = outside
        raise InvalidInput("images", f"a value range of {low:.9g}..{high:.9g}", "finite values in 0..1")


def check_gradients(gradients: Array | None, scales: Array | None, shape: tuple[int, ...]) -> None:
    """Raises InvalidInput unless `gradients` has the images' shape and `scales` is None or has one per image."""
    if gradients is None:
        if scales is not None:
            raise InvalidInput("gradient_scales", "given without gradients", "gradients to scale")
        return
    if gradients.dtype not in GRADIENT_DTYPES.values():
        raise InvalidInput("gradients", f"dtype {gradients.dtype}", "FP16, FP32, or INT8 with gradient_scales")
    if gradients.shape != shape:
        raise InvalidInput("gradients", f"shape {list(gradients.shape)}", f"{list(shape)}, the shape of the images")
    largest = largest_magnitudes(gradients)
    if not np.isfinite(largest).all():
        raise InvalidInput("gradients", "NaN or infinity", "finite values")
    if scales is None:
        if gradients.dtype == np.int8:
            raise InvalidInput("gradient_scales", "missing", "float32 [N], because gradients are INT8")
        return
    if scales.dtype != np.float32 or scales.shape != shape[:1]:
        raise InvalidInput("gradient_scales", f"{scales.dtype} {list(scales.shape)}", f"float32 [{shape[0]}]")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise InvalidInput(
            "gradient_scales", "a value that is negative or not finite", "finite values of 0 or more"
        )
    if (largest * scales).max() > np.finfo(np.float32).max:
        raise InvalidInput("gradient_scales", f"up to {scales.max():g}", "scaled gradients that are finite in fp32")


def check_indices(indices: Array, codec: str, codebook_size: int) -> None:
    """Raises InvalidInput unless `indices` is uint16 or int32 [N,h,w], each in 0..codebook_size-1."""
    if indices.dtype not in INDEX_DTYPES.values():
        raise InvalidInput("indices", f"dtype {indices.dtype}", "UINT16 or INT32")
    if indices.ndim != 3 or min(indices.shape) < 1:
        raise InvalidInput("indices", f"shape {list(indices.shape)}", "[N,h,w], with N, h and w of 1 or more")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= codebook_size:
        wrong = low if low < 0 else high
        raise InvalidInput("indices", wrong, f"0 to {codebook_size - 1} (codec {codec})")
