"""What flows share of a capacity: none may hold more than is still free beside it."""

from __future__ import annotations


class Shares:
    """Dynamic thresholds (Choudhury and Hahne, 1998): a flow's limit is what nobody holds yet.

    One flood alone gets half, two a third each, and there is always room left for somebody new. Whoever holds
    nothing yet may take whatever is free.

    >>> places = Shares(4)
    >>> [places.take("flood", 1) for _ in range(4)]
    [True, True, False, False]
    >>> places.take("small", 1)
    True
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._flows: dict[str, int] = {}

    def take(self, flow: str, amount: int) -> bool:
        """Holds `amount` more for the flow, or says False and holds nothing."""
        own, free = self._flows.get(flow, 0), self.capacity - self.held
        if amount > free or (own and own + amount > free):
            return False
        self._hold(flow, amount)
        return True

    def change(self, flow: str, old: int, new: int) -> bool:
        """Holds `new` instead of `old` that was taken, judged as if it were taken anew; or leaves all as it is."""
        self.give(flow, old)
        if self.take(flow, new):
            return True
        self._hold(flow, old)
        return False

    def _hold(self, flow: str, amount: int) -> None:
        self.held += amount
        self._flows[flow] = self._flows.get(flow, 0) + amount

    def give(self, flow: str, amount: int) -> None:
        """Lets go of `amount` that was taken."""
        self.held -= amount
        left = self._flows.get(flow, 0) - amount
        if left:
            self._flows[flow] = left
        else:
            self._flows.pop(flow, None)
