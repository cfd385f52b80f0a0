"""Declares the interface through which a Client reaches its codec: Transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

from dat_client.calls.core import Call, Exchange

#: The requests besides inference. OIP v2 calls them "server live", "model ready" and so on.
Question: TypeAlias = Literal["live", "ready", "metadata", "server_metadata"]


class Transport(Protocol):
    """Sends calls to one codec of one service and returns the answers.

    Threads share a transport. It need not survive a fork, because the client closes it in the child and makes a new
    transport there. Deadlines are times of time.monotonic(). Methods raise the exceptions of dat_client.errors;
    after Unavailable the attempt may be repeated.
    """

    def address(self, target: Question | Literal["infer"]) -> str:
        """Returns the address to which a question or an inference is sent, as error messages show it."""

    def prepare(self, call: Call) -> Callable[[float, int], Exchange]:
        """Encodes the call once and returns `attempt(deadline, number)`, which sends it and returns its answer."""

    def ask(self, question: Question, deadline: float, number: int = 1) -> dict[str, Any]:
        """Sends a question once and returns its answer. `number` counts the attempts of this question from 1."""

    def close(self) -> None:
        """Closes idle connections now, and each connection in use as soon as its request ends."""
