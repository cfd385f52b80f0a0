"""Open Inference Protocol v2 with the binary tensor data extension, over one codec.

Specification: the KServe "Open Inference Protocol" REST description and Triton's "Binary tensor data extension".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

import dat_client.wire as wire
from dat_service import __version__
from dat_service.body import BuffersResponse, read_body
from dat_service.security import require_key
from dat_service.settings import Settings
from dat_service.worker import CodecWorker
from dat_workers.discretizer import Discretizer, default_outputs
from dat_workers.errors import InvalidInput, TooLarge
from dat_workers.perturbation import Step, number
from dat_workers.pictures import decode_pictures

PARAMETERS = ("preset", "base", "alpha", "normalize", "epsilon", "replace_fraction", "seed", "output_dtype")
INPUTS = ("images", "gradients", "gradient_scales")
SERVER = "discrete-augmentation"

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
    return {"name": SERVER, "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/health/live", summary="The process answers")
async def live() -> dict[str, bool]:
    return {"live": True}


@router.get("/health/ready", summary="The codec is loaded and warm")
async def ready(request: Request, response: Response) -> dict[str, bool]:
    worker: CodecWorker = request.app.state.worker
    if not worker.ready:
        response.status_code = 503
    return {"ready": worker.ready}


@router.get("/models/{codec}", summary="Model metadata", dependencies=[Depends(require_key)])
@router.get("/models/{codec}/versions/{version}", include_in_schema=False, dependencies=[Depends(require_key)])
async def model_metadata(request: Request, codec: str, version: str | None = None) -> dict[str, Any]:
    worker = served(request, codec, version)
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
        "name": codec,
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
async def infer(request: Request, codec: str, version: str | None = None) -> Response:
    """Inputs: `images` UINT8 [N,3,H,W], FP16/FP32 in 0..1, or BYTES [N] (JPEG, PNG, WebP of one size), with
    `gradients` FP16/FP32 of their shape and `gradient_scales` FP32 [N]; or `indices` UINT16/INT32 [N,h,w].
    Outputs: `reconstruction`, `adversarial`, `indices`, `adversarial_indices`; asked for none,
    `reconstruction`, and with gradients `adversarial` too. Parameters: `preset` (paper, easyrobust), `base`,
    `alpha`, `normalize`, `epsilon`, `replace_fraction`, `seed`; `output_dtype` UINT8, FP16 or FP32, by default
    that of `images`, UINT8 for BYTES and tokens. The answer's parameter `tokens_changed` is the share that
    the step changed.
    """
    worker = served(request, codec, version)
    settings = worker.settings
    with ExitStack() as place:
        place.enter_context(worker.admit())
        body = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
        header = request.headers.get(wire.HEADER_LENGTH)
        chunks, header_length = await worker.run(lambda: answer(worker, body, header))
        if not request.app.state.views:
            chunks = [bytes(chunk) for chunk in chunks]
        # the place is held until the answer is out: a slow reader holds its memory for as long
        done = place.pop_all().close
    return BuffersResponse(chunks, {wire.HEADER_LENGTH: str(header_length)}, done, settings.body_timeout_s)


def answer(worker: CodecWorker, body: memoryview, header_length: str | None) -> wire.Encoded:
    """The reply's buffers and the length of its JSON part, for one request body."""
    discretizer, settings = worker.discretizer, worker.settings
    assert discretizer is not None
    said = (header_length or "").strip()
    json_bytes = int(said) if said.isdecimal() and len(said) < 20 else len(body)
    if settings.max_json_bytes < json_bytes <= len(body):
        raise TooLarge("JSON part", f"{json_bytes} bytes", f"at most {settings.max_json_bytes} bytes; send binary")
    request = wire.decode_request(body, header_length, max_strings=settings.max_images)
    parameters = request.parameters
    for name in parameters:
        if name not in PARAMETERS:
            raise InvalidInput("parameters", repr(name), f"of {', '.join(PARAMETERS)}")
    output_dtype = parameters.get("output_dtype")
    names = [o.name for o in request.outputs]
    if "images" in request.inputs and set(request.inputs) <= set(INPUTS):
        discretizer.check_outputs(names)
        images = request.inputs["images"]
        check_limits(images, settings)
        if images.dtype == object:
            images = decode_pictures(
                images, max_image_pixels=settings.max_image_pixels, max_pixels=settings.max_pixels
            )
        replaced = fraction(parameters)
        attacked = "gradients" in request.inputs or replaced > 0
        names = names or list(default_outputs(attacked))
        check_json_outputs(request, names, images.size // 3, discretizer.spec.factor, settings)
        outputs = discretizer.discretize(
            images,
            request.inputs.get("gradients"),
            gradient_scales=request.inputs.get("gradient_scales"),
            step=Step.from_parameters(parameters),
            replace_fraction=replaced,
            seed=whole_number(parameters, "seed"),
            outputs=names,
            output_dtype=output_dtype,
        )
    elif list(request.inputs) == ["indices"]:
        others = sorted(set(parameters) - {"output_dtype"})
        if others:
            raise InvalidInput("parameters", others, "output_dtype alone, where tokens are decoded")
        names = names or ["reconstruction"]
        if names != ["reconstruction"]:
            raise InvalidInput("outputs", names, "reconstruction alone, where tokens are decoded")
        indices = request.inputs["indices"]
        factor = discretizer.spec.factor
        check_limits(indices, settings, scale=factor)
        check_json_outputs(request, names, indices.size * factor**2, factor, settings)
        outputs = {"reconstruction": discretizer.decode(indices, output_dtype=output_dtype)}
    else:
        raise InvalidInput("inputs", sorted(request.inputs), f"either indices alone, or {', '.join(INPUTS)}")
    facts: dict[str, Any] = {"fingerprint": discretizer.fingerprint}
    if "tokens_changed" in outputs:
        facts["tokens_changed"] = float(outputs.pop("tokens_changed").mean())
    return wire.encode_response(
        discretizer.spec.name,
        outputs,
        model_version=model_version(discretizer),
        id=request.id,
        parameters=facts,
        binary={name: request.wants_binary(name) for name in outputs},
    )


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
