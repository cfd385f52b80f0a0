"""Divides the samples of a dataset among readers: first among ranks, then among the workers of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Share: TypeAlias = tuple[str, range]  # a shard, and the positions of some of its samples


def split(shares: Sequence[Share], index: int, readers: int) -> list[Share]:
    """Returns the part of `shares` that reader `index` of `readers` reads; each position is in exactly one part.

    Whole shares are dealt in turn where there is one for each reader:

    >>> split([("a.tar", range(4)), ("b.tar", range(2)), ("c.tar", range(4))], index=0, readers=2)
    [('a.tar', range(0, 4)), ('c.tar', range(0, 4))]

    Otherwise samples are dealt in turn, through all shares, so that the readers' numbers of samples differ by 1 at
    most. Every reader then has to read every shard:

    >>> split([("a.tar", range(4)), ("b.tar", range(2))], index=1, readers=4)
    [('a.tar', range(1, 4, 4)), ('b.tar', range(1, 2, 4))]
    """
    if len(shares) >= readers:
        return list(shares[index::readers])
    part, start = [], 0
    for shard, positions in shares:
        part.append((shard, positions[(index - start) % readers :: readers]))
        start += len(positions)
    return part


def total(shares: Sequence[Share]) -> int:
    """Returns the number of samples in `shares`."""
    return sum(len(positions) for _, positions in shares)
