"""The door for trainers in the same Ray cluster: a call is a dict, arrays come and go through the object store.

The other end is dat_client/_serve.py. Who is in the cluster is trusted: there are no keys here, but every limit of
the HTTP door holds. Errors go back in words, so that no class of the service has to be unpickled in a trainer.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import dat_client.wire as wire
from dat_service.app import reason_of, status_of
from dat_service.inference import Caller, infer, size
from dat_service.logs import REQUEST_ID
from dat_service.observe import REASONS
from dat_service.protocol import SERVER_METADATA, UnknownCodec, metadata
from dat_service.worker import CodecWorker
from dat_workers.errors import EngineError, InvalidInput, Unhealthy

log = logging.getLogger("dat_service")


async def infer_call(worker: CodecWorker, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer to one call of a `Client("serve://...")`; it raises nothing.

    payload: `what` (infer, live, ready, metadata, server_metadata), `codec`, `id`, `client` (for fairness),
    `timeout_ms`, `attempt`; for infer also `inputs` (arrays by name, as on the wire), `parameters`, and `outputs`
    (names).

    Returns for infer `outputs`, `parameters`, `codec` and `timing` (seconds: body, queue, codec, total), for the
    others what the HTTP door answers; or `error`: a dict of `status`, `error`, `field`, `value`, `limit` and
    `retry_after_s`, as the HTTP door says it.
    """
    began = time.perf_counter()
    token = REQUEST_ID.set(str(payload.get("id"))[:64])
    try:
        said = await told(worker, payload)
    except Exception as error:
        said = {"error": refusal(error)}
    finally:
        REQUEST_ID.reset(token)
    if payload.get("what") == "infer":
        count(worker, payload, said, time.perf_counter() - began)
    return said


async def told(worker: CodecWorker, payload: dict[str, Any]) -> dict[str, Any]:
    """What a call asks for; raises what the HTTP door would answer with another status than 200."""
    if payload["codec"] != worker.settings.codec:
        raise UnknownCodec("codec", str(payload["codec"]), worker.settings.codec)
    match payload["what"]:
        case "infer":
            return await answer(worker, payload)
        case "live":
            return {"live": worker.healthy}
        case "ready":
            return {"name": worker.settings.codec, "ready": worker.ready}
        case "metadata":
            return metadata(worker)
        case "server_metadata":
            return dict(SERVER_METADATA)
        case other:
            raise InvalidInput("what", repr(other)[:80], "infer, live, ready, metadata or server_metadata")


async def answer(worker: CodecWorker, payload: dict[str, Any]) -> dict[str, Any]:
    """What the codec makes of the call's inputs."""
    started = time.monotonic()
    inputs = payload["inputs"]
    outputs = [wire.RequestedOutput(name) for name in payload["outputs"]]
    request = wire.Request(inputs, payload["id"], payload["parameters"], outputs, binary_default=True)
    flow = f"/{payload['client']}"
    caller = Caller(flow, started + payload["timeout_ms"] / 1000, holder=flow)
    with worker.admit(caller.holder, sum(size(array) for array in inputs.values())) as place:
        made = await infer(worker, request, caller, place)
    return {
        "outputs": made.outputs,
        "parameters": made.parameters,
        "codec": worker.settings.codec,
        "timing": {
            "body": 0.0,
            "queue": made.queue_s,
            "codec": made.codec_s,
            "total": time.monotonic() - started,
        },
    }


def refusal(error: Exception) -> dict[str, Any]:
    """An exception in words: the status and the body that the HTTP door gives it."""
    status, message = status_of(error), str(error)
    if isinstance(error, EngineError):
        if not isinstance(error, Unhealthy):  # that was said once, where it was found
            log.error("%s", error)
    elif status == 500:
        log.error("a call by handle failed", exc_info=error)
        message = f"internal error: {type(error).__name__}"
    said = {name: getattr(error, name, None) for name in ("field", "value", "limit")}
    retry_after_s = getattr(error, "retry_after_s", 1) if status == 503 else None
    reason = reason_of(error)
    return {"status": status, "error": message, **said, "retry_after_s": retry_after_s, "reason": reason}


def count(worker: CodecWorker, payload: dict[str, Any], said: dict[str, Any], seconds: float) -> None:
    """An inference call in the metrics, as one over HTTP is counted."""
    metrics = worker.metrics
    if payload.get("attempt", 1) > 1:
        metrics.retried()
    if "error" in said:
        status = said["error"]["status"]
        metrics.request(status, 0, 0, None)
        if status in REASONS:
            metrics.refused(said["error"]["reason"] or REASONS[status])
        return
    received, sent = (sum(map(size, arrays.values())) for arrays in (payload["inputs"], said["outputs"]))
    metrics.request(200, received, sent, seconds)
