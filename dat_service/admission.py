"""What holders share of a capacity: none may hold more than is still free beside it."""

from __future__ import annotations


class Shares:
    """Dynamic thresholds (Choudhury and Hahne, 1998): a holder's limit is what nobody holds yet.

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
        self._holders: dict[str, int] = {}

    def take(self, holder: str, amount: int) -> bool:
        """Holds `amount` more for the holder, or says False and holds nothing."""
        own, free = self._holders.get(holder, 0), self.capacity - self.held
        if amount > free or (own and own + amount > free):
            return False
        self._hold(holder, amount)
        return True

    def change(self, holder: str, old: int, new: int) -> bool:
        """Holds `new` instead of `old` that was taken, judged as if it were taken anew; or leaves all as it is."""
        self.give(holder, old)
        if self.take(holder, new):
            return True
        self._hold(holder, old)
        return False

    def _hold(self, holder: str, amount: int) -> None:
        self.held += amount
        self._holders[holder] = self._holders.get(holder, 0) + amount

    def give(self, holder: str, amount: int) -> None:
        """Lets go of `amount` that was taken."""
        self.held -= amount
        left = self._holders.get(holder, 0) - amount
        if left:
            self._holders[holder] = left
        else:
            self._holders.pop(holder, None)
