"""Serves one codec over the Open Inference Protocol v2, with the binary tensor data extension.

Specification: the KServe "Open Inference Protocol" REST description and Triton's "Binary tensor data extension".
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

import dat_client.wire as wire
from dat_client.errors import shown
from dat_client.wire.headers import HEADER_LENGTH
from dat_service import __version__
from dat_service.http.auth import require_key
from dat_service.http.exchange import Reply, exchange
from dat_service.inference import Answer, Caller, CheckedRequest, check_request, infer, nbytes_of
from dat_service.worker import CodecWorker, Reservation
from dat_workers.discretizer import Discretizer
from dat_workers.errors import TooLarge

SERVER_METADATA = {"name": "discrete-augmentation", "version": __version__, "extensions": ["binary_tensor_data"]}
SMALL_JSON = 64 * 1024  # in bytes; JSON longer than this is parsed in a thread

TAGS: list[str | Enum] = ["Open Inference Protocol v2"]

router = APIRouter(prefix="/v2", tags=TAGS)
codec_router = APIRouter(prefix="/v2/models/{codec}", tags=TAGS, dependencies=[Depends(require_key)])


class NotServed(LookupError):
    """The request names a codec, or a version of the codec, that this service does not serve (HTTP 404)."""

    def __init__(self, field: str, value: str, known: str) -> None:
        self.field, self.value, self.limit = field, shown(value), f"served here: {known}"
        super().__init__(f"{field} {self.value} is not served here; the {field} {known} is")


def worker_of(request: Request, codec: str, version: str | None = None) -> CodecWorker:
    """Returns the worker of this process.

    Raises NotServed if the worker serves a codec other than `codec`, or a version of it other than `version`.
    """
    worker: CodecWorker = request.app.state.worker
    if codec != worker.settings.codec:
        raise NotServed("codec", codec, worker.settings.codec)
    if version is not None and worker.discretizer is not None and version != model_version(worker.discretizer):
        raise NotServed("version", version, model_version(worker.discretizer))
    return worker


def model_version(discretizer: Discretizer) -> str:
    """Returns the codec's version, the first 12 characters of its fingerprint, which depends on the weights."""
    return discretizer.fingerprint[:12]


@router.get("", summary="Server metadata")
async def server_metadata() -> dict[str, Any]:
    return dict(SERVER_METADATA)


@router.get("/health/live", summary="Status 200 if the codec can compute, 503 after it has failed or hung")
async def live(request: Request, response: Response) -> dict[str, bool]:
    worker: CodecWorker = request.app.state.worker
    response.status_code = 200 if worker.healthy else 503
    return {"live": worker.healthy}


@router.get("/health/ready", summary="Status 200 if the codec is loaded and warm, else 503")
async def ready(request: Request, response: Response) -> dict[str, bool]:
    worker: CodecWorker = request.app.state.worker
    response.status_code = 200 if worker.ready else 503
    return {"ready": worker.ready}


@codec_router.get("", summary="Model metadata")
@codec_router.get("/versions/{version}", include_in_schema=False)
async def model_metadata(request: Request, codec: str, version: str | None = None) -> dict[str, Any]:
    discretizer = worker_of(request, codec, version).discretizer
    assert discretizer is not None
    spec, engine = discretizer.spec, discretizer.engine.describe()
    images = {"datatype": "UINT8", "shape": [-1, 3, -1, -1]}
    tokens = {"datatype": "UINT16", "shape": [-1, -1, -1]}
    inputs: list[dict[str, Any]] = [
        {"name": "images", **images},
        {"name": "gradients", "datatype": "FP16", "shape": [-1, 3, -1, -1]},
        {"name": "gradient_scales", "datatype": "FP32", "shape": [-1]},
    ]
    outputs: list[dict[str, Any]] = [{"name": name, **images} for name in ("reconstruction", "adversarial")]
    if spec.has_tokens:
        inputs.append({"name": "indices", **tokens})
        outputs += [{"name": name, **tokens} for name in ("indices", "adversarial_indices")]
    return {
        "name": codec,
        "versions": [model_version(discretizer)],
        "platform": f"dat_{engine['engine']}",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {
            "fingerprint": discretizer.fingerprint,
            "factor": spec.factor,
            "codebook_size": spec.codebook_size,
            "latent_dim": spec.latent_dim,
            **engine,
        },
    }


