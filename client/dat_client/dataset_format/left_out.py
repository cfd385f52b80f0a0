"""Counts what a reader leaves out, by reason, so that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Iterable

NAMED = 20  # names that are remembered of each reason

#: One reason, how many names have it, and the first of these names.
Row = tuple[str, int, tuple[str, ...]]


class LeftOut:
    """Counts names by the reason why they are left out, and remembers the first 20 names of each reason.

    >>> left_out = LeftOut()
    >>> left_out.add(".gif files are not read", "cat/1.gif")
    >>> left_out.rows
    (('.gif files are not read', 1, ('cat/1.gif',)),)
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.update(rows)

    def add(self, reason: str, name: str) -> None:
        """Counts one name."""
        self.update([(reason, 1, (name,))])

    def update(self, rows: Iterable[Row]) -> None:
        """Adds the rows of another count."""
        for reason, number, names in rows:
            count, first = self._rows.get(reason, (0, ()))
            if len(first) < NAMED:
                first = (*first, *names)[:NAMED]
            self._rows[reason] = (count + number, first)

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row for each reason, in the order in which the reasons first occurred."""
        return tuple((reason, count, names) for reason, (count, names) in self._rows.items())

    def lines(self) -> list[str]:
        """Returns one text for each reason, with the number of names and the first of them, one a line."""
        texts = []
        for reason, count, names in self.rows:
            more = [f"... and {count - len(names)} more"] if count > len(names) else []
            texts.append("\n  ".join([f"left out: {count}, since {reason}:", *names, *more]))
        return texts

    @property
    def total(self) -> int:
        """The number of names that were left out."""
        return sum(count for count, _ in self._rows.values())
