"""The record of a request that metrics, logs and spans share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

INCOMPLETE = 499  # nginx's number for a response that was not sent completely; only metrics, logs and spans show it


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that has ended."""

    method: str
    path: str
    route: str
    status: int
    request_id: str
    began_ns: int  # since the epoch
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # by the names in TIMED_STAGES
    headers: Mapping[bytes, bytes] = field(default_factory=dict)  # the few that metrics, logs and spans read
