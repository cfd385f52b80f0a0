"""Good infer requests, and mutations of them by seed, as the bytes of whole HTTP messages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dat_client.wire as wire
from tests.raw_requests import encoded

CODEC = "tiny-f8"
SIDE = 16
Json = dict[str, Any]


@dataclass
class Message:
    """A request in parts that can be changed separately. `whole`: it is complete HTTP, so it must be answered."""

    header: bytes
    tail: bytes
    fields: list[tuple[str, str]] = field(default_factory=list)
    line: str = f"POST /v2/models/{CODEC}/infer HTTP/1.1"
    length: str | None = None  # of Inference-Header-Content-Length; None: the right one
    content_length: str | None = None
    raw: bytes | None = None  # replaces all of the above
    whole: bool = True
    kind: str = "good"

    def to_bytes(self) -> bytes:
        """Returns the bytes of the whole HTTP message."""
        if self.raw is not None:
            return self.raw
        body = self.header + self.tail
        length = str(len(self.header)) if self.length is None else self.length
        content_length = str(len(body)) if self.content_length is None else self.content_length
        lines = [self.line, "Host: x", f"{wire.HEADER_LENGTH}: {length}", f"Content-Length: {content_length}"]
        lines += [f"{name}: {value}" for name, value in self.fields]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def good_requests() -> list[Message]:
    """Returns one request of each kind: uint8, gradients with scales, fp16, tokens, picture files, JSON alone."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 3, SIDE, SIDE), np.uint8)
    gradients = draw.standard_normal(images.shape).astype(np.float16)
    scales = np.full(2, 0.01, np.float32)
    files = np.array([encoded(image, kind) for image, kind in zip(images, ("JPEG", "PNG"), strict=True)], object)
    tokens = draw.integers(0, 16384, (2, 2, 2)).astype(np.uint16)
    outputs = [wire.RequestedOutput("reconstruction"), wire.RequestedOutput("indices", binary=False)]
    step = {"preset": "easyrobust", "alpha": 0.2, "epsilon": 0.1, "seed": 7, "replace_fraction": 0.1}
    encode = wire.encode_request
    encoded_requests = [
        encode({"images": images}, id="7"),
        encode({"images": images, "gradients": gradients, "gradient_scales": scales}, parameters=step),
        encode({"images": (images / np.float32(255)).astype(np.float16)}, outputs=outputs),
        encode({"indices": tokens}, parameters={"output_dtype": "FP32"}),
        encode({"images": files}),
        encode({"images": images[:1, :, :8, :8]}, binary=False, binary_default=False),
    ]
    return [Message(bytes(chunks[0]), b"".join(map(bytes, chunks[1:]))) for chunks, _ in encoded_requests]


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1.5, -0.0, 1e308, "", "x", "é\u0000",
    "UINT8", "FP32", "FP64", "BYTES", "images", "nan", "A" * 5000, [], {}, [[]], [None], [-1], [0], [2**62, 2**62],
    [1, 3, 2**31, 2**31], {"a": {}}, [1] * 200,
]  # fmt: skip
NUMBERS = [
    "",
    "0",
    "-1",
    "+1",
    "1e3",
    "0x10",
    "1.0",
    " 7 ",
    "9" * 19,
    "9" * 400,
    "nan",
    "\x00",
    "\xb2",
    "1,2",
    "7;8",
]
FIELDS = [
    "X-Dat-Timeout-Ms", "X-Dat-Client", "X-Dat-Attempt", "X-Request-Id", "Authorization", "Content-Type", "Accept",
    "Content-Encoding", "Origin", "Cookie", "Expect", "Range", "If-Match", "Forwarded", "X-Forwarded-For", "TE",
    "Traceparent", "X-Request-Disconnect-Disabled",
]  # fmt: skip
TEXTS = [
    *NUMBERS,
    "Bearer x",
    "gzip",
    "identity",
    "100-continue",
    "../..",
    "%00",
    "a" * 4000,
    "{}",
    "\t",
    "🦊",
    "null",
]


def mutated(seed: int, good: list[Message]) -> Message:
    """Returns request number `seed`: a good one with one to three changes of one kind."""
    draw = random.Random(seed)
    base = draw.choice(good)
    message = Message(base.header, base.tail, list(base.fields))
    kind = draw.choices(list(MUTATIONS), [weight for _, weight in MUTATIONS.values()])[0]
    for _ in range(draw.randint(1, 3)):
        MUTATIONS[kind][0](message, draw)
        if message.raw is not None:
            break
    message.kind = kind
    return message


def change_json(m: Message, draw: random.Random) -> None:
    """Replaces, removes or repeats a value of the JSON header."""
    try:
        tree = json.loads(m.header)
    except ValueError:
        return
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(min(len(node), 20)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    if not places:
        return
    node, key = draw.choice(places)
    match draw.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.append(node[key])
        case 2 if isinstance(node, dict):
            node[draw.choice(["alpha", "seed", "epsilon", "normalize", "data", "shape", "x", ""])] = draw.choice(
                NASTY
            )
        case 3 if isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] += draw.choice([-1, 1, 7, 2**16, -(2**16), 2**32])
        case _:
            node[key] = draw.choice(NASTY)
    m.header = json.dumps(tree, allow_nan=True).encode()


