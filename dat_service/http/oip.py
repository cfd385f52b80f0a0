"""Open Inference Protocol v2 with the binary tensor data extension, over one codec.

Specification: the KServe "Open Inference Protocol" REST description and Triton's "Binary tensor data extension".
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

import dat_client.wire as wire
from dat_service import __version__
from dat_service.http.auth import require_key
from dat_service.http.body import BuffersResponse, announced_length, read_body, while_connected
from dat_service.inference import Answer, Caller, check_names, infer, size
from dat_service.worker import CodecWorker, Place
from dat_workers.discretizer import Discretizer
from dat_workers.errors import InvalidInput, TooLarge

SERVER_METADATA = {"name": "discrete-augmentation", "version": __version__, "extensions": ["binary_tensor_data"]}
SMALL_JSON = 64 * 1024  # bytes; what is larger is read and written beside the event loop

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])


class UnknownCodec(LookupError):
    """This service holds another codec, or another version of it (HTTP 404)."""

    def __init__(self, field: str, value: str, known: str) -> None:
        self.field, self.value, self.limit = field, value[:80], f"served here: {known}"
        super().__init__(f"{field} {self.value!r} is not served here; {known} is")


def served(request: Request, codec: str, version: str | None = None) -> CodecWorker:
    """The worker, if `codec` (and `version`, the start of its fingerprint) is what it serves."""
    worker: CodecWorker = request.app.state.worker
    if codec != worker.settings.codec:
        raise UnknownCodec("codec", codec, worker.settings.codec)
    if version is not None and worker.discretizer is not None and version != model_version(worker.discretizer):
        raise UnknownCodec("version", version, model_version(worker.discretizer))
    return worker


def model_version(discretizer: Discretizer) -> str:
    """A codec's version is the start of its fingerprint: other weights are another version."""
    return discretizer.fingerprint[:12]


@router.get("", summary="Server metadata")
async def server_metadata() -> dict[str, Any]:
    return dict(SERVER_METADATA)


@router.get("/health/live", summary="The process answers")
async def live(request: Request, response: Response) -> dict[str, bool]:
    worker: CodecWorker = request.app.state.worker
    if not worker.healthy:
        response.status_code = 503
    return {"live": worker.healthy}


@router.get("/health/ready", summary="The codec is loaded and warm")
async def ready(request: Request, response: Response) -> dict[str, bool]:
    worker: CodecWorker = request.app.state.worker
    if not worker.ready:
        response.status_code = 503
    return {"ready": worker.ready}


@router.get("/models/{codec}", summary="Model metadata", dependencies=[Depends(require_key)])
@router.get("/models/{codec}/versions/{version}", include_in_schema=False, dependencies=[Depends(require_key)])
async def model_metadata(request: Request, codec: str, version: str | None = None) -> dict[str, Any]:
    return metadata(served(request, codec, version))


def metadata(worker: CodecWorker) -> dict[str, Any]:
    """What OIP v2 says of a model: name, version, inputs, outputs; the codec's facts as parameters."""
    assert worker.discretizer is not None
    spec = worker.discretizer.spec
    picture = {"datatype": "UINT8", "shape": [-1, 3, -1, -1]}
    tokens = {"datatype": "UINT16", "shape": [-1, -1, -1]}
    inputs: list[dict[str, Any]] = [
        {"name": "images", **picture},
        {"name": "gradients", "datatype": "FP16", "shape": [-1, 3, -1, -1]},
        {"name": "gradient_scales", "datatype": "FP32", "shape": [-1]},
    ]
    outputs: list[dict[str, Any]] = [{"name": name, **picture} for name in ("reconstruction", "adversarial")]
    if spec.has_tokens:
        inputs.append({"name": "indices", **tokens})
        outputs += [{"name": name, **tokens} for name in ("indices", "adversarial_indices")]
    return {
        "name": worker.settings.codec,
        "versions": [model_version(worker.discretizer)],
        "platform": f"dat_{worker.discretizer.describe()['engine']}",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {
            "fingerprint": worker.discretizer.fingerprint,
            "factor": spec.factor,
            "codebook_size": spec.codebook_size,
            "latent_dim": spec.latent_dim,
            **worker.discretizer.describe(),
        },
    }


@router.get("/models/{codec}/ready", summary="The codec is ready", dependencies=[Depends(require_key)])
@router.get(
    "/models/{codec}/versions/{version}/ready", include_in_schema=False, dependencies=[Depends(require_key)]
)
async def model_ready(
    request: Request, response: Response, codec: str, version: str | None = None
) -> dict[str, Any]:
    worker = served(request, codec, version)
    if not worker.ready:
        response.status_code = 503
    return {"name": codec, "ready": worker.ready}


INFER_DOC = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": {"type": "object", "required": ["inputs"]}},
        },
    }
}


