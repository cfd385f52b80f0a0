"""Computes the answer to a decoded request: checks its values and limits, then queues it for the codec."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dat_client.wire as wire
from dat_client.errors import shown
from dat_client.wire.tensors import Array
from dat_client.wire.vocabulary import ATTACK_IS_MISSING, INPUTS, OUTPUTS, default_outputs, step_without_attack
from dat_service.settings import Settings
from dat_service.worker import CodecWorker, Reservation
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.errors import DeadlinePassed, InvalidInput, TooLarge
from dat_workers.images.encoded import decode_pictures
from dat_workers.request import CodecRequest, Parameters, Task, check_outputs, parse_parameters

JSON_BYTES_PER_NUMBER = 20  # an assumption about one number of a tensor in JSON, including its comma


@dataclass(frozen=True)
class Caller:
    """The caller of a request.

    `flow` is the name under which the fair queue schedules the request. `deadline` is a time on the clock of
    time.monotonic(), or None if the request has no deadline. `holder` is the name to which the slot and the bytes
    of the request are charged.
    """

    flow: str = ""
    deadline: float | None = None
    holder: str = ""


@dataclass(frozen=True)
class Answer:
    """The outputs and parameters of a response, and the seconds its request spent in the queue and in the codec."""

    outputs: dict[str, Array]
    parameters: dict[str, Any]
    queue_s: float
    codec_s: float


@dataclass(frozen=True)
class CheckedRequest:
    """A decoded request whose inputs, outputs and parameters have valid names, and whose parameters are usable."""

    message: wire.Request
    parameters: Parameters

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs that the request asks for; empty if it names none."""
        return [output.name for output in self.message.outputs]


def check_request(message: wire.Request) -> CheckedRequest:
    """Returns the request with its parsed parameters.

    Raises InvalidInput for names of inputs, outputs or parameters that no codec has, and for unusable parameters.
    """
    parameters = parse_parameters(message.parameters)
    names = list(message.inputs)
    if names != ["indices"] and not ("images" in names and set(names) <= set(INPUTS)):
        raise InvalidInput(
            "inputs", shown(sorted(names)), f"indices alone, or images and any of {', '.join(INPUTS)}"
        )
    request = CheckedRequest(message, parameters)
    check_outputs(request.output_names, OUTPUTS)
    return request


async def infer(worker: CodecWorker, request: CheckedRequest, caller: Caller, reservation: Reservation) -> Answer:
    """Computes the answer to an admitted request.

    Raises InvalidInput and TooLarge for an unusable request, and Full, DeadlinePassed and EngineError where
    `Batcher.submit` does. Cancelling the call takes the request out of the queue.
    """
    inputs = request.message.inputs
    if len(inputs) == 1 and "images" in inputs and inputs["images"].dtype == np.uint8:
        codec_request = prepare(worker, request, reservation)  # this takes less time than a change of threads
    else:
        codec_request = await worker.run_in_thread(lambda: prepare(worker, request, reservation))
    return await compute(worker, codec_request, caller)


async def compute(worker: CodecWorker, request: CodecRequest, caller: Caller) -> Answer:
    """Returns the answer to a prepared request and counts it in the metrics.

    Raises DeadlinePassed if the codec has no answer by the caller's deadline.
    """
    assert worker.discretizer is not None
    result = await _queued(worker, request, caller) if request.result is None else Result(request.result)
    outputs = dict(result.outputs)
    parameters: dict[str, Any] = {"fingerprint": worker.discretizer.fingerprint}
    changed = outputs.pop("tokens_changed", None)
    if changed is not None:
        parameters["tokens_changed"] = float(changed.mean())
    kind = "decode" if request.task.decodes else "adversarial" if request.task.adversarial else "plain"
    worker.metrics.answered(kind, request.rows, result.queue_s, parameters.get("tokens_changed"))
    return Answer(outputs, parameters, result.queue_s, result.codec_s)


async def _queued(worker: CodecWorker, request: CodecRequest, caller: Caller) -> Result:
    future = worker.batcher.submit(request, caller.flow, caller.deadline)
    left_s = None if caller.deadline is None else max(0.0, caller.deadline - time.monotonic())
    try:
        async with asyncio.timeout(left_s):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise DeadlinePassed("the deadline passed before the codec had the answer") from None


