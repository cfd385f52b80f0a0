"""From a decoded request to its answer, whichever door it came through: limits, checks, the codec's queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dat_client.wire as wire
from dat_service.settings import Settings
from dat_service.worker import CodecWorker, Place
from dat_workers.batching.device_copies import Array
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.errors import DeadlinePassed, InvalidInput, TooLarge
from dat_workers.images.encoded import decode_pictures
from dat_workers.perturbation import Step, number
from dat_workers.request import OUTPUTS, Task, Work, check_outputs, default_outputs

PARAMETERS = ("preset", "base", "alpha", "normalize", "epsilon", "replace_fraction", "seed", "output_dtype")
INPUTS = ("images", "gradients", "gradient_scales")


@dataclass(frozen=True)
class Caller:
    """Who asks: `flow` has its turn in the queue, `deadline` by time.monotonic(), None for none; `holder` shares
    places and bytes with the others.
    """

    flow: str = ""
    deadline: float | None = None
    holder: str = ""


@dataclass(frozen=True)
class Answer:
    """Outputs and parameters of a response, and the seconds that it waited for the codec and was in it."""

    outputs: dict[str, Array]
    parameters: dict[str, Any]
    queue_s: float
    codec_s: float


async def infer(worker: CodecWorker, request: wire.Request, caller: Caller, place: Place) -> Answer:
    """What the codec makes of a request that holds a place.

    Raises InvalidInput and TooLarge for the request's faults; Full, DeadlinePassed and EngineError as
    `Batcher.submit`. Cancelling it takes the request out of the queue.
    """
    discretizer = worker.discretizer
    assert discretizer is not None
    images = request.inputs.get("images")
    if images is not None and images.dtype == np.uint8 and len(request.inputs) == 1:
        work = prepare(discretizer, request, worker.settings, place)  # nothing that takes time
    else:
        work = await worker.aside(lambda: prepare(discretizer, request, worker.settings, place))
    result = await compute(worker, work, caller)
    parameters: dict[str, Any] = {"fingerprint": discretizer.fingerprint}
    outputs = dict(result.outputs)
    changed = outputs.pop("tokens_changed", None)
    share = None if changed is None else float(changed.mean())
    if share is not None:
        parameters["tokens_changed"] = share
    kind = "decode" if work.task.decodes else "adversarial" if work.task.adversarial else "plain"
    worker.metrics.answered(kind, work.rows, result.queue_s, share)
    return Answer(outputs, parameters, result.queue_s, result.codec_s)


async def compute(worker: CodecWorker, work: Work, caller: Caller) -> Result:
    """The result of a work, waited for until the caller's deadline."""
    if work.result is not None:
        return Result(work.result)
    future = worker.submit(work, caller.flow, caller.deadline)
    left_s = None if caller.deadline is None else max(0.0, caller.deadline - time.monotonic())
    try:
        async with asyncio.timeout(left_s):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise DeadlinePassed("the deadline passed before the codec had the answer") from None


def prepare(discretizer: Discretizer, request: wire.Request, settings: Settings, place: Place) -> Work:
    """The request as work, every limit and value checked, and room held for its answer."""
    check_names(request)
    parameters, inputs = request.parameters, request.inputs
    names = [o.name for o in request.outputs]
    if "images" in inputs:
        work = images_work(discretizer, request, names, settings, place)
    else:
        others = sorted(set(parameters) - {"output_dtype"})
        if others:
            raise InvalidInput("parameters", others, "output_dtype alone, where tokens are decoded")
        if names not in ([], ["reconstruction"]):
            raise InvalidInput("outputs", names, "reconstruction alone, where tokens are decoded")
        indices = inputs["indices"]
        check_limits(indices, settings, scale=discretizer.spec.factor)
        pixels = indices.size * discretizer.spec.factor**2
        check_json_outputs(request, ["reconstruction"], pixels, discretizer.spec.factor, settings)
        work = discretizer.decode_work(indices, output_dtype=parameters.get("output_dtype"))
    if work.result is None:
        place.grow(work.rows * output_bytes(work.task, discretizer.spec.factor))
    return work


def check_names(request: wire.Request) -> None:
    """Raises InvalidInput for parameters, inputs and outputs that no codec has, and parameters of many parts."""
    for name, value in request.parameters.items():
        if name not in PARAMETERS:
            raise InvalidInput("parameters", repr(name), f"of {', '.join(PARAMETERS)}")
        if isinstance(value, list | dict):
            raise InvalidInput(name, "a JSON " + ("list" if isinstance(value, list) else "object"), "one value")
    inputs = list(request.inputs)
    if inputs != ["indices"] and not ("images" in inputs and set(inputs) <= set(INPUTS)):
        raise InvalidInput("inputs", sorted(inputs[:9]), f"either indices alone, or {', '.join(INPUTS)}")
    check_outputs([o.name for o in request.outputs], OUTPUTS)


