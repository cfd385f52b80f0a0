"""Decides whose rows are next: start-time fair queueing between flows (Goyal, Vin and Cheng, SIGCOMM 1996).

Each flow (a client) has a tag, the virtual time at which its next row may start; taking rows moves it on by their
cost. The flow with the smallest tag is next. Virtual time goes on by what each of the waiting flows was due, and is
never behind the flow served last: a flow that comes back from a pause has no credit, and a client that takes a new
name each time gains nothing. With n flows that always wait, each gets 1/n of the codec, whatever the sizes
and numbers of their requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(eq=False)
class QueuedItem:
    """Rows that wait. `waiting` of them are not taken yet; only rows of one `group` may be taken together."""

    flow: str
    group: Hashable
    waiting: int
    row_cost: float
    arrived: float


T = TypeVar("T", bound=QueuedItem)


@dataclass
class _Flow(Generic[T]):
    tag: float
    items: deque[T] = field(default_factory=deque)

    @property
    def cost(self) -> float:
        return sum(item.waiting * item.row_cost for item in self.items)


class FairQueue(Generic[T]):
    """A queue of items, fair between their flows. Not thread-safe: its user must hold a lock.

    >>> queue = FairQueue[QueuedItem]()
    >>> for i in range(3): queue.push(QueuedItem("flood", "g", 8, 1.0, arrived=i))
    >>> queue.push(QueuedItem("small", "g", 1, 1.0, arrived=3))
    >>> [queue.take("g", 8)[0].flow for _ in range(3)]
    ['flood', 'small', 'flood']
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        self._virtual_time = 0.0

    def __iter__(self) -> Iterator[T]:
        return iter([item for flow in self._flows.values() for item in flow.items])

    @property
    def rows(self) -> int:
        """The number of rows that wait."""
        return sum(item.waiting for item in self)

    def push(self, item: T) -> None:
        """Puts an item behind those of its flow."""
        flow = self._flows.setdefault(item.flow, _Flow(self._virtual_time))
        if not flow.items:
            flow.tag = max(flow.tag, self._virtual_time)
        flow.items.append(item)

    def head(self) -> T | None:
        """Returns the item whose rows are next."""
        return next((flow.items[0] for flow in self._waiting_flows()), None)

    def rows_of(self, group: Hashable) -> tuple[int, float]:
        """Returns how many rows of a group wait, and when the first of them arrived (infinity if none waits)."""
        items = [item for item in self if item.group == group]
        return sum(item.waiting for item in items), min((item.arrived for item in items), default=float("inf"))

    def take(self, group: Hashable, room: int) -> tuple[T, int] | None:
        """Takes at most `room` rows of the group's next item; returns the item and the number, or None."""
        flows = self._waiting_flows()
        for flow in flows:
            item = next((item for item in flow.items if item.group == group), None)
            if item is not None:
                count = min(room, item.waiting)
                item.waiting -= count
                cost = count * item.row_cost
                self._virtual_time = max(self._virtual_time + cost / len(flows), flow.tag)
                flow.tag += cost
                if not item.waiting:
                    flow.items.remove(item)
                self._forget_flows()
                return item, count
        return None

    def remove(self, item: T) -> None:
        """Takes an item out, if it is still in."""
        flow = self._flows.get(item.flow)
        if flow is not None and item in flow.items:
            flow.items.remove(item)
            self._forget_flows()

    def cost_before(self, flow: str, cost: float) -> float:
        """Returns the cost of the rows that are served before a new request of `cost` in this flow.

        In that time each other flow is served at most as much as this flow.
        """
        own = self._flows[flow].cost if flow in self._flows else 0.0
        return own + sum(min(f.cost, own + cost) for name, f in self._flows.items() if name != flow)

    def _waiting_flows(self) -> list[_Flow[T]]:
        """Returns the flows that have items, in the order of their turns."""
        return sorted((flow for flow in self._flows.values() if flow.items), key=lambda flow: flow.tag)

    def _forget_flows(self) -> None:
        """Drops empty flows that do not differ from a new flow of the same name."""
        if not any(flow.items for flow in self._flows.values()):
            self._flows.clear()  # nothing waits, so no flow was served at another one's expense
        else:
            self._flows = {n: f for n, f in self._flows.items() if f.items or f.tag > self._virtual_time}
