"""The webdataset pipeline that `load` returns: it knows its length as long as its stages keep it."""

from __future__ import annotations

import sys
from typing import Any

import webdataset as wds
from webdataset import filters

# The stages that yield one item for each item, unless a handler passes over errors or a function returns None.
KEEP_THE_NUMBER = tuple(stage.f for stage in (filters.map, filters.map_tuple, filters.shuffle))


class Pipeline(wds.FluidWrapper):  # type: ignore[misc]
    """A `webdataset.FluidWrapper` around samples whose number is known.

    >>> len(load("train-q").map(augment).repeat(2))            # doctest: +SKIP
    2562334
    """

    def __len__(self) -> int:
        """Returns the number of items that an epoch of this rank has, in all its DataLoader workers together.

        Raises TypeError where the number is not known: after `.repeat()` without a number, after `.with_epoch(n)`,
        which counts for each worker, and after stages such as `.select` or `.batched`. `.with_length(n)` sets one.
        """
        samples, *stages = self.pipeline
        if self.nsamples > 0 or self.repetitions == sys.maxsize:
            raise TypeError("the pipeline repeats its samples: its length is not known; set it by .with_length(n)")
        for stage in stages:
            if not keeps_the_number(stage):
                raise TypeError(f"the length after {stage} is not known; set it by .with_length(n)")
        return len(samples) * int(self.repetitions)

    def __bool__(self) -> bool:
        """Returns True. Without this method `if data` would ask for the length."""
        return True


def keeps_the_number(stage: Any) -> bool:
    """Returns whether a stage of a pipeline yields as many items as it gets."""
    handler = getattr(stage, "kw", {}).get("handler", filters.reraise_exception)
    return getattr(stage, "f", None) in KEEP_THE_NUMBER and handler is filters.reraise_exception