def size(array: Array) -> int:
    """Bytes of an array; of one of encoded pictures, of the pictures."""
    return int(sum(map(len, array.reshape(-1).tolist())) if array.dtype == object else array.nbytes)


def images_work(
    discretizer: Discretizer, request: wire.Request, names: list[str], settings: Settings, place: Place
) -> Work:
    """The work of a request with `images`, decoded where they are encoded."""
    parameters, inputs = request.parameters, request.inputs
    check_outputs(names, discretizer.outputs)
    images = inputs["images"]
    check_limits(images, settings)
    if images.dtype == object:
        images = decode_pictures(images, max_image_pixels=settings.max_image_pixels, max_pixels=settings.max_pixels)
        place.grow(images.nbytes)
    replaced = fraction(parameters)
    names = names or list(default_outputs("gradients" in inputs or replaced > 0))
    check_json_outputs(request, names, images.size // 3, discretizer.spec.factor, settings)
    return discretizer.work(
        images,
        inputs.get("gradients"),
        gradient_scales=inputs.get("gradient_scales"),
        step=Step.from_parameters(parameters),
        replace_fraction=replaced,
        seed=whole_number(parameters, "seed"),
        outputs=names,
        output_dtype=parameters.get("output_dtype"),
    )


def output_bytes(task: Task, factor: int) -> int:
    """Bytes of one row of the answer."""
    height, width = task.size
    picture, tokens = 3 * height * width * task.dtype.itemsize, 2 * -(-height // factor) * -(-width // factor)
    return sum(tokens if name.endswith("indices") else picture for name in task.outputs)


def fraction(parameters: Mapping[str, Any]) -> float:
    """`replace_fraction`, 0 where it is not given."""
    value = number(parameters, "replace_fraction") if "replace_fraction" in parameters else 0.0
    if not 0 <= value <= 1:
        raise InvalidInput("replace_fraction", value, "0 to 1")
    return value


def whole_number(parameters: Mapping[str, Any], name: str) -> int:
    """A parameter that is a whole number of 0 or more; 0 where it is not given."""
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise InvalidInput(name, repr(value), "a whole number, 0 to 2^63 - 1")
    return value


def check_json_outputs(
    request: wire.Request, names: Sequence[str], pixels: int, factor: int, settings: Settings
) -> None:
    """Raises TooLarge where outputs of about `pixels` pixels are asked for as JSON, taken as 20 bytes a number."""
    as_json = [name for name in names if not request.wants_binary(name)]
    numbers = sum(pixels // factor**2 if name.endswith("indices") else 3 * pixels for name in as_json)
    if 20 * numbers > settings.max_json_bytes:
        raise TooLarge(
            "outputs",
            f"{', '.join(as_json)} as JSON, up to {20 * numbers} bytes",
            f"at most {settings.max_json_bytes} bytes of JSON; ask for binary data (binary_data_output)",
        )


def check_limits(tensor: np.ndarray[Any, Any], settings: Settings, scale: int = 1) -> None:
    """Raises TooLarge for more images or pixels than are taken; what is not [N,...,H,W] is judged later.

    `scale` is the side in pixels of one element (f for tokens).
    """
    field = "images" if scale == 1 else "indices"
    if tensor.dtype == object and tensor.ndim != 1:
        raise InvalidInput(field, f"BYTES of shape {list(tensor.shape)}", "BYTES [N]")
    if tensor.ndim and len(tensor) > settings.max_images:
        raise TooLarge(field, f"{len(tensor)} images", f"at most {settings.max_images} images")
    if tensor.dtype == object:
        if not len(tensor):
            raise InvalidInput(field, "shape [0]", "BYTES [N] with N of 1 or more")
        return
    if tensor.ndim < 2:
        return
    height, width = tensor.shape[-2] * scale, tensor.shape[-1] * scale
    pixels = height * width
    if pixels > settings.max_image_pixels:
        raise TooLarge(
            field,
            f"{width}x{height} = {pixels} pixels",
            f"at most {settings.max_image_pixels} pixels an image",
        )
    if pixels * len(tensor) > settings.max_pixels:
        raise TooLarge(
            field, f"{pixels * len(tensor)} pixels", f"at most {settings.max_pixels} pixels in a request"
        )
