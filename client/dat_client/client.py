"""The client a trainer uses: `Client`."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from . import _core, wire
from ._core import Array, Call, Discretized, Reply
from ._http import Transport, check_url, codec_path
from ._version import __version__
from .errors import InvalidRequest, ProtocolError, Unauthorized, Unavailable, UnknownCodec, shown

T = TypeVar("T")

_POLL_S = 0.2


class Client:
    """A codec on a server, as a function of images. Thread-safe; may be forked and pickled.

        with Client("http://codec:8000", codec="tiny-f8") as client:
            q = client.discretize(images)                # q.reconstruction is Q(x)

    Q is a pure function, so a request that was lost (connection refused or reset, short reply, 5xx, 429) is
    repeated with exponential backoff and full jitter, or when the server's Retry-After says, inside
    `timeout_s`.

    Connections belong to a process: a forked child (a DataLoader worker) and an unpickled copy open their
    own. A submitted call runs in a thread of this process.

    Args:
        url: `http://host:port` or `https://host:port`, with the base path of a proxy if there is one.
        codec: name of the codec, as in `GET /v2/models/{codec}`.
        timeout_s: total time of a call with all its repetitions, in seconds.
        connect_timeout_s: time for making one connection, and for `live()` and `ready()`.
        retries: how often a failed request is sent again at most.
        max_connections: connections, and threads for `submit`, at most.
        api_key: sent as `Authorization: Bearer <api_key>`.

    Raises:
        InvalidRequest: an argument is wrong; `field` says which.
    """

    def __init__(
        self,
        url: str,
        codec: str = "tiny-f8",
        *,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        retries: int = 8,
        max_connections: int = 8,
        api_key: str | None = None,
    ) -> None:
        self.url = check_url(url)
        self.codec = codec
        self.timeout_s = _positive("timeout_s", timeout_s)
        self.connect_timeout_s = _positive("connect_timeout_s", connect_timeout_s)
        self.retries = _at_least("retries", retries, 0)
        self.max_connections = _at_least("max_connections", max_connections, 1)
        self._api_key = api_key
        if not isinstance(codec, str) or not codec:
            raise InvalidRequest(f"codec: not a name, got {shown(codec)}", field="codec", value=codec)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise InvalidRequest("api_key: must be printable ASCII", field="api_key")
        self._open()

    def _open(self, closed: bool = False) -> None:
        headers = {"User-Agent": f"dat-client/{__version__}"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._executor: ThreadPoolExecutor | None = None
        self._transport = Transport(
            self.url,
            connect_timeout_s=self.connect_timeout_s,
            max_connections=self.max_connections,
            headers=headers,
        )
        _clients.add(self)

    def discretize(
        self,
        images: Any,
        gradients: Any = None,
        *,
        gradient_dtype: str = "FP16",
        outputs: Sequence[str] | None = None,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Discretized:
        """Q(x): encode, snap every latent vector to its nearest codebook entry, decode; and Q(x + δ) (Algorithm 1).

            q = client.discretize(images, outputs=["reconstruction", "indices"])
            q = client.discretize(images, gradients=g, preset="easyrobust", alpha=0.1)
            train_on(q.adversarial)

        Args:
            images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch on any
                device; or a sequence of N encoded JPEG, PNG or WebP files as `bytes`, which come back as numpy.
            gradients: of the loss at the image, float16/float32 of the images' shape; per sample, so of a summed
                loss for `normalize="none"`. Asks for `adversarial`.
            gradient_dtype: how they travel: FP16 with a scale for each sample, so that 1e-9 survives (and what
                is far below the sample's largest does not: FP32 for normalize="sign").
            outputs: some of reconstruction, indices, adversarial, adversarial_indices; None for the server's
                default (reconstruction, with gradients adversarial too).
            output_dtype: UINT8, FP16 or FP32; None for the dtype of the images (UINT8 for encoded files).
            timeout_s: total time of this call, instead of the client's.
            parameters: preset, base, alpha, normalize, epsilon, replace_fraction, seed of the service;
                None means the service's default.

        Returns:
            Arrays of the kind that `images` is, torch tensors on the device they came from.

        Raises:
            InvalidRequest: something in the call is wrong; UnknownCodec and TooLarge are of this kind.
            Unauthorized: the API key is missing or wrong.
            Unavailable: no good answer in `timeout_s`; Overloaded if the server is full.
            ProtocolError: what answered does not speak the Open Inference Protocol.
        """
        self._check_open()
        return self._infer(
            _core.discretize_call(images, gradients, gradient_dtype, outputs, output_dtype, parameters), timeout_s
        )

    def submit(
        self,
        images: Any,
        gradients: Any = None,
        *,
        gradient_dtype: str = "FP16",
        outputs: Sequence[str] | None = None,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Future[Discretized]:
        """As `discretize`, without waiting: the call runs in one of at most `max_connections` threads.

            futures = [client.submit(batch) for batch in batches]
            for future in futures:
                train_on(future.result().reconstruction)

        What is wrong with the arguments is raised here, at once. numpy arrays and CPU tensors are not copied:
        leave them unchanged until the future is done. `timeout_s` counts from when a thread takes the call
        up.
        """
        call = _core.discretize_call(images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        return self._spawn(lambda: self._infer(call, timeout_s))

    def decode(
        self,
        indices: Any,
        *,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Array:
        """The pictures that tokens stand for, [N,3,H,W], of the kind that `indices` is.

            images = client.decode(q.indices)

        `indices` are integers [N,h,w] below the codebook's size. Raises as `discretize`.
        """
        self._check_open()
        call = _core.decode_call(indices, output_dtype, parameters)
        return _core.read_reconstruction(call, self._post(call, timeout_s))

    def metadata(self) -> dict[str, Any]:
        """What the server says of the codec: name, inputs, outputs (`GET /v2/models/{codec}`, OIP v2)."""
        return self._get_json(codec_path(self.codec))

    def server_metadata(self) -> dict[str, Any]:
        """What the server says of itself: name, version, extensions (`GET /v2`, OIP v2)."""
        return self._get_json("/v2")

    def live(self) -> bool:
        """Whether the server is up (`GET /v2/health/live`). One try of `connect_timeout_s`."""
        return self._is("live", "/v2/health/live") is None

    def ready(self) -> bool:
        """Whether the codec takes requests now (`GET /v2/models/{codec}/ready`).

        One try of `connect_timeout_s`. Raises UnknownCodec where the server has no such codec, Unauthorized
        where it wants another key.
        """
        return self._is("ready", f"{codec_path(self.codec)}/ready") is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the codec takes requests; raises Unavailable after `timeout_s`, else as `ready`."""
        deadline = time.monotonic() + _positive("timeout_s", timeout_s)
        path = f"{codec_path(self.codec)}/ready"
        attempts = 0
        while True:
            attempts += 1
            error = self._is("ready", path, min(self.connect_timeout_s, max(0.01, deadline - time.monotonic())))
            if error is None:
                return
            if deadline - time.monotonic() <= _POLL_S or self._closed.wait(_POLL_S):
                message = f"{self.url}{path}: not ready after {timeout_s:g} s; last: {error}"
                raise Unavailable(message, attempts=attempts, cause=str(error)) from error

    def close(self) -> None:
        """Let what was submitted finish, repeat nothing any more, close the connections. Idempotent."""
        self._closed.set()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._closed.is_set() else ""
        return f"Client({self.url!r}, codec={self.codec!r}, timeout_s={self.timeout_s:g}{closed})"

    def __getstate__(self) -> dict[str, Any]:
        names = ("url", "codec", "timeout_s", "connect_timeout_s", "retries", "max_connections", "_api_key")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _spawn(self, function: Callable[[], T]) -> Future[T]:
        with self._lock:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.max_connections, thread_name_prefix="dat-client")
            return self._executor.submit(function)

    def _infer(self, call: Call, timeout_s: float | None) -> Discretized:
        return _core.read_discretized(call, self._post(call, timeout_s))

    def _post(self, call: Call, timeout_s: float | None) -> Reply:
        buffers, header_length = call.encode()
        headers = {
            "Content-Type": "application/octet-stream",
            wire.HEADER_LENGTH: str(header_length),
        }
        path = f"{codec_path(self.codec)}/infer"
        return self._repeat("POST", path, buffers, headers, timeout_s)

    def _get_json(self, path: str) -> dict[str, Any]:
        self._check_open()
        reply = self._repeat("GET", path, None, {}, None)
        try:
            answer = json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{self.url}{path}: the answer is not JSON: {shown(str(error))}") from error
        if not isinstance(answer, dict):
            raise ProtocolError(f"{self.url}{path}: the answer is not a JSON object: {shown(answer)}")
        return answer

    def _repeat(
        self,
        method: str,
        path: str,
        buffers: list[bytes | memoryview] | None,
        headers: dict[str, str],
        timeout_s: float | None,
    ) -> Reply:
        transport, closed = self._transport, self._closed

        def attempt(deadline: float) -> Reply:
            reply = transport.send(method, path, buffers, headers, deadline)
            error = _core.error_of(reply, self.url + path)
            if error is not None:
                raise error
            return reply

        return _core.repeat(
            attempt,
            what=f"{method} {self.url}{path}",
            timeout_s=self.timeout_s if timeout_s is None else _positive("timeout_s", timeout_s),
            retries=self.retries,
            clock=time.monotonic,
            wait=closed.wait,
            jitter=random.uniform,
        )

    def _is(self, key: str, path: str, timeout_s: float | None = None) -> Exception | None:
        """None if the server says yes, else why not."""
        self._check_open()
        deadline = time.monotonic() + (self.connect_timeout_s if timeout_s is None else timeout_s)
        try:
            reply = self._transport.send("GET", path, None, {}, deadline)
            error: Exception | None = _core.error_of(reply, self.url + path)
            if error is None and json.loads(reply.body or b"{}").get(key) is False:
                error = Unavailable(f"{self.url}{path}: {key} is false")
        except (Unavailable, ProtocolError) as failed:
            error = failed
        except (
            ValueError,
            AttributeError,
            RecursionError,
        ):  # a 200 with another body is still a yes in OIP v2
            error = None
        if isinstance(error, (UnknownCodec, Unauthorized)):
            raise error
        return error

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"{self!r} was closed")


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    # Locks may be held and sockets used by threads that the child does not have.
    for client in list(_clients):
        client._open(closed=client._closed.is_set())


os.register_at_fork(after_in_child=_after_fork)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        message = f"{name}: must be a finite number of seconds above 0, got {shown(value)}"
        raise InvalidRequest(message, field=name, value=value, limit="> 0")
    return float(value)


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        message = f"{name}: must be an integer of at least {least}, got {shown(value)}"
        raise InvalidRequest(message, field=name, value=value, limit=f">= {least}")
    return value
