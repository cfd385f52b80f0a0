"""Declares the transport of a Client: the way in which its calls reach a codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

from dat_client.calls.core import Call, Exchange

#: What can be asked beside inference. OIP v2 names the questions "server live", "model ready" and so on.
Question: TypeAlias = Literal["live", "ready", "metadata", "server_metadata"]


class Transport(Protocol):
    """Carries calls to one codec of one service, and carries the answers back.

    A transport is thread-safe. It need not survive a fork: the client closes it in the child and makes a new one.
    Deadlines are times of time.monotonic(). Methods raise the exceptions of dat_client.errors; Unavailable means
    that the attempt may be repeated.
    """

    def address(self, target: Question | Literal["infer"]) -> str:
        """Returns where a question or an inference goes, for messages."""

    def prepare(self, call: Call) -> Callable[[float, int], Exchange]:
        """Encodes the call once and returns `attempt(deadline, number)`, which sends it and returns its answer."""

    def ask(self, question: Question, deadline: float, number: int = 1) -> dict[str, Any]:
        """Returns the answer to a question, asked for the `number`-th time."""

    def close(self) -> None:
        """Closes what is idle now, and what is in use when its request ends."""
