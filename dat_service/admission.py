"""Divides a limited capacity into fair shares, so that no holder can take all of it from the others."""

from __future__ import annotations


class FairShares:
    """Divides a capacity by dynamic thresholds (Choudhury and Hahne, 1998).

    A holder that holds nothing yet may take everything that is free. Any other holder may take more only if its new
    total is at most the capacity that is free before. So one holder that floods the service gets half of the
    capacity, two such holders get a third each, and some capacity is always left for a newcomer.

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

    def fits(self, holder: str, amount: int) -> bool:
        """Returns True if the holder may take `amount` now."""
        own, free = self._holders.get(holder, 0), self.capacity - self.held
        return amount <= free and (not own or own + amount <= free)

    def take(self, holder: str, amount: int) -> bool:
        """Takes `amount` for the holder and returns True; if it is too much, takes nothing and returns False."""
        if not self.fits(holder, amount):
            return False
        self._add(holder, amount)
        return True

    def change(self, holder: str, old: int, new: int) -> bool:
        """Replaces an amount `old` that the holder took by `new`, under the rules of `take`.

        Returns True if it was replaced, or False, with `old` still taken, if `new` is not allowed.
        """
        self._add(holder, -old)
        if self.take(holder, new):
            return True
        self._add(holder, old)
        return False

    def give(self, holder: str, amount: int) -> None:
        """Returns `amount` of what the holder took to the free capacity."""
        self._add(holder, -amount)

    def _add(self, holder: str, amount: int) -> None:
        self.held += amount
        self._holders[holder] = self._holders.get(holder, 0) + amount
        if not self._holders[holder]:
            del self._holders[holder]
