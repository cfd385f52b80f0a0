"""LitServe: bytes arrive as base64 in JSON, as its examples send pictures, and leave as they are.

Its other way, a file in a form, fails above 1 MB: Starlette then keeps the file on disk, and LitServe pickles it.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve as ls
from fastapi import Response

from benchmarks.processes import print_ready_once_open

FIELD = "body"


class Echo(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: Any) -> None:
        pass

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the annotation
        return base64.b64decode(request[FIELD])

    def predict(self, x: bytes) -> bytes:
        return x

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    port = int(sys.argv[1])
    print_ready_once_open(port)
    server = ls.LitServer(Echo(api_path="/echo"), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
