"""The way through a Ray cluster, `Client("serve://APP")`: arrays through the object store, no HTTP.

A call is one dict to the method `infer` of the application's replicas, its answer another; dat_service/handle.py is
their other end. Errors are told in words, so that no class of the service has to exist here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from . import wire
from ._core import Call, Exchange, check_response, error_from, next_id
from .errors import InvalidRequest, ProtocolError, Unavailable, shown

SCHEME = "serve://"


def check_application(url: str) -> str:
    """The name in `serve://NAME`; raises InvalidRequest.

    >>> check_application("serve://tiny-f8")
    'tiny-f8'
    """
    name = url.removeprefix(SCHEME)
    if not name or urlsplit(url).netloc != name:
        limit = "serve://APP, the name of a Ray Serve application"
        raise InvalidRequest(f"url: must be {limit}, got {shown(url)}", field="url", value=url, limit=limit)
    return name


class ServeWay:
    """A codec that runs as a Ray Serve application of the cluster that this process is in, or can join.

    Outputs are read-only views of the object store's memory, which they keep in use for as long as they live.
    """

    def __init__(self, url: str, codec: str, client_id: str) -> None:
        self.url = url
        self._application = check_application(url)
        self._common = {"codec": codec, "client": client_id}
        self._handle: Any = None

    def address(self, what: str) -> str:
        """Where a question, or "infer", goes, for messages."""
        return f"{self.url} {what}"

    def sending(self, call: Call) -> Callable[[float, int], Exchange]:
        """The attempt that `repeat` makes."""
        payload = {
            "inputs": call.inputs,
            "parameters": call.parameters,
            "outputs": list(call.outputs),
            "id": call.id,
        }
        sent = _size(call.inputs)

        def attempt(deadline: float, number: int) -> Exchange:
            begun_s = time.perf_counter()
            answer = self._call("infer", payload, deadline, number)
            seconds = time.perf_counter() - begun_s
            try:
                outputs, timing = answer["outputs"], answer["timing"]
                response = wire.Response(answer["codec"], outputs, id=call.id, parameters=answer["parameters"])
            except (KeyError, TypeError) as error:
                raise ProtocolError(f"{self.url}: not an answer to a call: {shown(answer)}") from error
            check_response(call, response)
            return Exchange(response, timing, begun_s, seconds, sent, _size(outputs))

        return attempt

    def ask(self, what: str, deadline: float, number: int = 1) -> dict[str, Any]:
        """The answer to "live", "ready", "metadata" or "server_metadata"; raises as `Client.metadata`."""
        return self._call(what, {"id": next_id()}, deadline, number)

    def close(self) -> None:
        """Nothing is held open; the connection to Ray is the process's."""

    def _call(self, what: str, payload: Mapping[str, Any], deadline: float, number: int) -> dict[str, Any]:
        ray, serve = _ray()
        try:
            handle = self._handle  # another thread may take it away below
            if handle is None:
                handle = self._handle = _handle(ray, serve, self._application)
            left_s = deadline - time.monotonic()  # joining the cluster may have taken seconds
            told = {"timeout_ms": max(1, int(left_s * 1000)), "attempt": number}
            response = handle.infer.remote({"what": what, **self._common, **payload, **told})
            try:
                answer = response.result(timeout_s=max(0.0, left_s))
            except BaseException:
                response.cancel()  # timed out or interrupted: nobody waits for it any more
                raise
        except TimeoutError as error:
            raise Unavailable(f"{self.url}: timed out", cause="timed out") from error
        except (ConnectionError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
            self._handle = None  # the application may come back as another deployment
            lines = str(error).strip().splitlines()
            cause = f"{type(error).__name__}: {lines[-1] if lines else ''}"
            own = 500 if isinstance(error, ray.exceptions.RayTaskError) else None  # raised by the replica's code
            raise Unavailable(f"{self.url}: {cause}", cause=cause, status=own) from error
        if not isinstance(answer, dict):
            raise ProtocolError(f"{self.url}: not an answer to a call: {shown(answer)}")
        refusal = answer.get("error")
        if refusal is None:
            return answer
        said = wire.ErrorBody(refusal["error"], refusal.get("field"), refusal.get("value"), refusal.get("limit"))
        message = f"{self.address(what)}: {refusal['status']}: {said.error}"
        raise error_from(refusal["status"], message, said, refusal.get("retry_after_s"))


def _size(arrays: Mapping[str, Any]) -> int:
    return sum(sum(map(len, a.tolist())) if a.dtype == object else a.nbytes for a in arrays.values())


_forked = False
_joining = threading.Lock()


def _after_fork() -> None:
    global _forked
    ray: Any = sys.modules.get("ray")
    _forked = _forked or (ray is not None and ray.is_initialized())


os.register_at_fork(after_in_child=_after_fork)


def _ray() -> tuple[Any, Any]:
    """The modules ray and ray.serve."""
    if _forked:
        raise RuntimeError(
            "serve:// does not work in a process forked from one that is connected to Ray; use the start method "
            "spawn (DataLoader: multiprocessing_context='spawn'), or the service's http address"
        )
    try:
        import ray
        import ray.serve.exceptions
    except ImportError as error:
        raise ImportError("serve:// needs Ray Serve: pip install 'dat-client[serve]'") from error
    return ray, ray.serve


def _handle(ray: Any, serve: Any, application: str) -> Any:
    """A handle to the application; the process joins the cluster it is in (RAY_ADDRESS, or this machine's)."""
    with _joining:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
    return serve.get_app_handle(application)