def prepare(worker: CodecWorker, request: CheckedRequest, reservation: Reservation) -> CodecRequest:
    """Returns the request in the form that the batcher takes, and reserves the bytes of its outputs.

    Raises InvalidInput or TooLarge if a value or a size is not allowed, and Full if the bytes are not free now.
    """
    discretizer = worker.discretizer
    assert discretizer is not None
    if "images" in request.message.inputs:
        codec_request = _prepare_images(discretizer, request, worker.settings, reservation)
    else:
        codec_request = _prepare_indices(discretizer, request, worker.settings)
    if codec_request.result is None:
        reservation.grow(codec_request.rows * output_bytes(codec_request.task, discretizer.spec.factor))
    return codec_request


def _prepare_images(
    discretizer: Discretizer, request: CheckedRequest, settings: Settings, reservation: Reservation
) -> CodecRequest:
    inputs, names = request.message.inputs, request.output_names
    check_outputs(names, discretizer.outputs)
    if idle := step_without_attack(request.message.parameters, "gradients" in inputs):
        raise InvalidInput(", ".join(idle), "a value without an attack", ATTACK_IS_MISSING)
    images = inputs["images"]
    check_limits(images, settings)
    if images.dtype == object:
        images = decode_pictures(images, max_image_pixels=settings.max_image_pixels, max_pixels=settings.max_pixels)
        reservation.grow(images.nbytes)
    names = names or list(default_outputs("gradients" in inputs or request.parameters.replace_fraction > 0))
    check_json_outputs(request.message, names, images.size // 3, discretizer.spec.factor, settings)
    return discretizer.prepare(
        images,
        inputs.get("gradients"),
        gradient_scales=inputs.get("gradient_scales"),
        parameters=request.parameters,
        outputs=names,
    )


def _prepare_indices(discretizer: Discretizer, request: CheckedRequest, settings: Settings) -> CodecRequest:
    if others := sorted(set(request.message.parameters) - {"output_dtype"}):
        raise InvalidInput("parameters", others, "no parameter but output_dtype when tokens are decoded")
    if request.output_names not in ([], ["reconstruction"]):
        raise InvalidInput("outputs", request.output_names, "no output but reconstruction when tokens are decoded")
    indices, factor = request.message.inputs["indices"], discretizer.spec.factor
    check_limits(indices, settings, scale=factor)
    check_json_outputs(request.message, ["reconstruction"], indices.size * factor**2, factor, settings)
    return discretizer.prepare_decode(indices, output_dtype=request.parameters.output_dtype)


def nbytes_of(array: Array) -> int:
    """Returns the size of a tensor in bytes; for the datatype BYTES, the sum of the sizes of its elements."""
    return int(sum(map(len, array.reshape(-1).tolist())) if array.dtype == object else array.nbytes)


def output_bytes(task: Task, factor: int) -> int:
    """Returns the number of bytes that the outputs of one image take, all outputs together."""
    height, width = task.size
    picture = 3 * height * width * task.output_dtype.itemsize
    tokens = 2 * -(-height // factor) * -(-width // factor)
    return sum(tokens if name.endswith("indices") else picture for name in task.outputs)


def check_json_outputs(
    request: wire.Request, names: Sequence[str], pixels: int, factor: int, settings: Settings
) -> None:
    """Raises TooLarge if the outputs that the request wants as JSON might exceed the limit on JSON.

    `pixels` is the number of pixels of all images of the request together.
    """
    as_json = [name for name in names if not request.wants_binary(name)]
    numbers = sum(pixels // factor**2 if name.endswith("indices") else 3 * pixels for name in as_json)
    nbytes = JSON_BYTES_PER_NUMBER * numbers
    if nbytes > settings.max_json_bytes:
        raise TooLarge(
            "outputs",
            f"{', '.join(as_json)} as JSON, up to {nbytes} bytes",
            f"at most {settings.max_json_bytes} bytes of JSON; request binary data instead (binary_data_output)",
        )


def check_limits(tensor: Array, settings: Settings, scale: int = 1) -> None:
    """Raises TooLarge if the tensor stands for too many images or pixels.

    Raises InvalidInput if a tensor of encoded pictures does not have the shape [N] with N of 1 or more. The shapes
    of all other tensors are checked later. `scale` is the side in pixels of the square that one element of the
    tensor stands for: 1 for images, f for tokens.
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
        raise TooLarge(field, f"{width}x{height} = {pixels} pixels", f"at most {most} pixels for each image")
    total, most = pixels * len(tensor), settings.max_pixels
    if total > most:
        raise TooLarge(field, f"{total} pixels", f"at most {most} pixels for all images of a request")