@router.post(
    "/models/{codec}/infer",
    summary="Discretize images, or decode tokens",
    openapi_extra=INFER_DOC,
    dependencies=[Depends(require_key)],
)
@router.post(
    "/models/{codec}/versions/{version}/infer", include_in_schema=False, dependencies=[Depends(require_key)]
)
async def infer_over_http(request: Request, codec: str, version: str | None = None) -> Response:
    """Inputs: `images` UINT8 [N,3,H,W], FP16/FP32 in 0..1, or BYTES [N] (JPEG, PNG, WebP of one size), with
    `gradients` FP16/FP32 of their shape and `gradient_scales` FP32 [N]; or `indices` UINT16/INT32 [N,h,w].
    Outputs: `reconstruction`, `adversarial`, `indices`, `adversarial_indices`; asked for none,
    `reconstruction`, and with gradients `adversarial` too. Parameters: `preset` (paper, easyrobust), `base`,
    `alpha`, `normalize`, `epsilon`, `replace_fraction`, `seed`; `output_dtype` UINT8, FP16 or FP32, by default
    that of `images`, UINT8 for BYTES and tokens. The answer's parameter `tokens_changed` is the share that
    the step changed.
    """
    started = time.monotonic()
    worker = served(request, codec, version)
    settings = worker.settings
    length = announced_length(request, settings.max_body_bytes)
    caller = caller_of(request, started)
    with ExitStack() as held:
        place = held.enter_context(worker.admit(caller.holder, length or 0))
        body = await read_body(
            request, length, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s, grow=place.grow
        )
        read = time.monotonic()

        async def reply() -> tuple[wire.Encoded, Answer]:
            asked = await decode(worker, body, request.headers.get(wire.HEADER_LENGTH), place)
            answer = await infer(worker, asked, caller, place)
            return await encode(worker, asked, answer), answer

        (chunks, header_length), answer = await while_connected(request, reply())
        seconds = {
            "body": read - started,
            "queue": answer.queue_s,
            "codec": answer.codec_s,
            "total": time.monotonic() - started,
        }
        headers = {
            wire.HEADER_LENGTH: str(header_length),
            "Server-Timing": ", ".join(f"{name};dur={1000 * s:.3f}" for name, s in seconds.items()),
        }
        # the place is held until the answer is out: a slow reader holds its memory for as long
        done = held.pop_all().close
    return BuffersResponse(chunks, headers, done, settings.body_timeout_s)


def caller_of(request: Request, started: float) -> Caller:
    """Who asks, and until when: X-Dat-Timeout-Ms after `started`. Raises InvalidInput for what is no time.

    X-Dat-Client is a name that anybody may make up: it has its turn in the queue, and holds nothing.
    """
    said = request.headers.get("x-dat-timeout-ms")
    deadline = None
    if said is not None:
        if not (said.isascii() and said.isdigit() and 0 < len(said) < 12):
            raise InvalidInput("X-Dat-Timeout-Ms", repr(said), "a whole number of milliseconds, below 10^11")
        deadline = started + int(said) / 1000
    peer = request.client.host if request.client else ""
    if request.app.state.gather is not None:  # on Ray: HAProxy writes it, whatever the client sent; nobody else may
        peer = request.headers.get("x-forwarded-for", peer)
    key_id = getattr(request.state, "key_id", "")
    holder = f"key/{key_id}" if key_id else f"peer/{peer[:64]}"
    return Caller(f"{key_id}/{request.headers.get('x-dat-client', peer)[:64]}", deadline, holder)


async def decode(worker: CodecWorker, body: memoryview, header_length: str | None, place: Place) -> wire.Request:
    """The request in a body; beside the event loop where its JSON part is long.

    Parsed JSON is up to 24 times its text. What is returned is small, but for tensors, and `place` holds those that
    are not views of the body.
    """
    settings = worker.settings
    said = (header_length or "").strip()
    json_bytes = int(said) if said.isdecimal() and len(said) < 20 else len(body)
    if settings.max_json_bytes < json_bytes <= len(body):
        raise TooLarge("JSON part", f"{json_bytes} bytes", f"at most {settings.max_json_bytes} bytes; send binary")

    def parse() -> wire.Request:
        request = wire.decode_request(body, header_length, max_strings=settings.max_images)
        check_names(request)  # here: on its way to another thread it would wait beside all others
        place.grow(sum(size(array) for array in request.inputs.values() if not np.may_share_memory(array, body)))
        return request

    # encoded pictures are copied out of the body
    quick = json_bytes <= SMALL_JSON and b"BYTES" not in body[:json_bytes].tobytes()
    return parse() if quick else await worker.aside(parse)


async def encode(worker: CodecWorker, asked: wire.Request, answer: Answer) -> wire.Encoded:
    """The reply's buffers and the length of its JSON part."""
    discretizer = worker.discretizer
    assert discretizer is not None
    version = model_version(discretizer)
    binary = {name: asked.wants_binary(name) for name in answer.outputs}

    def write() -> wire.Encoded:
        return wire.encode_response(
            worker.settings.codec,
            answer.outputs,
            model_version=version,
            id=asked.id,
            parameters=answer.parameters,
            binary=binary,
        )

    return write() if all(binary.values()) else await worker.aside(write)
