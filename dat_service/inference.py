"""From a decoded request to its answer: limits and checks, then the codec's queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dat_client.wire as wire
from dat_client.wire.vocabulary import INPUTS, OUTPUTS, PARAMETERS
from dat_service.settings import Settings
from dat_service.worker import CodecWorker, Reservation
from dat_workers.batching.device_copies import Array
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.errors import DeadlinePassed, InvalidInput, TooLarge
from dat_workers.images.encoded import decode_pictures
from dat_workers.request import CodecRequest, Task, check_outputs, default_outputs, parse_parameters

JSON_BYTES_PER_NUMBER = 20  # a number of a tensor in JSON, with its comma


@dataclass(frozen=True)
class Caller:
    """The caller of a request.

    `flow`: the name under which the fair queue schedules the request. `deadline`: by time.monotonic(), None for
    none. `holder`: the name under which the request takes its share of slots and bytes.
    """

    flow: str = ""
    deadline: float | None = None
    holder: str = ""


@dataclass(frozen=True)
class Answer:
    """Outputs and parameters of a response, and the seconds that its request spent in queue and codec."""

    outputs: dict[str, Array]
    parameters: dict[str, Any]
    queue_s: float
    codec_s: float


async def infer(worker: CodecWorker, request: wire.Request, caller: Caller, reservation: Reservation) -> Answer:
    """Computes an admitted request whose names were checked.

    Raises InvalidInput and TooLarge for an unusable request; Full, DeadlinePassed and EngineError as
    `Batcher.submit`. Cancelling the call takes the request out of the queue.
    """
    images = request.inputs.get("images")
    if images is not None and images.dtype == np.uint8 and len(request.inputs) == 1:
        work = prepare(worker, request, reservation)  # too quick to be worth a thread
    else:
        work = await worker.run_in_thread(lambda: prepare(worker, request, reservation))
    return await compute(worker, work, caller)


async def compute(worker: CodecWorker, work: CodecRequest, caller: Caller) -> Answer:
    """Returns the answer to a request, waiting until the caller's deadline, and counts it."""
    assert worker.discretizer is not None
    result = await _queued(worker, work, caller) if work.result is None else Result(work.result)
    outputs = dict(result.outputs)
    parameters: dict[str, Any] = {"fingerprint": worker.discretizer.fingerprint}
    changed = outputs.pop("tokens_changed", None)
    if changed is not None:
        parameters["tokens_changed"] = float(changed.mean())
    kind = "decode" if work.task.decodes else "adversarial" if work.task.adversarial else "plain"
    worker.metrics.answered(kind, work.rows, result.queue_s, parameters.get("tokens_changed"))
    return Answer(outputs, parameters, result.queue_s, result.codec_s)


async def _queued(worker: CodecWorker, work: CodecRequest, caller: Caller) -> Result:
    future = worker.batcher.submit(work, caller.flow, caller.deadline)
    left_s = None if caller.deadline is None else max(0.0, caller.deadline - time.monotonic())
    try:
        async with asyncio.timeout(left_s):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise DeadlinePassed("the deadline passed before the codec had the answer") from None


def prepare(worker: CodecWorker, request: wire.Request, reservation: Reservation) -> CodecRequest:
    """Checks every limit and value of a request and reserves the bytes of its outputs."""
    discretizer, settings = worker.discretizer, worker.settings
    assert discretizer is not None
    factor = discretizer.spec.factor
    if "images" in request.inputs:
        work = images_work(discretizer, request, settings, reservation)
    else:
        names = [o.name for o in request.outputs]
        others = sorted(set(request.parameters) - {"output_dtype"})
        if others:
            raise InvalidInput("parameters", others, "output_dtype alone, where tokens are decoded")
        if names not in ([], ["reconstruction"]):
            raise InvalidInput("outputs", names, "reconstruction alone, where tokens are decoded")
        indices = request.inputs["indices"]
        check_limits(indices, settings, scale=factor)
        check_json_outputs(request, ["reconstruction"], indices.size * factor**2, factor, settings)
        work = discretizer.prepare_decode(indices, output_dtype=request.parameters.get("output_dtype"))
    if work.result is None:
        reservation.grow(work.rows * output_bytes(work.task, factor))
    return work


