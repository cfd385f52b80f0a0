"""Small codecs, published-looking checkpoints and a loopback server with every fault a download meets."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session")
def spec() -> CodecSpec:
    return CodecSpec(
        "toy",
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(128,),
        z_channels=4,
        codebook_size=64,
        latent_dim=4,
    )


@pytest.fixture(scope="session")
def _weights(spec: CodecSpec) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in VQGAN(spec).state_dict().items()}


@pytest.fixture
def weights(_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fresh mapping of fresh tensors, to be altered at will."""
    return {name: tensor.clone() for name, tensor in _weights.items()}


@pytest.fixture
def lightning_checkpoint() -> Iterator[Callable[..., Path]]:
    """Writes a `.ckpt` as Lightning 1.x does; its classes exist only while it is written."""
    made: list[str] = []

    def module(name: str, **classes: type) -> None:
        built = types.ModuleType(name)
        for attribute, cls in classes.items():
            cls.__module__, cls.__qualname__ = name, attribute
            setattr(built, attribute, cls)
        sys.modules[name] = built
        made.append(name)

    def save(path: Path, weights: dict[str, Tensor], *, old_format: bool = False, **more: Any) -> Path:
        class ModelCheckpoint:
            def __init__(self) -> None:
                self.best_model_path, self.monitor = "last.ckpt", "val/rec_loss"

        class AttributeDict(dict):  # type: ignore[type-arg]
            pass

        class ListConfig:
            def __init__(self, content: list[int]) -> None:
                self.content = content

        class scalar:
            def __reduce__(self) -> Any:
                return scalar, ()

        module("pytorch_lightning")
        module("pytorch_lightning.callbacks")
        module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=ModelCheckpoint)
        module("pytorch_lightning.utilities.parsing", AttributeDict=AttributeDict)
        module("omegaconf")
        module("omegaconf.listconfig", ListConfig=ListConfig)
        try:
            content = {
                "epoch": 12,
                "global_step": 971043,
                "pytorch-lightning_version": "1.0.8",
                "state_dict": {
                    **weights,
                    "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 4, 1, 1),
                    "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
                },
                "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
                "instance": ModelCheckpoint(),
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": []}],
                "hyper_parameters": AttributeDict(ddconfig=AttributeDict(ch_mult=ListConfig([1, 2]))),
                **more,
            }
            torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        finally:
            for name in made:
                sys.modules.pop(name, None)
        return path

    yield save
    for name in made:
        assert name not in sys.modules


@dataclass
class Source:
    """What the loopback server answers with; the fields are switched by the tests."""

    body: bytes = b""
    etag: str = '"one"'
    ranges: bool = True
    honours_if_range: bool = True
    status: int = 200
    content_type: str = "application/octet-stream"
    drop_after: list[int] = field(default_factory=list)  # for each request: bytes sent before hanging up
    announces_length: bool = True
    redirect_to: str | None = None
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(handler.headers.items()))
        if self.redirect_to and handler.path == "/file":
            handler.send_response(302)
            handler.send_header("Location", self.redirect_to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start, status = 0, self.status
        asked = handler.headers.get("Range")
        same = handler.headers.get("If-Range") == self.etag or not self.honours_if_range
        if asked and self.ranges and same and status == 200:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(self.body) else 416
        body = self.body[start:] if status in (200, 206) else b"no"
        handler.send_response(status)
        handler.send_header("Content-Type", self.content_type)
        if self.announces_length:
            handler.send_header("Content-Length", str(len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        if status == 416:
            handler.send_header("Content-Range", f"bytes */{len(self.body)}")
        handler.end_headers()
        if self.drop_after:
            body = body[: self.drop_after.pop(0)]
            handler.close_connection = True
        handler.wfile.write(body)


@pytest.fixture
def source() -> Iterator[Source]:
    served = Source()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/file"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()
