"""For people: a page to try the codec with, and a picture in, a picture out."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from dat_service.body import read_body
from dat_service.security import require_key
from dat_service.worker import CodecWorker
from dat_workers.pictures import decode_picture, encode_png

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
    with worker.admit():
        body = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
        png = await worker.run(lambda: reconstruct_png(worker, bytes(body)))
    return Response(png, media_type="image/png", headers={"x-codec": settings.codec})


def reconstruct_png(worker: CodecWorker, encoded: bytes) -> bytes:
    """PNG of Q(x) for one encoded picture."""
    assert worker.discretizer is not None
    picture = decode_picture(encoded, max_pixels=worker.settings.max_image_pixels, field="body", upright=True)
    return encode_png(worker.discretizer.discretize(picture[None])["reconstruction"][0])