def check_names(request: wire.Request) -> None:
    """Raises InvalidInput for inputs, outputs and parameters that no codec has, and for lists as parameters."""
    for name, value in request.parameters.items():
        if name not in PARAMETERS:
            raise InvalidInput("parameters", repr(name), f"of {', '.join(PARAMETERS)}")
        if isinstance(value, list | dict):
            raise InvalidInput(name, "a JSON " + ("list" if isinstance(value, list) else "object"), "one value")
    inputs = list(request.inputs)
    if inputs != ["indices"] and not ("images" in inputs and set(inputs) <= set(INPUTS)):
        raise InvalidInput("inputs", sorted(inputs[:9]), f"either indices alone, or {', '.join(INPUTS)}")
    check_outputs([o.name for o in request.outputs], OUTPUTS)


def images_work(
    discretizer: Discretizer, request: wire.Request, settings: Settings, reservation: Reservation
) -> CodecRequest:
    """Checks a request with `images`; encoded pictures are decoded."""
    parameters, inputs = request.parameters, request.inputs
    names = [o.name for o in request.outputs]
    check_outputs(names, discretizer.outputs)
    images = inputs["images"]
    check_limits(images, settings)
    if images.dtype == object:
        images = decode_pictures(images, max_image_pixels=settings.max_image_pixels, max_pixels=settings.max_pixels)
        reservation.grow(images.nbytes)
    parsed = parse_parameters(parameters)
    names = names or list(default_outputs("gradients" in inputs or parsed.replace_fraction > 0))
    check_json_outputs(request, names, images.size // 3, discretizer.spec.factor, settings)
    return discretizer.prepare(
        images,
        inputs.get("gradients"),
        gradient_scales=inputs.get("gradient_scales"),
        parameters=parsed,
        outputs=names,
    )


def nbytes_of(array: Array) -> int:
    """Returns the bytes of a tensor; for BYTES those of its elements."""
    return int(sum(map(len, array.reshape(-1).tolist())) if array.dtype == object else array.nbytes)


def output_bytes(task: Task, factor: int) -> int:
    """Returns the bytes of one row of the outputs."""
    height, width = task.size
    picture = 3 * height * width * task.output_dtype.itemsize
    tokens = 2 * -(-height // factor) * -(-width // factor)
    return sum(tokens if name.endswith("indices") else picture for name in task.outputs)


def check_json_outputs(
    request: wire.Request, names: Sequence[str], pixels: int, factor: int, settings: Settings
) -> None:
    """Raises TooLarge if the outputs of `pixels` pixels that are wanted as JSON might exceed its limit."""
    as_json = [name for name in names if not request.wants_binary(name)]
    numbers = sum(pixels // factor**2 if name.endswith("indices") else 3 * pixels for name in as_json)
    nbytes = JSON_BYTES_PER_NUMBER * numbers
    if nbytes > settings.max_json_bytes:
        raise TooLarge(
            "outputs",
            f"{', '.join(as_json)} as JSON, up to {nbytes} bytes",
            f"at most {settings.max_json_bytes} bytes of JSON; ask for binary data (binary_data_output)",
        )


def check_limits(tensor: Array, settings: Settings, scale: int = 1) -> None:
    """Raises TooLarge for too many images or pixels; whether the shape is [N,...,H,W] is checked later.

    `scale` is the side of one element in pixels: 1 for images, f for tokens.
    """
    field = "images" if scale == 1 else "indices"
    encoded = tensor.dtype == object
    if encoded and tensor.ndim != 1:
        raise InvalidInput(field, f"BYTES of shape {list(tensor.shape)}", "BYTES [N]")
    if tensor.ndim and len(tensor) > settings.max_images:
        raise TooLarge(field, f"{len(tensor)} images", f"at most {settings.max_images} images")
    if encoded and not len(tensor):
        raise InvalidInput(field, "shape [0]", "BYTES [N] with N of 1 or more")
    if encoded or tensor.ndim < 2:
        return
    height, width = tensor.shape[-2] * scale, tensor.shape[-1] * scale
    pixels, most = height * width, settings.max_image_pixels
    if pixels > most:
        raise TooLarge(field, f"{width}x{height} = {pixels} pixels", f"at most {most} pixels an image")
    total, most = pixels * len(tensor), settings.max_pixels
    if total > most:
        raise TooLarge(field, f"{total} pixels", f"at most {most} pixels in a request")
