"""API keys: the file, its rotation and the scopes, and what no client gets whatever it sends."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dat_service.http.auth import KeyRing, read_keys
from tests.raw_requests import Reply, encoded, infer, infer_images, send

IMAGE = np.zeros((1, 3, 8, 8), np.uint8)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Collects the messages of the service's logger, whatever its handlers are."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger("dat_service")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_lines_of_the_file(file: Path) -> None:
    file.write_text("# team\n\nplain-key\n  looker admin\nboth-key  infer,admin  ci.nightly\r\n")
    plain, looker, both = read_keys(file)
    assert [k.scopes for k in (plain, looker, both)] == [{"infer"}, {"admin"}, {"infer", "admin"}]
    assert both.id == "ci.nightly"
    assert len(plain.id) == 8
    assert "plain-key" not in repr((plain, looker, both))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "contains no key"),
        ("# nothing\n", "contains no key"),
        ("k1\nk2-secret root\n", "line 2: 'root' is not a scope"),
        ("k1 infer, admin\n", "'' is not a scope"),
        ("k1 infer na me\n", "one word"),
        ("k1 infer n=1\n", "one word"),
        ("k2-secret\nk2-secret admin\n", "line 2: the key is the same as on an earlier line"),
    ],
)
def test_files_that_are_not_usable(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        read_keys(file)
    assert "secret" not in str(error.value)


def test_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"secret\xff")
    with pytest.raises(ValueError, match="at byte 6") as error:
        read_keys(file)
    assert "secret" not in str(error.value)


def test_rotation_needs_no_restart(file: Path, messages: list[str]) -> None:
    now = 0.0
    file.write_text("old\n")
    ring = KeyRing(file, clock=lambda: now)

    def known(*keys: str) -> bool:
        nonlocal now
        now += 2
        return all(ring.find(key) is not None for key in keys)

    file.write_text("old\nnew infer night\n")
    assert ring.find("new") is None  # it is looked at once a second
    assert known("old", "new")
    assert messages == ["the API key file has changed and now contains 2 keys"]
    for broken in ("", "new root\n"):
        file.write_text(broken)
        assert known("old", "new")
        assert known("old", "new")
    file.unlink()
    assert known("old", "new")
    assert known("old")
    assert [line.partition(": ")[0] for line in messages[1:]] == [
        "the changed API key file is unusable, so the old keys stay valid"
    ] * 3
    replaced = file.with_suffix(".tmp")  # as Kubernetes does it, and everybody should
    replaced.write_text("new\n")
    os.replace(replaced, file)
    assert known("new")
    assert not known("old")


def test_scopes(serve_app: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("user\nlooker admin scraper\nboth infer,admin\n")
    url = serve_app(codec="identity", api_key_file=keys)

    def status(path: str, key: str) -> int:
        body = encoded(np.zeros((3, 8, 8), np.uint8), "PNG") if path == "/v1/reconstruct" else None
        return send(url, "POST" if body else "GET", path, body, bearer(key)).status

    for path in ("/v2/models/identity", "/v2/models/identity/ready", "/v1/reconstruct"):
        assert [status(path, key) for key in ("user", "looker", "both", "other")] == [200, 403, 200, 401], path
    for path in ("/metrics", "/v1/status"):
        assert [status(path, key) for key in ("user", "looker", "both", "other")] == [403, 200, 200, 401], path
        assert send(url, "GET", path).status == 401
    refused = send(url, "GET", "/metrics", None, bearer("user"))
    assert "this route needs admin" in refused.error["error"]
    assert "www-authenticate" not in refused.headers


def test_what_is_open_without_a_key(serve_app: Callable[..., str], file: Path) -> None:
    """docs/safety.md lists them."""
    file.write_text("user\n")
    url = serve_app(codec="identity", api_key_file=file)
    described = json.loads(send(url, "GET", "/openapi.json").body)["paths"]
    routes = {
        (m.upper(), path.replace("{codec}", "identity")) for path, methods in described.items() for m in methods
    }
    routes |= {("GET", path) for path in ("/", "/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect")}
    routes |= {("GET", path) for path in ("/favicon.ico", "/favicon.svg", "/docs/swagger-ui.css")}
    statuses = {path: send(url, method, path).status for method, path in routes}
    assert {path for path, status in statuses.items() if status == 200} == {
        "/", "/docs", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready",
        "/favicon.ico", "/favicon.svg", "/docs/swagger-ui.css",
    }  # fmt: skip
    assert {path for path, status in statuses.items() if status == 404} == {"/redoc", "/docs/oauth2-redirect"}
    assert set(statuses.values()) == {200, 401, 404}


def test_without_a_key_file_all_is_open(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity")
    assert [send(url, "GET", path).status for path in ("/metrics", "/v1/status", "/v2/models/identity")] == [
        200
    ] * 3


@pytest.fixture(scope="module")
def open_url(serve_app: Callable[..., str]) -> str:
    return serve_app(codec="identity")


def no_cors(reply: Reply) -> bool:
    return not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_other_sites_get_nothing(open_url: str) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for path in ("/v2/models/identity/infer", "/v1/reconstruct", "/metrics", "/v2"):
        reply = send(open_url, "OPTIONS", path, None, origin)
        assert reply.status == 405
        assert no_cors(reply)
    assert no_cors(send(open_url, "GET", "/v2", None, origin))
    assert no_cors(infer_images(open_url, IMAGE, "UINT8"))


def test_pickles_are_not_opened(open_url: str, tmp_path: Path) -> None:
    """Pickles are not read as a body, as its binary part or as an encoded picture, and not by numpy either."""
    trace = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(trace),)

    trap = pickle.dumps(Trap())
    pickle.loads(trap)
    assert trace.exists(), "the trap does not work"
    trace.rmdir()
    entry = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 8, 8]}
    objects = {"name": "images", "datatype": "BYTES", "shape": [1]}
    boxed = len(trap).to_bytes(4, "little") + trap
    replies = [
        send(open_url, "POST", "/v2/models/identity/infer", trap),
        send(open_url, "POST", "/v2/models/identity/infer", trap, {"Content-Type": "application/python-pickle"}),
        infer(open_url, {"inputs": [entry | {"parameters": {"binary_data_size": len(trap)}}]}, trap),
        infer(open_url, {"inputs": [objects | {"parameters": {"binary_data_size": len(boxed)}}]}, boxed),
        infer(open_url, {"inputs": [objects | {"datatype": "OBJECT"}]}, trap),
        send(open_url, "POST", "/v1/reconstruct", trap),
    ]
    assert {reply.status for reply in replies} == {400, 422}
    assert not trace.exists()