def change_bytes(m: Message, draw: random.Random) -> None:
    """Flips, removes, inserts or repeats bytes of the header or of the tensors."""
    name = draw.choice(["header", "tail"])
    data = bytearray(getattr(m, name))
    at = draw.randrange(len(data) + 1)
    match draw.randrange(4):
        case 0 if data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        case 1:
            del data[at : at + draw.randrange(1, 40)]
        case 2:
            data[at:at] = draw.randbytes(draw.randrange(1, 40))
        case _:
            data[at:at] = data[at : at + draw.randrange(1, 400)]
    setattr(m, name, bytes(data))


def change_values(m: Message, draw: random.Random) -> None:
    """Fills the tensors with noise: NaN, infinity, wrong lengths of files, tokens that are too large."""
    filling = draw.choice([b"\xff", b"\x00", b"\x7f\x80", b"\x7c\x00", draw.randbytes(97)])
    m.tail = (filling * (len(m.tail) // len(filling) + 1))[: len(m.tail)]


def change_length(m: Message, draw: random.Random) -> None:
    """Sets Inference-Header-Content-Length to another length."""
    near = [str(len(m.header) + off) for off in (-17, -1, 1, 16, len(m.tail))]
    m.length = draw.choice(NUMBERS + near)


def cut(m: Message, draw: random.Random) -> None:
    """Makes the body shorter or longer than its tensors, with the right Content-Length."""
    if draw.random() < 0.7:
        m.tail = m.tail[: draw.randrange(len(m.tail) + 1)]
    else:
        m.tail += draw.randbytes(draw.randrange(1, 3000))


def change_fields(m: Message, draw: random.Random) -> None:
    """Adds a header field, which the service may read, with any text."""
    m.fields.append((draw.choice(FIELDS), draw.choice(TEXTS).replace("\x00", "")))


def change_line(m: Message, draw: random.Random) -> None:
    """Changes the method or the path."""
    method = draw.choice(["POST", "POST", "GET", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH"])
    codec = draw.choice([CODEC, CODEC + "%00", "..%2f..", "é", "x" * 3000, "%", "tiny-f8/versions/1", ""])
    rest = draw.choice(["/infer", "/infer/", "/infer?x=1", "/ready", "", "/infer%20", "//infer", "/generate"])
    m.line = f"{method} /v2/models/{codec}{rest} HTTP/1.1"


def break_http(m: Message, draw: random.Random) -> None:
    """Breaks HTTP itself: chunks, lengths, versions, lines, several requests behind one another."""
    m.whole = False
    good = m.to_bytes()
    head, _, body = good.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    without_length = [line for line in lines if not line.startswith(b"Content-Length")]
    chunked = b"\r\n".join([*without_length, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n"

    def chunk(size: bytes, data: bytes) -> bytes:
        return size + b"\r\n" + data + b"\r\n"

    match draw.randrange(14):
        case 0:  # shorter than Content-Length
            m.raw = good[: len(head) + 4 + draw.randrange(len(body) + 1)]
        case 1:
            m.raw = head[: draw.randrange(1, len(head))]
        case 2:
            m.content_length = draw.choice([*NUMBERS, str(len(body) - 1), str(len(body) + 5), str(1 << 40)])
        case 3:
            m.raw = chunked + chunk(b"%x" % len(body), body) + b"0\r\n\r\n"
            m.whole = True
        case 4:
            wrong = draw.choice(
                [b"zz", b"-1", b"f" * 30, b"", b"%x" % (len(body) + 9), b"0x10", b"5;x=" + b"y" * 900]
            )
            m.raw = chunked + chunk(wrong, body) + b"0\r\n\r\n"
        case 5:
            m.raw = chunked + b"".join(chunk(b"1", bytes([byte])) for byte in body[:300])
        case 6:  # two contradicting lengths
            m.raw = head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"%x" % len(body), body) + b"0\r\n\r\n"
        case 7:
            m.raw = good + good + b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
        case 8:
            m.raw = head + b"\r\nX-Long: " + b"y" * draw.choice([9_000, 70_000, 300_000]) + b"\r\n\r\n" + body
        case 9:
            m.raw = (
                head + b"".join(b"\r\nX-%d: y" % i for i in range(draw.choice([150, 2000]))) + b"\r\n\r\n" + body
            )
        case 10:
            version = draw.choice([b"HTTP/0.9", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/9", b"FTP/1.1", b""])
            m.raw = good.replace(b"HTTP/1.1", version, 1)
        case 11:
            odd = draw.choice(
                [b"X y: z", b": empty", b"X: a\x00b", b"X\t: a", b" folded", b"X: a\rb", b"X: \xff\xfe"]
            )
            m.raw = head + b"\r\n" + odd + b"\r\n\r\n" + body
        case 12:
            m.raw = draw.randbytes(draw.randrange(1, 2000))
        case _:
            m.raw = good.replace(b"\r\n", draw.choice([b"\n", b"\r", b"\r\r\n"]), draw.randrange(1, 6))


MUTATIONS: dict[str, tuple[Callable[[Message, random.Random], None], int]] = {
    "json": (change_json, 40),
    "bytes": (change_bytes, 15),
    "values": (change_values, 5),
    "length": (change_length, 5),
    "cut": (cut, 5),
    "fields": (change_fields, 10),
    "line": (change_line, 5),
    "http": (break_http, 15),
}
