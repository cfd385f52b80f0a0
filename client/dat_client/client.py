"""The client of a trainer: `Client`."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

from dat_client._version import __version__
from dat_client.calls.checks import integer, positive_seconds
from dat_client.calls.codec_watch import FingerprintWatch
from dat_client.calls.core import Array, Call, Discretized, Exchange, decode_call, discretize_call, discretized
from dat_client.calls.profile import Profile, call_timing
from dat_client.errors import DatError, Unauthorized, Unavailable, UnknownCodec, invalid
from dat_client.transports import split
from dat_client.transports.base import Question, Transport
from dat_client.transports.http import HttpTransport, check_url
from dat_client.transports.retry import repeat
from dat_client.wire.headers import CLIENT_ID

P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 0.2


def _only_while_open(method: Callable[Concatenate[Client, P], T]) -> Callable[Concatenate[Client, P], T]:
    """Makes a method of Client raise RuntimeError after `close`."""

    @functools.wraps(method)
    def checked(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._check_open()
        return method(self, *args, **kwargs)

    return checked


class Client:
    """A codec on a server, as a function of images. It is thread-safe and may be forked and pickled.

        with Client("http://codec:8000", codec="tiny-f8") as client:
            q = client.discretize(images)                # q.reconstruction is Q(x)

    Q is a pure function, so a request that was lost (connection refused or reset, short reply, status 408, 429 or
    5xx) is repeated within `timeout_s`, after the server's Retry-After and an exponential backoff with full jitter.
    A change of the codec's weights gives the warning CodecChanged.

    Connections belong to a process: a forked child (a DataLoader worker) and an unpickled copy open their own. A
    submitted call runs in a thread of this process.

    Args:
        url: `http://host:port` or `https://host:port`, with the base path of a proxy if there is one.
        codec: the name of the codec, as in `GET /v2/models/{codec}`.
        timeout_s: the total time of a call with all its repetitions, in seconds.
        connect_timeout_s: the time in which a connection must be made, and `live()` and `ready()` answered.
        retries: the largest number of repetitions of a failed request. None: as many as fit into `timeout_s`, but
            at most 8 after the service's own status 500, which may be a bug rather than a bad moment.
        max_connections: the largest number of connections, and of threads for `submit`.
        max_in_flight: the largest number of requests, sent at the same time, that a batch is split into.
        api_key: sent as `Authorization: Bearer <api_key>`.

    Raises:
        InvalidRequest: an argument is wrong; `field` names it.
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
        self.timeout_s = positive_seconds("timeout_s", timeout_s)
        self.connect_timeout_s = positive_seconds("connect_timeout_s", connect_timeout_s)
        self.retries = None if retries is None else integer("retries", retries, 0)
        self.max_connections = integer("max_connections", max_connections, 1)
        self.max_in_flight = integer("max_in_flight", max_in_flight, 1)
        self._api_key = api_key
        if not isinstance(codec, str) or not codec:
            raise invalid("codec", "a name", value=codec)
        if not isinstance(api_key, str | None):
            raise invalid("api_key", "printable ASCII", found=type(api_key).__name__)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise invalid("api_key", "printable ASCII", found="other characters")  # a secret is not shown
        self._id = uuid.uuid4().hex  # copies and forked children keep it: to the server they are one trainer
        self._watch = FingerprintWatch()
        self._open()

    def _open(self, closed: bool = False) -> None:
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._executor = ThreadPoolExecutor(self.max_connections, "dat-client")
        # The threads of `submit` cannot send parts: all of them may be waiting for parts.
        parts_at_once = min(self.max_connections, self.max_in_flight)
        self._parts_executor = ThreadPoolExecutor(parts_at_once, "dat-client-part")
        self._profiles: set[Profile] = set()  # add, discard and copy are atomic
        headers = {"User-Agent": f"dat-client/{__version__}", CLIENT_ID: self._id}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._transport: Transport = HttpTransport(
            self.url,
            self.codec,
            connect_timeout_s=self.connect_timeout_s,
            max_connections=self.max_connections,
            headers=headers,
        )
        _clients.add(self)

    @_only_while_open
    def discretize(
        self,
        /,
        images: Any,
        gradients: Any = None,
        *,
        gradient_dtype: str = "FP16",
        outputs: Sequence[str] | None = None,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Discretized:
        """Returns Q(x), and with gradients Q(x + δ) (Algorithm 1).

        Q encodes the images, replaces every latent vector by its nearest codebook entry and decodes.

            q = client.discretize(images, outputs=["reconstruction", "indices"])
            q = client.discretize(images, gradients=g, preset="easyrobust", alpha=0.1)
            train_on(q.adversarial)

        Args:
            images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch on any
                device; or a sequence of N encoded JPEG, PNG or WebP files as `bytes`, which are answered in numpy.
            gradients: the loss's gradient at each image, float16/float32 of the images' shape. For
                `normalize="none"` it must be that of the summed loss. With it the answer has `adversarial`.
            gradient_dtype: the datatype in which gradients are sent. FP16 comes with a scale for each sample, so
                that a gradient of 1e-9 survives; values far below the sample's largest do not. FP32 keeps those
                too, which `normalize="sign"` needs. INT8 comes with a scale for each sample and has half the bytes
                of FP16; docs/thin-links.md has its cost in tokens.
            outputs: some of reconstruction, adversarial, indices, adversarial_indices; None for the server's
                default (reconstruction, with gradients adversarial too).
            output_dtype: UINT8, FP16 or FP32; None for the dtype of the images (UINT8 for encoded files).
            timeout_s: the total time of this call, in place of the client's.
            parameters: preset, base, alpha, normalize, epsilon, replace_fraction, seed of the service;
                None means the service's default.

        Returns:
            Arrays of the same kind as `images`; torch tensors on the device they came from.

        Raises:
            InvalidRequest: an argument is wrong; UnknownCodec and TooLarge are subclasses.
            Unauthorized: the API key is missing or wrong.
            Unavailable: no good answer arrived within `timeout_s`; Overloaded if the server is full.
            ProtocolError: the answer does not follow the Open Inference Protocol.
        """
        call = discretize_call(images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        return self._infer(call, timeout_s)

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
        """Starts `discretize` without waiting: the call runs in one of at most `max_connections` threads.

            futures = [client.submit(batch) for batch in batches]
            for future in futures:
                train_on(future.result().reconstruction)

        Wrong arguments raise InvalidRequest at once. numpy arrays and CPU tensors are not copied, so leave them
        unchanged until the future is done. `timeout_s` counts from the moment when a thread takes the call up.
        """
        call = discretize_call(images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        return self._spawn(lambda: self._infer(call, timeout_s))

    @_only_while_open
    def decode(
        self,
        /,
        indices: Any,
        *,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Array:
        """Returns the images that tokens stand for, [N,3,H,W], in the kind of array that `indices` is.

            images = client.decode(q.indices)

        `indices` are integers [N,h,w] below the codebook's size. Raises as `discretize`.
        """
        return self._infer(decode_call(indices, output_dtype, parameters), timeout_s).reconstruction

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Measures where the time of the calls inside goes: client, network, queue, codec, rest of the server.

            with client.profile() as profile:
                train()
            print(profile)                               # medians, shares, images/s and MB/s

        It counts the calls of this client in all threads of this process. If the server sends no Server-Timing, its
        time is counted as the network's.
        """
        profile = Profile()
        self._profiles.add(profile)
        try:
            yield profile
        finally:
            profile.end()
            self._profiles.discard(profile)  # a forked child begins with none

    def metadata(self) -> dict[str, Any]:
        """Returns the codec's name, inputs and outputs (`GET /v2/models/{codec}`, OIP v2)."""
        return self._ask("metadata")

    def server_metadata(self) -> dict[str, Any]:
        """Returns the server's name, version and extensions (`GET /v2`, OIP v2)."""
        return self._ask("server_metadata")

    def live(self) -> bool:
        """Whether the server is up (`GET /v2/health/live`). Tries once, for `connect_timeout_s`."""
        return self._obstacle("live", self.connect_timeout_s) is None

    def ready(self) -> bool:
        """Whether the codec takes requests now (`GET /v2/models/{codec}/ready`).

        Tries once, for `connect_timeout_s`. Raises UnknownCodec if the server has no such codec, Unauthorized if it
        requires another key.
        """
        return self._obstacle("ready", self.connect_timeout_s) is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the codec takes requests; raises Unavailable after `timeout_s`, and otherwise as `ready`."""
        deadline = time.monotonic() + positive_seconds("timeout_s", timeout_s)
        for attempts in itertools.count(1):
            error = self._obstacle("ready", min(self.connect_timeout_s, max(0.01, deadline - time.monotonic())))
            if error is None:
                return
            if deadline - time.monotonic() <= _POLL_S or self._closed.wait(_POLL_S):
                message = f"{self._transport.address('ready')}: not ready after {timeout_s:g} s; last: {error}"
                raise Unavailable(message, attempts=attempts, cause=str(error)) from error

    def close(self) -> None:
        """Lets submitted calls finish without further repetitions, then closes the connections. Idempotent."""
        self._closed.set()
        self._executor.shutdown()
        self._parts_executor.shutdown()  # after the other, because submitted calls may send parts
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._closed.is_set() else ""
        return f"Client({self.url!r}, codec={self.codec!r}, timeout_s={self.timeout_s:g}{closed})"

    def __getstate__(self) -> dict[str, Any]:
        names = ("url", "codec", "timeout_s", "connect_timeout_s", "retries", "max_connections", "max_in_flight")
        state = {name: getattr(self, name) for name in (*names, "_api_key", "_id")}
        return {**state, "fingerprint": self._watch.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._watch = FingerprintWatch(state.pop("fingerprint"))
        self.__dict__.update(state)
        self._open()

    def _spawn(self, function: Callable[[], T]) -> Future[T]:
        self._check_open()
        return self._executor.submit(function)

    def _infer(self, call: Call, timeout_s: float | None) -> Discretized:
        """Returns the answer to a call. A call that waited for a thread is answered after `close`, too."""
        begun_s = time.perf_counter()
        exchange, first_attempt_s = self._exchange(call, timeout_s)
        answer = discretized(call, exchange.response)
        if self._profiles:
            timing = call_timing(call, exchange, first_attempt_s, time.perf_counter() - begun_s)
            for profile in self._profiles.copy():
                profile.calls.append(timing)
        self._watch.observe(answer.fingerprint, answer.codec)
        return answer

    def _exchange(self, call: Call, timeout_s: float | None) -> tuple[Exchange, float]:
        """Returns the answer, and time.perf_counter() when the first attempt began."""
        transport, closed = self._transport, self._closed
        repeated = self._repeater(f"POST {transport.address('infer')}", timeout_s)
        if min(self.max_in_flight, call.batch) == 1:
            attempt = transport.prepare(call)
            first_attempt_s = time.perf_counter()
            return repeated(attempt, wait=closed.wait), first_attempt_s

        def send_part(part: Call, stop: threading.Event) -> Exchange:
            wait = functools.partial(split.wait_for, stop, closed)
            exchange: Exchange = repeated(transport.prepare(part), wait=wait)
            return exchange

        def attempt_parts(deadline: float, number: int) -> Exchange | DatError:
            return split.infer(call, self.max_in_flight, send_part, self._parts_executor.submit)

        first_attempt_s = time.perf_counter()
        exchange = repeated(attempt_parts, wait=closed.wait)
        if isinstance(exchange, DatError):
            raise exchange
        return exchange, first_attempt_s

    def _repeater(self, target: str, timeout_s: float | None) -> Callable[..., Any]:
        """Returns `repeat` with a deadline `timeout_s` from now, which all its calls share."""
        timeout_s = self.timeout_s if timeout_s is None else positive_seconds("timeout_s", timeout_s)
        deadline = time.monotonic() + timeout_s
        return functools.partial(
            repeat, target=target, timeout_s=timeout_s, deadline=deadline, retries=self.retries
        )

    def _ask(self, question: Question) -> dict[str, Any]:
        self._check_open()
        repeated = self._repeater(f"GET {self._transport.address(question)}", None)
        answer: dict[str, Any] = repeated(functools.partial(self._transport.ask, question), wait=self._closed.wait)
        return answer

    def _obstacle(self, question: Literal["live", "ready"], timeout_s: float) -> Exception | None:
        """Returns why the server is not live or ready, None if it is."""
        self._check_open()
        try:
            if self._transport.ask(question, time.monotonic() + timeout_s).get(question) is False:
                return Unavailable(f"{self._transport.address(question)}: {question} is false")
        except (UnknownCodec, Unauthorized):
            raise
        except DatError as error:
            return error
        return None

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"{self!r} was closed")


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    # Locks may be held, and sockets in use, by threads that the child does not have.
    for client in list(_clients):
        client._transport.close()
        client._open(closed=client._closed.is_set())


os.register_at_fork(after_in_child=_after_fork)
