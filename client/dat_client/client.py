"""The client a trainer uses: `Client`."""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from dat_client._version import __version__
from dat_client.calls import core
from dat_client.calls.checks import positive, whole
from dat_client.calls.codec_watch import Watch
from dat_client.calls.core import Array, Call, Discretized, Exchange
from dat_client.calls.profile import Profile, sample
from dat_client.errors import (
    DatError,
    InvalidRequest,
    ProtocolError,
    Unauthorized,
    Unavailable,
    UnknownCodec,
    shown,
)
from dat_client.transports import split
from dat_client.transports.http import HttpWay, check_url
from dat_client.transports.retry import repeat
from dat_client.wire.headers import CLIENT_ID

T = TypeVar("T")

_POLL_S = 0.2


class Client:
    """A codec on a server, as a function of images. Thread-safe; may be forked and pickled.

        with Client("http://codec:8000", codec="tiny-f8") as client:
            q = client.discretize(images)                # q.reconstruction is Q(x)

    Q is a pure function, so a request that was lost (connection refused or reset, short reply, 408, 429, 5xx)
    is repeated with exponential backoff and full jitter, or when the server's Retry-After says, inside
    `timeout_s`. Answers from other weights than before give the warning CodecChanged.

    Connections belong to a process: a forked child (a DataLoader worker) and an unpickled copy open their
    own. A submitted call runs in a thread of this process.

    Args:
        url: `http://host:port` or `https://host:port`, with the base path of a proxy if there is one.
        codec: name of the codec, as in `GET /v2/models/{codec}`.
        timeout_s: total time of a call with all its repetitions, in seconds.
        connect_timeout_s: time for making one connection, and for `live()` and `ready()`.
        retries: how often a failed request is sent again at most; None for as long as `timeout_s` lasts, after
            the service's own status 500 (which may be a bug rather than a bad moment) 8 times.
        max_connections: connections, and threads for `submit`, at most.
        max_in_flight: into how many requests, sent at the same time, a batch is cut at most.
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
        retries: int | None = None,
        max_connections: int = 8,
        max_in_flight: int = 1,
        api_key: str | None = None,
    ) -> None:
        self.url = check_url(url)
        self.codec = codec
        self.timeout_s = positive("timeout_s", timeout_s)
        self.connect_timeout_s = positive("connect_timeout_s", connect_timeout_s)
        self.retries = None if retries is None else whole("retries", retries, 0)
        self.max_connections = whole("max_connections", max_connections, 1)
        self.max_in_flight = whole("max_in_flight", max_in_flight, 1)
        self._api_key = api_key
        if not isinstance(codec, str) or not codec:
            raise InvalidRequest(f"codec: not a name, got {shown(codec)}", field="codec", value=codec)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise InvalidRequest("api_key: must be printable ASCII", field="api_key")
        self._id = uuid.uuid4().hex  # copies and forked children keep it: to the server they are one trainer
        self._watch = Watch()
        self._open()

    def _open(self, closed: bool = False) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._executor: ThreadPoolExecutor | None = None
        self._parts_executor: ThreadPoolExecutor | None = None
        self._profiles: tuple[Profile, ...] = ()  # replaced under the lock, read without
        self._way: HttpWay = self._make_way()
        _clients.add(self)

    def _make_way(self) -> HttpWay:
        headers = {"User-Agent": f"dat-client/{__version__}", CLIENT_ID: self._id}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return HttpWay(
            self.url,
            self.codec,
            connect_timeout_s=self.connect_timeout_s,
            max_connections=self.max_connections,
            headers=headers,
        )

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
                is far below the sample's largest does not: FP32 for normalize="sign"); FP32; or INT8 with a
                scale for each sample, half the bytes of FP16 (docs/thin-links.md says what it costs in tokens).
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
        arguments = (images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        return self._answer(timeout_s, core.discretize_call, *arguments)

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
        begun_s = time.perf_counter()
        call = core.discretize_call(images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        made_s = time.perf_counter() - begun_s
        return self._spawn(lambda: self._infer(call, timeout_s, made_s))

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
        return self._answer(timeout_s, core.decode_call, indices, output_dtype, parameters).reconstruction

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Where the time of the calls inside goes: client, network, queue, codec, the rest of the server.

            with client.profile() as profile:
                train()
            print(profile)                               # medians, shares, images/s and MB/s

        Counts the calls of this client in this process, whatever their thread. Where the server sends no
        Server-Timing its time is counted as the network's.
        """
        profile = Profile()
        with self._lock:
            self._profiles += (profile,)
        try:
            yield profile
        finally:
            profile.end()
            with self._lock:
                self._profiles = tuple(other for other in self._profiles if other is not profile)

    def metadata(self) -> dict[str, Any]:
        """What the server says of the codec: name, inputs, outputs (`GET /v2/models/{codec}`, OIP v2)."""
        return self._ask("metadata")

    def server_metadata(self) -> dict[str, Any]:
        """What the server says of itself: name, version, extensions (`GET /v2`, OIP v2)."""
        return self._ask("server_metadata")

    def live(self) -> bool:
        """Whether the server is up (`GET /v2/health/live`). One try of `connect_timeout_s`."""
        return self._why_not("live") is None

    def ready(self) -> bool:
        """Whether the codec takes requests now (`GET /v2/models/{codec}/ready`).

        One try of `connect_timeout_s`. Raises UnknownCodec where the server has no such codec, Unauthorized
        where it wants another key.
        """
        return self._why_not("ready") is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the codec takes requests; raises Unavailable after `timeout_s`, else as `ready`."""
        deadline = time.monotonic() + positive("timeout_s", timeout_s)
        attempts = 0
        while True:
            attempts += 1
            error = self._why_not("ready", min(self.connect_timeout_s, max(0.01, deadline - time.monotonic())))
            if error is None:
                return
            if deadline - time.monotonic() <= _POLL_S or self._closed.wait(_POLL_S):
                message = f"{self._way.address('ready')}: not ready after {timeout_s:g} s; last: {error}"
                raise Unavailable(message, attempts=attempts, cause=str(error)) from error

    def close(self) -> None:
        """Let what was submitted finish, repeat nothing any more, close the connections. Idempotent."""
        self._closed.set()
        for name in ("_executor", "_parts_executor"):  # in this order: what was submitted may ask for parts
            with self._lock:
                executor = getattr(self, name)
                setattr(self, name, None)
            if executor is not None:
                executor.shutdown(wait=True)
        self._way.close()

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
        names = ("url", "codec", "timeout_s", "connect_timeout_s", "retries", "max_connections", "max_in_flight")
        state = {name: getattr(self, name) for name in (*names, "_api_key", "_id")}
        return {**state, "fingerprint": self._watch.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._watch = Watch(state.pop("fingerprint"))
        self.__dict__.update(state)
        self._open()

    def _spawn(self, function: Callable[[], T]) -> Future[T]:
        with self._lock:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.max_connections, thread_name_prefix="dat-client")
            return self._executor.submit(function)

    def _spawn_part(self, function: Callable[[], T]) -> Future[T]:
        # threads apart from those of submit, all of which may be waiting for parts
        with self._lock:
            if self._parts_executor is None:
                self._parts_executor = ThreadPoolExecutor(
                    min(self.max_connections, self.max_in_flight), thread_name_prefix="dat-client-part"
                )
            return self._parts_executor.submit(function)

    def _answer(self, timeout_s: float | None, make: Callable[..., Call], *arguments: Any) -> Discretized:
        """The answer to `make(*arguments)`, also where the client was closed since it was asked for."""
        begun_s = time.perf_counter()
        call = make(*arguments)
        return self._infer(call, timeout_s, time.perf_counter() - begun_s)

    def _infer(self, call: Call, timeout_s: float | None, made_s: float) -> Discretized:
        """The answer to a call that was made, in `made_s`, just now."""
        begun_s = time.perf_counter()
        exchange, sent_s = self._exchange(call, timeout_s)
        answer = core.discretized(call, exchange.response)
        if self._profiles:
            taken = sample(call, exchange, sent_s, made_s + time.perf_counter() - begun_s)
            for profile in self._profiles:
                profile.calls.append(taken)
        self._watch.saw(answer.fingerprint, answer.codec)
        return answer

    def _exchange(self, call: Call, timeout_s: float | None) -> tuple[Exchange, float]:
        """The answer, and when (time.perf_counter) the first attempt was begun."""
        way, closed = self._way, self._closed
        patiently = self._patience(f"POST {way.address('infer')}", timeout_s)
        if min(self.max_in_flight, call.batch) == 1:
            attempt = way.sending(call)
            sent_s = time.perf_counter()
            return patiently(attempt, wait=closed.wait), sent_s

        def one(part: Call, stop: threading.Event) -> Exchange:
            answered: Exchange = patiently(way.sending(part), wait=functools.partial(split.wait_for, stop, closed))
            return answered

        def attempt_parts(deadline: float, number: int) -> Exchange | DatError:
            return split.infer(call, self.max_in_flight, one, self._spawn_part)

        sent_s = time.perf_counter()
        answer = patiently(attempt_parts, wait=closed.wait)
        if isinstance(answer, DatError):
            raise answer
        return answer, sent_s

    def _patience(self, what: str, timeout_s: float | None) -> Callable[..., Any]:
        """`repeat` with one deadline, from now, for all that it is called for."""
        timeout_s = self.timeout_s if timeout_s is None else positive("timeout_s", timeout_s)
        return functools.partial(
            repeat,
            what=what,
            timeout_s=timeout_s,
            deadline=time.monotonic() + timeout_s,
            retries=self.retries,
            clock=time.monotonic,
            jitter=random.uniform,
        )

    def _ask(self, what: str) -> dict[str, Any]:
        self._check_open()
        way = self._way
        answer: dict[str, Any] = self._patience(f"GET {way.address(what)}", None)(
            functools.partial(way.ask, what), wait=self._closed.wait
        )
        return answer

    def _why_not(self, what: str, timeout_s: float | None = None) -> Exception | None:
        """None if the server says that it is live or ready, else why not."""
        self._check_open()
        deadline = time.monotonic() + (self.connect_timeout_s if timeout_s is None else timeout_s)
        try:
            if self._way.ask(what, deadline).get(what) is False:
                return Unavailable(f"{self._way.address(what)}: {what} is false")
        except (UnknownCodec, Unauthorized):
            raise
        except (Unavailable, InvalidRequest, ProtocolError) as error:
            return error
        return None

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"{self!r} was closed")


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    # Locks may be held and sockets used by threads that the child does not have.
    for client in list(_clients):
        client._way.close()
        client._open(closed=client._closed.is_set())


os.register_at_fork(after_in_child=_after_fork)
