"""For people: a page to try the codec with, and a picture in, a picture out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from dat_service.http.auth import require_key
from dat_service.http.body import BuffersResponse, announced_length, read_body, while_connected
from dat_service.http.oip import caller_of
from dat_service.inference import Caller, compute
from dat_service.worker import CodecWorker, Place
from dat_workers.images.encoded import decode_picture, encode_png
from dat_workers.request import Work

router = APIRouter(tags=["For people"])

PICTURE_IN = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/", include_in_schema=False)
async def home() -> FileResponse:
    return FileResponse(Path(__file__).parent / "static" / "index.html")


@router.post(
    "/v1/reconstruct",
    summary="A picture in, Q(x) out as PNG",
    openapi_extra=PICTURE_IN,
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "Q(x), of the picture's own size"}},
    dependencies=[Depends(require_key)],
)
async def reconstruct(request: Request) -> Response:
    """The body is one JPEG, PNG or WebP file: `curl --data-binary @cat.jpg URL/v1/reconstruct -o q.png`."""
    worker: CodecWorker = request.app.state.worker
    settings = worker.settings
    length = announced_length(request, settings.max_body_bytes)
    caller = caller_of(request, time.monotonic())
    with ExitStack() as held:
        place = held.enter_context(worker.admit(caller.holder, length or 0))
        body = await read_body(
            request, length, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s, grow=place.grow
        )
        png = await while_connected(request, reconstruct_png(worker, body, caller, place))
        done = held.pop_all().close  # when the picture is out, as for `infer`
    return BuffersResponse([png], {"x-codec": settings.codec}, done, settings.body_timeout_s, "image/png")


async def reconstruct_png(worker: CodecWorker, encoded: memoryview, caller: Caller, place: Place) -> bytes:
    """PNG of Q(x) for one encoded picture."""
    discretizer = worker.discretizer
    assert discretizer is not None

    def prepare() -> Work:
        place.grow(len(encoded))  # Pillow reads a copy
        picture = decode_picture(
            bytes(encoded), max_pixels=worker.settings.max_image_pixels, field="body", upright=True
        )
        place.grow(3 * picture.nbytes)  # the picture, Q(x) and its PNG
        return discretizer.work(picture[None])

    result = await compute(worker, await worker.aside(prepare), caller)
    worker.metrics.answered("plain", 1, result.queue_s, None)
    return await worker.aside(lambda: encode_png(result.outputs["reconstruction"][0]))
