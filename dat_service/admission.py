"""Fair shares of a limited capacity: no holder may take more than what is free beside it."""

from __future__ import annotations


class FairShares:
    """Divides a capacity by dynamic thresholds (Choudhury and Hahne, 1998): each holder's limit is what is free.

    So a single flood gets half of the capacity, two floods get a third each, and some capacity is always left for a
    newcomer. A holder that holds nothing yet may take everything that is free.

    >>> slots = FairShares(4)
    >>> [slots.take("flood", 1) for _ in range(4)]
    [True, True, False, False]
    >>> slots.take("newcomer", 1)
    True
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._holders: dict[str, int] = {}

    def take(self, holder: str, amount: int) -> bool:
        """Takes `amount` more for the holder and returns True, or takes nothing and returns False."""
        own, free = self._holders.get(holder, 0), self.capacity - self.held
        if amount > free or (own and own + amount > free):
            return False
        self._add(holder, amount)
        return True

    def change(self, holder: str, old: int, new: int) -> bool:
        """Replaces `old`, taken before, by `new` if `take` would allow `new` afterwards; else changes nothing."""
        self._add(holder, -old)
        if self.take(holder, new):
            return True
        self._add(holder, old)
        return False

    def give(self, holder: str, amount: int) -> None:
        """Gives back `amount` that was taken."""
        self._add(holder, -amount)

    def _add(self, holder: str, amount: int) -> None:
        self.held += amount
        self._holders[holder] = self._holders.get(holder, 0) + amount
        if not self._holders[holder]:
            del self._holders[holder]
