"""Requests as a stranger would write them: bytes and headers, no client of ours."""

from __future__ import annotations

import http.client
import io
import json
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.body)
        assert isinstance(parsed["error"], str)
        assert parsed["error"]
        return parsed


def send(url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def tensor(name: str, array: np.ndarray, datatype: str) -> tuple[dict[str, Any], bytes]:
    """An input in binary form: its JSON entry and its bytes."""
    data = array.tobytes()
    entry = {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "parameters": {"binary_data_size": len(data)},
    }
    return entry, data


def infer(url: str, header: Any, tail: bytes = b"", *, codec: str = "identity", length: Any = None) -> Reply:
    """POST .../infer with any JSON header, any bytes after it, and any Inference-Header-Content-Length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(text) if length is None else length)}
    return send(url, "POST", f"/v2/models/{codec}/infer", text + tail, headers)


def infer_images(url: str, images: np.ndarray, datatype: str, *, codec: str = "identity", **more: Any) -> Reply:
    """A well-formed request with `images`, plus whatever else the JSON should hold."""
    entry, data = tensor("images", images, datatype)
    return infer(url, {"inputs": [entry], **more}, data, codec=codec)


def infer_encoded(url: str, *pictures: bytes, codec: str = "identity") -> Reply:
    """Encoded pictures as BYTES [N]."""
    data = b"".join(len(p).to_bytes(4, "little") + p for p in pictures)
    entry = {
        "name": "images", "datatype": "BYTES", "shape": [len(pictures)],
        "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    return infer(url, {"inputs": [entry]}, data, codec=codec)


def encoded(picture: np.ndarray, kind: str) -> bytes:
    """JPEG, PNG or WEBP bytes of uint8 [3,H,W]."""
    out = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(out, kind)
    return out.getvalue()


def png_bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, a few hundred kilobytes however large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes((side * 3 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    """A JPEG whose header says side x side pixels; its data is that of an 8 x 8 one."""
    data = bytearray(encoded(np.zeros((3, 8, 8), np.uint8), "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)