@codec_router.get("/ready", summary="Status 200 if this codec is loaded and warm, else 503")
@codec_router.get("/versions/{version}/ready", include_in_schema=False)
async def model_ready(
    request: Request, response: Response, codec: str, version: str | None = None
) -> dict[str, Any]:
    worker = worker_of(request, codec, version)
    response.status_code = 200 if worker.ready else 503
    return {"name": codec, "ready": worker.ready}


INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": {"type": "object", "required": ["inputs"]}},
        },
    }
}


@codec_router.post("/infer", summary="Discretize images, or decode tokens", openapi_extra=INFER_BODY)
@codec_router.post("/versions/{version}/infer", include_in_schema=False)
async def infer_over_http(request: Request, codec: str, version: str | None = None) -> Response:
    """Runs the codec on images or tokens.

    Inputs that discretize images: `images` as UINT8 [N,3,H,W], as FP16 or FP32 [N,3,H,W] in 0..1, or as BYTES [N]
    (JPEG, PNG or WebP files of the same size in pixels). `gradients` (FP16, FP32 or INT8, in the shape of the
    images) and `gradient_scales` (FP32 [N]) are optional. Input that decodes tokens: `indices` alone, as UINT16 or
    INT32 [N,h,w].
    Outputs: `reconstruction`, `adversarial`, `indices`, `adversarial_indices`. If the request names no output, the
    response has `reconstruction`, and if the request has gradients or a `replace_fraction` above 0, also
    `adversarial`.
    Parameters: `preset` (easyrobust, the default, or paper), `base`, `alpha`, `normalize`, `epsilon`,
    `replace_fraction`, `seed`, and `output_dtype` (UINT8, FP16 or FP32; by default the datatype of `images`, or
    UINT8 for BYTES and tokens).
    The response's parameter `tokens_changed` is the share of tokens that the adversarial step changed.
    """
    worker = worker_of(request, codec, version)

    async def inference(body: memoryview, caller: Caller, reservation: Reservation) -> Reply:
        checked = await decode(worker, body, request.headers.get(HEADER_LENGTH), reservation)
        return await encode(worker, checked.message, await infer(worker, checked, caller, reservation))

    return await exchange(request, worker, inference)


async def decode(
    worker: CodecWorker, body: memoryview, header_length: str | None, reservation: Reservation
) -> CheckedRequest:
    """Returns the request in a body, after checking its names and parameters.

    The body is decoded in a thread if that may take long. Parsed JSON takes up to 24 times the memory of its text.
    The decoded request is small, except for its tensors. The bytes of tensors that are not views of the body are
    added to the reservation. Raises WireError for a malformed body, InvalidInput and TooLarge for an unusable
    request, and Full if the bytes are not free now.
    """
    settings = worker.settings
    text = (header_length or "").strip()
    json_bytes = int(text) if text.isdecimal() and len(text) < 20 else len(body)
    if settings.max_json_bytes < json_bytes <= len(body):
        raise TooLarge("JSON part", f"{json_bytes} bytes", f"at most {settings.max_json_bytes} bytes; send binary")

    def parse() -> CheckedRequest:
        message = wire.decode_request(body, header_length, max_strings=settings.max_images)
        # This check is in the same thread as the parsing. Otherwise the large parsed JSON of many requests would
        # stay in memory while the requests wait for another thread.
        request = check_request(message)
        copies = [array for array in message.inputs.values() if not np.may_share_memory(array, body)]
        reservation.grow(sum(map(nbytes_of, copies)))
        return request

    if json_bytes <= SMALL_JSON:
        document = body[:json_bytes].tobytes()
        # Copying BYTES elements out of the body takes long. An escape such as \u0042 may hide the word BYTES.
        if b"BYTES" not in document and b"\\" not in document:
            return parse()
    return await worker.run_in_thread(parse)


async def encode(worker: CodecWorker, message: wire.Request, answer: Answer) -> Reply:
    """Returns the reply that encodes an answer as the request wants it; JSON tensors are written in a thread."""
    assert worker.discretizer is not None
    version = model_version(worker.discretizer)
    binary = {name: message.wants_binary(name) for name in answer.outputs}

    def write() -> wire.Encoded:
        return wire.encode_response(
            worker.settings.codec,
            answer.outputs,
            model_version=version,
            id=message.id,
            parameters=answer.parameters,
            binary=binary,
        )

    buffers, header_length = write() if all(binary.values()) else await worker.run_in_thread(write)
    return Reply(buffers, answer, {HEADER_LENGTH: str(header_length)})
