"""A server on the loopback that speaks dat_client.wire: an identity codec with faults to order."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

import numpy as np

from dat_client import wire

NUMPY = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
FINGERPRINT = "sha256:1d"


def identity(request: wire.Request) -> dict[str, np.ndarray]:
    """Q(x) = x; tokens are the first channel's values, one per 8x8 block; they decode to such blocks."""
    if "indices" in request.inputs:
        tokens = request.inputs["indices"].astype(np.int64)
        wide = tokens.repeat(8, axis=1).repeat(8, axis=2) % 256
        images = np.stack([wide] * 3, axis=1).astype(np.uint8)
    else:
        images = request.inputs["images"]
        if images.dtype == object:
            images = np.stack([np.full((3, 8, 8), len(data) % 256, np.uint8) for data in images])
    dtype = NUMPY[request.parameters.get("output_dtype", wire.datatype_of(images))]
    reconstruction = images
    if dtype != images.dtype and images.dtype == np.uint8:
        reconstruction = (images / np.float32(255)).astype(dtype)
    elif dtype != images.dtype:
        reconstruction = np.rint(images * 255).astype(dtype) if dtype == np.uint8 else images.astype(dtype)
    every = {
        "reconstruction": reconstruction,
        "adversarial": reconstruction,
        "indices": images[:, 0, ::8, ::8].astype(np.uint16),
    }
    names = [output.name for output in request.outputs] or ["reconstruction"]
    return {name: every[name] for name in names if name in every}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tls = tls
        self.faults: deque[str] = deque()  # one is taken by each POST; "" is none
        self.every: str = ""  # a fault for every POST that takes none from `faults`
        self.connections = 0
        self.requests: list[wire.Request] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.ready_after = 0
        self.prefix = ""
        self.change: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.raw: Callable[[BinaryIO, bytes, int], None] | None = None  # writes an answer, given the honest one
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)
        self.timing = ""  # the Server-Timing of its answers
        self.delay_s: Callable[[wire.Request], float] = lambda request: 0.0

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.server_address[1]}{self.prefix}"

    def get_request(self) -> Any:
        self.connections += 1
        connection, address = super().get_request()
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the tests break connections on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        path = self.path.removeprefix(self.server.prefix)
        if path == "/v2":
            self.reply(200, json.dumps({"name": "loopback", "version": "1", "extensions": []}).encode())
        elif path == "/v2/health/live":
            self.reply(200, b'{"live": true}')
        elif path == "/v2/models/tiny-f8":
            self.reply(200, json.dumps({"name": "tiny-f8", "versions": ["1"]}).encode())
        elif path == "/v2/models/tiny-f8/ready":
            self.server.ready_after -= 1
            self.reply(503 if self.server.ready_after >= 0 else 200, b"")
        else:
            self.reply(404, wire.encode_error("no such codec", "codec", path, "tiny-f8"))

    def do_POST(self) -> None:
        server = self.server
        server.paths.append(self.path)
        fault = server.faults.popleft() if server.faults else server.every
        if fault == "drop before reading":
            self.close_connection = True
            return
        if fault == "refuse before reading":
            self.reply(503, wire.encode_error("full"), {"Retry-After": "0", "Connection": "close"})
            self.close_connection = True
            return
        if fault == "slow headers":
            for byte in b"HTTP/1.1 200 OK\r\n" * 100:
                self.wfile.write(bytes([byte]))
                if server.release.wait(0.05):
                    break
            self.close_connection = True
            return
        body = bytearray(int(self.headers["Content-Length"]))
        self.rfile.readinto(body)
        if fault == "drop after reading":
            self.close_connection = True
            return
        if fault == "hang":
            server.entered.release()
            server.release.wait(30)
            self.close_connection = True
            return
        if fault.startswith("status "):  # status CODE [RETRY_AFTER]
            _, code, *after = fault.split()
            server.entered.release()
            self.reply(
                int(code),
                wire.encode_error("ordered", "f", 7, 5),
                {"Retry-After": after[0]} if after else None,
            )
            return
        if fault.startswith("plain "):  # a proxy's answer, without OIP's error body
            self.reply(int(fault.split()[1]), b"<html>proxy</html>", {"Location": "http://elsewhere/"})
            return
        if fault == "garbage":
            self.reply(200, b"\x00garbage")
            return
        if self.path != f"{server.prefix}/v2/models/tiny-f8/infer":
            self.reply(404, wire.encode_error("no such codec", "codec", self.path, "tiny-f8"))
            return
        request = wire.decode_request(body, self.headers[wire.HEADER_LENGTH])
        server.requests.append(request)
        server.headers.append(dict(self.headers))
        if fault == "gate":
            server.entered.release()
            server.release.wait(30)
        time.sleep(server.delay_s(request))
        answer = server.change(
            {
                "outputs": identity(request),
                "id": request.id,
                "model_name": "tiny-f8",
                "parameters": {"fingerprint": FINGERPRINT},
            }
        )
        chunks, length = wire.encode_response(**answer, model_version="1")
        data = b"".join(chunks)
        if server.raw is not None:
            server.raw(self.wfile, data, length)
            self.close_connection = True
            return
        if fault in ("chunked", "chunk of negative length"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header(wire.HEADER_LENGTH, str(length))
            self.end_headers()
            if fault == "chunk of negative length":
                self.wfile.write(b"-5\r\nhello\r\n")
                self.close_connection = True
                return
            for part in (data[:50], data[50:]):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header(wire.HEADER_LENGTH, str(length))
        if server.timing:
            self.send_header("Server-Timing", server.timing)
        self.end_headers()
        if fault == "short":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "reset":
            self.wfile.write(data[: len(data) // 2])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.server.shutdown_request(self.connection)
        elif fault == "drip":
            for byte in data:
                self.wfile.write(bytes([byte]))
                if server.release.wait(0.05):
                    break
        else:
            self.wfile.write(data)


@contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def client_threads() -> set[threading.Thread]:
    """The threads of all clients of this process, also of those that other tests left to the garbage collector."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("dat-client")}
