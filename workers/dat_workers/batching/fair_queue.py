"""Who is next: start-time fair queueing of rows between flows (Goyal, Vin and Cheng, SIGCOMM 1996).

Each flow (a client) has a tag, the virtual time at which its next row may start; taking rows moves it on by their
cost. The flow with the smallest tag is next. Virtual time goes on by what each of the waiting flows was due, and is
never behind who was served last: a flow that comes back from a pause has saved nothing up, and one that takes a
new name each time gains nothing. With n flows that always wait each gets 1/n of the codec, whatever the sizes and
numbers of their requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Entry(Generic[T]):
    """Rows that wait: `rows` not taken yet, each of `row_cost`; only rows of one `group` go together."""

    flow: str
    group: Hashable
    rows: int
    row_cost: float
    item: T
    arrived: float = 0.0


@dataclass
class _Flow(Generic[T]):
    tag: float
    entries: deque[Entry[T]] = field(default_factory=deque)

    @property
    def cost(self) -> float:
        return sum(e.rows * e.row_cost for e in self.entries)


class FairQueue(Generic[T]):
    """Not thread-safe: whoever holds it locks.

    >>> queue = FairQueue[str]()
    >>> for i in range(3): queue.push(Entry("flood", "g", 8, 1.0, f"flood {i}"))
    >>> queue.push(Entry("small", "g", 1, 1.0, "small"))
    >>> [queue.take("g", 8)[0].item for _ in range(3)]
    ['flood 0', 'small', 'flood 1']
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        self._now = 0.0

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter([entry for flow in self._flows.values() for entry in flow.entries])

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(entry.rows for entry in self)

    def push(self, entry: Entry[T]) -> None:
        """Puts an entry behind those of its flow."""
        flow = self._flows.setdefault(entry.flow, _Flow(self._now))
        if not flow.entries:
            flow.tag = max(flow.tag, self._now)
        flow.entries.append(entry)

    def head(self) -> Entry[T] | None:
        """The entry whose rows are next."""
        waiting = [flow for flow in self._flows.values() if flow.entries]
        return min(waiting, key=lambda flow: flow.tag).entries[0] if waiting else None

    def rows_of(self, group: Hashable) -> tuple[int, float]:
        """How many rows of a group wait, and when the first of them arrived (infinity where there is none)."""
        entries = [entry for entry in self if entry.group == group]
        return sum(e.rows for e in entries), min((e.arrived for e in entries), default=float("inf"))

    def take(self, group: Hashable, room: int) -> tuple[Entry[T], int] | None:
        """At most `room` rows of the group's next entry: the entry, and how many; None where none waits."""
        waiting = sorted((f for f in self._flows.values() if f.entries), key=lambda flow: flow.tag)
        for flow in waiting:
            entry = next((e for e in flow.entries if e.group == group), None)
            if entry is not None:
                count = min(room, entry.rows)
                entry.rows -= count
                cost = count * entry.row_cost
                self._now = max(self._now + cost / len(waiting), flow.tag)
                flow.tag += cost
                if not entry.rows:
                    flow.entries.remove(entry)
                self._forget()
                return entry, count
        return None

    def remove(self, entry: Entry[T]) -> None:
        """Takes an entry out, if it is still in."""
        flow = self._flows.get(entry.flow)
        if flow is not None and entry in flow.entries:
            flow.entries.remove(entry)
            self._forget()

    def cost_before(self, flow: str, cost: float) -> float:
        """What is computed before `cost` more of this flow would be: of each other flow no more than of it."""
        own = self._flows[flow].cost if flow in self._flows else 0.0
        others = (f.cost for name, f in self._flows.items() if name != flow)
        return own + sum(min(other, own + cost) for other in others)

    def _forget(self) -> None:
        """Drops flows without entries that a new flow of the same name would equal."""
        if not any(flow.entries for flow in self._flows.values()):
            self._flows.clear()  # nobody waits: nobody was put at a disadvantage
        else:
            self._flows = {n: f for n, f in self._flows.items() if f.entries or f.tag > self._now}
