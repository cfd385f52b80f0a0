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
from dat_client.calls.attack_watch import AttackWatch
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
    """Calls one codec of a server. A client is thread-safe, survives a fork and can be pickled.

        with Client("http://codec:8000", codec="tiny-f8") as client:
            q = client.discretize(images)                # q.reconstruction is Q(x)

    Q is a pure function, so a request that failed for a passing reason (connection refused or reset, reply cut off,
    status 408, 429 or 5xx) is repeated within `timeout_s`. Before each repetition the client waits for the server's
    Retry-After plus an exponential backoff with full jitter. If the codec's weights change, the client warns with
    CodecChanged.

    A forked child (a DataLoader worker) and an unpickled copy open connections of their own.

    Args:
        url: `http://host:port` or `https://host:port`; append the base path if a proxy serves the codec below one.
        codec: the name of the codec, as in `GET /v2/models/{codec}`.
        timeout_s: the longest time in seconds that a call may take, all its repetitions included.
        connect_timeout_s: the longest time in seconds that making a connection may take. It also limits `live()`
            and `ready()`, from the connection to the answer.
        retries: how often a failed request is repeated at most. None repeats for as long as `timeout_s` allows, but
            gives up at the ninth status 500 (which may be a bug) and the fourth 408 (the connection is too slow).
        max_connections: the largest number of connections at the same time, and of threads that run `submit`.
        max_in_flight: the largest number of requests into which a batch is split. They are sent at the same time.
        api_key: the service's API key, sent as `Authorization: Bearer <api_key>`.

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
            raise invalid("codec", "the name of a codec", value=codec)
        if not isinstance(api_key, str | None):
            raise invalid("api_key", "printable ASCII", found=type(api_key).__name__)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise invalid("api_key", "printable ASCII", found="other characters or none")  # never show a secret
        # Pickled copies and forked children send the same id, so the server takes all of them for one trainer.
        self._id = uuid.uuid4().hex
        self._watch = FingerprintWatch()
        self._open()

    def _open(self, closed: bool = False) -> None:
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._executor = ThreadPoolExecutor(self.max_connections, "dat-client")
        # Parts of a batch have threads of their own. In those of `submit` they could wait forever, because every
        # one of those threads may itself be waiting for the parts of its batch.
        parts_at_once = min(self.max_connections, self.max_in_flight)
        self._parts_executor = ThreadPoolExecutor(parts_at_once, "dat-client-part")
        self._profiles: set[Profile] = set()  # add, discard and copy are atomic
        self._attack_watch = AttackWatch()
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
        """Returns Q(x) and, if gradients are passed, Q(x + δ) (Algorithm 1).

        Q encodes the images, replaces every latent vector by its nearest codebook entry and decodes.

            q = client.discretize(images, outputs=["reconstruction", "indices"])
            q = client.discretize(images, gradients=g, preset="easyrobust", alpha=0.1)
            train_on(q.adversarial)

        Args:
            images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch on any
                device; or a sequence of N encoded JPEG, PNG or WebP files as `bytes`.
            gradients: the gradient of the loss at each image, float16/float32, of the images' shape. For
                `normalize="none"` it must be the gradient of the loss summed over the batch, not of its mean.
            gradient_dtype: the datatype in which gradients are sent. FP16 adds a scale for each sample, so that a
                gradient of 1e-9 is not rounded to 0; values below 2^-38 of the sample's largest still are. FP32
                keeps those too, which `normalize="sign"` needs. INT8 also adds a scale for each sample and takes
                half the bytes of FP16; docs/thin-links.md says how many tokens that changes.
            outputs: some of reconstruction, adversarial, indices, adversarial_indices. None requests
                `reconstruction`, and also `adversarial` if there are gradients or a replace_fraction above 0.
            output_dtype: UINT8, FP16 or FP32; None for the dtype of the images (UINT8 for encoded files).
            timeout_s: the longest time in seconds that this call may take; None for the client's `timeout_s`.
            parameters: the service's parameters preset, base, alpha, normalize, epsilon, replace_fraction and seed.
                None stands for the service's default.

        Returns:
            numpy arrays for numpy images and encoded files, torch tensors on the images' device for torch images.

        Raises:
            InvalidRequest: an argument is wrong; UnknownCodec and TooLarge are subclasses.
            Unauthorized: the API key is missing or wrong.
            Unavailable: no valid answer arrived within `timeout_s`; its subclass Overloaded if the server is full.
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
        """Starts `discretize` in one of at most `max_connections` threads and returns a future of its result.

            futures = [client.submit(batch) for batch in batches]
            for future in futures:
                train_on(future.result().reconstruction)

        Wrong arguments raise InvalidRequest at once; all later errors are raised by `future.result()`. numpy arrays
        and CPU tensors are not copied, so do not change them until the future is done. `timeout_s` counts from the
        moment at which a thread begins the call.
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
        """Decodes tokens: returns the images [N,3,H,W] that they stand for, as numpy or torch like `indices`.

            images = client.decode(q.indices)

        `indices` are integers [N,h,w], from 0 to the codebook's size - 1. Raises the errors of `discretize`.
        """
        return self._infer(decode_call(indices, output_dtype, parameters), timeout_s).reconstruction

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Measures how much time the calls inside the `with` block spend in each stage (see CallTiming).

            with client.profile() as profile:
                train()
            print(profile)                               # medians, shares, images/s and MB/s

        The profile covers this client's calls in all threads of this process. If the server sends no Server-Timing
        header, its share of the time is counted as network time.
        """
        profile = Profile()
        self._profiles.add(profile)
        try:
            yield profile
        finally:
            profile.end()
            self._profiles.discard(profile)  # a forked child begins with none

    def metadata(self) -> dict[str, Any]:
        """Returns the codec's name, inputs and outputs (`GET /v2/models/{codec}`, OIP v2).

        Failed requests are repeated, and errors raised, as for `discretize`.
        """
        return self._ask("metadata")

    def server_metadata(self) -> dict[str, Any]:
        """Returns the server's name, version and extensions (`GET /v2`, OIP v2).

        Failed requests are repeated, and errors raised, as for `discretize`.
        """
        return self._ask("server_metadata")

    def live(self) -> bool:
        """Returns True if the server is up (`GET /v2/health/live`).

        One request is sent and not repeated; connecting, sending and receiving together may take at most
        `connect_timeout_s`. Returns False if no answer arrives in that time, or if the answer is an error. Raises
        Unauthorized if the answer says that the API key is missing or wrong.
        """
        return self._obstacle("live", self.connect_timeout_s) is None

    def ready(self) -> bool:
        """Returns True if the codec accepts requests now (`GET /v2/models/{codec}/ready`).

        One request is sent and not repeated; connecting, sending and receiving together may take at most
        `connect_timeout_s`. Returns False if the server cannot be reached, does not answer in that time, or gives
        any other answer than that the codec is ready. Two answers raise instead: UnknownCodec if the server has no
        codec of this name, and Unauthorized if the API key is missing or wrong.
        """
        return self._obstacle("ready", self.connect_timeout_s) is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until the codec accepts requests, by calling `ready` every 0.2 s.

        Raises Unavailable if the codec is not ready within `timeout_s` or if the client is closed meanwhile, and
        UnknownCodec and Unauthorized as `ready` does.
        """
        deadline = time.monotonic() + positive_seconds("timeout_s", timeout_s)
        for attempts in itertools.count(1):
            error = self._obstacle("ready", min(self.connect_timeout_s, max(0.01, deadline - time.monotonic())))
            if error is None:
                return
            if deadline - time.monotonic() <= _POLL_S or self._closed.wait(_POLL_S):
                message = f"{self._transport.address('ready')}: not ready after {timeout_s:g} s; last: {error}"
                raise Unavailable(message, attempts=attempts, cause=str(error)) from error

    def close(self) -> None:
        """Waits for the submitted calls, then closes the connections.

        A submitted call that fails from now on is not repeated. Calling `close` a second time has no effect.
        """
        self._closed.set()
        self._executor.shutdown()
        self._parts_executor.shutdown()  # after the first executor, whose calls may still send parts
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
        """Returns the answer to a call, even if the client was closed after the call was submitted."""
        begun_s = time.perf_counter()
        exchange, first_attempt_s = self._exchange(call, timeout_s)
        answer = discretized(call, exchange.response)
        if self._profiles:
            timing = call_timing(call, exchange, first_attempt_s, time.perf_counter() - begun_s)
            for profile in self._profiles.copy():
                profile.calls.append(timing)
        self._watch.observe(answer.fingerprint, answer.codec)
        self._attack_watch.observe(call, answer.tokens_changed)
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
        """Returns `repeat` with one deadline, `timeout_s` from now, for all calls of the returned function."""
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
        """Asks once; returns None if the server is live or ready, else the exception that says why it is not."""
        self._check_open()
        try:
            if self._transport.ask(question, time.monotonic() + timeout_s).get(question) is False:
                return Unavailable(f"{self._transport.address(question)}: the server answers: not {question}")
        except (UnknownCodec, Unauthorized):
            raise
        except DatError as error:
            return error
        return None

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"{self!r}: this client was closed, make a new one")


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    # Threads of the parent, which the child does not have, may hold the locks and use the sockets of a client.
    for client in list(_clients):
        client._transport.close()
        client._open(closed=client._closed.is_set())


os.register_at_fork(after_in_child=_after_fork)
