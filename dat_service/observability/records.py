"""Defines the record of a request from which metrics, logs and spans are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

INCOMPLETE = 499  # nginx's status for a response that was not sent completely; only metrics, logs and spans use it


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The facts about one HTTP request that has ended."""

    method: str
    path: str
    route: str
    status: int
    request_id: str
    began_ns: int  # nanoseconds since the Unix epoch
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # the keys are the names in TIMED_STAGES
    headers: Mapping[bytes, bytes] = field(default_factory=dict)  # only those that metrics, logs and spans need
