"""Sends requests as any HTTP client could: bytes and headers, without dat_client."""

from __future__ import annotations

import http.client
import io
import json
import socket
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
    """Sends one request over a new connection."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def tensor(name: str, array: np.ndarray, datatype: str) -> tuple[dict[str, Any], bytes]:
    """Returns a binary input: its JSON entry and its bytes."""
    data = array.tobytes()
    entry = {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "parameters": {"binary_data_size": len(data)},
    }
    return entry, data


def infer(url: str, header: Any, tail: bytes = b"", *, codec: str = "identity", length: Any = None) -> Reply:
    """Posts any JSON header and any bytes after it, with any Inference-Header-Content-Length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(text) if length is None else length)}
    return send(url, "POST", f"/v2/models/{codec}/infer", text + tail, headers)


def infer_images(url: str, images: np.ndarray, datatype: str, *, codec: str = "identity", **more: Any) -> Reply:
    """Posts a well-formed request with `images`, and with `more` in the JSON."""
    entry, data = tensor("images", images, datatype)
    return infer(url, {"inputs": [entry], **more}, data, codec=codec)


def open_request(
    url: str, promised_bytes: int, *, source: str = "127.0.0.1", headers: str = "", codec: str = "identity"
) -> socket.socket:
    """Returns a connection on which the headers of an inference request were sent; the body may follow."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.settimeout(60)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    connection.bind((source, 0))
    connection.connect((parts.hostname or "", parts.port or 0))
    connection.sendall(
        f"POST {parts.path}/v2/models/{codec}/infer HTTP/1.1\r\nHost: x\r\n{headers}"
        f"Content-Length: {promised_bytes}\r\n\r\n".encode()
    )
    return connection


def unread_request(url: str, *, source: str = "127.0.0.1", headers: str = "") -> socket.socket:
    """Returns a connection that holds a slot: a whole request was sent, and its answer of 12 MB is not read."""
    entry, data = tensor("images", np.zeros((16, 3, 256, 256), np.uint8), "UINT8")
    parameters = {"output_dtype": "FP32", "binary_data_output": True}
    head = json.dumps({"inputs": [entry], "parameters": parameters}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}\r\n"
    connection = open_request(url, len(head) + len(data), source=source, headers=headers + length)
    connection.sendall(head + data)
    return connection


def infer_encoded(url: str, *pictures: bytes, codec: str = "identity") -> Reply:
    """Posts encoded pictures as BYTES [N]."""
    data = b"".join(len(p).to_bytes(4, "little") + p for p in pictures)
    entry = {
        "name": "images", "datatype": "BYTES", "shape": [len(pictures)],
        "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    return infer(url, {"inputs": [entry]}, data, codec=codec)


def encoded(picture: np.ndarray, kind: str) -> bytes:
    """Encodes uint8 [3,H,W] as JPEG, PNG or WEBP."""
    out = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(out, kind)
    return out.getvalue()


def png_bomb(side: int) -> bytes:
    """Returns a PNG of side x side black pixels, which takes only a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes((side * 3 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    """Returns a JPEG of 8 x 8 pixels whose header announces side x side."""
    data = bytearray(encoded(np.zeros((3, 8, 8), np.uint8), "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)
