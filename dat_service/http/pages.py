"""Defines the routes for people: a page to try the codec, the documentation, and a route for one picture."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse

from dat_service.http.auth import require_key
from dat_service.http.exchange import Reply, exchange
from dat_service.inference import Caller, compute
from dat_service.worker import CodecWorker, Reservation
from dat_workers.images.encoded import decode_picture, encode_png
from dat_workers.request import CodecRequest

router = APIRouter(tags=["For people"])

PICTURE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


STATIC = Path(__file__).parent / "static"
DOCS_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")
# Browsers load nothing from other hosts for these pages. Their scripts and styles are partly inline.
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:"}


@router.get("/", include_in_schema=False)
async def home() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)


@router.get("/favicon.ico", include_in_schema=False)
@router.get("/favicon.svg", include_in_schema=False)
async def favicon() -> FileResponse:
    return FileResponse(STATIC / "favicon.svg")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Returns Swagger UI, whose files come from the package fastapi-offline instead of the internet.

    All addresses are relative, so that the page works below the prefix of a codec or of a proxy.
    """
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=request.app.title,
        swagger_css_url=f"docs/{DOCS_FILES[0]}",
        swagger_js_url=f"docs/{DOCS_FILES[1]}",
        swagger_favicon_url="favicon.svg",
        swagger_ui_parameters={"validatorUrl": None},  # by default, it sends the page's address to a service
    )
    page.headers.update(PAGE_HEADERS)
    return page


@router.get("/docs/{name}", include_in_schema=False)
async def docs_file(name: str) -> FileResponse:
    if name not in DOCS_FILES:
        raise HTTPException(404, "Not Found")
    return FileResponse(str(files("fastapi_offline") / "static" / name))


@router.post(
    "/v1/reconstruct",
    summary="Discretize one picture and return Q(x) as PNG",
    openapi_extra=PICTURE_BODY,
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}}, "description": "Q(x), with the same size in pixels as the picture"}
    },
    dependencies=[Depends(require_key)],
)
async def reconstruct(request: Request) -> Response:
    """Returns Q(x) of the picture in the body, which is one JPEG, PNG or WebP file.

    For example: `curl --data-binary @cat.jpg URL/v1/reconstruct -o q.png`.
    """
    worker: CodecWorker = request.app.state.worker

    async def reconstruction(encoded: memoryview, caller: Caller, reservation: Reservation) -> Reply:
        discretizer = worker.discretizer
        assert discretizer is not None

        def prepare() -> CodecRequest:
            reservation.grow(len(encoded))  # Pillow reads a copy of the file
            picture = decode_picture(
                bytes(encoded), max_pixels=worker.settings.max_image_pixels, field="body", upright=True
            )
            reservation.grow(3 * picture.nbytes)  # the picture, Q(x) and its PNG
            return discretizer.prepare(picture[None])

        answer = await compute(worker, await worker.run_in_thread(prepare), caller)
        png = await worker.run_in_thread(lambda: encode_png(answer.outputs["reconstruction"][0]))
        return Reply([png], answer, {"x-codec": worker.settings.codec}, "image/png")

    return await exchange(request, worker, reconstruction)
