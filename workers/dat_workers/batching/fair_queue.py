"""Decides which flow's rows are next: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Each flow (a client) has a tag: the virtual time at which its next row may start. Taking rows increases the tag by
their cost. The flow with the smallest tag is next. When rows are taken, virtual time advances by their cost divided
by the number of waiting flows, and it is never behind the tag of the flow served last. A flow that returns after a
pause therefore has no credit, and a client gains nothing by using a new name each time. If n flows always have rows
waiting, each gets 1/n of the codec, whatever the sizes and numbers of their requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(eq=False)
class QueuedItem:
    """Rows in the queue. `waiting` counts those not taken yet; only rows of the same `group` share a batch."""

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
    """A queue of items that serves their flows fairly. It is not thread-safe: the caller must hold a lock.

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
        """Adds an item behind the other items of its flow."""
        flow = self._flows.setdefault(item.flow, _Flow(self._virtual_time))
        if not flow.items:
            flow.tag = max(flow.tag, self._virtual_time)
        flow.items.append(item)

    def head(self) -> T | None:
        """Returns the item whose rows are next, or None if the queue is empty."""
        return next((flow.items[0] for flow in self._waiting_flows()), None)

    def rows_of(self, group: Hashable) -> tuple[int, float]:
        """Returns how many rows of a group wait, and when the first of them arrived (infinity if none waits)."""
        items = [item for item in self if item.group == group]
        return sum(item.waiting for item in items), min((item.arrived for item in items), default=float("inf"))

    def take(self, group: Hashable, room: int) -> tuple[T, int] | None:
        """Takes at most `room` rows of the group's next item.

        Returns the item and the number of rows taken, or None if no rows of the group wait.
        """
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
        """Removes an item; does nothing if it is not in the queue."""
        flow = self._flows.get(item.flow)
        if flow is not None and item in flow.items:
            flow.items.remove(item)
            self._forget_flows()

    def cost_before(self, flow: str, cost: float) -> float:
        """Returns the cost of the rows that will be served before a new request of `cost` in this flow.

        It assumes that meanwhile every other flow is served at most as much as this flow.
        """
        own = self._flows[flow].cost if flow in self._flows else 0.0
        return own + sum(min(f.cost, own + cost) for name, f in self._flows.items() if name != flow)

    def _waiting_flows(self) -> list[_Flow[T]]:
        """Returns the flows that have items, in the order of their turns."""
        return sorted((flow for flow in self._flows.values() if flow.items), key=lambda flow: flow.tag)

    def _forget_flows(self) -> None:
        """Drops empty flows that do not differ from a new flow of the same name."""
        if not any(flow.items for flow in self._flows.values()):
            self._flows.clear()  # nothing waits, so no flow has been served more than its share
        else:
            self._flows = {n: f for n, f in self._flows.items() if f.items or f.tag > self._virtual_time}
