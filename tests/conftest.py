"""Fixtures: real photographs, and real services on Ray Serve, with --local, and in a thread."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dat_client import Client
from dat_service.launch import DAT, running_service
from dat_service.ports import free_port

__all__ = ["DAT", "ROOT", "app_in_thread", "crop", "dat_serve", "free_port", "photograph"]

ROOT = Path(__file__).parent.parent


def photograph(name: str) -> np.ndarray:
    """Returns uint8 [3,H,W] of a photograph inside scikit-image."""
    from skimage import data

    return np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1))


def crop(name: str, height: int, width: int) -> np.ndarray:
    """Returns uint8 [3,height,width], the middle of a photograph."""
    picture = photograph(name)
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return np.ascontiguousarray(picture[:, top : top + height, left : left + width])


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Restores the loggers that an app configures (observability/logs.py); caplog needs them to propagate."""
    loggers = [logging.getLogger(name) for name in ("dat_service", "dat_workers")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = True  # else pytest gives the logger a handler of its own in the next test


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """Four photographs, uint8 [4,3,224,224]."""
    return np.stack([crop(name, 224, 224) for name in ("astronaut", "chelsea", "coffee", "rocket")])


@contextmanager
def dat_serve(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `dat serve`, with `env` added to the environment, and checks that it ends with status 0."""
    with running_service(*arguments, env=os.environ | (env or {})) as service:
        yield service.url, service.process
    assert service.process.returncode == 0, service.log


@pytest.fixture(scope="session")
def ray_url() -> Iterator[str]:
    """The address of tiny-f8 on Ray Serve in HAProxy mode, as users get it from `dat serve`."""
    with dat_serve("--codec", "tiny-f8") as (url, _):
        yield url


@pytest.fixture(scope="session")
def local_url() -> Iterator[str]:
    """The address of tiny-f8 with --local."""
    with dat_serve("--codec", "tiny-f8", "--local") as (url, _):
        yield url


@pytest.fixture(params=["ray", "local"])
def url(request: pytest.FixtureRequest) -> str:
    """The addresses of both services, one after the other."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@contextmanager
def app_in_thread(**settings: Any) -> Iterator[str]:
    """Runs the app with these settings under uvicorn, in a thread of the test, and yields its address."""
    import uvicorn

    from dat_service.http.app import create_app
    from dat_service.settings import Settings
    from dat_service.worker import CodecWorker

    port = free_port()
    worker = CodecWorker(Settings(port=port, **{"log_level": "error"} | settings))
    worker.load()
    server = uvicorn.Server(
        uvicorn.Config(create_app(worker), port=port, loop="asyncio", ws="none", log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the app did not start"
            assert time.monotonic() < deadline, "the app did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def serve_app() -> Iterator[Callable[..., str]]:
    """`serve_app(codec="identity", max_images=4)` returns the address of such an app; it lasts for the module."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(app_in_thread(**settings))


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, "tiny-f8") as c:
        yield c
